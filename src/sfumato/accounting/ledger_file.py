"""The file behind a ledger: its schema, how it comes into being, and how it is recognised."""

from __future__ import annotations

import os
import re
import sqlite3
import stat
import tempfile
from contextlib import suppress
from pathlib import Path

from ..errors import LedgerError
from .ledger_seal import seal_of, sync_folder

FORMAT = "sfumato-ledger"
VERSION = "2"
GENESIS = "0" * 64
# Record numbers are kept once for each distinct set; entries name them by their hash, so the chain covers them.
SCHEMA = f"""
    PRAGMA journal_mode=WAL;
    BEGIN;
    CREATE TABLE meta (key TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;
    CREATE TABLE scopes (digest TEXT PRIMARY KEY, records TEXT NOT NULL) WITHOUT ROWID;
    CREATE TABLE entries (seq INTEGER PRIMARY KEY, run TEXT NOT NULL, step INTEGER NOT NULL, "group" TEXT, dataset TEXT,
                          records TEXT, note TEXT NOT NULL, event TEXT NOT NULL, count INTEGER NOT NULL,
                          reservation INTEGER, hash TEXT NOT NULL);
    INSERT INTO meta VALUES ('format', '{FORMAT}'), ('schema', '{VERSION}'), ('head', '{GENESIS}'),
                            ('salt', lower(hex(randomblob(32))));
    COMMIT;
"""


def foreign(path: Path) -> LedgerError:
    """The error for a file that is something else."""
    return LedgerError(
        f"{path} is not a Sfumato ledger.", found=str(path), where=str(path), fix="name another file, or a new one."
    )


def identity(path: Path) -> tuple[int, int] | None:
    """Device and inode of the regular file at ``path``, or None if there is none; anything else is refused."""
    try:
        status = os.lstat(path)
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise LedgerError(f"ledger {path} cannot be opened: {error}.", found=str(path), where=str(path)) from error
    # An empty file is refused as well: a ledger that was truncated must not pass for a new one.
    if not stat.S_ISREG(status.st_mode) or status.st_size == 0:
        raise foreign(path)
    if status.st_nlink > 1 and not _draft_removed(path, status):
        raise LedgerError(
            f"ledger {path} has another name (a hard link): under it, others would not see what is written here.",
            found=status.st_nlink,
            where=str(path),
            fix="remove the other name; to keep a backup, copy the file of a closed ledger.",
        )
    return status.st_dev, status.st_ino


def side_files(path: Path) -> list[tuple[int, int] | None]:
    """Device and inode of the write-ahead log and of its index, None for one that is not there."""
    found: list[tuple[int, int] | None] = []
    for suffix in ("-wal", "-shm"):
        try:
            status = os.lstat(f"{path}{suffix}")
        except FileNotFoundError:
            found.append(None)
        else:
            found.append((status.st_dev, status.st_ino))
    return found


def _draft_removed(path: Path, status: os.stat_result) -> bool:
    """Whether the other name was the draft of :func:`create`, which another process is removing or was killed over."""
    for other in os.listdir(path.parent):
        if re.fullmatch(re.escape(f".{path.name}.") + r"[a-z0-9_]{8}", other):
            draft = path.with_name(other)
            with suppress(FileNotFoundError):
                if os.path.samestat(os.lstat(draft), status):
                    os.unlink(draft)
    return os.lstat(path).st_nlink == 1


def found_or_created(path: Path, *, may_create: bool) -> tuple[int, int]:
    """Identity of the ledger file at ``path``, made if there is none and nothing says that there was one."""
    sealed = os.path.lexists(seal_of(path)) if b"\0" not in os.fsencode(path) else False
    # In this order: a seal is written only where a ledger is, so a seal seen first and no ledger after it is a loss.
    there = identity(path)
    if there is None and (sealed or not may_create):
        raise LedgerError(
            f"ledger {path} is gone, but {'its seal is there' if sealed else 'one was there'}: what it recorded would "
            "be forgotten.",
            found=None,
            where=str(path),
            fix="restore the ledger; if its records are used no more, delete its seal.",
        )
    return there or create(path)


def create(path: Path) -> tuple[int, int]:
    """Put a complete, empty ledger at ``path`` in one atomic step; when two processes race, both open the winner's."""
    try:
        handle, draft = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)  # mode 0600
        os.close(handle)
        try:
            connection = sqlite3.connect(draft, isolation_level=None)
            connection.executescript(SCHEMA)
            connection.close()
            with suppress(FileExistsError):
                os.link(draft, path)
        finally:
            with suppress(FileNotFoundError):  # whoever opened it meanwhile has removed this name
                os.unlink(draft)
        sync_folder(path)  # the file's name must be as durable as its entries
    except (OSError, sqlite3.Error) as error:
        raise LedgerError(
            f"ledger {path} cannot be created: {error}.",
            found=str(path),
            where=str(path),
            fix="create the folder first, on a local disk, and make it writable.",
        ) from error
    created = identity(path)
    if created is None:
        raise LedgerError(f"ledger {path} was deleted while it was created.", found=str(path), where=str(path))
    return created
