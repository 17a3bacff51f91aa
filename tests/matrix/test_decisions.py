"""``if mask.all()``: one record must not choose the branch for the others, and a sound forward stays fast."""

import copy

import pytest
import torch
from tests.oracle.oracle import B, Case, Net, R, agree, check, microbatch_of_one, per_record, recorded, sq_norms
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import sfumato as sf

D, T = 4, 3
MASK = torch.tensor([[1, 1, 1], [1, 1, 0], [1, 1, 1], [1, 0, 0]]).bool()


def pooled(s: nn.Module, x: Tensor, mask: Tensor) -> Tensor:
    """Skips the mask where it hides nothing, as libraries do."""
    h = s.a(x)
    if mask.all():
        return s.b(h.mean(1))
    return s.b((h * mask[..., None]).sum(1) / mask.sum(1, keepdim=True))


def counted(s: nn.Module, x: Tensor, mask: Tensor) -> Tensor:
    h = s.a(x)
    if mask.sum() == mask.numel():
        return s.b(h.mean(1))
    return s.b((h * mask[..., None]).sum(1) / mask.sum(1, keepdim=True))


def anyone(s: nn.Module, x: Tensor, mask: Tensor) -> Tensor:
    h = s.a(x)
    if (~mask).any():
        h = h.masked_fill(~mask[..., None], 0.0)
    return s.b(h.sum(1))


def nested(s: nn.Module, x: Tensor, mask: Tensor) -> Tensor:
    h = pooled(s, x, mask)
    if (x[:, 0, 0] > 0).any():
        h = torch.where((x[:, 0, 0] > 0)[:, None], h.tanh(), h)
    return h


def negated(s: nn.Module, x: Tensor, mask: Tensor) -> Tensor:
    if not mask.all() and mask.any():
        x = x * mask[..., None]
    return s.b(s.a(x))


def two_outputs(s: nn.Module, x: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, None]:
    h = s.a(x)
    if (~mask).any():
        h = h.masked_fill(~mask[..., None], 0.0)
    return s.b(h).reshape(-1, 2), h.transpose(0, 1).sum(0), None


def recomputed(s: nn.Module, x: Tensor, mask: Tensor) -> Tensor:
    return checkpoint(lambda v, m: anyone(s, v, m), x, mask, use_reentrant=False)


def recomputed_part(s: nn.Module, x: Tensor, mask: Tensor) -> Tensor:
    h = checkpoint(s.a, x, use_reentrant=False)
    if (~mask).any():
        h = h.masked_fill(~mask[..., None], 0.0)
    return checkpoint(s.b, h.sum(1), use_reentrant=False)


def model(forward: object) -> nn.Module:
    return Net(forward, a=nn.Linear(D, D), b=nn.Linear(D, 2))  # type: ignore[arg-type]


def inputs() -> tuple[Tensor, Tensor]:
    return R(B, T, D), MASK.clone()


SOUND = [pooled, counted, anyone, nested, negated, recomputed, recomputed_part]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["f64", "f32"])
@pytest.mark.parametrize("forward", SOUND, ids=lambda f: f.__name__)
def test_each_record_goes_its_own_way(forward: object, dtype: torch.dtype) -> None:
    check(Case(lambda: model(forward), inputs), dtype)


@pytest.mark.parametrize("hidden", [MASK, MASK.new_ones(B, T), ~MASK.new_ones(B, T)], ids=["some", "none", "all"])
def test_whoever_is_hidden(hidden: Tensor) -> None:
    check(Case(lambda: model(anyone), lambda: (R(B, T, D), hidden.clone())), torch.float64)


def test_blocks_of_rows_come_back_in_order() -> None:
    net, given = model(two_outputs).double(), (R(B, T, D).double(), MASK.clone())

    def loss(out: tuple[Tensor, Tensor, None]) -> Tensor:
        return per_record([out[0].reshape(-1, T, 2), out[1]])

    want = microbatch_of_one(copy.deepcopy(net), given, loss)
    tape, out = recorded(net, given, loss)
    agree(tape, want, 1e-9)
    torch.testing.assert_close(out[0], net(*given)[0])
    assert set(tape.tiers.values()) == {"rule"}


