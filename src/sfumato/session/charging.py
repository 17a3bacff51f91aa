"""What a training owes the ledger: which event a release pays, for whose records, and whether the budget allows it."""

import math
import uuid
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from sfumato.accounting import Budget, Event, Ledger, Records, Reservation, compose, max_steps, noise_multiplier
from sfumato.errors import BudgetExceeded, ConfigurationError, UnsupportedError
from sfumato.plan import Plan

LOOKAHEAD = 1 << 10  # steps of a noise schedule that are looked at in advance


@dataclass(frozen=True, eq=False)
class Scope:
    """Which records a training may touch, as the ledger's ``append`` takes it; nothing given: anybody's."""

    dataset: str | None = None
    group: str | None = None
    records: Records | None = None

    @property
    def arguments(self) -> dict[str, Any]:
        given = {"dataset": self.dataset, "group": self.group, "records": self.records}
        return {k: v for k, v in given.items() if v is not None}


class Charging:
    """Charges for one training, in the order of its steps.

    Guarantee: :meth:`pay` returns after the ledger holds an event at least as expensive as the release that follows;
    with a budget, what the ledger holds stays within it, whatever other processes charge meanwhile.
    """

    def __init__(self, ledger: Ledger, budget: Budget | None, scope: Scope, reserve: int):
        self.ledger, self.budget, self.scope, self.reserve = ledger, budget, scope, reserve
        self.run = uuid.uuid4().hex
        self._period: int | None = None  # the last one that was paid for, and by which plan
        self._payer: Plan | None = None
        self._reserved: Reservation | None = None
        self._own: Counter[Event] = Counter()  # what this training charged
        # Beside _others, the first _room of _coming (its last one for ever) fit; _used of them are charged by now, and
        # then the ledger was at _head.
        self._others: tuple[frozenset[tuple[Event, int]], ...] = ()
        self._coming: Sequence[Event] = ()
        self._room = self._used = 0
        self._head: str | None = None

    def pay(self, plan: Plan, step: int, period: int | None) -> None:
        """Charge step ``step``, which belongs to ``period``; ``BudgetExceeded`` if nothing may be released."""
        where: dict[str, Any] = {"run": self.run, "step": step, "note": f"noise: {plan.noise_level}"}
        where |= self.scope.arguments
        if not self._pays(plan, period):
            self.ledger.append(plan.covered(step), **where)
            self._own[plan.covered(step)] += 1
            self._head = None  # entries of others may have come before this one
            return
        event = plan.charge(step)
        if self._reserved is not None and (self._reserved.event != event or not self._reserved.left):
            self.settle()
        if self._reserved is None and self.reserve > 1:
            self._reserved = self.ledger.reserve(event, self.reserve, budget=self.budget, **where)
            self._own[event] += self._reserved.left
        if self._reserved is not None:
            self._reserved.use()
        else:
            fits_at = self._head if event == self._foreseen else None
            self.ledger.append(event, budget=self.budget, fits_at=fits_at, **where)
            self._own[event] += 1
            self._head = None if self.budget is None else self.ledger.head
        self._used = self._used + 1 if event == self._foreseen else self._room
        self._period, self._payer = period, plan

    def affordable(self, plan: Plan, step: int, period: int | None) -> bool:
        """Whether the budget allows step ``step``, after all that the ledger holds by now."""
        if not self._pays(plan, period) or (self._reserved is not None and self._reserved.left):
            return True
        left = self.left(plan, step)
        return left is None or left > 0

    def left(self, plan: Plan, step: int) -> int | None:
        """Further charges that the budget allows from step ``step`` on; None without a budget."""
        if self.budget is None:
            return None
        event, prepaid = plan.charge(step), 0 if self._reserved is None else self._reserved.left
        multisets = self.ledger.spent(**self.scope.arguments)
        others = tuple(frozenset((e, n - self._own[e]) for e, n in m.items() if n != self._own[e]) for m in multisets)
        if others != self._others or event != self._foreseen:
            self._others, self._used = others, 0
            self._coming = [event] if plan.noise_schedule is None else _charges(plan, step)
            # What is reserved is in the ledger already, and will be used before anything else is charged.
            self._room = prepaid + min(_fitting(m, self._coming, self.budget) for m in multisets)
        return self._room - self._used

    @property
    def _foreseen(self) -> Event | None:
        return self._coming[min(self._used, len(self._coming) - 1)] if self._used < self._room else None

    def renew(self) -> None:
        """The coming steps are no longer those that the period's charge foresaw: pay again."""
        self._period = None

    def settle(self) -> None:
        """Give back what was reserved and not used."""
        reserved, self._reserved = self._reserved, None
        if reserved is not None:
            self._own[reserved.event] -= reserved.close()

    def _pays(self, plan: Plan, period: int | None) -> bool:
        return period is None or period != self._period or plan is not self._payer


