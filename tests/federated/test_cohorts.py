"""Who is drawn, who pays, and that the two cannot disagree."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import numpy as np
import pytest

from sfumato.errors import ConfigurationError
from sfumato.federated.cohorts import (
    FixedCohort,
    History,
    MinSeparation,
    PoissonCohort,
    Terms,
    checked,
    draw,
    event_of,
    number_of,
    participations,
)

NAMES = tuple(f"c{i:02d}" for i in range(20))
ONE = dict.fromkeys(NAMES, Terms(1.0))
WEIGHTS = dict.fromkeys(NAMES, 1.0)


def drawn(
    cohort: Any, number: int = 1, seed: int = 0, terms: Any = ONE, history: Any = None, names: Any = NAMES
) -> Any:
    rng = np.random.default_rng((seed, number))
    return draw(
        cohort,
        names,
        terms,
        WEIGHTS,
        number=number,
        history=History() if history is None else history,
        uniform=rng.random,
    )


def test_poisson_rates() -> None:
    """Each client by itself, with its own rate; sizes vary, and empty cohorts happen."""
    terms = {c: Terms(1.0, 0.5 if i < 10 else 1.0) for i, c in enumerate(NAMES)}
    rounds = 6000
    counts: Counter[str] = Counter()
    sizes: Counter[int] = Counter()
    for k in range(rounds):
        ids = drawn(PoissonCohort(0.2), k, terms=terms).ids
        counts.update(ids)
        sizes[len(ids)] += 1
    for c in NAMES:
        q = 0.2 * terms[c].rate
        assert abs(counts[c] - rounds * q) < 6.2 * math.sqrt(rounds * q * (1 - q))
    assert sizes[0] > 0
    variance = sum(n * (s - 3.0) ** 2 for s, n in sizes.items()) / rounds
    assert variance == pytest.approx(10 * 0.1 * 0.9 + 10 * 0.2 * 0.8, rel=0.2)  # of independent draws


def test_poisson_rate_is_never_rounded_up() -> None:
    """A coin of exactly 1 - q decides against taking part more often than not; q = 1 takes everybody."""
    low = draw(
        PoissonCohort(0.25),
        ("a",),
        {"a": Terms(1.0)},
        {"a": 1.0},
        number=1,
        history=History(),
        uniform=lambda n: np.full(n, 0.75 - 1e-9),
    )
    assert low.ids == ()
    for value in (0.0, 0.5, 1 - 2.0**-53):
        got = draw(
            PoissonCohort(),
            ("a",),
            {"a": Terms(1.0)},
            {"a": 1.0},
            number=1,
            history=History(),
            uniform=lambda n, v=value: np.full(n, v),
        )
        assert got.ids == ("a",)


def test_poisson_charges_everybody_and_fixed_cohorts_only_the_drawn() -> None:
    """Nobody may conclude from the draw in the first case; in the others it counts as known."""
    for k in range(200):
        (event, paying), *rest = drawn(PoissonCohort(0.1), k).charges
        assert not rest
        assert paying == NAMES
        assert (event.mechanism, event.sample_rate, event.adjacency) == ("poisson-gaussian", 0.1, "add-remove")
        for cohort in (FixedCohort(5), MinSeparation(5, 3)):
            got = drawn(cohort, k)
            ((event, paying),) = got.charges
            assert paying == got.ids
            assert len(got.ids) == 5
            assert (event.mechanism, event.sample_rate, event.adjacency) == ("gaussian", 1.0, "zero-out")
        ((event, paying),) = drawn(FixedCohort(5, amplification=True), k).charges
        assert paying == NAMES
        assert (event.mechanism, event.adjacency, event.dataset_size, event.cap) == (
            "fixed-size-gaussian",
            "replace-one",
            20,
            5,
        )


def test_charges_by_terms_are_disjoint_and_complete() -> None:
    terms = {c: Terms(1.0 + i % 3, 1.0 / (1 + i % 2)) for i, c in enumerate(NAMES)}
    for cohort in (PoissonCohort(0.3), FixedCohort(7), FixedCohort(7, amplification=True)):
        got = drawn(cohort, terms=terms)
        paying = [c for _, who in got.charges for c in who]
        assert sorted(paying) == sorted(got.ids if cohort == FixedCohort(7) else NAMES)
        for event, who in got.charges:
            assert all(event == event_of(cohort, terms[c], len(NAMES)) for c in who)


def test_fixed_draws_are_uniform_without_replacement() -> None:
    counts = Counter(c for k in range(4000) for c in drawn(FixedCohort(5), k).ids)
    assert max(abs(counts[c] - 1000) for c in NAMES) < 6.2 * math.sqrt(4000 * 0.25 * 0.75)
    assert all(len(set(drawn(FixedCohort(5), k).ids)) == 5 for k in range(50))
    assert drawn(FixedCohort(50)).ids == NAMES


def test_min_separation() -> None:
    """Nobody is drawn twice within ``rounds`` rounds, even when too few are left."""
    history, last = History(), {}
    for k in range(1, 200):
        got = drawn(MinSeparation(6, 4), k, history=history)
        for c in got.ids:
            assert k - last.get(c, -10) >= 4
            last[c] = k
        assert len(got.ids) <= 6
    assert sorted(last) == list(NAMES)


def test_the_estimate_is_divided_by_a_public_constant() -> None:
    """Not by how many were drawn: that would be a release of its own."""
    for cohort in (PoissonCohort(0.3), FixedCohort(5), MinSeparation(5, 2)):
        assert len({drawn(cohort, k).expected for k in range(100)}) == 1


def test_a_smaller_population_is_charged_at_its_higher_rate() -> None:
    few = NAMES[:4]
    got = drawn(FixedCohort(3, amplification=True), names=few)
    assert got.charges[0][0].sample_rate == pytest.approx(0.75)
    assert got.charges[0][0].dataset_size == 4


def test_nobody_to_draw_from() -> None:
    for cohort in (PoissonCohort(0.3), FixedCohort(5), MinSeparation(5, 2)):
        got = drawn(cohort, names=())
        assert got.ids == ()
        assert got.charges == ()


@pytest.mark.parametrize(
    "make",
    [
        lambda: PoissonCohort(0.0),
        lambda: PoissonCohort(1.1),
        lambda: PoissonCohort(math.nan),
        lambda: FixedCohort(0),
        lambda: FixedCohort(2.5),  # type: ignore[arg-type]
        lambda: FixedCohort(2, amplification=1),  # type: ignore[arg-type]
        lambda: MinSeparation(0, 1),
        lambda: MinSeparation(1, 0),
        lambda: checked("poisson"),
    ],
)
def test_refused(make: Any) -> None:
    with pytest.raises(ConfigurationError):
        make()


def test_participations_cover_what_is_paid() -> None:
    assert participations(PoissonCohort(0.1), 100, 20, amplified=True) == 100
    assert participations(FixedCohort(2), 100, 20, amplified=True) < 25
    assert participations(FixedCohort(2, amplification=True), 100, 20, amplified=True) == 100
    assert participations(MinSeparation(2, 5), 100, 20, amplified=True) == 20
    assert participations(PoissonCohort(), 7, 20, amplified=False) == 7


def test_numbers_in_the_ledger() -> None:
    assert number_of("c1") == number_of("c1")
    assert len({number_of(f"client {i}") for i in range(1000)}) == 1000
    assert all(0 <= number_of(str(i)) < 2**31 for i in range(100))
