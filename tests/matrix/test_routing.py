"""Routed experts and rows placed by what records chose: exact where it can be proven, refused where others decide."""

import pytest
import torch
from tests.oracle.oracle import B, Case, Net, R, check, per_record, recorded
from torch import Tensor, nn

import sfumato as sf

D, E, T = 4, 3, 5


def experts() -> nn.ModuleList:
    return nn.ModuleList(nn.Linear(D, D) for _ in range(E))


def nonzero_loop(s: nn.Module, x: Tensor) -> Tensor:
    """Top-1 by a loop over experts; tokens gathered and added back."""
    flat = x.reshape(-1, D)
    gates = s.gate(flat).softmax(-1)
    weight, choice = gates.max(-1)
    out = torch.zeros_like(flat)
    for e, expert in enumerate(s.experts):
        token = (choice == e).nonzero()[:, 0]
        out = out.index_add(0, token, expert(flat[token]) * weight[token, None])
    return out.view_as(x)


def where_loop(s: nn.Module, x: Tensor) -> Tensor:
    """Top-2 of one row a record, written in place."""
    values, choice = s.gate(x).softmax(-1).topk(2)
    out = torch.zeros(x.shape[0], D, dtype=x.dtype)
    for e, expert in enumerate(s.experts):
        token, slot = torch.where(choice == e)
        out.index_add_(0, token, expert(x[token]) * values[token, slot, None])
    return out


def masked_write(s: nn.Module, x: Tensor) -> Tensor:
    flat = x.reshape(-1, D)
    choice = s.gate(flat).argmax(-1)
    out = torch.zeros_like(flat)
    for e, expert in enumerate(s.experts):
        token = torch.nonzero(choice == e, as_tuple=True)[0]
        out[token] = expert(flat[token])
    return out.reshape(x.shape)


def boolean_masks(s: nn.Module, x: Tensor) -> Tensor:
    choice = s.gate(x).argmax(-1)
    out = torch.zeros_like(x)
    for e, expert in enumerate(s.experts):
        out[choice == e] = expert(x[choice == e])
    return out


def sorted_rows(s: nn.Module, x: Tensor) -> Tensor:
    """By sorting, an elementwise weight of each expert, and the inverse permutation."""
    flat = x.reshape(-1, D)
    choice = s.gate(flat).argmax(-1)
    ranked, order = choice.sort()
    out = flat[order] * s.scale[ranked]
    back = torch.argsort(order)
    return out[back].view_as(x)


def stacked_weights(s: nn.Module, x: Tensor) -> Tensor:
    """All experts in one parameter, sliced."""
    flat = x.reshape(-1, D)
    choice = s.gate(flat).argmax(-1)
    out = torch.zeros_like(flat)
    for e in range(E):
        token = (choice == e).nonzero().squeeze(1)
        out = out.index_add(0, token, flat[token] @ s.weight[e] + s.bias[e])
    return out.view_as(x)


def by_keyword(s: nn.Module, x: Tensor) -> Tensor:
    choice = s.gate(x).argmax(-1)
    out = torch.zeros_like(x)
    for e, expert in enumerate(s.experts):
        token = (choice == e).nonzero()[:, 0]
        out = out.index_add(dim=0, index=token, source=expert(x.index_select(0, index=token)))
    return out


def slices_with_and_without_their_axis(s: nn.Module, x: Tensor) -> Tensor:
    return x * s.weight[0, 0] + x * s.weight[0:1, 0] + x @ s.weight[1] + x @ s.weight[1:2].squeeze(0)


FLAT, ROWS = (lambda: (R(B, T, D),)), (lambda: (R(B, D),))
EXACT = {
    "a loop over nonzero": (nonzero_loop, FLAT, {"experts": experts}),
    "a loop over where": (where_loop, ROWS, {"experts": experts}),
    "index writes": (masked_write, FLAT, {"experts": experts}),
    "boolean masks": (boolean_masks, FLAT, {"experts": experts}),
    "sorted": (sorted_rows, FLAT, {"scale": (E, D)}),
    "by keyword": (by_keyword, ROWS, {"experts": experts}),
    "slices with and without their axis": (slices_with_and_without_their_axis, ROWS, {"weight": (E, D, D)}),
    "slices of one parameter": (stacked_weights, FLAT, {"weight": (E, D, D), "bias": (E, D)}),
}


def build(forward: object, members: dict[str, object]) -> nn.Module:
    made = {k: v() if callable(v) else v for k, v in members.items()}
    return Net(forward, gate=nn.Linear(D, E), **made)  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["f64", "f32"])
@pytest.mark.parametrize("name", EXACT)
def test_routed_experts_are_exact(name: str, dtype: torch.dtype) -> None:
    forward, inputs, members = EXACT[name]
    check(Case(lambda: build(forward, members), inputs), dtype)


def capacity(s: nn.Module, x: Tensor) -> Tensor:
    """An expert takes the first three tokens only: whether mine is among them is the others' choice."""
    flat = x.reshape(-1, D)
    choice = s.gate(flat).argmax(-1)
    out = torch.zeros_like(flat)
    for e, expert in enumerate(s.experts):
        token = (choice == e).nonzero()[:, 0][:3]
        out = out.index_add(0, token, expert(flat[token]))
    return out.view_as(x)