def test_two_calls_in_one_step_share_one_clip() -> None:
    """Once split and once whole: the parts overlap, and the norm must have their cross term."""
    net, (x, mask) = model(pooled).double(), (R(B, T, D).double(), MASK.clone())

    def loss(m: nn.Module, *xs: Tensor) -> Tensor:
        a, b = m(xs[0], xs[1]), m(xs[0] + 1, torch.ones_like(xs[1]))
        return (a.square().sum(1) + (a * b).sum(1)).sum()

    rows = []
    for i in range(B):
        net.zero_grad()
        loss(net, x[i : i + 1], mask[i : i + 1]).backward()
        rows.append({n: p.grad.clone() for n, p in net.named_parameters()})
    net.zero_grad(set_to_none=True)
    want = {n: torch.stack([r[n] for r in rows]) for n in rows[0]}
    with sf.record(net, loss_reduction="sum") as tape:
        loss(net, x, mask).backward()
    agree(tape, want, 1e-9)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_a_loss_inside_the_model(reduction: str) -> None:
    def forward(s: nn.Module, x: Tensor, mask: Tensor) -> Tensor:
        return F.mse_loss(pooled(s, x, mask), torch.zeros(len(x), 2, dtype=x.dtype), reduction=reduction)

    net, given = model(forward).double(), inputs()
    given = (given[0].double(), given[1])
    want = microbatch_of_one(copy.deepcopy(net), given, lambda out: out)
    with sf.record(net, loss_reduction=reduction) as tape:
        net(*given).backward()
    agree(tape, want, 1e-9)


def test_dropout_masks_of_the_one_forward_that_ran() -> None:
    """With probability 0.5 a record's gradient is that of one mask: some entries vanish, each record its own."""
    net = Net(lambda s, x, m: pooled(s, F.dropout(x, 0.5, s.training), m), a=nn.Linear(64, D), b=nn.Linear(D, 2))
    tape, _ = recorded(net, (R(B, T, 64), MASK.clone()))
    used = tape.per_sample("a.weight").abs().sum(1) > 0
    assert len({tuple(row) for row in used.int().tolist()}) == B


def bigger_for_all(s: nn.Module, x: Tensor, mask: Tensor) -> Tensor:
    """One record with a gap scales everyone."""
    h = s.a(x).sum(1)
    return s.b(h * 2 if (~mask).any() else h)


def counted_gaps(s: nn.Module, x: Tensor, mask: Tensor) -> Tensor:
    h = s.a(x).sum(1)
    return s.b(h * 2 if mask.sum() > 7 else h)


def decided_by_a_value(s: nn.Module, x: Tensor, mask: Tensor) -> Tensor:
    h = s.a(x).sum(1)
    return s.b(h * 2 if x.max() > 0.1 else h)


@pytest.mark.parametrize("forward", [bigger_for_all, counted_gaps, decided_by_a_value], ids=lambda f: f.__name__)
def test_a_branch_that_others_really_decide_is_refused(forward: object) -> None:
    net = model(forward).double()
    x, mask = R(B, T, D).double(), MASK.clone()
    x[1:] -= 4
    with pytest.raises(sf.SfumatoError):
        recorded(net, (x, mask))
    assert all(p.grad is None for p in net.parameters())


def test_neighbours_move_the_clipped_sum_by_their_own_record_only() -> None:
    """Remove one record, and with it perhaps the whole of one branch."""
    net, (x, mask) = model(pooled).double(), (10 * R(B, T, D).double(), MASK.clone())
    bound = 0.3

    def clipped(keep: list[int]) -> dict[str, Tensor]:
        tape, _ = recorded(net, (x[keep], mask[keep]))
        return tape.clipped_sum(bound)

    everyone = clipped(list(range(B)))
    for gone in range(B):
        rest = clipped([b for b in range(B) if b != gone])
        moved = sum((everyone[n] - rest[n]).square().sum() for n in everyone).sqrt()
        assert moved <= bound * (1 + 1e-9)
        alone = microbatch_of_one(net, (x[gone : gone + 1], mask[gone : gone + 1]), per_record)
        norm = sq_norms(alone).sqrt().clamp_min(bound)[0]
        for name in everyone:
            torch.testing.assert_close(
                everyone[name] - rest[name], alone[name][0] * bound / norm, rtol=1e-9, atol=1e-11
            )
