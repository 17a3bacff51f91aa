"""The database behind a ledger: how it is opened, locked, sealed and closed, and what its errors mean."""

from __future__ import annotations

import os
import sqlite3
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from ..errors import LedgerError
from .ledger_file import FORMAT, SCHEMA, VERSION, foreign, found_or_created, identity
from .ledger_seal import break_seal, intact, write_seal


class Store:
    """One connection of one process. Every use is inside :meth:`guarded`; every read or write of more than one row is
    inside one :meth:`transaction`."""

    def __init__(self, path: Path | None, *, may_create: bool = True) -> None:
        self.path = path
        self.where = ":memory:" if path is None else str(path)
        self._lock = threading.RLock()
        self._pid = os.getpid()
        self._file: tuple[int, int] | None = None
        if path is None:
            self.connection = sqlite3.connect(":memory:", isolation_level=None, check_same_thread=False)
            self.connection.executescript(SCHEMA)
            return
        self._file = found_or_created(path, may_create=may_create)
        with self.guarded():
            self.connection = sqlite3.connect(
                path.as_uri() + "?mode=rw", uri=True, timeout=60, isolation_level=None, check_same_thread=False
            )
        try:
            self._recognise(path)
        except BaseException:
            self.connection.close()
            raise

    def _recognise(self, path: Path) -> None:
        with self.guarded():
            # FULL syncs the write-ahead log at every commit; fullfsync makes macOS flush the drive's cache too.
            self.connection.executescript("PRAGMA synchronous=FULL; PRAGMA fullfsync=1;")
            tables = {name for (name,) in self.execute("SELECT name FROM sqlite_master")}
            meta = dict(self.execute("SELECT key, value FROM meta")) if "meta" in tables else {}
        if meta.get("format") != FORMAT:
            raise foreign(path)
        if meta.get("schema") != VERSION:
            raise LedgerError(
                f"{self.where} has ledger schema {meta.get('schema')!r}; this release knows {VERSION!r}.",
                found=meta.get("schema"),
                where=self.where,
                fix="use the Sfumato release that wrote it, or a newer one.",
            )

    def execute(self, statement: str, values: tuple[Any, ...] = ()) -> sqlite3.Cursor:
        """Run one statement."""
        return self.connection.execute(statement, values)

    def check(self) -> None:
        """Inside a transaction: SQLite finds its structure sound, and no byte changed since the file was closed."""
        (state,) = self.execute("PRAGMA integrity_check(1)").fetchone()
        if state != "ok":
            raise self.damaged(f"the database is damaged ({state})", state)
        if self.path is not None and not intact(self.path, self.connection):
            raise self.damaged("the file was changed after it was closed", str(self.path))

    def about_to_change(self) -> None:
        """Inside the transaction that will change the file."""
        if self.path is not None:
            break_seal(self.path)

    def close(self, *, seal: bool) -> None:
        """Close, and seal if nobody else is writing; harmless when repeated and in a forked child."""
        if os.getpid() != self._pid:
            return
        with self._lock:
            # A seal that cannot be written (a full disk, others at work) leaves the chain to be checked.
            with suppress(sqlite3.Error, OSError, LedgerError):
                if seal and self.path is not None and identity(self.path) == self._file:
                    self.execute("PRAGMA busy_timeout=2000")
                    self.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()
                    with self.transaction():
                        write_seal(self.path, self.connection)
            self.connection.close()

    def damaged(self, what: str, found: object) -> LedgerError:
        """The error for a ledger that cannot be trusted."""
        return LedgerError(
            f"ledger {self.where}: {what}; what was spent is no longer certain.",
            found=found,
            where=self.where,
            fix="restore the latest backup and add what was released since; do not train on a damaged ledger.",
        )

    @contextmanager
    def transaction(self, kind: str = "IMMEDIATE") -> Iterator[None]:
        """All or nothing; "DEFERRED" suffices to read one consistent state."""
        # IMMEDIATE takes the write lock before the last entry is read, so two processes cannot extend the same one.
        try:
            self.execute(f"BEGIN {kind}")
            yield
            self.execute("COMMIT")
        except BaseException:
            if self.connection.in_transaction:
                self.execute("ROLLBACK")
            raise

    @contextmanager
    def guarded(self) -> Iterator[None]:
        """This process, one thread at a time, and the same file as ever; SQLite's errors as ``LedgerError``."""
        if os.getpid() != self._pid:
            raise LedgerError(
                f"ledger {self.where} was opened in another process; a forked child must not share its connection.",
                found=os.getpid(),
                where=self.where,
                fix="open it again in this process: Ledger(path).",
            )
        with self._lock:
            if self.path is not None and identity(self.path) != self._file:
                raise self.damaged("the file was deleted or replaced while in use", None)
            try:
                yield
            except (sqlite3.Error, OverflowError, UnicodeError, OSError) as error:
                if self.path is not None and getattr(error, "sqlite_errorcode", None) == sqlite3.SQLITE_NOTADB:
                    raise foreign(self.path) from error
                raise LedgerError(
                    f"ledger {self.where}: {error}; nothing was recorded.",
                    found=str(error),
                    where=self.where,
                    fix="check that the ledger is open, intact and writable, and that the disk has room.",
                ) from error
