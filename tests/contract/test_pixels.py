"""Norms by pixel Grams equal those of the per-sample gradients, for every geometry."""

import random

import pytest
import torch
from torch.nn import functional as F

from sfumato.terms import Conv, ConvSpec, keep, materialize, measured
from sfumato.terms.pixels import measured_by_pixels, suits


def _term(seed: int, scale: int = 1) -> Conv:
    draw = random.Random(seed)
    torch.manual_seed(seed)
    axes, groups = draw.choice([1, 2]), draw.choice([1, 1, 2])
    inputs, outputs = groups * scale * draw.randint(1, 4), groups * scale * draw.randint(1, 4)
    kernel, stride, dilation, padding = (
        tuple(draw.randint(low, high) for _ in range(axes)) for low, high in ((1, 4), (1, 3), (1, 2), (0, 2))
    )
    size = [draw.randint(8, 11) for _ in range(axes)]
    x = torch.randn(3, inputs, *size, dtype=torch.float64)
    weight = torch.randn(outputs, inputs // groups, *kernel, dtype=torch.float64)
    out = (F.conv1d if axes == 1 else F.conv2d)(x, weight, None, stride, padding, dilation, groups)
    spec = ConvSpec(stride, padding, dilation, False, (0,) * axes, groups)
    return Conv(torch.randn_like(out).unsqueeze(1), x.unsqueeze(1), weight, spec)


@pytest.mark.parametrize("seed", range(60))
def test_norms_equal_those_of_the_gradients(seed: int) -> None:
    term = _term(seed)
    sq, mass, _ = measured_by_pixels(term)
    want = materialize(term).flatten(1).square().sum(1)
    torch.testing.assert_close(sq, want, rtol=1e-9, atol=0)
    assert bool((mass.square() >= want * (1 - 1e-9)).all())


def test_wide_convolutions_take_this_way_and_are_not_kept() -> None:
    x, weight = torch.randn(2, 1, 256, 8, 8), torch.randn(256, 256, 3, 3)
    term = Conv(torch.randn(2, 1, 256, 8, 8), x, weight, ConvSpec((1, 1), (1, 1), (1, 1), False, (0, 0), 1))
    assert suits(term)
    assert keep(term, 1 << 40) is term
    sq, floor = measured([term])
    torch.testing.assert_close(sq, materialize(term).double().flatten(1).square().sum(1), rtol=1e-5, atol=0)
    assert bool((sq > floor).all())


def test_positions_that_cancel_are_measured_apart() -> None:
    x = torch.ones(1, 1, 256, 8, 8) * 1e4
    grad = torch.randn(1, 1, 256, 8, 8)
    grad = grad - grad.mean((3, 4), keepdim=True)  # the interior of every gradient cancels
    term = Conv(grad, x, torch.zeros(256, 256, 1, 1), ConvSpec((1, 1), (0, 0), (1, 1), False, (0, 0), 1))
    assert suits(term)
    sq, floor = measured([term])
    assert bool((sq < floor).all())


@pytest.mark.parametrize(("inputs", "grads"), [(1e17, 1e-24), (1e-24, 1e17), (1e20, 1e-20)])
def test_factors_beyond_float32_products_are_measured_apart(inputs: float, grads: float) -> None:
    x, weight = torch.randn(1, 1, 256, 8, 8) * inputs, torch.zeros(256, 256, 3, 3)
    term = Conv(torch.randn(1, 1, 256, 8, 8) * grads, x, weight, ConvSpec((1, 1), (1, 1), (1, 1), False, (0, 0), 1))
    _, floor = measured([term])
    assert bool((floor == float("inf")).all())
