"""The bound finds a quantile of the norms; sum and count together cost what the step is charged for."""

import math

import mpmath
import numpy as np
import pytest

from sfumato.clipping import Quantile, gradient_multiplier, noisy_fraction, update
from sfumato.errors import ConfigurationError


@pytest.mark.parametrize("count_noise", [0.6, 1.0, 12.8, 1e4])
@pytest.mark.parametrize("z", [1e-3, 0.5, 0.8, 1.1, 1.99999999])
def test_sum_and_count_together_have_the_noise_multiplier(z, count_noise):
    if z >= 2 * count_noise:
        with pytest.raises(ConfigurationError, match="count_noise"):
            gradient_multiplier(z, count_noise)
        return
    alone = gradient_multiplier(z, count_noise)
    with mpmath.workdps(50):
        joint = 1 / mpmath.sqrt(mpmath.mpf(alone) ** -2 + (2 * mpmath.mpf(count_noise)) ** -2)
        assert joint >= z  # never less noise than is charged
        assert joint <= z * (1 + mpmath.mpf("1e-6"))
    assert alone >= z


@pytest.mark.parametrize("seed", range(5))
def test_rounding_is_to_the_safe_side(seed):
    rng = np.random.default_rng(seed)
    for _ in range(200):
        z = float(10 ** rng.uniform(-3, 2))
        count_noise = z / 2 * (1 + float(10 ** rng.uniform(-14, 2)))
        if z / (2 * count_noise) >= 1:
            continue
        with mpmath.workdps(60):
            alone = mpmath.mpf(gradient_multiplier(z, count_noise))
            assert alone**-2 + (2 * mpmath.mpf(count_noise)) ** -2 <= mpmath.mpf(z) ** -2


def test_no_noise_stays_no_noise_and_equality_is_refused():
    assert gradient_multiplier(0.0, 3.0) == 0.0
    for z, count_noise in ((2.0, 1.0), (3.0, 1.0), (math.inf, 1.0), (math.nan, 1.0), (1.0, 0.0), (-1.0, 1.0)):
        with pytest.raises(ConfigurationError):
            gradient_multiplier(z, count_noise)


@pytest.mark.parametrize(
    "bad",
    [
        {"target": 0.0},
        {"target": 1.0},
        {"target": math.nan},
        {"learning_rate": 0.0},
        {"learning_rate": math.inf},
        {"count_noise": 0.0},
        {"lowest": 0.0},
        {"lowest": 2.0, "highest": 1.0},
        {"highest": math.inf},
    ],
)
def test_bad_settings(bad):
    with pytest.raises(ConfigurationError, match=next(iter(bad))):
        Quantile(**bad)


def test_the_count_noise_follows_the_expected_batch():
    assert Quantile().resolved(256).count_noise == 12.8
    assert Quantile(count_noise=3).resolved(256).count_noise == 3.0


def test_one_record_moves_the_fraction_by_half_a_record():
    for below in (True, False):
        moved = noisy_fraction(40 + below, 101, 0.3, 100) - noisy_fraction(40, 100, 0.3, 100)
        assert abs(moved) == pytest.approx(0.5 / 100)
    assert noisy_fraction(0, 0, 0.0, 100) == 0.5  # nobody drawn says nothing either way


def test_the_bound_stays_in_its_range_whatever_the_noise():
    q = Quantile(lowest=0.5, highest=2.0)
    assert update(q, 1.0, 1e9, 0) == 0.5
    assert update(q, 1.0, -1e9, 0) == 2.0
    assert update(q, 1.0, q.target, 0) == 1.0
    assert update(q, 1.0, 1.0, 10**6) == pytest.approx(math.exp(-0.05))
    assert update(q, 1.0, 1e9, 10**6) == pytest.approx(math.exp(-0.05))  # more than all of them it cannot have been
    assert update(Quantile(learning_rate=1e9, highest=1e6), 1.0, -1e300, 3) == 1e6


NORMS = {
    "lognormal": lambda rng, n: rng.lognormal(0.3, 1.0, n),
    "fixed": lambda rng, n: np.ones(n),
    "heavy": lambda rng, n: rng.pareto(1.5, n) + 0.1,
    "uniform": lambda rng, n: rng.uniform(0, 7, n),
    "two peaks": lambda rng, n: np.where(rng.random(n) < 0.7, rng.normal(1, 0.2, n), rng.normal(30, 3, n)).clip(0.01),
}


@pytest.mark.parametrize("start", [0.1, 10.0])
@pytest.mark.parametrize("target", [0.3, 0.5, 0.7])
@pytest.mark.parametrize("norms", sorted(NORMS))
@pytest.mark.parametrize("expected", [200, 1000])
def test_the_quantile_is_found_within_60_rounds(target, norms, start, expected):
    if (norms, target) == ("two peaks", 0.7):
        target = 0.6  # at 0.7 the quantile lies in the gap between the peaks, where there is none to find
    rng = np.random.default_rng(1)
    population = 20_000
    every = NORMS[norms](rng, population)
    q = Quantile(target=target).resolved(expected)
    true = float(np.quantile(every, target))
    bound, bounds = true * start, []
    for step in range(60):
        drawn = every[rng.random(population) < expected / population]
        noise = float(rng.normal(0, q.count_noise))
        bound = update(q, bound, noisy_fraction(int((drawn <= bound).sum()), len(drawn), noise, expected), step)
        bounds.append(bound)
    assert abs(math.log(np.mean(bounds[-10:]) / true)) < math.log(1.1)
