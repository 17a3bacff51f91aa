"""The database behind a ledger: how it is opened, locked, sealed and closed, and what its errors mean."""

from __future__ import annotations

import ctypes
import os
import sqlite3
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Any

from ..errors import LedgerError
from .ledger_file import FORMAT, SCHEMA, VERSION, foreign, found_or_created, identity, side_files
from .ledger_seal import break_seal, intact, seal_of, write_seal


class Store:
    """One connection of one process. Every use is inside :meth:`guarded`; every read or write of more than one row is
    inside one :meth:`transaction`."""

    def __init__(self, path: Path | None, *, may_create: bool = True) -> None:
        self.path = path
        self.where = ":memory:" if path is None else str(path)
        self._lock = threading.RLock()
        self._pid = os.getpid()
        self._file: tuple[int, int] | None = None
        self._beside: list[tuple[int, int] | None] = []
        self._busy = self._closed = False
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
            # While a connection is open nobody may remove these; SQLite goes on writing to a file without a name.
            self._beside = side_files(path)
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
        """Inside the transaction that will change the file, before it does."""
        if self.path is not None:
            # The next seal must not bless an edit made since this ledger was opened. A new connection, as pages that
            # this one holds in memory are not read again.
            if os.path.lexists(seal_of(self.path)):
                with closing(sqlite3.connect(self.path.as_uri() + "?mode=ro", uri=True)) as fresh:
                    if not intact(self.path, fresh):
                        raise self.damaged("the file was changed after it was closed", str(self.path))
            break_seal(self.path)

    def close(self, *, seal: bool) -> None:
        """Close, and seal if nobody else is writing; harmless when repeated and in a forked child."""
        if os.getpid() != self._pid:
            return
        with self._alone():
            # A seal that cannot be written (a full disk, others at work) leaves the chain to be checked.
            with suppress(sqlite3.Error, OSError, LedgerError):
                if seal and self.path is not None and identity(self.path) == self._file and self._holds():
                    self.execute("PRAGMA busy_timeout=2000")
                    self.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()
                    with self.transaction():
                        if self.execute("SELECT 1 FROM entries LIMIT 1").fetchone():
                            write_seal(self.path, self.connection)
            if self._beside and not self._closed and not self._holds():
                # Closing would copy a log that is no longer the ledger's over what others wrote since: the connection
                # is kept until the process ends.
                ctypes.pythonapi.Py_IncRef(ctypes.py_object(self.connection))
            else:
                self.connection.close()
            self._closed = True

    def damaged(self, what: str, found: object) -> LedgerError:
        """The error for a ledger that cannot be trusted."""
        return LedgerError(
            f"ledger {self.where}: {what}; what was spent is no longer certain.",
            found=found,
            where=self.where,
            fix="restore the latest backup and add what was released since; do not train on a damaged ledger.",
        )

    def _holds(self) -> bool:
        """Whether the write-ahead log and its index are the files that this connection writes to."""
        return self.path is None or side_files(self.path) == self._beside

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """One thread at a time, and no signal handler inside what it interrupted."""
        with self._lock:
            if self._busy:
                raise LedgerError(
                    f"ledger {self.where} is in use by the code that was interrupted for this (a signal handler?); "
                    "nothing was read or recorded.",
                    found=None,
                    where=self.where,
                    fix="set a flag in the handler, and use the ledger after the step.",
                )
            try:
                self._busy = True
                yield
            finally:
                self._busy = False

    @contextmanager
    def transaction(self, kind: str = "IMMEDIATE") -> Iterator[None]:
        """All or nothing; "DEFERRED" suffices to read one consistent state."""
        # IMMEDIATE takes the write lock before the last entry is read, so two processes cannot extend the same one.
        lost = "the write-ahead log was removed or replaced while in use"
        try:
            self.execute(f"BEGIN {kind}")
            if not self._holds():
                raise self.damaged(lost, None)
            yield
            self.execute("COMMIT")
            if not self._holds():  # what was just committed may be in no file that has a name
                raise self.damaged(lost, None)
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
        with self._alone():
            if self.path is not None and identity(self.path) != self._file:
                raise self.damaged("the file was deleted or replaced while in use", None)
            try:
                yield
            except (sqlite3.Error, OverflowError, UnicodeError, OSError, MemoryError) as error:
                if self.path is not None and getattr(error, "sqlite_errorcode", None) == sqlite3.SQLITE_NOTADB:
                    raise foreign(self.path) from error
                raise LedgerError(
                    f"ledger {self.where}: {error or 'out of memory'}; nothing was recorded.",
                    found=str(error),
                    where=self.where,
                    fix="check that the ledger is open and intact, its folder writable, and that the disk has room.",
                ) from error
