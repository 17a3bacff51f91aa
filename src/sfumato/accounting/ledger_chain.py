"""Entries and the hash chain that commits each to all before it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from .events import Event
from .ledger_file import GENESIS
from .ledger_scope import Scope

MOST_RELEASES = 10**12  # of one entry: sums of many stay within 64 bits
COLUMNS = 'seq, run, step, "group", dataset, records, note, event, count, reservation'


class Broken(ValueError):
    """An entry that does not continue the chain."""


@dataclass(frozen=True)
class Entry:
    """One row: ``count`` releases of ``event``. ``reservation``: the entry that reserved them (itself, or the one that
    a negative count gives back from)."""

    seq: int
    run: str
    step: int
    group: str | None
    dataset: str | None
    records: str | None
    note: str
    event: str
    count: int = 1
    reservation: int | None = None

    @property
    def scope(self) -> Scope:
        return Scope(self.dataset, self.group, self.records)

    def chained(self, previous: str) -> str:
        """Hash of this entry and, through ``previous``, of all before it."""
        return hashlib.sha256((previous + canonical(vars(self))).encode()).hexdigest()


def canonical(data: object) -> str:
    """The one JSON text of ``data``."""
    return json.dumps(data, sort_keys=True, separators=(",", ":"), allow_nan=False)


class Chain:
    """How far a chain has been followed: the last number and hash, and the reservations not yet given back."""

    def __init__(self) -> None:
        self.seq, self.head = 0, GENESIS
        self._reserved: dict[int, Entry] = {}
        self._events: dict[str, Event] = {}

    def follow(self, row: Sequence[Any]) -> tuple[Entry, Event]:
        """Check the next row and go on to it; :class:`Broken` leaves everything as is."""
        entry, event = self.checked(row)
        self.seq, self.head = entry.seq, row[-1]
        if entry.count < 0:
            del self._reserved[entry.reservation or 0]
        elif entry.reservation is not None:
            self._reserved[entry.seq] = entry
        return entry, event

    def checked(self, row: Sequence[Any]) -> tuple[Entry, Event]:
        """The entry of the next row (``COLUMNS``, then its hash) and its event; :class:`Broken` if it is not that."""
        seq = self.seq + 1
        try:
            entry = Entry(*row[:-1])
            expected = entry.chained(self.head)
        except (TypeError, ValueError):
            expected = None
        if expected is None or row[0] != seq or row[-1] != expected:
            raise Broken(f"entry {seq} was changed, moved or removed")
        # SQLite columns hold any type, and a hash fits whatever was hashed.
        whole = (entry.seq, entry.step, entry.count, 0 if entry.reservation is None else entry.reservation)
        texts = (entry.run, entry.note, entry.event, *("" if t is None else t for t in vars(entry.scope).values()))
        if {type(n) for n in whole} != {int} or {type(t) for t in texts} != {str}:
            raise Broken(f"entry {seq} holds a value that no ledger writes")
        event = self._events.get(entry.event)
        if event is None:
            try:
                event = self._events[entry.event] = Event.from_json(json.loads(entry.event))
            except (TypeError, ValueError, AttributeError) as error:
                raise Broken(f"entry {seq} holds no event that can be accounted for ({error})") from error
        if entry.count <= 0 or entry.reservation not in (None, entry.seq):
            # Only what one reservation charged, for the same records, can be given back, and once.
            opened = self._reserved.get(entry.reservation or 0)
            same = opened and (opened.run, opened.scope, opened.event) == (entry.run, entry.scope, entry.event)
            if not opened or not same or not -opened.count <= entry.count < 0:
                raise Broken(f"entry {seq} gives back what was not reserved")
        if entry.count > MOST_RELEASES:
            raise Broken(f"entry {seq} charges more than an entry may")
        return entry, event
