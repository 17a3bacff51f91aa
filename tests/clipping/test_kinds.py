"""The ways to clip: a closed set, groups that cover every parameter once, weights whose bounds are C in quadrature."""

import math

import pytest
import torch

from sfumato.clipping import (
    Automatic,
    Flat,
    Grouped,
    PerLayer,
    chosen,
    group_of,
    groups_of,
    label,
    weights,
)
from sfumato.errors import ConfigurationError

NAMES = ("body.0.weight", "body.0.bias", "body.10.weight", "head.weight")
HALVES = Grouped({"body": ["body"], "head": ["head"]}, {"body": 3.0, "head": 4.0})
CLIPS = [Flat(), Automatic(), Automatic(gamma=1e-6), PerLayer(), HALVES]
HOSTILE = [
    0.0,
    5e-324,
    1e-300,
    1e-90,
    1e-76,
    1e-40,
    1e-20,
    0.25,
    1.0,
    1e20,
    1e38,
    1e60,
    1e76,
    1e300,
    math.inf,
    math.nan,
]


def test_names_and_instances():
    assert [chosen(name) for name in ("flat", "automatic", "per-layer")] == [Flat(), Automatic(0.01), PerLayer()]
    for clip, name in ((Flat(), "flat"), (Automatic(0.1), "automatic"), (PerLayer(), "per-layer"), (HALVES, "grouped")):
        assert chosen(clip) is clip
        assert label(clip) == name
        assert hash(clip) is not None
    for bad in ("ghost", "grouped", "Flat", None, 1.0, Flat, ["flat"]):
        with pytest.raises(ConfigurationError, match="clipping="):
            chosen(bad)


@pytest.mark.parametrize("gamma", [0.0, -1.0, 1e-9, math.nan, math.inf, True, "0.01"])
def test_gamma_keeps_rounding_from_being_scaled_up(gamma):
    with pytest.raises(ConfigurationError, match="gamma"):
        Automatic(gamma)


def test_groups_and_their_shares():
    assert groups_of(Flat(), NAMES) == ((0, 0, 0, 0), (1.0,))
    assert groups_of(Automatic(), NAMES) == ((0, 0, 0, 0), (1.0,))
    assert groups_of(PerLayer(), NAMES) == ((0, 1, 2, 3), (0.5,) * 4)
    assert groups_of(HALVES, NAMES) == ((0, 0, 0, 1), (0.6, 0.8))
    assert group_of(Flat(), NAMES) is None
    assert group_of(HALVES, NAMES) == dict(zip(NAMES, (0, 0, 0, 1), strict=True))
    # "body.1" is a module, not the beginning of "body.10"
    split = Grouped({"b": ["body.10", "head"], "a": ["body.0.weight", "body.0.bias"]})
    assert groups_of(split, NAMES)[0] == (1, 1, 0, 0)
    for k in (1, 2, 3, 7, 200):
        parts = groups_of(PerLayer(), [f"p{i}" for i in range(k)])[1]
        assert math.fsum(s * s for s in parts) == pytest.approx(1.0, abs=1e-14)


@pytest.mark.parametrize(
    ("groups", "named"),
    [
        ({"a": ["body"]}, "head.weight"),  # left out
        ({"a": ["body", "head"], "b": ["head.weight"]}, "head.weight"),  # in two groups
        ({"a": ["body", "head"], "b": ["tail"]}, "tail"),  # nothing of that name
        ({"a": ["body.0", "body.1", "head"]}, "body.10.weight"),  # a prefix of the name, but not a module
    ],
)
def test_every_parameter_is_in_exactly_one_group(groups, named):
    with pytest.raises(ConfigurationError, match=named):
        groups_of(Grouped(groups), NAMES)


@pytest.mark.parametrize(
    "groups", [{}, ["body"], {"a": []}, {"a": "body"}, {"a": ["x", "x"]}, {"a": ["x"], "b": ["x"]}]
)
def test_groups_that_are_none(groups):
    with pytest.raises(ConfigurationError, match="groups"):
        Grouped(groups)


@pytest.mark.parametrize(
    "bounds", [{}, {"a": 1.0}, {"a": 1.0, "c": 1.0}, {"a": 1.0, "b": 0.0}, {"a": 1.0, "b": 1e-9}, 1.0]
)
def test_bounds_that_are_none(bounds):
    with pytest.raises(ConfigurationError, match="bounds"):
        Grouped({"a": ["x"], "b": ["y"]}, bounds)


def groups(clip):
    return len(groups_of(clip, NAMES)[1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("c", [1e-3, 0.1, 1.0, 7.0, 1e3])
@pytest.mark.parametrize("clip", CLIPS, ids=repr)
def test_weights_bound_every_group_and_all_in_quadrature(clip, c, dtype):
    g, shares = groups(clip), groups_of(clip, NAMES)[1]
    rng = torch.Generator().manual_seed(3)
    random = (torch.randn(g, 4000, generator=rng, dtype=torch.float64) * 8).exp()
    hostile = torch.cartesian_prod(*[torch.tensor(HOSTILE, dtype=torch.float64)] * min(g, 2)).reshape(-1, min(g, 2)).T
    sq = torch.cat([random, hostile.repeat(-(-g // len(hostile)), 1)[:g]], 1)
    w = weights(clip, sq, c, dtype)
    assert w.shape == sq.shape
    assert w.dtype == torch.float64
    assert w.isfinite().all()
    assert (w >= 0).all()
    used = (w > 0).all(0)
    assert (used == (w > 0).any(0)).all()  # all of a record, or nothing of it
    assert not used[~sq.isfinite().all(0)].any()
    # In the arithmetic of the sum: rounded weight times rounded norm, group by group and together.
    low = (w.to(dtype) * sq.sqrt().to(dtype)).double()[:, used]
    for k, share in enumerate(shares):
        assert (low[k] <= c * share).all()
    assert (low.square().sum(0).sqrt() <= c).all()
    ordinary = used & (sq < 1e38).all(0)
    assert ordinary[: random.shape[1]].sum() > 3000


def test_records_within_the_bound_keep_weight_one():
    sq = torch.tensor([[0.0, 0.01, 0.2, 9.0], [0.0, 0.1, 0.6, 0.0]], dtype=torch.float64)
    w = weights(HALVES, sq, 1.0, torch.float32)
    assert w[:, :3].tolist() == [[1.0] * 3] * 2
    assert w[0, 3] == pytest.approx(0.2, rel=1e-5)
    assert w[1, 3] == 1.0


def test_automatic_normalises():
    norms = torch.tensor([0.0, 1e-3, 0.01, 1.0, 1e6], dtype=torch.float64)
    w = weights(Automatic(0.01), norms.square()[None], 2.0, torch.float64)[0]
    torch.testing.assert_close(w, 2.0 / (norms + 0.01), rtol=1e-12, atol=0)
    assert (w * norms < 2.0).all()
    twice = weights(Automatic(0.01), norms.square()[None], 4.0, torch.float64)[0]
    assert torch.equal(twice, 2 * w)  # the bound is a factor, nothing else


def test_norms_of_other_groups_are_refused():
    with pytest.raises(ConfigurationError, match="groups"):
        weights(HALVES, torch.ones(1, 3, dtype=torch.float64), 1.0, torch.float32)
