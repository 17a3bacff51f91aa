"""Integer noise: the tables against exact laws, the draws against the tables' laws, and what is refused."""

from __future__ import annotations

import math
from collections.abc import Callable
from fractions import Fraction

import mpmath
import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy import stats

from sfumato.errors import ConfigurationError
from sfumato.noise import Research, Secure, integers
from sfumato.noise._keystream import random_bytes

ALPHA = 1e-9
N = 200_000


def pmf_of(law: str, parameter: float, xs: NDArray[np.int64]) -> NDArray[np.float64]:
    """From scipy, or normalised by summation: nothing in common with the tables."""
    if law == "skellam":
        return np.asarray(stats.skellam.pmf(xs, parameter / 2, parameter / 2))
    if law == "poisson":
        return np.asarray(stats.poisson.pmf(xs, parameter))
    wide = np.arange(-20_000, 20_001)
    exponent = wide**2 / (2 * parameter) if law == "discrete_gaussian" else np.abs(wide) / parameter
    return np.exp(-(xs**2 / (2 * parameter) if law == "discrete_gaussian" else np.abs(xs) / parameter)) / math.fsum(
        np.exp(-exponent)
    )


def p_value(draws: NDArray[np.int64], law: str, parameter: float) -> float:
    """Chi-squared goodness of fit, neighbouring integers pooled until each pool expects at least 20."""
    reach = int(max(np.abs(draws).max(), 1)) + 50
    xs = np.arange(-reach, reach + 1)
    expected = pmf_of(law, parameter, xs) * len(draws)
    found = np.bincount(draws + reach, minlength=2 * reach + 1)
    pools = np.minimum(np.cumsum(expected) // 20, len(draws) // 20 - 1).astype(int)
    want, got = np.bincount(pools, expected), np.bincount(pools, found)
    used = want > 5
    want, got = np.append(want[used], want[~used].sum()), np.append(got[used], got[~used].sum())
    statistic = float(((got - want)[want > 0] ** 2 / want[want > 0]).sum())
    return float(stats.chi2.sf(statistic, int((want > 0).sum()) - 1))


LAWS = [
    ("skellam", 0.02), ("skellam", 0.7), ("skellam", 5.0), ("skellam", 433.25),
    ("discrete_gaussian", 0.1), ("discrete_gaussian", 0.6), ("discrete_gaussian", 25.0),
    ("discrete_gaussian", 1000.5), ("discrete_laplace", 0.3), ("discrete_laplace", 7.5),
    ("poisson", 0.01), ("poisson", 3.0), ("poisson", 250.0),
]  # fmt: skip


@pytest.mark.parametrize(("law", "parameter"), LAWS)
def test_draws_follow_the_law(law: str, parameter: float) -> None:
    draw = getattr(integers, law)
    assert p_value(draw(N, parameter, random_bytes), law, parameter) > ALPHA


@pytest.mark.parametrize("factor", [0.7, 1.3])
@pytest.mark.parametrize(("law", "parameter"), LAWS)
def test_a_parameter_30_percent_off_is_found(law: str, parameter: float, factor: float) -> None:
    draw = getattr(integers, law)
    assert p_value(draw(N, parameter * factor, random_bytes), law, parameter) < ALPHA


@pytest.mark.parametrize(
    ("table", "log_weight", "parameter"),
    [
        (integers._discrete_gaussian, lambda k, s: -(mpmath.mpf(k) ** 2) / (2 * s), Fraction(1, 7)),
        (integers._discrete_gaussian, lambda k, s: -(mpmath.mpf(k) ** 2) / (2 * s), Fraction(901, 3)),
        (integers._discrete_laplace, lambda k, s: -mpmath.mpf(abs(k)) / s, Fraction(22, 7)),
        (integers._poisson, lambda k, s: k * mpmath.log(s) - mpmath.loggamma(k + 1), Fraction(3, 100)),
        (integers._poisson, lambda k, s: k * mpmath.log(s) - mpmath.loggamma(k + 1), Fraction(2021, 10)),
    ],
)
def test_every_threshold_is_exact_to_100_bits(
    table: Callable[[Fraction], integers._Table],
    log_weight: Callable[[int, mpmath.mpf], mpmath.mpf],
    parameter: Fraction,
) -> None:
    """Against 80 digits, with a support three times as wide as the table's."""
    held = table(parameter)
    with mpmath.workdps(80):
        value = mpmath.mpf(parameter.numerator) / parameter.denominator
        size = len(held.heads) + 1
        low = max(0, held.first - size) if table is integers._poisson else held.first - size
        weights = {k: mpmath.exp(log_weight(k, value)) for k in range(low, held.first + 2 * size)}
        total = mpmath.fsum(weights.values())
        below = mpmath.fsum(w for k, w in weights.items() if k < held.first)
        distance = below / total
        for i in range(size - 1):
            below += weights[held.first + i]
            stored = mpmath.mpf((int(held.heads[i]) << 64) + int(held.tails[i])) / mpmath.mpf(2) ** 128
            distance = max(distance, abs(stored - below / total))
        above = mpmath.fsum(w for k, w in weights.items() if k >= held.first + size) / total
        assert max(distance, above) < mpmath.mpf(2) ** -100


def test_equal_first_words_are_decided_by_the_second() -> None:
    """The draw is the number of thresholds <= the 128 bits, also next to, and on, a threshold."""
    table = integers._discrete_gaussian(Fraction(50))
    full = [(int(h) << 64) + int(t) for h, t in zip(table.heads, table.tails, strict=True)]
    word = (1 << 64) - 1
    for threshold in (full[0], full[len(full) // 3], full[-20], full[-1]):
        for bits in (max(0, threshold - 1), threshold, min(2**128 - 1, threshold + 1)):
            tail = np.array([bits & word], np.uint64)
            found = table.look_up(np.array([bits >> 64], np.uint64), lambda _, tail=tail: tail.view(np.uint8))
            assert found[0] == table.first + sum(t <= bits for t in full)


@pytest.mark.parametrize(("shares", "variance"), [(2, 1.0), (7, 12.0), (30, 90.0)])
def test_shares_add_up_to_the_whole(shares: int, variance: float) -> None:
    share = Fraction(variance) / shares
    total = sum(integers.skellam(N, share, random_bytes) for _ in range(shares))
    assert p_value(np.asarray(total), "skellam", variance) > ALPHA
    short = total - integers.skellam(N, share, random_bytes) * 0
    for _ in range(math.ceil(0.3 * shares)):
        short = short + integers.skellam(N, share, random_bytes)
    assert p_value(np.asarray(short), "skellam", variance) < ALPHA


@pytest.mark.parametrize("variance", [10**9, 10**10])
def test_wide_skellam_has_the_normal_limit(variance: int) -> None:
    """At 1e10 several tables are added; a standard deviation 30 % off must fail."""
    draws = integers.skellam(50_000, variance, random_bytes)

    def fits(sample: NDArray[np.float64]) -> bool:
        return bool(stats.kstest(sample, stats.norm(0, math.sqrt(variance)).cdf).pvalue > ALPHA)

    assert fits(draws.astype(float))
    assert not fits(draws * 1.3)
    assert not fits(draws * 0.7)


@pytest.mark.parametrize("kind", [Secure, lambda: Research(3)])
def test_sources_give_integers_of_any_shape(kind: Callable[[], Secure | Research]) -> None:
    source = kind()
    for drawn in (
        source.skellam((3, 5), variance=9),
        source.discrete_gaussian((3, 5), sigma2=Fraction(9, 2)),
        source.discrete_laplace((3, 5), scale=2.5),
    ):
        assert drawn.shape == (3, 5)
        assert drawn.dtype == torch.int64
        assert drawn.abs().max() > 0
    assert source.skellam((0,), variance=1).shape == (0,)
    assert not source.skellam((100,), variance=0).any()
    assert not torch.equal(source.skellam((100,), variance=9), source.skellam((100,), variance=9))


def test_research_repeats_and_keeps_its_streams_apart() -> None:
    first, second = Research(11), Research(11)
    second.normal((7,), std=1.0)
    second.uniform(3)
    assert torch.equal(first.skellam((50,), variance=100), second.skellam((50,), variance=100))
    assert torch.equal(first.normal((7,), std=1.0), Research(11).normal((7,), std=1.0))
    assert not torch.equal(Research(11).skellam((50,), variance=100), Research(12).skellam((50,), variance=100))


@pytest.mark.parametrize("value", [-1, -0.5, math.nan, math.inf, True, "1", None, Fraction(-1, 9), 10**13])
@pytest.mark.parametrize("law", ["skellam", "discrete_gaussian", "discrete_laplace", "poisson"])
def test_what_is_not_a_variance_is_refused(law: str, value: object) -> None:
    with pytest.raises(ConfigurationError) as caught:
        getattr(integers, law)(3, value, random_bytes)
    assert caught.value.where in ("variance", "sigma2", "scale", "mean")


def test_the_widest_tables_stay_within_the_size_the_error_bound_assumes() -> None:
    limits = (integers._poisson, integers._PART), (integers._discrete_gaussian, integers._PART)
    for table, limit in (*limits, (integers._discrete_laplace, Fraction(integers.WIDEST // 224 - 2))):
        assert len(table(limit).heads) < integers.WIDEST
