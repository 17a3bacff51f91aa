"""What every enrolled client has been charged in the server's ledger, and whether it can pay for one more round."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from sfumato.accounting import Budget, Event, Ledger, Records, Reservation, compose
from sfumato.errors import BudgetExceeded

from .cohorts import number_of

DATASET = "clients"  # its records are clients, by number_of
Spent = tuple[frozenset[tuple[Event, int]], ...]  # candidates: no client exceeds all of them
NOTHING: Spent = (frozenset(),)


class Accounts:
    """The server's books. Clients with the same history share one account, so that any number of them is cheap.

    Guarantee: :meth:`charge` returns after the ledger holds the events for all who pay, each within their budgets.
    """

    def __init__(self, ledger: Ledger, budgets: Mapping[str, Budget | None], run: str):
        self.ledger, self.run = ledger, run
        self._budgets = dict(budgets)
        self._spent: dict[str, Spent] = dict.fromkeys(budgets, NOTHING)
        if ledger.events() and ledger.events(dataset=DATASET):
            self.refresh()
        self._epsilons: dict[tuple[Spent, float], float] = {}
        self._records: dict[tuple[str, ...], Records] = {}

    def refresh(self) -> bool:
        """Read again what the ledger holds, for others may charge it too; whether it was not what is known here."""
        known, asked = dict(self._spent), dict[bytes, Spent]()
        for client, history in zip(known, self._histories(tuple(known)), strict=True):
            if history not in asked:
                found = self.ledger.spent(dataset=DATASET, records=[number_of(client)])
                asked[history] = tuple(frozenset(counts.items()) for counts in found)
            self._spent[client] = asked[history]
        return self._spent != known

    def _histories(self, clients: tuple[str, ...]) -> list[bytes]:
        """Which sets of charged clients each is in: those that agree have spent the same, and are looked up once."""
        document = self.ledger.export()
        named = sorted({e["records"] for e in document["entries"] if e["dataset"] == DATASET and e["records"]})
        numbers = np.array([number_of(c) for c in clients], dtype=np.int64)
        member = np.zeros((len(clients), len(named)), dtype=bool)
        for k, digest in enumerate(named):
            runs = [part.partition("-") for part in document["scopes"][digest].split(",")]
            first = np.array([int(a) for a, _, _ in runs], dtype=np.int64)
            last = np.array([int(b or a) for a, _, b in runs], dtype=np.int64)
            place = np.searchsorted(first, numbers, side="right") - 1
            member[:, k] = (place >= 0) & (numbers <= last[place])
        return [row.tobytes() for row in np.packbits(member, axis=1)]

    def affordable(self, clients: Iterable[str], event: Callable[[str], Event]) -> list[str]:
        """Those who can pay ``event(client)`` within their budgets."""
        return [c for c in clients if self._allows(c, event(c))]

    def _allows(self, client: str, event: Event) -> bool:
        budget = self._budgets[client]
        return budget is None or self._epsilon(_more(self._spent[client], event), budget.delta) <= budget.epsilon

    def charge(
        self, charges: Sequence[tuple[Event, tuple[str, ...]]], step: int, note: str, *, reserve: bool = False
    ) -> list[Reservation]:
        """Write every event down for those who pay it; ``reserve``: so that it can be given back.

        Raises ``BudgetExceeded`` if others who share the ledger have spent what was left.
        """
        where: dict[str, Any] = {"run": self.run, "step": step, "dataset": DATASET, "note": note}
        taken: list[Reservation] = []
        try:
            for event, clients in charges:
                tiers: dict[Budget | None, list[str]] = {}
                for client in clients:
                    tiers.setdefault(self._budgets[client], []).append(client)
                for budget, tier in tiers.items():
                    where |= {"records": self._numbers(tuple(tier)), "budget": budget}
                    if reserve:
                        taken.append(self.ledger.reserve(event, 1, **where))
                    else:
                        self.ledger.append(event, **where)
                    more = {before: _more(before, event) for before in {self._spent[c] for c in tier}}
                    self._spent |= {client: more[self._spent[client]] for client in tier}
        except BudgetExceeded:  # nobody is asked then
            for reservation in taken:
                reservation.close()
            raise
        return taken

    def epsilon(self, client: str, delta: float) -> float:
        """Certified upper bound for this client."""
        return self._epsilon(self._spent[client], delta)

    def forget(self, charges: Sequence[tuple[Event, tuple[str, ...]]]) -> None:
        """These charges were given back."""
        for event, clients in charges:
            for client in clients:
                self._spent[client] = _more(self._spent[client], event, -1)

    def _epsilon(self, spent: Spent, delta: float) -> float:
        key = spent, delta
        if key not in self._epsilons:
            if len(self._epsilons) > 1 << 16:
                self._epsilons.clear()
            self._epsilons[key] = max(float(compose(dict(counts), delta=delta)) for counts in spent)
        return self._epsilons[key]

    def _numbers(self, clients: tuple[str, ...]) -> Records:
        if clients not in self._records:
            if len(self._records) > 64:
                self._records.clear()
            self._records[clients] = Records(np.array([number_of(c) for c in clients], dtype=np.int64))
        return self._records[clients]


def _more(spent: Spent, event: Event, count: int = 1) -> Spent:
    found = []
    for counts in spent:
        total = Counter(dict(counts))
        total[event] += count
        found.append(frozenset(total.items()))
    return tuple(found)
