"""Sums of records clipped by group: against microbatches of one, on neighbouring data, with padding."""

import copy
import math

import pytest
import torch
from tests.oracle.oracle import microbatch_of_one
from torch import nn

import sfumato as sf
from sfumato.clipping import Automatic, Flat, Grouped, PerLayer, groups_of
from sfumato.errors import PrivacyError
from sfumato.ghost import clipped, total_norms

CLIPS = {
    "flat": Flat(),
    "automatic": Automatic(),
    "per-layer": PerLayer(),
    "grouped": Grouped({"low": ["0", "2"], "top": ["3"]}, {"low": 1.0, "top": 2.0}),
}
HOSTILE = [0.0, math.inf, -math.inf, math.nan, 3e38, 1e38, 1e30, 1e15, 1e-15, 1e-38, 1e-45]


def build(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 6, bias=False), nn.Linear(6, 3))


def loss(out):
    return (out.square() + out).flatten(1).sum(1)


def tape_of(model, x):
    with sf.record(model, loss_reduction="sum") as tape:
        loss(model(x)).sum().backward()
    return tape


def oracle(clip, gradients, c):
    """The sum by the definition: each record's parts weighed by the norm of each, in float64."""
    names = list(gradients)
    of, shares = groups_of(clip, names)
    sq = torch.zeros(len(shares), len(gradients[names[0]]), dtype=torch.float64)
    for name, k in zip(names, of, strict=True):
        sq[k] += gradients[name].double().flatten(1).square().sum(1)
    norms = sq.sqrt()
    if isinstance(clip, Automatic):
        w = c / (norms + clip.gamma)
    else:
        w = (torch.tensor(shares, dtype=torch.float64)[:, None] * c / norms.clamp_min(1e-300)).clamp_max(1)
    return {name: torch.tensordot(w[k], gradients[name].double(), 1) for name, k in zip(names, of, strict=True)}


