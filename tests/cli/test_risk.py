"""What an ε means: attack bounds against closed forms, sampling, groups."""

from __future__ import annotations

import math

import pytest
from scipy.stats import norm

from sfumato.accounting import Event, compose
from sfumato.report.risk import group_epsilon, meaning, trade_off, without_amplification

DELTA = 1e-5
PLAIN = {Event("gaussian", 2.0, 1.0, "zero-out", sampler="shuffle"): 4}  # mu = 1
SAMPLED = {Event("poisson-gaussian", 1.5, 0.02, "add-remove"): 101}


def test_attacks_on_a_gaussian_have_the_closed_form() -> None:
    found = meaning(PLAIN, delta=DELTA)
    advantage = 2.0 * norm.cdf(0.5) - 1.0
    assert advantage <= found.advantage <= 1.01 * advantage
    for alarms, power in found.detection:
        exact = norm.cdf(norm.ppf(alarms) + 1.0)
        assert exact <= power <= 1.01 * exact
    assert [alarms for alarms, _ in found.detection] == [0.001, 0.01, 0.1]


def test_the_curve_is_the_same_bound() -> None:
    points = trade_off(PLAIN, points=20)
    assert (points[0][0], points[-1]) == (0.0, (1.0, 1.0))
    assert [a for a, _ in points] == sorted(a for a, _ in points)
    for alarms, power in points:
        assert power >= norm.cdf(norm.ppf(alarms) + 1.0) - 1e-12


def test_without_sampling_a_record_is_in_one_step_of_each_epoch() -> None:
    shuffled = Event("gaussian", 1.5, 1.0, "add-remove", sampler="shuffle")
    assert without_amplification(SAMPLED) == {shuffled: 3}  # 101 steps of which 50 make an epoch: in 3 of them
    assert meaning(SAMPLED, delta=DELTA).unamplified == float(compose({shuffled: 3}, delta=DELTA))
    assert without_amplification(PLAIN) is None
    assert meaning(PLAIN, delta=DELTA).unamplified is None
    assert without_amplification(PLAIN | {Event("poisson-gaussian", 2.0, 0.3, "zero-out"): 8}) == PLAIN | {
        Event("gaussian", 2.0, 1.0, "zero-out", sampler="shuffle"): 4 + 2
    }
    laplace = Event("laplace", 2.0, 0.5, "add-remove")
    assert without_amplification({laplace: 3}) == {Event("laplace", 2.0, 1.0, "add-remove"): 2}


def test_a_group_of_k_moves_a_gaussian_k_times_as_far() -> None:
    for k, found in meaning(PLAIN, delta=DELTA).groups:
        closer = {Event("gaussian", 2.0 / k, 1.0, "zero-out", sampler="shuffle"): 4}
        assert found == pytest.approx(float(compose(closer, delta=DELTA)), rel=1e-9)


def test_groups_grow_with_k_and_the_lemma_is_never_below_the_exact_value() -> None:
    exact = [group_epsilon(SAMPLED, k, delta=DELTA) for k in (1, 2, 3, 5)]
    assert exact == sorted(exact)
    assert exact[0] == pytest.approx(float(compose(SAMPLED, delta=DELTA)))
    # The lemma is used for cyclic draws, which have the same law for one record.
    cyclic = {Event("poisson-gaussian", 1.5, 0.02, "add-remove", sampler="cyclic"): 101}
    for k, tight in zip((2, 3, 5), exact[1:], strict=True):
        assert tight <= group_epsilon(cyclic, k, delta=DELTA) <= 5.0 * tight


def test_the_lemma_gives_a_guarantee_that_the_curve_supports() -> None:
    """ε_k/k at the δ' that it spends: k gaussian units, by the lemma, from the exact profile of one."""
    events = {Event("gaussian", 3.0, 1.0, "replace-one", sampler="shuffle"): 1, **_sampled_replacement()}
    k = 4
    per_unit = group_epsilon(events, k, delta=DELTA) / k
    share = DELTA / sum(math.exp(i * per_unit) for i in range(k))
    assert float(compose(events, delta=share)) <= per_unit


def _sampled_replacement() -> dict[Event, int]:
    return {Event("poisson-gaussian", 3.0, 0.01, "replace-one"): 50}


def test_no_noise_protects_nobody() -> None:
    found = meaning({Event("poisson-gaussian", 0.0, 0.1, "add-remove"): 3}, delta=DELTA)
    assert found.advantage == 1.0
    assert {power for _, power in found.detection} == {1.0}
    assert found.unamplified == math.inf
    assert {value for _, value in found.groups} == {math.inf}


def test_too_large_a_group_has_no_bound_rather_than_a_wrong_one() -> None:
    assert group_epsilon(_sampled_replacement(), 10_000, delta=DELTA) == math.inf
