"""The durable record of every release: written before the release, never changed afterwards."""

from __future__ import annotations

import hashlib
import json
import os
import sqlite3
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

from ..errors import ConfigurationError, LedgerError
from .events import Event
from .ledger_file import FORMAT, GENESIS, SCHEMA, VERSION, create, foreign, identity
from .pld import Epsilon, compose

_FIELDS = ("seq", "run", "step", "group", "note", "event")
_COLUMNS = 'seq, run, step, "group", note, event'


def _canonical(data: object) -> str:
    return json.dumps(data, sort_keys=True, separators=(",", ":"), allow_nan=False)


def _chained(previous: str, fields: tuple[object, ...]) -> str:
    return hashlib.sha256((previous + _canonical(dict(zip(_FIELDS, fields, strict=True)))).encode()).hexdigest()


class Ledger:
    """An append-only, hash-chained list of events in one SQLite file, or in memory when ``path`` is None.

    Guarantee: once :meth:`append` returns, the entry survives a crash of the process, of the machine, and of any
    other process that shares the file; an append that is cut short leaves no trace or a complete entry. Appending
    before releasing therefore never undercounts. Usable from every thread; in a forked child it must be opened anew.
    The chain finds damage and edits, not a forger who rewrites all of it or restores an old copy: keep :attr:`head`
    elsewhere (a checkpoint) to find those. The file belongs on a local disk (SQLite WAL) and has mode 0600.
    Raises ``LedgerError`` if the folder is missing or the file is not an intact ledger of a known version.
    """

    def __init__(self, path: str | os.PathLike[str] | None = None) -> None:
        self.path = None if path is None else Path(path).absolute()
        self._where = ":memory:" if self.path is None else str(self.path)
        self._lock = threading.RLock()
        self._pid = os.getpid()
        # The last entry this object has seen, and the counts up to it: entries never change, so only new ones are read.
        self._seen, self._head = 0, GENESIS
        self._counts: Counter[tuple[str | None, Event]] = Counter()
        self._file: tuple[int, int] | None = None
        if self.path is None:
            self._connection = sqlite3.connect(":memory:", isolation_level=None, check_same_thread=False)
            self._connection.executescript(SCHEMA)
            return
        self._file = identity(self.path) or create(self.path)
        with self._guarded():
            self._connection = sqlite3.connect(
                self.path.as_uri() + "?mode=rw", uri=True, timeout=60, isolation_level=None, check_same_thread=False
            )
        try:
            with self._guarded():
                # FULL syncs the write-ahead log at every commit; fullfsync makes macOS flush the drive's cache too.
                self._connection.executescript("PRAGMA synchronous=FULL; PRAGMA fullfsync=1;")
                tables = {name for (name,) in self._connection.execute("SELECT name FROM sqlite_master")}
                meta = dict(self._connection.execute("SELECT key, value FROM meta")) if "meta" in tables else {}
            if meta.get("format") != FORMAT:
                raise foreign(self.path)
            if meta.get("schema") != VERSION:
                raise LedgerError(
                    f"{self._where} has ledger schema {meta.get('schema')!r}; this release knows {VERSION!r}.",
                    found=meta.get("schema"),
                    where=self._where,
                    fix="use the Sfumato release that wrote it, or a newer one.",
                )
        except BaseException:
            self._connection.close()
            raise

    def append(self, event: Event, *, run: str, step: int, group: str | None = None, note: str = "") -> int:
        """Write one entry durably and return its number (1, 2, …). Processes that share the file take turns.

        Raises ``ConfigurationError`` for a bad argument and ``LedgerError`` if the entry could not be made durable, or
        protects another unit than those before it; nothing was written then, and nothing may be released.
        """
        if not isinstance(event, Event) or isinstance(step, bool) or not isinstance(step, int):
            raise ConfigurationError(f"append needs an Event and an integer step, got {event!r} and {step!r}.")
        if not all(isinstance(text, str) for text in (run, note)) or not isinstance(group, str | None):
            raise ConfigurationError("run and note must be strings, and group a string or None.")
        # A round trip repeats the event's own checks (NaN, negative sigma) and proves that it can be read back.
        Event.from_json(event.to_json())
        with self._guarded(), self._transaction():
            last, previous = self._last()
            self._refuse_mixed(event)
            fields = (last + 1, run, step, group, note, _canonical(event.to_json()))
            head = _chained(previous, fields)
            self._connection.execute("INSERT INTO entries VALUES (?, ?, ?, ?, ?, ?, ?)", (*fields, head))
            self._connection.execute("UPDATE meta SET value = ? WHERE key = 'head'", (head,))
        return last + 1

    def events(self, group: str | None = None) -> dict[Event, int]:
        """Return {event: how often}: of all entries, or of those that concern the privacy group ``group``.

        An entry written without a group may have touched anyone, so it counts in every group.
        """
        with self._guarded():
            rows = self._connection.execute(
                'SELECT seq, "group", event, hash FROM entries WHERE seq > ? ORDER BY seq', (self._seen,)
            )
            for seq, name, event, head in rows.fetchall():
                self._counts[name, self._parsed(seq, event)] += 1
                self._seen, self._head = seq, head
            total: Counter[Event] = Counter()
            for (name, parsed), count in self._counts.items():
                if group is None or name in (None, group):
                    total[parsed] += count
            return dict(total)

    def epsilon(self, *, delta: float, group: str | None = None) -> Epsilon:
        """Return the certified epsilon at ``delta`` of everything recorded (for ``group``)."""
        return compose(self.events(group), delta=delta)

    def entries(self) -> list[dict[str, Any]]:
        """Return every entry, oldest first: seq, run, step, group, note, event (a dict) and hash."""
        with self._guarded():
            rows = self._connection.execute(f"SELECT {_COLUMNS}, hash FROM entries ORDER BY seq").fetchall()
            found = [dict(zip((*_FIELDS, "hash"), row, strict=True)) for row in rows]
            return [entry | {"event": self._parsed(entry["seq"], entry["event"]).to_json()} for entry in found]

    def verify(self) -> int:
        """Recompute the whole chain and return the number of entries; ``LedgerError`` names the first bad one."""
        with self._guarded(), self._transaction():
            (state,) = self._connection.execute("PRAGMA integrity_check(1)").fetchone()
            if state != "ok":
                raise self._damaged(f"the database is damaged ({state})", state)
            count, previous = 0, GENESIS
            for *fields, stored in self._connection.execute(f"SELECT {_COLUMNS}, hash FROM entries ORDER BY seq"):
                count += 1
                try:
                    expected = _chained(previous, tuple(fields))
                except (TypeError, ValueError):
                    expected = None
                if fields[0] != count or stored != expected:
                    raise self._damaged(f"entry {count} was changed, moved or removed", fields)
                self._parsed(count, fields[-1])
                previous = stored
            self._last()
            return count

    @property
    def head(self) -> str:
        """The hash of the last entry (64 zeros when empty); it commits to the entire history."""
        with self._guarded(), self._transaction():
            return self._last()[1]

    def close(self) -> None:
        """Close the file; harmless when repeated, and in a forked child, where the connection is the parent's."""
        if os.getpid() == self._pid:
            with self._lock:
                self._connection.close()

    def __enter__(self) -> Ledger:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def _refuse_mixed(self, event: Event) -> None:
        """One ε describes one unit: an entry for another would leave the whole ledger without any."""
        others = sorted({held.unit for held in self.events()} - {event.unit})
        if others:
            raise LedgerError(
                f"ledger {self._where} holds releases that protect one {others[0]}, and this one would protect one "
                f"{event.unit}; nothing was recorded.",
                found=others,
                where=self._where,
                fix="use another ledger, and report both guarantees.",
            )

    def _last(self) -> tuple[int, str]:
        """Number and hash of the last entry, once they agree with the recorded head and with what was seen before."""
        row = self._connection.execute("SELECT seq, hash FROM entries ORDER BY seq DESC LIMIT 1").fetchone()
        seq, last = row or (0, GENESIS)
        (head,) = self._connection.execute("SELECT value FROM meta WHERE key = 'head'").fetchone() or (None,)
        if head != last:
            raise self._damaged(f"entries after {seq} were removed, or the last one was changed", head)
        if seq < self._seen or (seq == self._seen and last != self._head):
            raise self._damaged(f"entries up to {self._seen} were here before, and have been rolled back", seq)
        return seq, last

    def _parsed(self, seq: int, event: str) -> Event:
        try:
            return Event.from_json(json.loads(event))
        except (TypeError, ValueError, AttributeError) as error:
            raise self._damaged(f"entry {seq} holds no event that can be accounted for ({error})", event) from error

    def _damaged(self, what: str, found: object) -> LedgerError:
        return LedgerError(
            f"ledger {self._where}: {what}; what was spent is no longer certain.",
            found=found,
            where=self._where,
            fix="restore the latest backup and add what was released since; do not train on a damaged ledger.",
        )

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        # IMMEDIATE takes the write lock before the last entry is read, so two processes cannot extend the same one.
        try:
            self._connection.execute("BEGIN IMMEDIATE")
            yield
            self._connection.execute("COMMIT")
        except BaseException:
            if self._connection.in_transaction:
                self._connection.execute("ROLLBACK")
            raise

    @contextmanager
    def _guarded(self) -> Iterator[None]:
        if os.getpid() != self._pid:
            raise LedgerError(
                f"ledger {self._where} was opened in another process; a forked child must not share its connection.",
                found=os.getpid(),
                where=self._where,
                fix="open it again in this process: Ledger(path).",
            )
        with self._lock:
            if self.path is not None and identity(self.path) != self._file:
                raise self._damaged("the file was deleted or replaced while in use", None)
            try:
                yield
            except (sqlite3.Error, OverflowError, UnicodeError) as error:
                if self.path is not None and getattr(error, "sqlite_errorcode", None) == sqlite3.SQLITE_NOTADB:
                    raise foreign(self.path) from error
                raise LedgerError(
                    f"ledger {self._where}: {error}; nothing was recorded.",
                    found=str(error),
                    where=self._where,
                    fix="check that the ledger is open, intact and writable, and that the disk has room.",
                ) from error