@pytest.mark.parametrize("rows", [(), (4,)], ids=["vectors", "sequences"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("clip", CLIPS.values(), ids=CLIPS)
def test_against_microbatches_of_one(clip, dtype, rows):
    model, x = build(), torch.randn(9, *rows, 5)
    want = microbatch_of_one(copy.deepcopy(model).double(), (x.double(),), loss)
    tape = tape_of(model.to(dtype), x.to(dtype))
    for c in (0.05, 3.0, 1e3):
        sums, expected = tape.clipped_sum(c, clip), oracle(clip, want, c)
        for name, total in expected.items():
            error = float((sums[name].double() - total).norm())
            assert error <= (1e-12 if dtype == torch.float64 else 1e-5) * 9 * c, name


def flat(sums):
    return torch.cat([g.double().flatten() for g in sums.values()])


@pytest.mark.parametrize("value", [*HOSTILE, "cancel"])
@pytest.mark.parametrize("clip", CLIPS.values(), ids=CLIPS)
def test_one_record_moves_each_group_by_its_bound_and_all_by_c(clip, value):
    for c, seed in ((1e-3, 0), (1.0, 1), (1e3, 2)):
        model = build(seed)
        x = torch.randn(6, 4, 5)
        if value == "cancel":
            x[2] = torch.tensor([1e4, -1e4, 1e4, -1e4])[:, None] * x[2, :1]
        else:
            x[2] = x[2].sign() * value
        with_it = tape_of(model, x).clipped_sum(c, clip)
        without = tape_of(model, torch.cat([x[:2], x[3:]])).clipped_sum(c, clip)
        names = list(with_it)
        of, shares = groups_of(clip, names)
        change = {name: (with_it[name].double() - without[name].double()) for name in names}
        assert float(flat(change).norm()) <= c * (1 + 1e-6)
        for k, share in enumerate(shares):
            part = flat({n: change[n] for n, g in zip(names, of, strict=True) if g == k})
            assert float(part.norm()) <= c * share * (1 + 1e-6)


def parts_of(tape):
    return tape._terms(), tape._records


@pytest.mark.parametrize("clip", CLIPS.values(), ids=CLIPS)
@pytest.mark.parametrize("pads", [1, 3])
def test_padding_counts_for_nothing(clip, pads):
    model, x = build(), torch.randn(5, 4, 5)
    x[1] = 1e30  # computed apart, or left out
    x[4] = math.nan  # what is repeated may be hostile itself
    names = [n for n, _ in model.named_parameters()]
    of = dict(zip(names, groups_of(clip, names)[0], strict=True))
    plain, records = parts_of(tape_of(model, x))
    want, seen = clipped(plain, total_norms(plain, records, of), 1.0, torch.float32, clip=clip)
    padded, records = parts_of(tape_of(model, torch.cat([x, x[-1:].expand(pads, -1, -1)])))
    mask = torch.arange(records) >= 5
    got, facts = clipped(padded, total_norms(padded, records, of), 1.0, torch.float32, clip=clip, mask=mask)
    assert facts.weights.shape == facts.norms.shape == seen.norms.shape == (5,)
    torch.testing.assert_close(facts.weights, seen.weights)
    torch.testing.assert_close(facts.norms, seen.norms, equal_nan=True)
    for name in names:
        assert got[name].isfinite().all()
        torch.testing.assert_close(got[name], want[name])
    # Padding that is an ordinary record would be counted twice without the mask.
    ordinary, records = parts_of(tape_of(model, torch.cat([x[:1], x[:1]])))
    mask = torch.tensor([False, True])
    norms = total_norms(ordinary, records, of)
    once, _ = clipped(ordinary, norms, 1.0, torch.float32, clip=clip, mask=mask)
    twice, _ = clipped(ordinary, norms, 1.0, torch.float32, clip=clip)
    torch.testing.assert_close(2 * flat(once), flat(twice), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("clip", CLIPS.values(), ids=CLIPS)
def test_nothing_but_padding_is_a_sum_of_zeros(clip):
    model = build()
    names = [n for n, _ in model.named_parameters()]
    of = dict(zip(names, groups_of(clip, names)[0], strict=True))
    parts, records = parts_of(tape_of(model, torch.randn(3, 5)))
    sums, facts = clipped(
        parts, total_norms(parts, records, of), 1.0, torch.float32, clip=clip, mask=torch.ones(3, dtype=torch.bool)
    )
    assert len(facts.weights) == 0
    assert not flat(sums).any()


def test_norms_and_scale():
    """``scale`` multiplies the gradients before they are clipped, in what is counted too."""
    model, x = build(), torch.randn(7, 5)
    names = [n for n, _ in model.named_parameters()]
    of = dict(zip(names, groups_of(PerLayer(), names)[0], strict=True))
    parts, records = parts_of(tape_of(model, x))
    norms = total_norms(parts, records, of)
    assert norms.sq.shape == (len(names), 7)
    torch.testing.assert_close(norms.total, total_norms(parts, records).sq[0])
    _, facts = clipped(parts, norms, 1.0, torch.float32, 3.0, clip=PerLayer())
    torch.testing.assert_close(facts.norms, 3.0 * norms.total.sqrt())
    bounds = 1.0 / len(names) ** 0.5
    want = (bounds / (3.0 * norms.sq.sqrt())).clamp_max(1).amin(0)
    torch.testing.assert_close(facts.weights, want, rtol=1e-4, atol=0)


def test_a_parameter_in_no_group_is_refused():
    model = build()
    parts, records = parts_of(tape_of(model, torch.randn(3, 5)))
    with pytest.raises(PrivacyError, match="no group"):
        total_norms(parts, records, {"0.weight": 0})


@pytest.mark.parametrize("clip", CLIPS.values(), ids=CLIPS)
def test_a_record_that_is_computed_apart(clip):
    """Factors that leave the range of float32 products are measured and summed in float64, by group as well."""
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(5, 6), nn.Identity(), nn.Linear(6, 6, bias=False), nn.Linear(6, 3))
    x = torch.randn(4, 4, 5)
    x[1] *= 1e16

    def linear(out):
        return out.flatten(1).sum(1)

    want = microbatch_of_one(copy.deepcopy(model).double(), (x.double(),), linear)
    with sf.record(model, loss_reduction="sum") as tape:
        linear(model(x)).sum().backward()
    of = dict(zip(want, groups_of(clip, want)[0], strict=True))
    parts, records = parts_of(tape)
    norms = total_norms(parts, records, of)
    assert norms.apart.tolist() == [False, True, False, False]
    sums, _ = clipped(parts, norms, 1.0, torch.float32, clip=clip)
    for name, total in oracle(clip, want, 1.0).items():
        assert float((sums[name].double() - total).norm()) <= 1e-4, name