def rank_as_feature(s: nn.Module, x: Tensor) -> Tensor:
    order = torch.argsort(s.gate(x)[:, 0])
    return s.experts[0](x) * order[:, None]


def position_after_sort(s: nn.Module, x: Tensor) -> Tensor:
    order = torch.argsort(s.gate(x)[:, 0])
    placed = s.experts[0](x)[order] * torch.arange(B, dtype=x.dtype)[:, None]
    return placed[torch.argsort(order)]


def learned_position_after_sort(s: nn.Module, x: Tensor) -> Tensor:
    order = torch.argsort(s.gate(x)[:, 0])
    return (x[order] * s.table)[torch.argsort(order)]


def running_count(s: nn.Module, x: Tensor) -> Tensor:
    """The usual capacity by a running count over the tokens of all records."""
    flat = x.reshape(-1, D)
    hot = nn.functional.one_hot(s.gate(flat).argmax(-1), E)
    keep = (hot.cumsum(0) * hot).sum(1) <= 4
    return (s.experts[0](flat) * keep[:, None]).view_as(x)


def neighbour_in_order(s: nn.Module, x: Tensor) -> Tensor:
    order = torch.argsort(s.gate(x)[:, 0])
    return s.experts[0](x[order.roll(1)])


def written_to_another(s: nn.Module, x: Tensor) -> Tensor:
    token = (s.gate(x).argmax(-1) >= 0).nonzero()[:, 0]
    return torch.zeros_like(x).index_add(0, B - 1 - token, s.experts[0](x[token]))


def first_of_sorted(s: nn.Module, x: Tensor) -> Tensor:
    order = torch.argsort(s.gate(x)[:, 0])
    return s.experts[0](x[order][:2])


def rank_chooses_the_row(s: nn.Module, x: Tensor) -> Tensor:
    """Each reads a row of its own, but which one is a matter of how all are sorted."""
    flat = x.reshape(-1, D)
    rank = torch.argsort(torch.argsort(s.gate(flat)[:, 0]))
    token = (flat[:, 1] > -99).nonzero()[:, 0]
    own = token - token % T + rank[token] % T
    return torch.zeros_like(flat).index_add(0, token, s.experts[0](flat[own])).view_as(x)


def ramp_in_sorted_order(s: nn.Module, x: Tensor) -> Tensor:
    back = torch.argsort(torch.argsort(s.gate(x)[:, 0]))
    ramp = torch.linspace(0, 1, len(x), dtype=x.dtype)[:, None].repeat(1, D)
    return ramp.index_add(0, back, s.experts[0](x))[back]


def written_by_place(s: nn.Module, x: Tensor) -> Tensor:
    order = torch.argsort(s.gate(x)[:, 0])
    h = s.experts[0](x)[order].clone()
    h[2:] = 0
    return h[torch.argsort(order)]


def einsum_by_place(s: nn.Module, x: Tensor) -> Tensor:
    order = torch.argsort(s.gate(x)[:, 0])
    ramp = torch.arange(len(x), dtype=x.dtype)
    return torch.einsum("nd,n,dk->nk", x[order], ramp, s.experts[0].weight)[torch.argsort(order)]


def bias_by_place(s: nn.Module, x: Tensor) -> Tensor:
    order = torch.argsort(s.gate(x)[:, 0])
    ramp = torch.arange(len(x), dtype=x.dtype)[:, None]
    return nn.functional.linear(x[order], s.experts[0].weight, ramp)[torch.argsort(order)]


def place_among_the_chosen(s: nn.Module, x: Tensor) -> Tensor:
    chosen = x[:, 0] > -99
    h = s.experts[0](x[chosen])
    out = torch.zeros_like(x)
    out[chosen] = h * torch.arange(len(h), dtype=x.dtype)[:, None]
    return out


def parameter_by_place_in_the_batch(s: nn.Module, x: Tensor) -> Tensor:
    return s.experts[0](x) * s.table[: len(x)]


COUPLED = {
    f.__name__: (f, inputs)
    for f, inputs in (
        (capacity, FLAT), (rank_as_feature, ROWS), (position_after_sort, ROWS), (learned_position_after_sort, ROWS),
        (running_count, FLAT), (neighbour_in_order, ROWS), (written_to_another, ROWS), (first_of_sorted, ROWS),
        (rank_chooses_the_row, FLAT), (ramp_in_sorted_order, ROWS), (written_by_place, ROWS), (einsum_by_place, ROWS),
        (bias_by_place, ROWS), (place_among_the_chosen, ROWS), (parameter_by_place_in_the_batch, ROWS),
    )
}  # fmt: skip


@pytest.mark.parametrize("name", COUPLED)
def test_what_depends_on_the_choices_of_others_is_refused(name: str) -> None:
    forward, inputs = COUPLED[name]
    model = build(forward, {"experts": experts, "table": (B, D)}).double()
    (x,) = inputs()
    with pytest.raises(sf.SfumatoError):
        recorded(model, (x.double(),), per_record)
