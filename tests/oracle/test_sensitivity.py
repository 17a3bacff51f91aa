"""Neighbours: removing a record, or making it non-finite, moves the clipped sum by at most C(1 + 1e-6)."""

import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.oracle.oracle import Net
from torch import nn
from torch.nn import functional as F

import sfumato as sf

SLACK = 1 + 1e-6
few = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])

MODELS = {
    "linear": (lambda: nn.Linear(3, 2), (3,)),
    "linear, no bias": (lambda: nn.Linear(3, 2, bias=False), (3,)),
    "rows": (lambda: nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)), (4, 3)),
    "few wide rows": (lambda: nn.Linear(24, 20), (2, 24)),
    "convolution": (lambda: nn.Sequential(nn.Conv1d(2, 3, 2), nn.ReLU(), nn.Flatten(), nn.Linear(12, 2)), (2, 5)),
    "norm": (lambda: nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(4, 2)), (3,)),
    "bare": (lambda: Net(lambda s, x: s.l(x * s.g) + s.p[:2], l=nn.Linear(3, 2), g=(3,), p=(5,)), (4, 3)),
    "tied": (lambda: Net(lambda s, x: F.linear(F.linear(x, s.w), s.w.t()) * s.g, w=(4, 3), g=()), (2, 3)),
    "reused": (lambda: Net(lambda s, x: s.l(s.l(x)), l=nn.Linear(3, 3)), (3,)),
}


def total(model, x, bound, scale=1.0, signs=None):
    """The clipped sum in float64, flattened. ``signs``: weights of the rows in the loss."""
    if not len(x):
        return torch.zeros(sum(p.numel() for p in model.parameters()), dtype=torch.float64)
    with sf.record(model, loss_reduction="sum") as tape:
        out = model(x)
        out = out if signs is None else out * signs.view(-1, *[1] * (out.dim() - 2))
        (out.sum() * scale).backward()
    return torch.cat([g.double().flatten() for g in tape.clipped_sum(bound).values()])


def moved(model, x, b, bound, **more):
    """‖sum with record b − sum without it‖ / C."""
    rest = torch.cat([x[:b], x[b + 1 :]])
    change = total(model, x, bound, **more) - total(model, rest, bound, **more)
    assert change.isfinite().all()
    return float(change.norm()) / bound


magnitudes = st.one_of(st.floats(-30, 38), st.sampled_from([-45.0, -38.0, -30.0, 0.0, 18.9, 19.2, 30.0, 37.9, 38.4]))
bounds = st.sampled_from([1e-3, 0.1, 1.0, 7.0, 1e3])


@few
@given(
    name=st.sampled_from(sorted(MODELS)),
    seed=st.integers(0, 10**6),
    magnitude=magnitudes,
    loss=st.sampled_from([1e-20, 1.0, 1e6, 1e20, 1e35]),
    bound=bounds,
    records=st.integers(1, 5),
    b=st.integers(0, 4),
)
def test_removing_a_record_of_any_magnitude(name, seed, magnitude, loss, bound, records, b):
    torch.manual_seed(seed)
    build, shape = MODELS[name]
    model, x = build(), torch.randn(records, *shape)
    b %= records
    x[b] = (x[b].double() * 10.0**magnitude).float()
    assert moved(model, x, b, bound, scale=loss) <= SLACK


@few
@given(
    name=st.sampled_from(sorted(MODELS)),
    seed=st.integers(0, 10**6),
    value=st.sampled_from([math.nan, math.inf, -math.inf, 3.4e38, 1e38]),
    everywhere=st.booleans(),
    bound=bounds,
)
def test_a_non_finite_record(name, seed, value, everywhere, bound):
    torch.manual_seed(seed)
    build, shape = MODELS[name]
    model, x = build(), torch.randn(4, *shape)
    if everywhere:
        x[2] = value
    else:
        x[2].view(-1)[0] = value
    assert moved(model, x, 2, bound) <= SLACK


@pytest.mark.parametrize("bound", [1e-3, 1.0, 1e3])
def test_weights_below_the_smallest_normal_number(bound):
    """A norm near 1e45 asks for a weight that float32 holds in one or two bits."""
    for k in range(60):
        torch.manual_seed(k)
        model, x = nn.Linear(3, 2, bias=False), torch.randn(4, 3)
        x[1] = torch.tensor([1.0, -2.0, 1.5]) * 1e38
        assert moved(model, x, 1, bound, scale=10 ** (4.5 + k / 20)) <= SLACK


@pytest.mark.parametrize("nearly", [0.0, 1e-6, 1e-4, 1e-2])
@pytest.mark.parametrize(("width", "positions"), [(3, 2), (40, 2), (64, 6)])
def test_a_record_whose_huge_rows_cancel(width, positions, nearly):
    """Norm (almost) zero, but its parts would drown the others in a shared float32 sum."""
    signs = torch.tensor([1.0, -1.0] + [0.0] * (positions - 2))
    for k in range(38):
        torch.manual_seed(k)
        model, x = nn.Linear(width, 24 if width > 3 else 2), torch.randn(6, positions, width)
        x[2, 0] = torch.randn(width).clamp(-3, 3) * 10.0**k
        x[2, 1] = x[2, 0] * (1 + nearly)
        for bound in (0.1, 1.0):
            assert moved(model, x, 2, bound, signs=signs) <= SLACK, f"rows of size 1e{k}"


@few
@given(seed=st.integers(0, 10**6), magnitude=st.floats(-5, 30), bound=bounds)
def test_two_uses_of_a_weight_that_cancel(seed, magnitude, bound):
    """The same weight through a row product and through a broadcast: two kinds of term, sum zero."""
    torch.manual_seed(seed)
    model = Net(lambda s, x: F.linear(x, s.w).sum(-1) - (x.unsqueeze(-2) * s.w).sum((-1, -2)) + s.b, w=(4, 3), b=())
    x = torch.randn(5, 2, 3)
    x[0] *= 10.0**magnitude
    assert moved(model, x, 0, bound) <= SLACK


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_record_stays_below_the_bound(dtype):
    """One record alone: its contribution is at most C, and exactly its gradient when that is shorter."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 4)).to(dtype)
    for k in range(-12, 12):
        x = (torch.randn(1, 8) * 10.0**k).to(dtype)
        with sf.record(model, loss_reduction="sum") as tape:
            (model(x).float() * 100).sum().backward()
        norm = float(tape.sq_norms().sqrt())
        length = float(torch.cat([g.double().flatten() for g in tape.clipped_sum(1.0).values()]).norm())
        assert length <= 1 + 1e-9
        assert abs(length - min(1, norm)) <= 2e-5 * min(1, norm)
