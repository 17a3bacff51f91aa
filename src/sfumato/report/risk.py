"""What an ε means: the attacks it rules out, the sampling it rests on, the groups it weakens for."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace

from ..accounting import Event, advantage, compose, true_positive_rate
from ..accounting import trade_off as curve
from .facts import Meaning

FALSE_ALARMS = (0.001, 0.01, 0.1)
GROUPS = (2, 5, 10)
DELTAS = (1e-3, 1e-4, 1e-5, 1e-6, 1e-7, 1e-8, 1e-9)
SMALLEST_DELTA = 1e-15  # the accountant is certified down to here


def meaning(
    events: Mapping[Event, int],
    *,
    delta: float,
    false_alarms: Sequence[float] = FALSE_ALARMS,
    groups: Sequence[int] = GROUPS,
) -> Meaning:
    """Certified upper bounds for everything that ``events`` released; see :class:`Meaning`."""
    alone = without_amplification(events)
    return Meaning(
        advantage=min(1.0, advantage(events)),
        detection=tuple((a, min(1.0, true_positive_rate(events, false_positive_rate=a))) for a in false_alarms),
        unamplified=None if alone is None else float(compose(alone, delta=delta)),
        groups=tuple((k, group_epsilon(events, k, delta=delta)) for k in groups),
    )


def profile(events: Mapping[Event, int]) -> tuple[tuple[float, float], ...]:
    """((δ, ε), …) at the δ that a report shows."""
    return tuple((delta, float(compose(events, delta=delta))) for delta in DELTAS)


def trade_off(events: Mapping[Event, int], points: int = 100) -> tuple[tuple[float, float], ...]:
    """((false-alarm rate, highest detection rate), …) from 0 to 1, closer together where false alarms are few."""
    alarms = [(i / points) ** 2 for i in range(points + 1)]
    return tuple((a, min(1.0, float(power))) for a, power in zip(alarms, curve(events, alarms), strict=True))


def without_amplification(events: Mapping[Event, int]) -> dict[Event, int] | None:
    """The same releases in shuffled or fixed batches: a record is in one of every ⌈1/q⌉ steps, and in that one surely.

    None if no event is sampled. Nothing is then gained from not knowing which records a step used.
    """
    if not any(event.sample_rate < 1.0 for event in events):
        return None
    found: Counter[Event] = Counter()
    for event, count in events.items():
        if event.sample_rate < 1.0:
            every = math.ceil(1.0 / event.sample_rate - 1e-9)
            event, count = _surely(event), math.ceil(count / every)
        found[event] += count
    return dict(found)


def _surely(event: Event) -> Event:
    if event.mechanism in ("laplace", "discrete-gaussian"):
        return replace(event, sample_rate=1.0)
    return replace(event, mechanism="gaussian", sample_rate=1.0, sampler="shuffle", dataset_size=None, cap=None)


def group_epsilon(events: Mapping[Event, int], k: int, *, delta: float) -> float:
    """ε at ``delta`` for ``k`` units together; inf where no bound is known.

    Exact for Gaussian releases where k units are one unit with k times its records. Otherwise by the lemma of group
    privacy, (ε, δ')-DP gives (kε, δ' (1 + e^ε + … + e^((k-1)ε))) (Vadhan 2017, lemma 2.2), at the best ε found.
    """
    if all(_joins(event) for event in events):
        many = {e if e.mechanism == "covered" else replace(e, records=k * e.records): n for e, n in events.items()}
        return float(compose(many, delta=delta))
    epsilon = float(compose(events, delta=delta))
    for _ in range(50):
        if not (k - 1) * epsilon < 600.0:
            break
        share = delta / sum(math.exp(i * epsilon) for i in range(k))
        if share < SMALLEST_DELTA:
            break
        needed = float(compose(events, delta=share))
        if needed <= epsilon:
            return k * epsilon
        epsilon = needed * 1.001
    return math.inf


def _joins(event: Event) -> bool:
    """Whether several units are accounted for as one with more records."""
    if event.sample_rate < 1.0:
        plain = event.mechanism == "poisson-gaussian" and not event.adaptive
        return plain and event.sampler == "poisson" and event.adjacency != "replace-one"
    return event.mechanism in ("gaussian", "poisson-gaussian", "covered") and not event.adaptive
