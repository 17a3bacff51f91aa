"""How many more releases of one kind a budget allows, beside what is already charged."""

from __future__ import annotations

from collections.abc import Iterable

from .budget import Budget
from .calibrate import max_steps
from .events import Event
from .pld import compose

MOST_REMEMBERED = 4096


class Room:
    """Remembers the answers: a run that repeats one event is checked by a comparison, whoever else repeats it."""

    def __init__(self) -> None:
        # By what else was charged: how many of the event are known to fit, and whether that is the limit.
        self._fits: dict[tuple[frozenset[tuple[Event, int]], Event, Budget], tuple[int, bool]] = {}

    def allowed(self, candidates: Iterable[dict[Event, int]], event: Event, count: int, budget: Budget) -> int:
        """Most releases of ``event``, at most ``count``, that keep every candidate within ``budget``; 0 if none."""
        for spent in candidates:
            others = {held: times for held, times in spent.items() if held != event}
            count = min(count, self._fitting(others, event, spent.get(event, 0), count, budget))
            if count <= 0:
                return 0
        return count

    def _fitting(self, others: dict[Event, int], event: Event, already: int, count: int, budget: Budget) -> int:
        key = frozenset(others.items()), event, budget
        fits, exact = self._fits.get(key, (-1, False))
        if already + count > fits and not exact:
            if len(self._fits) >= MOST_REMEMBERED:
                self._fits.clear()
            # Under a schedule every step is another event: one composition then is cheaper than finding the limit.
            total = {**others, event: already + count}
            if fits < 0 and compose(total, delta=budget.delta) <= budget.epsilon:
                fits = already + count
            else:
                fits = max_steps(others, event, epsilon=budget.epsilon, delta=budget.delta)
                exact = True
            self._fits[key] = fits, exact
        return fits - already
