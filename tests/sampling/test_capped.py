"""Capped and cyclic draws have the distribution that the accountant assumes; a wrong sampler is found out."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from scipy import stats

from sfumato.errors import ConfigurationError, PrivacyError
from sfumato.sampling import (
    CyclicPoisson,
    TruncatedPoisson,
    cyclic_group,
    draw_cyclic,
    draw_poisson,
    draw_truncated,
    pad,
    truncation,
)

ALPHA = 1e-9
N, RATE, CAP, CYCLE, STEPS = 40, 0.25, 11, 4, 24_000


def taken_by(draw: Callable[[int], np.ndarray], n: int = N, steps: int = STEPS) -> np.ndarray:
    """(steps, n): who was drawn when."""
    taken = np.zeros((steps, n), bool)
    for step, row in enumerate(taken):
        row[draw(step)] = True
    return taken


def least_p(taken: np.ndarray, sizes: stats.rv_discrete) -> float:
    """Smallest corrected p-value: sizes, exchangeable inclusion of records and of pairs of them, given the sizes."""
    steps, n = taken.shape
    size = taken.sum(1)
    mean, variance = sizes.mean(), sizes.var()
    k = np.arange(n + 1)
    fourth = float((sizes.pmf(k) * (k - mean) ** 4).sum())
    found = [2 * stats.norm.sf(abs(size.mean() - mean) / (variance / steps) ** 0.5)]
    spread = ((size - mean) ** 2).mean() - variance
    found.append(2 * stats.norm.sf(abs(spread) / ((fourth - variance**2) / steps) ** 0.5))
    # Subsets of one size are equally likely: a record is in with probability size / n, a pair with the product below.
    share = size / n
    z = (taken.sum(0) - share.sum()) / (share * (1 - share)).sum() ** 0.5
    found.append(2 * stats.norm.sf(np.abs(z).max()) * n)
    both = size * (size - 1) / (n * (n - 1))
    pairs = (taken.T.astype(float) @ taken)[np.triu_indices(n, 1)]
    z = (pairs - both.sum()) / (both * (1 - both)).sum() ** 0.5
    found.append(2 * stats.norm.sf(np.abs(z).max()) * len(pairs))
    # Steps do not depend on one another.
    centred = taken - share.mean()
    apart = (centred[:-1] * centred[1:]).sum() / ((centred**2).sum() / (steps * n) * (n * (steps - 1)) ** 0.5)
    found.append(2 * stats.norm.sf(abs(apart)))
    return float(min(found))


def capped(n: int, rate: float, cap: int) -> stats.rv_discrete:
    """The law of min(Binomial, cap)."""
    k = np.arange(n + 1)
    p = np.where(k < cap, stats.binom.pmf(k, n, rate), 0.0)
    p[cap] = stats.binom.sf(cap - 1, n, rate)
    return stats.rv_discrete(values=(k, p))


def test_truncated_draws() -> None:
    uniform = np.random.default_rng(5).random
    taken = taken_by(lambda _: draw_truncated(N, RATE, CAP, uniform))
    assert taken.sum(1).max() == CAP
    assert least_p(taken, capped(N, RATE, CAP)) > ALPHA
    assert stats.binomtest(int(taken.sum()), taken.size, RATE, alternative="less").pvalue < ALPHA  # below the rate


def first_of_many(n: int, uniform: Callable[[int], np.ndarray]) -> np.ndarray:
    return draw_poisson(n, RATE, uniform)[:CAP]


def full_if_many(n: int, uniform: Callable[[int], np.ndarray]) -> np.ndarray:
    return draw_poisson(n, RATE, uniform)


def fixed_size(n: int, uniform: Callable[[int], np.ndarray]) -> np.ndarray:
    return np.argsort(uniform(n))[: round(n * RATE)]


def again_if_many(n: int, uniform: Callable[[int], np.ndarray]) -> np.ndarray:
    while len(drawn := draw_poisson(n, RATE, uniform)) > CAP:
        pass
    return drawn


def pairs_together(n: int, uniform: Callable[[int], np.ndarray]) -> np.ndarray:
    drawn = draw_truncated(n, RATE, CAP, uniform)
    other = drawn[0] ^ 1 if len(drawn) else 0
    return np.r_[drawn[:-1], other] if len(drawn) > 1 and other not in drawn else drawn


@pytest.mark.parametrize("wrong", [first_of_many, full_if_many, fixed_size, again_if_many, pairs_together])
def test_a_wrong_truncated_sampler_is_found_out(wrong: Callable[..., np.ndarray]) -> None:
    uniform = np.random.default_rng(5).random
    assert least_p(taken_by(lambda _: wrong(N, uniform)), capped(N, RATE, CAP)) < ALPHA


def test_the_subset_is_uniform() -> None:
    """All C(6, 2) subsets of a draw of everybody."""
    uniform = np.random.default_rng(6).random
    counts: dict[tuple[int, ...], int] = {}
    for _ in range(15_000):
        drawn = tuple(draw_truncated(6, 1.0, 2, uniform).tolist())
        counts[drawn] = counts.get(drawn, 0) + 1
    assert len(counts) == 15
    assert all(a < b for a, b in counts)
    assert stats.chisquare(list(counts.values())).pvalue > ALPHA


def test_keys_that_tie_are_drawn_again() -> None:
    """A stable sort would keep the lower index: with keys of 2 bits, far too often."""
    rng = np.random.default_rng(7)

    def coarse(n: int) -> np.ndarray:
        return rng.integers(0, 4, n) / 4

    counts = np.zeros(3)
    for _ in range(6_000):
        counts[draw_truncated(3, 1.0, 1, coarse)] += 1
    assert stats.chisquare(counts).pvalue > ALPHA
    with pytest.raises(PrivacyError, match="repeated itself"):
        draw_truncated(3, 1.0, 1, np.zeros)


def test_truncation_never_adds_a_record() -> None:
    """Inclusion is at most that of the Poisson sample that is cut, so never above the declared rate."""
    for seed in range(200):
        whole = draw_poisson(60, 0.3, np.random.default_rng(seed).random)
        cut = draw_truncated(60, 0.3, 18, np.random.default_rng(seed).random)
        assert set(cut) <= set(whole)
        assert len(cut) == min(18, len(whole))
        assert cut.dtype == np.int64
        assert (np.diff(cut) > 0).all()


def test_the_default_truncation() -> None:
    assert truncation(10_000, 0.01) == 150  # 100 + 5 · 9.95
    assert truncation(10, 0.9) == 10
    assert truncation(1, 1e-9) == 1
    assert truncation(50, 1.0) == 50
    for n, rate in ((1000, 0.5), (60_000, 256 / 60_000)):
        assert stats.binom.sf(truncation(n, rate), n, rate) < 1e-5


def test_cyclic_draws() -> None:
    uniform = np.random.default_rng(8).random
    n = 4 * N
    taken = taken_by(lambda step: draw_cyclic(n, RATE, CYCLE, step, uniform), n, CYCLE * 12_000)
    binomial = stats.rv_discrete(values=(np.arange(N + 1), stats.binom.pmf(np.arange(N + 1), N, RATE)))
    for group in range(CYCLE):
        own = taken[group::CYCLE]
        assert not own[:, np.arange(n) % CYCLE != group].any()  # nobody outside the group
        assert least_p(own[:, group::CYCLE], binomial) > ALPHA


def test_a_wrong_cyclic_sampler_is_found_out() -> None:
    uniform = np.random.default_rng(8).random
    binomial = stats.rv_discrete(values=(np.arange(N + 1), stats.binom.pmf(np.arange(N + 1), N, RATE)))
    low = taken_by(lambda _: draw_poisson(N, RATE * 1.03, uniform))
    assert least_p(low, binomial) < ALPHA
    kept = draw_poisson(N, RATE, uniform)
    assert least_p(taken_by(lambda _: kept), binomial) < ALPHA  # one draw for every cycle


@pytest.mark.parametrize(("n", "cycle"), [(10, 3), (7, 7), (5, 1), (12, 4)])
def test_groups_partition_the_records(n: int, cycle: int) -> None:
    drawn = [draw_cyclic(n, 1.0, cycle, step, np.random.default_rng(0).random) for step in range(cycle)]
    assert sorted(np.concatenate(drawn).tolist()) == list(range(n))
    assert [len(d) for d in drawn] == [cyclic_group(n, cycle, step) for step in range(cycle)]
    assert all(d.dtype == np.int64 for d in drawn)
    for step in range(3 * cycle):
        assert draw_cyclic(n, 1.0, cycle, step, np.zeros).tolist() == drawn[step % cycle].tolist()


def test_inclusion_is_never_above_the_rate() -> None:
    """Around the threshold, as for the plain Poisson draw: "<" on the uniform itself would round up."""
    for rate in (0.1, 1 / 3, 0.7):
        threshold = int(rate * 2**53)
        values = np.arange(2**53 - threshold - 2, 2**53 - threshold + 3)
        drawn = draw_cyclic(2 * len(values), rate, 2, 1, lambda n, v=values: v * 2.0**-53)  # type: ignore[misc]
        assert (values[drawn // 2] >= 2**53 - threshold).all()
        assert len(drawn) == 3


@pytest.mark.parametrize("real", range(5))
def test_padding_repeats_what_was_drawn(real: int) -> None:
    indices = np.arange(real) * 3
    padded, count = pad(indices, 4)
    assert count == real
    assert padded[:real].tolist() == indices.tolist()
    assert len(padded) == (4 if real else 0)
    assert set(padded) <= set(indices)
    assert padded.dtype == np.int64
    with pytest.raises(ConfigurationError, match="do not fit"):
        pad(np.arange(5), 4)


def test_schemes() -> None:
    assert TruncatedPoisson() == TruncatedPoisson(None, None)
    assert TruncatedPoisson(1, np.int64(3)) == TruncatedPoisson(1.0, 3)  # type: ignore[arg-type]
    assert CyclicPoisson(0.5, cycle=4) == CyclicPoisson(rate=0.5, cycle=4)
    for bad in (0.0, 1.1, float("nan"), "0.5", True):
        for build in (lambda b: TruncatedPoisson(b), lambda b: CyclicPoisson(b, cycle=2)):
            with pytest.raises(ConfigurationError, match="rate"):
                build(bad)
    for bad in (0, -1, 1.5, "3", True):
        with pytest.raises(ConfigurationError, match="max_batch_size"):
            TruncatedPoisson(max_batch_size=bad)  # type: ignore[arg-type]
        with pytest.raises(ConfigurationError, match="cycle"):
            CyclicPoisson(cycle=bad)  # type: ignore[arg-type]
        with pytest.raises(ConfigurationError, match="max_batch_size"):
            draw_truncated(3, 0.5, bad, np.zeros)  # type: ignore[arg-type]
    for args in ((3, 4, 0), (3, 0, 0), (3, 2, -1), (3, 2, 0.5)):
        with pytest.raises(ConfigurationError):
            draw_cyclic(args[0], 0.5, args[1], args[2], np.zeros)  # type: ignore[arg-type]
