"""Who is asked in a round, and what that costs: a sampler returns ids together with the events they pay.

A client that may be drawn but is not has spent as much as one that is, when the draw is what amplifies; when nothing is
gained from the draw, only those who were drawn pay.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import get_args

import numpy as np
from numpy.typing import NDArray

from sfumato import _validate
from sfumato.accounting import Event
from sfumato.errors import ConfigurationError
from sfumato.sampling import Poisson

Uniform = Callable[[int], NDArray[np.float64]]
NUMBERS = 2**31


@dataclass(frozen=True)
class PoissonCohort:
    """Every enrolled client takes part in a round independently with probability ``rate``; amplifies privacy.

    Rates refer to everybody who is enrolled: a client that is offline when drawn contributes nothing, and nobody takes
    its place. A cohort may be empty.
    """

    rate: float = 1.0

    def __post_init__(self) -> None:
        Poisson(self.rate)


@dataclass(frozen=True)
class FixedCohort:
    """``size`` clients, uniformly without replacement.

    With ``amplification`` the guarantee is for replacing one client, which moves the sum by up to 2C. Without (the
    default), who was drawn counts as known, and those who were pay in full, for a contribution that is left out (C).
    """

    size: int
    amplification: bool = False

    def __post_init__(self) -> None:
        _validate.count("size", self.size)
        if not isinstance(self.amplification, bool):
            raise ConfigurationError(f"amplification={self.amplification!r} is not a bool.", where="amplification")


@dataclass(frozen=True)
class MinSeparation:
    """``size`` clients among those who were not drawn in the last ``rounds`` - 1 rounds (fewer if there are not more).

    A client takes part at most once in ``rounds`` rounds; no secrecy of the draw is needed, and nothing is gained from
    it: those who were drawn pay in full.
    """

    size: int
    rounds: int

    def __post_init__(self) -> None:
        _validate.count("size", self.size)
        _validate.count("rounds", self.rounds)


Cohort = PoissonCohort | FixedCohort | MinSeparation


@dataclass(frozen=True)
class Terms:
    """What one client's part in a round amounts to: its chance factor, and the noise over its own bound."""

    noise_multiplier: float
    rate: float = 1.0


@dataclass(frozen=True)
class Drawn:
    """``ids``: whom to ask. ``charges``: events, each with the clients that pay it, disjoint. ``expected``: the sum of
    weights that the release is divided by, a public constant."""

    ids: tuple[str, ...]
    charges: tuple[tuple[Event, tuple[str, ...]], ...]
    expected: float


@dataclass
class History:
    """When each client was last drawn, by round number (MinSeparation)."""

    last: dict[str, int] = field(default_factory=dict)


def checked(cohort: object) -> Cohort:
    """Refuse anything that is not one of the samplers."""
    if not isinstance(cohort, get_args(Cohort)):
        raise ConfigurationError(
            f"cohort={cohort!r} is no cohort sampler.",
            found=cohort,
            where="cohort",
            fix="PoissonCohort, FixedCohort or MinSeparation.",
        )
    return cohort


def event_of(cohort: Cohort, terms: Terms, population: int, unit: str = "client", adaptive: bool = False) -> Event:
    """What a round costs a client that pays, when ``population`` clients may be drawn."""
    z = terms.noise_multiplier
    match cohort:
        case PoissonCohort():
            rate = cohort.rate * terms.rate
            return Event("poisson-gaussian", z, rate, "add-remove", unit, adaptive=adaptive)
        case FixedCohort(amplification=True):
            size = min(cohort.size, population)
            return Event(
                "fixed-size-gaussian",
                z,
                size / population,
                "replace-one",
                unit,
                "fixed-size",
                dataset_size=population,
                cap=size,
                adaptive=adaptive,
            )
        case _:
            return Event("gaussian", z, 1.0, "zero-out", unit, adaptive=adaptive)


def participations(cohort: Cohort, rounds: int, population: int, *, amplified: bool) -> int:
    """For how many rounds a client's noise is made to last.

    ``amplified``: everyone pays for every round. Otherwise those who are drawn pay, and this is the mean number of
    draws and two standard deviations: the few who are drawn more often run out of budget, and are not asked again.
    """
    match cohort:
        case MinSeparation():
            return min(rounds, -(-rounds // cohort.rounds))
        case PoissonCohort():
            rate = cohort.rate
        case FixedCohort():
            rate = min(1.0, cohort.size / population)
            amplified = amplified and cohort.amplification
    if amplified:
        return rounds
    mean = rounds * rate
    return max(1, min(rounds, math.ceil(mean + 2.0 * math.sqrt(mean * (1.0 - rate)))))


def draw(
    cohort: Cohort,
    clients: Sequence[str],
    terms: Mapping[str, Terms],
    weights: Mapping[str, float],
    *,
    number: int,
    history: History,
    uniform: Uniform,
    adaptive: bool = False,
) -> Drawn:
    """Draw the cohort of round ``number`` from ``clients`` (those who may still take part)."""
    clients = tuple(sorted(clients))
    coins = uniform(len(clients)) if clients else np.empty(0)
    match cohort:
        case PoissonCohort():
            # 1 - u lies in (0, 1] and is exact, so "<=" never rounds a probability up.
            ids = tuple(c for c, u in zip(clients, coins, strict=True) if 1.0 - u <= cohort.rate * terms[c].rate)
            paying = clients
            expected = sum(cohort.rate * terms[c].rate * weights[c] for c in clients)
        case FixedCohort():
            order = np.argsort(coins, kind="stable")[: cohort.size]
            ids = tuple(sorted(clients[i] for i in order))
            paying = clients if cohort.amplification else ids
            size = min(cohort.size, len(clients))
            expected = size * sum(weights[c] for c in clients) / max(1, len(clients))
        case MinSeparation():
            rested = [i for i, c in enumerate(clients) if number - history.last.get(c, -NUMBERS) >= cohort.rounds]
            order = np.asarray(rested, dtype=np.int64)[np.argsort(coins[rested], kind="stable")[: cohort.size]]
            ids = paying = tuple(sorted(clients[i] for i in order))
            expected = cohort.size * sum(weights[c] for c in clients) / max(1, len(clients))
    if isinstance(cohort, MinSeparation):  # who was drawn is a secret of the others, and is not kept
        history.last |= dict.fromkeys(ids, number)
    charges: dict[Event, list[str]] = {}
    for client in paying:
        charges.setdefault(event_of(cohort, terms[client], len(clients), adaptive=adaptive), []).append(client)
    return Drawn(ids, tuple((event, tuple(who)) for event, who in charges.items()), expected)


def number_of(client: str) -> int:
    """A client's record number in the ledger, the same in every run. Two that share one are charged for both."""
    return int.from_bytes(hashlib.sha256(f"client:{client}".encode()).digest()[:8], "big") % NUMBERS
