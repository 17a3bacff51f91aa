"""Rényi filter: a budget for releases whose parameters are chosen on the way."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace

import numpy as np

from ..errors import ConfigurationError
from .budget import Budget
from .charges import charges
from .events import Event
from .renyi import ORDERS, conversion, curve, divergence

MAX_STEPS = 10**9


class Filter:
    """Decides, before each release, whether a budget still covers it, whatever earlier releases led to it.

    Guarantee (Feldman & Zrnic 2021, theorem 4.3, for the Rényi filter; Canonne, Kamath & Steinke 2020, proposition 12,
    for epsilon): if every release was allowed here first, all of them together are (``budget.epsilon``,
    ``budget.delta``)-differentially private, even when parameters, or whether to go on, depend on earlier outputs.
    The price is one Rényi order, ``order``, fixed here: the one at which ``reference`` may be repeated most often. The
    reference must not depend on outputs; if later releases differ from it, the guarantee holds and only fits are lost.
    Raises ConfigurationError for a reference without a Rényi bound.
    """

    def __init__(self, budget: Budget, reference: Event) -> None:
        self.budget = budget
        orders = np.asarray(ORDERS)
        room = budget.epsilon - conversion(orders, budget.delta)
        with np.errstate(divide="ignore", invalid="ignore"):
            repeats = np.where(room > 0.0, room / curve(reference), -np.inf)
        best = int(np.nanargmax(repeats))
        if not room[best] > 0.0:
            raise ConfigurationError(
                f"no Rényi order up to {ORDERS[-1]:g} reaches epsilon {budget.epsilon!r}.",
                found=budget.epsilon,
                where="budget",
                fix="raise epsilon or delta.",
            )
        self.order = ORDERS[best]
        self.limit = float(room[best]) * (1.0 - 1e-12)  # what may be spent, as a Rényi divergence
        self._costs: dict[Event, float] = {}

    def cost(self, event: Event) -> float:
        """Rényi divergence of one ``event`` at ``order``, remembered."""
        found = self._costs.get(event)
        if found is None:
            if len(self._costs) > 1 << 16:
                self._costs.clear()
            found = self._costs[event] = divergence(replace(event, adaptive=False), self.order)
        return found

    def spent(self, events: Mapping[Event, int]) -> float:
        """Rényi divergence of ``events`` together, rounded up."""
        return math.fsum(times * self.cost(event) for event, times in charges(events).items()) * (1.0 + 1e-12)

    def epsilon(self, events: Mapping[Event, int]) -> float:
        """Epsilon at ``budget.delta`` by the same order; 0 if nothing was released.

        At most ``budget.epsilon`` if every release was allowed here. It holds whenever one stops, in the sense of
        :func:`.renyi.compose_renyi`, without its loss for many orders.
        """
        spent = self.spent(events)
        return max(0.0, spent + self.budget.epsilon - self.limit) if spent > 0.0 else 0.0

    def allows(self, events: Mapping[Event, int], event: Event) -> bool:
        """Whether ``event`` still fits beside ``events``, all that was released before."""
        charges({**events, event: events.get(event, 0) + 1})
        return event.mechanism == "covered" or self.allowed(self.spent(events), event)

    def allowed(self, spent: float, event: Event) -> bool:
        """:meth:`allows` for a caller who keeps the running sum of :meth:`cost`, in microseconds."""
        return (spent + self.cost(event)) * (1.0 + 1e-12) <= self.limit

    def remaining(self, events: Mapping[Event, int], event: Event) -> int:
        """How many more ``event`` fit beside ``events``; at most 10**9."""
        charges({**events, event: events.get(event, 0) + 1})
        left, cost = self.limit - self.spent(events) * (1.0 + 1e-12), self.cost(event)
        if not left > 0.0 or not cost < math.inf:
            return 0
        return MAX_STEPS if cost * MAX_STEPS <= left else int(left / cost * (1.0 - 1e-12))
