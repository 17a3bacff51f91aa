"""Schemes are validated; draws have the distribution that the accountant assumes."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import FrozenInstanceError

import numpy as np
import pytest
from scipy import stats

from sfumato.errors import ConfigurationError
from sfumato.sampling import Poisson, Shuffle, draw_poisson, physical, shuffle_epoch

ALPHA = 1e-9


@pytest.mark.parametrize("rate", [0, 0.0, -0.1, 1.0001, float("nan"), float("inf"), "0.5", True, [0.5]])
def test_bad_rates(rate: float) -> None:
    with pytest.raises(ConfigurationError, match="rate"):
        Poisson(rate)
    with pytest.raises(ConfigurationError, match="rate"):
        draw_poisson(10, rate, np.random.default_rng(0).random)


@pytest.mark.parametrize("size", [0, -1, 1.5, "3", True])
def test_bad_sizes(size: int) -> None:
    with pytest.raises(ConfigurationError, match="batch_size"):
        Shuffle(size)
    with pytest.raises(ConfigurationError, match="batch_size"):
        shuffle_epoch(10, size, np.random.default_rng(0).random)
    with pytest.raises(ConfigurationError, match="max_physical_batch_size"):
        physical(np.arange(3), size)


def test_schemes_are_frozen_plain_values() -> None:
    assert Poisson().rate is None
    assert Shuffle().batch_size is None
    assert Poisson(1) == Poisson(np.float32(1.0)) == Poisson(1.0)  # type: ignore[arg-type]
    assert type(Shuffle(np.int64(4)).batch_size) is int  # type: ignore[arg-type]
    with pytest.raises(FrozenInstanceError):
        Poisson(0.5).rate = 0.6  # type: ignore[misc]


def test_poisson_inclusion_batch_size_and_pairs() -> None:
    n, rate, steps = 200, 0.05, 20_000
    uniform = np.random.default_rng(1).random
    taken = np.zeros((steps, n), bool)
    for row in taken:
        row[draw_poisson(n, rate, uniform)] = True
    sizes = taken.sum(1)

    inclusion = (taken.mean(0) - rate) / (rate * (1 - rate) / steps) ** 0.5
    assert 2 * stats.norm.sf(np.abs(inclusion).max()) * n > ALPHA
    assert 2 * stats.norm.sf(abs(taken.mean() - rate) / (rate * (1 - rate) / taken.size) ** 0.5) > ALPHA

    variance = n * rate * (1 - rate)  # shuffling or a fixed size would make this 0
    fourth = variance * (1 + 3 * variance * (n - 2) / n)
    z = (np.mean((sizes - n * rate) ** 2) - variance) / ((fourth - variance**2) / steps) ** 0.5
    assert 2 * stats.norm.sf(abs(z)) > ALPHA

    centred = (taken - rate) / (rate * (1 - rate)) ** 0.5
    pairs = (centred.T @ centred / steps**0.5)[np.triu_indices(n, 1)]
    assert 2 * stats.norm.sf(np.abs(pairs).max()) * len(pairs) > ALPHA
    steps_apart = (centred[:-1] * centred[1:]).sum() / (n * (steps - 1)) ** 0.5
    assert 2 * stats.norm.sf(abs(steps_apart)) > ALPHA


def test_poisson_result_is_sorted_and_may_be_empty_or_full() -> None:
    uniform = np.random.default_rng(2).random
    drawn = draw_poisson(1000, 0.3, uniform)
    assert drawn.dtype == np.int64
    assert (np.diff(drawn) > 0).all()
    assert len(draw_poisson(1000, 1e-12, uniform)) == 0
    assert len(draw_poisson(0, 0.5, uniform)) == 0
    assert (draw_poisson(1000, 1.0, uniform) == np.arange(1000)).all()


def test_poisson_inclusion_is_never_above_the_rate() -> None:
    """Of the 2**53 values of a uniform exactly floor(rate * 2**53) include the record; look around the threshold."""
    for rate in (0.1, 0.01, 1 / 3, 0.7, 1e-7, 1.0, 2.0**-53):
        threshold = int(rate * 2**53)
        values = np.array([v for v in range(2**53 - threshold - 2, 2**53 - threshold + 3) if 0 <= v < 2**53])
        drawn = draw_poisson(len(values), rate, lambda n, v=values: v * 2.0**-53)  # type: ignore[misc]
        assert (values[drawn] >= 2**53 - threshold).all()
        assert len(drawn) == (values >= 2**53 - threshold).sum()


def test_poisson_over_several_passes_uses_one_uniform_per_record() -> None:
    asked: list[int] = []

    def uniform(n: int) -> np.ndarray:
        asked.append(n)
        return np.zeros(n) if len(asked) < 3 else np.full(n, 1 - 2.0**-53)

    n = (2 << 20) + 5
    assert draw_poisson(n, 0.5, uniform).tolist() == list(range(2 << 20, n))
    assert sum(asked) == n


def test_shuffle_covers_every_record_once_and_is_uniform() -> None:
    uniform = np.random.default_rng(3).random
    batches = shuffle_epoch(10, 4, uniform)
    assert [len(b) for b in batches] == [4, 4, 2]
    assert sorted(np.concatenate(batches).tolist()) == list(range(10))
    assert all(b.dtype == np.int64 for b in batches)
    assert shuffle_epoch(0, 4, uniform) == []
    constant = shuffle_epoch(10, 4, np.zeros)  # even a stuck source loses no record
    assert sorted(np.concatenate(constant).tolist()) == list(range(10))
    counts = np.zeros((5, 5))
    for _ in range(20_000):
        counts[np.arange(5), np.concatenate(shuffle_epoch(5, 2, uniform))] += 1
    # The doubly stochastic table has (5-1)**2 degrees of freedom; its statistic is scaled by (n-1)/n.
    chi2 = ((counts - 4000) ** 2 / 4000).sum() * 4 / 5
    assert stats.chi2.sf(chi2, 16) > ALPHA


@pytest.mark.parametrize("limit", [1, 2, 3, 7, 10, 11, None])
def test_physical_batches_partition_in_order(limit: int | None) -> None:
    indices = np.arange(10) * 3
    parts = physical(indices, limit)
    assert np.concatenate(parts).tolist() == indices.tolist()
    assert all(1 <= len(p) <= (limit or 10) for p in parts)
    assert len(parts) == -(-10 // (limit or 10))
    assert physical(indices[:0], limit) == []


def test_importing_sampling_does_not_import_torch() -> None:
    code = "import sys, sfumato.sampling, sfumato.accounting.ledger; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
