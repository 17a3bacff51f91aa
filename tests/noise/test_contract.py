"""What every source promises: the right distribution, fresh draws, and refusal of what it cannot honour."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from tests.noise.statistics import (
    ALPHA,
    binomial_pvalue,
    correlation_pvalue,
    kurtosis_pvalue,
    mean_pvalue,
    shape_pvalue,
    std_pvalue,
)

from sfumato.errors import ConfigurationError
from sfumato.noise import Research, Secure, source

N = 1_000_000
Source = Secure | Research
each_source = pytest.mark.parametrize("make", [Secure, lambda: Research(3)], ids=["secure", "research"])
each_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["f32", "f64"])


@each_source
@each_dtype
def test_the_distribution_is_normal_with_the_requested_std(make: Callable[[], Source], dtype: torch.dtype) -> None:
    std = 0.37
    draws = make().normal((N,), std=std, dtype=dtype)
    assert draws.dtype == dtype
    assert torch.isfinite(draws).all()
    for pvalue in (std_pvalue, mean_pvalue, kurtosis_pvalue, shape_pvalue):
        assert pvalue(draws, std) > ALPHA, pvalue.__name__


@pytest.mark.parametrize("scale", [0.7, 0.993, 1.007, 1.3])
def test_the_std_test_rejects_a_source_that_is_off(scale: float) -> None:
    assert std_pvalue(scale * Secure().normal((N,), std=2.0), 2.0) < ALPHA


def test_the_other_tests_reject_broken_sources() -> None:
    good = Research(0).normal((N,), std=1.0)
    uniform = (torch.rand(N) - 0.5) * 12**0.5
    assert std_pvalue(uniform, 1.0) > ALPHA  # right std, wrong shape
    assert shape_pvalue(uniform, 1.0) < ALPHA
    assert kurtosis_pvalue(uniform, 1.0) < ALPHA
    assert mean_pvalue(good + 0.01, 1.0) < ALPHA
    assert correlation_pvalue(good, good + 100 * Research(1).normal((N,), std=1.0)) < ALPHA
    assert binomial_pvalue(900, 10_000, 0.1 * 1.3) < ALPHA


@each_source
def test_tail_exceedances(make: Callable[[], Source]) -> None:
    noise, n = make(), 4 * N
    sizes = torch.cat([noise.normal((N,), std=1.0) for _ in range(4)]).abs()
    for bound, probability in ((3.0, 2.699796e-3), (4.0, 6.334248e-5), (5.0, 5.733031e-7)):
        assert binomial_pvalue(int((sizes > bound).sum()), n, probability) > ALPHA, bound


@each_source
def test_calls_tensors_and_pair_halves_are_independent(make: Callable[[], Source]) -> None:
    noise = make()
    a, b = noise.normal((N,), std=1.0), noise.normal((1000, 1000), std=1.0)
    half = 1 << 15  # secure noise writes cosines, then sines, of the same radii
    pairs = a[: 30 * half].view(-1, 2, half)
    for left, right in ((a, b), (a[:-1], a[1:]), (pairs[:, 0], pairs[:, 1]), (pairs[:-1], pairs[1:])):
        assert correlation_pvalue(left, right) > ALPHA
        assert correlation_pvalue(left.square(), right.square()) > ALPHA
    assert not torch.isin(b[0], a).all()


@each_source
@pytest.mark.parametrize("shape", [(), (0,), (1,), (3,), (2, 0, 3), (65535,), (65537,), (7, 11, 13)])
def test_shapes(make: Callable[[], Source], shape: tuple[int, ...]) -> None:
    draws = make().normal(shape, std=1.0)
    assert draws.shape == shape
    assert draws.device.type == "cpu"
    assert draws.unique().numel() >= 0.99 * draws.numel()
    assert torch.equal(make().normal(shape, std=0), torch.zeros(shape))


@each_source
def test_uniforms_have_53_bits_in_the_half_open_interval(make: Callable[[], Source]) -> None:
    draws = make().uniform(N)
    assert draws.dtype == np.float64
    assert draws.shape == (N,)
    assert draws.min() >= 0
    assert draws.max() < 1
    scaled = draws * 2.0**53
    assert (scaled == np.floor(scaled)).all()
    for bit in (0, 1, 25, 51, 52):
        ones = int(((scaled.astype(np.int64) >> bit) & 1).sum())
        assert binomial_pvalue(ones, N, 0.5) > ALPHA, bit
    assert len(make().uniform(0)) == 0


@each_source
@pytest.mark.parametrize(
    ("shape", "std", "dtype"),
    [
        ((2,), 1.0, torch.bfloat16),
        ((2,), 1.0, torch.float16),
        ((2,), 1.0, torch.int64),
        ((2,), -1.0, torch.float32),
        ((2,), float("nan"), torch.float32),
        ((2,), float("inf"), torch.float32),
        ((2,), 1e-46, torch.float32),  # would underflow: no noise at all
        ((2,), 1e38, torch.float32),  # would overflow
        ((2,), True, torch.float32),
        ((-1,), 1.0, torch.float32),
        ((1.5,), 1.0, torch.float32),
    ],
)
def test_what_cannot_be_honoured_is_refused(
    make: Callable[[], Source], shape: tuple[int, ...], std: float, dtype: torch.dtype
) -> None:
    with pytest.raises(ConfigurationError):
        make().normal(shape, std=std, dtype=dtype)


@each_source
def test_the_global_generators_are_left_alone(make: Callable[[], Source]) -> None:
    before, before_np = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    noise = make()
    noise.normal((100,), std=1.0)
    noise.uniform(100)
    assert torch.equal(before, torch.get_rng_state())
    assert (before_np == np.random.get_state()[1]).all()  # noqa: NPY002


def test_source_resolves_names_and_instances_only() -> None:
    class Cheat(Secure):  # type: ignore[misc]
        pass

    assert type(source("secure")) is Secure
    assert type(source("research")) is Research
    mine = Research(7)
    assert source(mine) is mine
    for other in ("hardened", None, 3, Secure, Cheat(), object()):
        with pytest.raises(ConfigurationError, match="noise must be"):
            source(other)  # type: ignore[arg-type]
