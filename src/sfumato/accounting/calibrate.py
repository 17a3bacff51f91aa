"""Noise, steps or sampling rate for a target, and how many more steps a budget allows: all end on the safe side."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from scipy.special import ndtr, ndtri

from ..errors import BudgetExceeded, ConfigurationError
from .budget import count, positive, probability, rate
from .charges import charges
from .events import Event
from .gaussian import gaussian_epsilon
from .moments import Array
from .pld import compose
from .renyi import conversion, divergence
from .search import largest
from .tradeoff import advantage, true_positive_rate

MIN_NOISE, MAX_NOISE = 1e-2, 1e8
MIN_RATE = 1e-20
MAX_STEPS = 10**9
GRAIN = 2e-5  # noise and rates are found on a geometric grid this fine
# Coarse orders that find a start; Rényi epsilons are about this much too large.
STEER = np.array([1.25, 1.5, 2.0, 3.0, 5.0, 9.0, 17.0, 33.0, 65.0, 257.0, 1025.0, 8193.0, 262145.0])
LOOSE = 1.08


@dataclass(frozen=True)
class _Target:
    """What may not be exceeded: epsilon at ``delta``, else the detection rate at ``false``, else the advantage."""

    limit: float
    delta: float | None = None
    false: float | None = None

    def excess(self, events: Mapping[Event, int]) -> float:
        """<= 0 exactly if ``events`` stay within the target; smooth in what they cost."""
        if self.delta is not None:
            value = float(compose(events, delta=self.delta))
            return (
                math.log(value / self.limit) if 0.0 < value < math.inf else math.copysign(math.inf, value - self.limit)
            )
        value = advantage(events) if self.false is None else true_positive_rate(events, false_positive_rate=self.false)
        if value <= self.limit:
            return min(0.0, _logit(value) - _logit(self.limit))
        return max(math.ulp(0.0), _logit(value) - _logit(self.limit))

    def steered(self) -> tuple[float, float]:
        """(epsilon, delta) at which a search by Rényi divergences starts: those of a Gaussian with the same limit."""
        if self.delta is not None:
            return self.limit * LOOSE, self.delta
        mu = 2.0 * ndtri(0.5 + 0.5 * self.limit) if self.false is None else ndtri(self.limit) - ndtri(self.false)
        delta = 0.05 * (2.0 * ndtr(0.5 * mu) - 1.0)
        return gaussian_epsilon(float(mu), float(delta), upper=True) * LOOSE, float(delta)


def _logit(value: float) -> float:
    return math.log(value) - math.log1p(-value) if 0.0 < value < 1.0 else math.copysign(math.inf, value - 0.5)


def _target(
    epsilon: object, delta: object, advantage: object, tpr: object, false_positive_rate: object
) -> _Target:  # fmt: skip
    named = {"target_epsilon": epsilon, "target_advantage": advantage, "target_tpr": tpr}
    if len(given := [name for name, value in named.items() if value is not None]) != 1:
        raise ConfigurationError(
            f"exactly one of {', '.join(named)} must be given; got {', '.join(given) or 'none'}.", found=given
        )
    (kind,) = given
    for name, value, owner in (
        ("target_delta", delta, "target_epsilon"), ("false_positive_rate", false_positive_rate, "target_tpr")
    ):  # fmt: skip
        if kind != owner and value is not None:
            raise ConfigurationError(f"{name} goes with {owner}, not with {kind}.", found=value, where=name)
    if kind == "target_epsilon":
        return _Target(positive(kind, epsilon), delta=probability("target_delta", delta))
    limit = probability(kind, named[kind])
    if kind == "target_advantage":
        return _Target(limit)
    false = probability("false_positive_rate", false_positive_rate)
    if limit <= false:
        raise ConfigurationError(
            f"target_tpr must be above false_positive_rate, which guessing reaches; got {limit!r} and {false!r}.",
            found=tpr,
            where="target_tpr",
        )
    return _Target(limit, false=false)


def noise_multiplier(
    *,
    target_epsilon: float | None = None,
    target_delta: float | None = None,
    sample_rate: float | None = None,
    steps: int | None = None,
    target_advantage: float | None = None,
    target_tpr: float | None = None,
    false_positive_rate: float | None = None,
    adjacency: str = "add-remove",
    spent: Mapping[Event, int] | None = None,
    factors: Sequence[float] | None = None,
    event: Event | None = None,
) -> float:
    """Smallest noise multiplier found with which ``steps`` releases stay within one target, certified, never above it.

    Targets: ``target_epsilon`` at ``target_delta``; ``target_advantage`` of membership inference; or ``target_tpr`` at
    ``false_positive_rate``. What ``spent`` holds counts against it. ``factors``: a schedule, step t having the noise
    multiplier result * factors[t] (``steps`` is then their number). ``event``: any other kind of release, instead of a
    Poisson-sampled Gaussian with ``sample_rate`` and ``adjacency``; its own noise is ignored.
    Returns 0.0 for no steps and at least 0.01 otherwise (before factors); at most 0.05 % above what is needed.
    Raises ConfigurationError on bad arguments, BudgetExceeded if no noise helps because of what is spent.
    """
    target = _target(target_epsilon, target_delta, target_advantage, target_tpr, false_positive_rate)
    template = _template(event, sample_rate, adjacency)
    held = dict(spent or {})
    relative = _relative(factors, steps)
    if not relative:
        return 0.0

    def events(sigma: float) -> dict[Event, int]:
        return _merged(held, {replace(template, noise_multiplier=sigma * f): n for f, n in relative.items()})

    mean = math.sqrt(sum(relative.values()) / sum(n / f**2 for f, n in relative.items()))
    goal, delta = target.steered()
    room = goal - conversion(STEER, delta) - _divergences(held)

    def rough(k: int) -> float:
        one = replace(template, noise_multiplier=math.exp(-GRAIN * k) * mean)
        return _best_ratio(_divergences({one: sum(relative.values())}), room)

    low, high = _index(1.0 / MAX_NOISE), _index(1.0 / MIN_NOISE)
    guess = largest(rough, 0, low, high, grain=GRAIN, close=1000)
    guess = guess if guess >= low else 0
    found = largest(lambda k: target.excess(events(math.exp(-GRAIN * k))), guess, low, high, grain=GRAIN)
    if found < low:
        _refuse_spent(target, held)
        raise ConfigurationError(
            f"no noise multiplier up to {MAX_NOISE:g} reaches the target {target.limit!r}.",
            found=target.limit,
            where="target",
            fix="raise the target, lower sample_rate or take fewer steps.",
        )
    return math.exp(-GRAIN * found)  # the very number that was held against the target


def steps(
    *,
    noise_multiplier: float,
    sample_rate: float,
    target_epsilon: float | None = None,
    target_delta: float | None = None,
    target_advantage: float | None = None,
    target_tpr: float | None = None,
    false_positive_rate: float | None = None,
    adjacency: str = "add-remove",
) -> int:
    """Most Poisson-subsampled Gaussian releases within one target (as in :func:`noise_multiplier`); at most 10**9."""
    target = _target(target_epsilon, target_delta, target_advantage, target_tpr, false_positive_rate)
    event = replace(
        _template(None, sample_rate, adjacency), noise_multiplier=positive("noise_multiplier", noise_multiplier)
    )
    return _most({}, event, target)


def sample_rate(
    *,
    noise_multiplier: float,
    steps: int,
    target_epsilon: float | None = None,
    target_delta: float | None = None,
    target_advantage: float | None = None,
    target_tpr: float | None = None,
    false_positive_rate: float | None = None,
    adjacency: str = "add-remove",
) -> float:
    """Largest Poisson rate found at which ``steps`` Gaussian releases stay within one target; 1.0 if all rates do."""
    target = _target(target_epsilon, target_delta, target_advantage, target_tpr, false_positive_rate)
    sigma, times = positive("noise_multiplier", noise_multiplier), count("steps", steps)
    if times == 0:
        return 1.0

    def events(k: int) -> dict[Event, int]:
        return {Event("poisson-gaussian", sigma, math.exp(GRAIN * k), adjacency): times}

    goal, delta = target.steered()
    room = goal - conversion(STEER, delta)
    low = _index(MIN_RATE)
    guess = largest(lambda k: _best_ratio(_divergences(events(k)), room), low // 10, low, 0, grain=GRAIN, close=1000)
    found = largest(lambda k: target.excess(events(k)), guess, low, 0, grain=GRAIN)
    if found < low:
        raise ConfigurationError(
            f"no sampling rate down to {MIN_RATE:g} reaches the target {target.limit!r}.",
            found=target.limit,
            where="target",
            fix="raise the target or the noise, or take fewer steps.",
        )
    return math.exp(GRAIN * found)


def max_steps(spent: Mapping[Event, int], event: Event, *, epsilon: float, delta: float) -> int:
    """How many more ``event`` fit beside ``spent`` so that the certified epsilon stays <= ``epsilon``.

    0 if none does; at most 10**9, which is also the answer for an event that costs nothing. Any kind of event, also
    adaptive ones: epsilon then is the odometer's (:func:`compose`), which holds whenever one stops.
    """
    return _most(spent, event, _Target(positive("epsilon", epsilon), delta=probability("delta", delta)))


def _most(spent: Mapping[Event, int], event: Event, target: _Target) -> int:
    def total(n: int) -> dict[Event, int]:
        return _merged(spent, {event: n})

    charges(total(1))  # whatever cannot be composed is refused before the search
    if event.mechanism == "covered":
        return MAX_STEPS if target.excess(total(1)) <= 0.0 else 0
    if event.noise_multiplier == 0.0 or target.excess(total(1)) > 0.0:
        return 0
    goal, start = target.steered()
    room = goal - conversion(STEER, start) - _divergences(spent)
    with np.errstate(divide="ignore", invalid="ignore"):
        guess = float(np.nanmax(np.append(room / _divergences({event: 1}), 1.0)))
    return largest(lambda n: target.excess(total(n)), int(min(guess, MAX_STEPS)), 1, MAX_STEPS, grain=None)


def _template(event: Event | None, sample_rate: object, adjacency: str) -> Event:
    if event is None:
        return Event("poisson-gaussian", 1.0, rate("sample_rate", sample_rate), adjacency)
    if sample_rate is not None or event.mechanism == "covered":
        raise ConfigurationError(
            "event= states its own sample_rate, and must cost something.", found=event, where="event"
        )
    return event


def _relative(factors: Sequence[float] | None, steps: int | None) -> dict[float, int]:
    if factors is None:
        times = count("steps", steps)
        return {1.0: times} if times else {}
    if steps is not None and count("steps", steps) != len(factors):
        raise ConfigurationError(
            f"steps is {steps!r}, but there are {len(factors)} factors.",
            found=steps,
            where="steps",
            fix="leave it out.",
        )
    return dict(Counter(positive("factors", factor) for factor in factors))


def _merged(spent: Mapping[Event, int], more: Mapping[Event, int]) -> dict[Event, int]:
    result = dict(spent)
    for event, times in more.items():
        result[event] = result.get(event, 0) + times
    return result


def _refuse_spent(target: _Target, spent: Mapping[Event, int]) -> None:
    if spent and target.excess(spent) >= -GRAIN:
        raise BudgetExceeded(
            f"What is spent already leaves no room below the target {target.limit:g}, whatever the noise.",
            found=target.limit,
            where="spent",
            fix="raise the target, or train on other records with a ledger of their own.",
        )


def _index(value: float) -> int:
    return math.floor(math.log(value) / GRAIN)


def _divergences(events: Mapping[Event, int]) -> Array:
    """Rényi divergences at the coarse orders; of a long history of different events only a start: none of it."""
    if len(events) > 64:
        return np.zeros(STEER.size)
    found = [[n * divergence(replace(event, adaptive=False), a) for a in STEER.tolist()] for event, n in events.items()]
    return np.sum(np.reshape(found, (-1, STEER.size)), axis=0)


def _best_ratio(cost: Array, room: Array) -> float:
    """log of the least share of the room that ``cost`` takes; inf where there is no room."""
    usable = room > 0.0
    if not usable.any():
        return math.inf
    share = float(np.min(cost[usable] / room[usable]))
    return math.log(share) if 0.0 < share < math.inf else math.copysign(math.inf, share - 1.0)
