"""The seal of a closed ledger: a hash of the whole file beside it, so that no byte of it can change unnoticed.

The chain covers what entries say; the seal also covers the bytes that SQLite never looks at. Every function here is
called while the caller holds SQLite's write lock, and every append breaks the seal before it commits. So a seal that is
there belongs to the file as it is, and a crash can only leave none.
"""

from __future__ import annotations

import hashlib
import json
import os
import sqlite3
import stat
from contextlib import suppress
from pathlib import Path


def seal_of(path: Path) -> Path:
    """Where the seal of the ledger at ``path`` lies."""
    return path.with_name(path.name + ".seal")


def sync_folder(path: Path) -> None:
    """Make the names in the folder of ``path`` durable."""
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def write_seal(path: Path, connection: sqlite3.Connection) -> None:
    """Seal the ledger, unless it is sealed or part of it is still in the write-ahead log."""
    seal, log = seal_of(path), path.with_name(path.name + "-wal")
    # What was sealed and not appended to since stays as it was sealed: hashing it anew would bless an edit.
    if os.path.lexists(seal) or (log.exists() and log.stat().st_size):
        return
    draft = path.with_name(path.name + ".seal.new")
    with suppress(FileNotFoundError):
        draft.unlink()
    handle = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(_expected(path, connection))
            file.flush()
            os.fsync(handle)
        os.replace(draft, seal)
    except OSError:
        with suppress(OSError):
            draft.unlink()
        raise
    sync_folder(path)


def intact(path: Path, connection: sqlite3.Connection) -> bool:
    """Whether there is no seal, or one that fits the file byte by byte."""
    try:
        handle = os.open(seal_of(path), os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except FileNotFoundError:
        return True
    except OSError:  # a link
        return False
    with os.fdopen(handle, "rb") as file:
        return stat.S_ISREG(os.fstat(handle).st_mode) and file.read(4096) == _expected(path, connection)


def break_seal(path: Path) -> None:
    """Remove the seal, durably, before the file changes; nothing to do after the first append."""
    try:
        os.unlink(seal_of(path))
    except FileNotFoundError:
        return
    sync_folder(path)


def _expected(path: Path, connection: sqlite3.Connection) -> bytes:
    # Through SQLite: closing a file handle of our own would drop the locks of every connection of this process.
    content = connection.serialize()
    size = path.stat().st_size  # what lies beyond the last page is no part of the database
    facts = {"seal": 1, "size": size, "sha256": hashlib.sha256(content).hexdigest()}
    return (json.dumps(facts, sort_keys=True) + "\n").encode()