def _charges(plan: Plan, step: int) -> list[Event]:
    found: list[Event] = []
    with suppress(ConfigurationError):  # a schedule may leave the numbers there are, later than training ends
        for k in range(LOOKAHEAD):
            found.append(plan.charge(step + k * (plan.period or 1)))  # noqa: PERF401 (keep what came before)
    return found


def _fitting(spent: Mapping[Event, int], coming: Sequence[Event], budget: Budget) -> int:
    """How many of ``coming`` (one: for ever) fit beside ``spent``."""
    if len(coming) == 1:
        return max_steps(spent, coming[0], epsilon=budget.epsilon, delta=budget.delta)

    def excess(n: int) -> float:
        total = Counter(spent)
        total.update(coming[:n])
        return float(compose(total, delta=budget.delta)) - budget.epsilon

    return _last_within(excess, len(coming))


def _last_within(excess: Callable[[int], float], most: int) -> int:
    """The largest n <= ``most`` with ``excess(n)`` <= 0, for a growing function that is dear to ask; 0 if none."""
    low, high = (0, -math.inf), (1, excess(1))
    while high[1] <= 0 and high[0] < most:
        n = min(2 * high[0], most)
        low, high = high, (n, excess(n))
    if high[1] <= 0:
        return high[0]
    while high[0] - low[0] > 1:
        # Nearly straight between two finite values; half way where it is not, or where that makes little headway.
        straight = low[1] / (low[1] - high[1]) if math.isfinite(high[1]) and math.isfinite(low[1]) else 0.5
        n = low[0] + round((high[0] - low[0]) * straight)
        n = min(max(n, low[0] + 1), high[0] - 1)
        value = excess(n)
        before = high[0] - low[0]
        low, high = ((n, value), high) if value <= 0 else (low, (n, value))
        if high[0] - low[0] > max(2, before // 2):
            n = (low[0] + high[0]) // 2
            value = excess(n)
            low, high = ((n, value), high) if value <= 0 else (low, (n, value))
    return low[0]


def charging_of(ledger: Ledger, plan: Plan, budget: Budget | None, scope: Scope, reserve: int) -> Charging:
    """Charges for ``plan``, refused before anything is changed if the ledger could not take them."""
    if isinstance(reserve, bool) or not isinstance(reserve, int) or reserve < 1:
        raise ConfigurationError(f"reserve={reserve!r} is not a whole number >= 1.", found=reserve, where="reserve")
    if reserve > 1 and (plan.noise_schedule is not None or plan.period is not None):
        raise ConfigurationError(
            f"reserve={reserve} pays for equal steps in advance, and these differ: a noise schedule, or one charge for "
            "many steps.",
            found=reserve,
            where="reserve",
            fix="leave reserve out.",
        )
    refuse_other_kind(ledger, plan)
    return Charging(ledger, budget, scope, reserve)


def refuse_other_kind(ledger: Ledger, plan: Plan) -> None:
    """No single ε describes both one record and one user, or both removal and replacement."""
    held = list(ledger.events())
    others = sorted({event.unit for event in held} - {plan.unit})
    if others:
        raise UnsupportedError(
            f"The ledger holds releases that protect one {others[0]}, and these would protect one {plan.unit}: no "
            "single ε describes both.",
            found=others,
            where="privacy_unit",
            fix="use another ledger, and report both guarantees.",
        )
    relations = {event.adjacency for event in held} | {plan.adjacency}
    if "replace-one" in relations and len(relations) > 1:
        raise UnsupportedError(
            f"The ledger would hold releases for {' and '.join(sorted(relations))}: no single ε describes both.",
            found=sorted(relations),
            where="adjacency",
            fix="use another ledger, or the same adjacency.",
        )


def target_noise(plan: Plan, ledger: Ledger, scope: Scope, limit: Budget, epochs: int) -> float:
    """Least noise multiplier for which ``epochs`` epochs of ``plan`` stay within ``limit``, beside what is spent."""
    refuse_other_kind(ledger, plan)
    return max(_noise_beside(plan, spent, limit, epochs) for spent in ledger.spent(**scope.arguments))


def _noise_beside(plan: Plan, spent: Mapping[Event, int], limit: Budget, epochs: int) -> float:
    before = float(compose(spent, delta=limit.delta))
    if before >= limit.epsilon:
        raise BudgetExceeded(
            f"The ledger already holds ε = {before:.4g}, at or above the target {limit.epsilon:g}.",
            found=limit.epsilon,
            where="target_epsilon",
            fix="raise the target, or train on other records with a ledger of their own.",
        )
    factors = plan.noise_factors(epochs)

    return noise_multiplier(
        target_epsilon=limit.epsilon,
        target_delta=limit.delta,
        event=plan.event,
        steps=plan.charges(epochs) if factors is None else None,
        factors=factors,
        spent=spent,
    )


__all__ = ["Charging", "Scope", "charging_of", "target_noise"]
