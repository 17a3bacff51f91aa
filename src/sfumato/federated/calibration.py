"""The least noise with which every client of a ClientLevel federation stays within its ε for all rounds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from sfumato.accounting import Budget, Event, compose, noise_multiplier
from sfumato.errors import ConfigurationError

from .cohorts import Cohort, PoissonCohort, Terms, event_of
from .units import ClientLevel, budgets

FINEST = 2.0**-16  # of the largest rate: a client with less is as good as never drawn


@dataclass(frozen=True)
class Calibrated:
    """``noise_multiplier`` z over the common C; each client's rate factor; its own bound over C."""

    noise_multiplier: float
    terms: Mapping[str, Terms]
    scales: Mapping[str, float]


def calibrated(
    unit: ClientLevel,
    cohort: Cohort,
    clients: tuple[str, ...],
    *,
    factors: tuple[float, ...],
    beside: Mapping[float, int],
    adaptive: bool,
) -> Calibrated:
    """``factors``: noise of each round that the budgets have to last for. ``beside``: {noise multiplier: times} of
    other questions to the same clients, such as measures.

    The largest ε decides the common noise. Clients with a smaller one are drawn less often (``personal="rate"``), or
    clipped to a smaller bound under the same noise.
    """
    limits = budgets(unit, clients)
    named = sorted({b for b in limits.values() if b is not None}, key=lambda b: b.epsilon, reverse=True)

    def events(z: float, rate: float, scale: float = 1.0) -> dict[Event, int]:
        found: dict[Event, int] = {}
        for multiplier, count in [*((z * f, 1) for f in factors), *beside.items()]:
            event = event_of(cohort, Terms(multiplier / scale, rate), len(clients), adaptive=adaptive)
            found[event] = found.get(event, 0) + count
        return found

    def least(budget: Budget) -> float:
        spent = {
            event_of(cohort, Terms(m), len(clients), adaptive=adaptive): count for m, count in beside.items() if count
        }
        return noise_multiplier(
            target_epsilon=budget.epsilon,
            target_delta=budget.delta,
            event=event_of(cohort, Terms(1.0), len(clients), adaptive=adaptive),
            factors=factors,
            spent=spent,
        )

    z = unit.noise_multiplier if unit.noise_multiplier is not None else least(named[0])
    same = unit.noise_multiplier is not None or len(named) < 2
    rates: dict[Budget | None, float] = {None: 1.0} | dict.fromkeys(named, 1.0)
    scales = dict(rates)
    if not same:
        if unit.personal == "rate" and not isinstance(cohort, PoissonCohort):
            raise ConfigurationError(
                "a smaller chance to be drawn needs PoissonCohort.",
                found=type(cohort).__name__,
                where="personal",
                fix="personal='noise', which clips such clients to a smaller bound.",
            )
        for budget in named[1:]:

            def fits(rate: float, scale: float, budget: Budget = budget) -> bool:
                return compose(events(z, rate, scale), delta=budget.delta) <= budget.epsilon

            if unit.personal == "rate":
                rates[budget] = _largest(lambda share: fits(share, 1.0))
            else:
                scales[budget] = _largest(lambda share: fits(1.0, share))
    return Calibrated(z, {c: Terms(1.0, rates[limits[c]]) for c in clients}, {c: scales[limits[c]] for c in clients})


def _largest(fits: object) -> float:
    """The largest share in (0, 1] that fits, to one part in a thousand, never above it."""
    assert callable(fits)
    if fits(1.0):
        return 1.0
    low, high = FINEST, 1.0
    if not fits(low):
        raise ConfigurationError(
            "the smallest epsilon is out of reach of the noise that the largest one asks for.",
            where="epsilon",
            fix="leave those clients out, or give them more.",
        )
    while high / low > 1.001:
        middle = (low * high) ** 0.5
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low
