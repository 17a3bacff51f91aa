"""What one record may have been charged: the worst of them, as few candidate multisets."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from .events import Event
from .ledger_scope import EVERYONE, Records, Scope

Counts = dict[Event, int]
Rows = NDArray[np.int64]
# More candidates, or a larger table, than this are replaced by an upper bound on each event's count.
MOST_ROWS = 128
MOST_CELLS = 1 << 25


@dataclass
class _Tally:
    """Entries of one group of one data set: those for all of it, and those for sets of record numbers (by digest)."""

    whole: Counter[Event] = field(default_factory=Counter)
    numbered: dict[Event, Counter[str]] = field(default_factory=dict)

    def add(self, event: Event, count: int, digest: str | None) -> None:
        if digest is None:
            self.whole[event] += count
        else:
            self.numbered.setdefault(event, Counter())[digest] += count


class Spending:
    """Running totals by scope.

    A record has one place in each data set: its group there and its number there. Places in different data sets, and
    group and number in one, are not related by anything, so every combination may be a record. Parallel composition
    (McSherry, 2009) makes the guarantee the worst over records, not the sum over entries.
    """

    def __init__(self) -> None:
        self.kinds: set[tuple[str, str]] = set()  # (unit, adjacency) of every event
        self.sets: dict[str, Records] = {}
        self._settled: defaultdict[tuple[str | None, str | None], _Tally] = defaultdict(_Tally)
        # The scope of the latest entries is kept apart: while a run goes on, only its counts change, and which
        # combinations can be the worst does not.
        self._live, self._fresh = EVERYONE, Counter[Event]()
        self._frontiers: dict[Scope, tuple[list[Event], Rows]] = {}

    def add(self, scope: Scope, event: Event, count: int) -> None:
        """Count one entry; ``sets`` must know its record numbers."""
        self.kinds.add((event.unit, event.adjacency))
        if scope != self._live or count < 0:
            for held, times in self._fresh.items():
                self._settle(self._live, held, times)
            self._live, self._fresh, self._frontiers = scope, Counter(), {}
        if count < 0:  # the frontier assumes that what is live only grows
            self._settle(scope, event, count)
        else:
            self._fresh[event] += count

    def _settle(self, scope: Scope, event: Event, count: int) -> None:
        self._settled[scope.dataset, scope.group].add(event, count, scope.records)

    def candidates(self, scope: Scope = EVERYONE, records: Records | None = None) -> list[Counts]:
        """What a record of ``scope`` may have been charged: no record was charged more than one of these."""
        if scope not in self._frontiers:
            self._frontiers[scope] = self._frontier(scope, records)
        events, rows = self._frontiers[scope]
        held = set(events)
        events = [*events, *(event for event in self._fresh if event not in held)]
        total: Rows = np.zeros((len(rows), len(events)), np.int64)
        total[:, : rows.shape[1] - 1] = rows[:, :-1]
        fresh = np.array([self._fresh[event] for event in events], np.int64)
        total = _undominated(total + rows[:, -1:] * fresh)
        return [{event: n for event, n in zip(events, row, strict=True) if n} for row in total.tolist()]

    def _frontier(self, scope: Scope, records: Records | None) -> tuple[list[Event], Rows]:
        """Undominated counts without the live scope; the last column says whether that may touch such a record."""
        events = list({e: None for t in self._settled.values() for e in (*t.whole, *t.numbered)})
        total: Rows = np.zeros((1, len(events) + 1), np.int64)
        for dataset in sorted({d for d, _ in self._settled} | {self._live.dataset}, key=lambda d: (d is not None, d)):
            rows = self._places(dataset, events, scope, records)
            if len(total) * len(rows) > MOST_ROWS * MOST_ROWS:
                total, rows = total.max(0, keepdims=True), rows.max(0, keepdims=True)
            total = _undominated((total[:, None] + rows[None]).reshape(-1, len(events) + 1))
        return events, total

    def _places(self, dataset: str | None, events: list[Event], scope: Scope, records: Records | None) -> Rows:
        """Counts of every place in one data set (the last column: whether the live scope reaches it)."""
        live = self._live if self._live.dataset == dataset else None
        groups: Iterable[str | None] = {g for d, g in self._settled if d == dataset} | {live.group if live else None}
        asked = scope.dataset == dataset
        if asked and scope.group is not None:
            groups = [scope.group]
        else:  # whoever is in a group has been charged all that someone in none has
            groups = sorted(g for g in groups if g is not None) or [None]
        numbers = records.numbers if asked and records is not None else None
        return _undominated(np.concatenate([self._group(dataset, g, events, live, numbers) for g in groups]))

    def _group(
        self,
        dataset: str | None,
        group: str | None,
        events: list[Event],
        live: Scope | None,
        asked: NDArray[np.uint32] | None,
    ) -> Rows:
        tallies = [self._settled[dataset, g] for g in {None, group} if (dataset, g) in self._settled]
        whole: Rows = np.array([*(sum(t.whole[e] for t in tallies) for e in events), 0], np.int64)
        columns: defaultdict[int, Counter[str]] = defaultdict(Counter)  # releases of each event by set of numbers
        for i, event in enumerate(events):
            for tally in tallies:
                columns[i].update(tally.numbered.get(event, {}))
        if live is not None and live.group in (None, group):
            if live.records is None:
                whole[-1] = 1
            else:
                columns[len(events)][live.records] = 1
        used = [i for i in sorted(columns) if columns[i]]
        if not used:
            return whole[None]
        sets = {digest: self.sets[digest].numbers for digest in {d for i in used for d in columns[i]}}
        places, chosen, size = _compressed(sets, asked)
        if size * len(used) > MOST_CELLS:
            for i in used:
                whole[i] += int(_charged(columns[i], places, size).max())
            return whole[None]
        table = np.stack([_charged(columns[i], places, size) for i in used], axis=1)
        table = _undominated(table if chosen is None else table[chosen])
        rows = np.repeat(whole[None], len(table), axis=0)
        rows[:, used] += table
        return rows


Places = NDArray[np.uint32] | NDArray[np.int64]


def _compressed(
    sets: dict[str, NDArray[np.uint32]], asked: NDArray[np.uint32] | None
) -> tuple[dict[str, Places], Places | None, int]:
    """Places of the numbers of every set, and of those asked for, in a table of this size.

    Its last row is for one who has no number here. Its size depends on how many numbers there are, not on the largest.
    """
    last = max(int(numbers[-1]) for numbers in sets.values())
    if last < max(1 << 16, 4 * sum(map(len, sets.values()))):
        return dict(sets), None if asked is None else np.unique(np.minimum(asked, last + 1)), last + 2
    every = np.unique(np.concatenate(list(sets.values())))
    places: dict[str, Places] = {digest: np.searchsorted(every, numbers) for digest, numbers in sets.items()}
    if asked is None:
        return places, None, len(every) + 1
    found = np.searchsorted(every, asked)
    there = every[np.minimum(found, len(every) - 1)] == asked
    return places, np.unique(np.where(there, found, len(every))), len(every) + 1


def _charged(sets: Counter[str], places: dict[str, Places], size: int) -> NDArray[np.int64]:
    """How much each place was charged."""
    total = np.zeros(size, np.int64)
    for digest, count in sets.items():
        total[places[digest]] += count
    return total


def _undominated(rows: Rows) -> Rows:
    """Rows that no other row reaches in every column; past ``MOST_ROWS``, one upper bound for all that are left."""
    rows = rows[np.argsort(-rows.sum(axis=1), kind="stable")]
    kept: list[Rows] = []
    while len(rows):
        if len(kept) == MOST_ROWS - 1:
            kept.append(rows.max(axis=0))
            break
        kept.append(rows[0])
        rows = rows[(rows > rows[0]).any(axis=1)]
    return np.stack(kept)
