"""From events to the pairs they are charged as; what has no exact account is refused here, by name."""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import lru_cache

import numpy as np

from ..errors import ConfigurationError
from .budget import count
from .events import Event
from .pairs import LARGEST_LATTICE, Discrete, Laplace, Mixture, Pair, Release, Truncated


def needs_renyi(events: Mapping[Event, int]) -> bool:
    """Whether some event can be accounted for by Rényi divergences only."""
    return any(times and event.mechanism != "covered" and _renyi_only(event) for event, times in events.items())


def _renyi_only(event: Event) -> bool:
    wide = event.dimension > 1 or event.noise_multiplier * event.sensitivity > LARGEST_LATTICE
    return (
        event.adaptive
        or event.mechanism in ("fixed-size-gaussian", "skellam")
        or (event.mechanism == "discrete-gaussian" and wide)
    )


def charges(events: Mapping[Event, int]) -> dict[Event, int]:
    """The events that cost something, checked: one unit, comparable adjacencies, each covered release has its payer."""
    counted = {event: count("count of an event", times) for event, times in events.items()}
    if len(units := sorted({event.unit for event in counted})) > 1:
        raise ConfigurationError(
            f"events protect different units ({', '.join(units)}), so no single epsilon describes them.",
            found=units,
            fix="compose each unit on its own.",
        )
    if len(relations := {event.adjacency for event in counted}) > 1 and "replace-one" in relations:
        raise ConfigurationError(
            f"events hold for different neighbours ({', '.join(sorted(relations))}), so no single epsilon describes "
            "them.",
            found=sorted(relations),
            fix="account for all of them under one adjacency.",
        )
    result = {}
    for event, times in counted.items():
        if event.mechanism != "covered":
            if times:
                result[event] = times
        elif times and not any(n and _pays(payer, event) for payer, n in counted.items()):
            raise ConfigurationError(
                f"{times} covered release(s) at noise multiplier {event.noise_multiplier} without an event of the same "
                f"{event.sampler} epoch or cycle, with no more noise, that pays for them.",
                found=event,
                fix="charge the epoch or cycle before its later batches.",
            )
    return result


def _pays(payer: Event, covered: Event) -> bool:
    kind = {"shuffle": "gaussian", "cyclic": "poisson-gaussian"}.get(covered.sampler)
    return (
        payer.mechanism == kind
        and payer.sampler == covered.sampler
        and payer.adjacency == covered.adjacency
        and payer.noise_multiplier <= covered.noise_multiplier
    )


def releases(events: Mapping[Event, int]) -> dict[Pair, int]:
    """What ``events`` cost, checked, as pairs. Raises ConfigurationError for an event whose loss has no known law."""
    result: dict[Pair, int] = {}
    for event, times in charges(events).items():
        pair = pair_of(event)
        result[pair] = result.get(pair, 0) + times
    return result


@lru_cache(maxsize=1024)
def pair_of(event: Event) -> Pair:
    """The pair that dominates ``event``."""
    sigma, q, replaced = event.noise_multiplier, event.sample_rate, event.adjacency == "replace-one"
    if _renyi_only(event) or event.mechanism == "covered":
        raise _refused(event, "the law of its privacy loss is not known in advance", "use a Rényi bound on epsilon.")
    if event.mechanism == "gaussian" or (event.mechanism == "poisson-gaussian" and q == 1.0):
        return Release(sigma / (event.records * (2 if replaced else 1)), 1.0)
    if event.mechanism == "poisson-gaussian":
        if replaced and event.records > 1:
            raise _refused(event, "sampled replacement of several records has no known worst case", "use 'zero-out'.")
        return Mixture(sigma, q, event.records, replaced) if replaced or event.records > 1 else Release(sigma, q)
    if event.mechanism == "truncated-poisson-gaussian":
        return _truncated(event)
    if event.mechanism == "laplace":
        if replaced and q < 1.0:
            raise _refused(event, "sampled replacement under Laplace noise is not implemented", "use 'zero-out'.")
        return Laplace(0.5 * sigma if replaced else sigma, q)
    assert event.mechanism == "discrete-gaussian"
    if event.sensitivity != int(event.sensitivity):
        raise _refused(event, "an integer query has an integer sensitivity", "round the sensitivity down.")
    reach = int(event.sensitivity)
    if replaced and q == 1.0:
        return Discrete(sigma * event.sensitivity, 1.0, 2 * reach, False)
    return Discrete(sigma * event.sensitivity, q, reach, replaced)


def _refused(event: Event, why: str, fix: str) -> ConfigurationError:
    return ConfigurationError(f"{event} cannot be accounted for exactly: {why}.", found=event, fix=fix)


def _truncated(event: Event) -> Pair:
    """Reveal which other records are in the batch; the record itself is then in it with a known probability.

    With K ~ Binomial(n - 1, q) others drawn and s kept: s < cap - 1 means no truncation, hence rate q; s = cap means
    that the record is out; s = cap - 1 means K = cap - 1, or K >= cap and the record was drawn and kept.
    """
    from scipy.stats import binom  # a third of a second, for those who truncate

    assert event.cap is not None
    assert event.dataset_size is not None
    q, cap, others = event.sample_rate, event.cap, event.dataset_size - 1
    if cap > others:
        return Release(event.noise_multiplier, q)
    below, at = float(binom.cdf(cap - 2, others, q)), float(binom.pmf(cap - 1, others, q))
    top = max(cap, others * q)
    drawn = np.arange(cap, min(others, int(top + 50.0 * math.sqrt(top) + 1000.0)) + 1)  # what is left out is < 1e-300
    kept = q * (at + math.fsum(binom.pmf(drawn, others, q) * (cap / (drawn + 1.0))))
    edge = kept + (1.0 - q) * at
    parts = ((below, q), (edge, min(1.0, kept / edge) if edge else 1.0), (max(0.0, 1.0 - below - edge), 0.0))
    return Truncated(event.noise_multiplier, parts)
