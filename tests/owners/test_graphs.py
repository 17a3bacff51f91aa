"""Batches of graphs: every graph's gradient is that of the graph alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.oracle.oracle import agree
from tests.owners.graphs import MODELS, Batch, Graph, collate, graph
from tests.step.harness import distance
from torch import Tensor, nn
from torch.nn import functional as F

import sfumato as sf

SIZES = {
    "ordinary": [(5, 9), (3, 4), (7, 12), (2, 1)],
    "no edges": [(4, 5), (3, 0), (1, 0), (6, 9)],
    "no nodes": [(4, 6), (0, 0), (3, 3), (0, 0)],
    "no edges at all": [(3, 0), (2, 0)],
    "nothing at all": [(0, 0)],
    "as many edges as nodes": [(4, 5), (3, 0), (1, 1), (6, 8)],
    "all alike": [(3, 4)] * 4,
    "one graph": [(5, 6)],
    "one node each": [(1, 2)] * 3,
}


def graphs(name: str) -> list[Graph]:
    return [graph(n, e, k) for k, (n, e) in enumerate(SIZES[name])]


def call(model: nn.Module, b: Batch) -> Tensor:
    return model(b.x, b.edge_index, b.weight, b.batch, len(b.y))


def alone(model: nn.Module, items: list[Graph]) -> dict[str, Tensor]:
    """{name: (B, *shape)}: plain autograd on one graph at a time."""
    rows = []
    for g in items:
        b = collate([g])
        grads = torch.autograd.grad(F.cross_entropy(call(model, b), b.y), list(model.parameters()), allow_unused=True)
        rows.append([torch.zeros_like(p) if v is None else v for v, p in zip(grads, model.parameters(), strict=True)])
    return {n: torch.stack([r[k] for r in rows]) for k, (n, _) in enumerate(model.named_parameters())}


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("name", MODELS)
def test_gradient_of_each_graph(name: str, sizes: str, reduction: Any) -> None:
    torch.manual_seed(0)
    model, items = MODELS[name]().double(), graphs(sizes)
    b = collate(items)
    with sf.record(model, loss_reduction=reduction) as tape, sf.rows(b.batch, inputs=b.inputs, records=len(b.y)):
        F.cross_entropy(call(model, b), b.y, reduction=reduction).backward()
    agree(tape, alone(model, items), 1e-9)
    assert set(tape.tiers.values()) == {"rule"}


@pytest.mark.parametrize("name", MODELS)
def test_every_input_may_be_named_in_any_order(name: str) -> None:
    torch.manual_seed(0)
    model, items = MODELS[name]().double(), graphs("no edges")  # as many as nodes, in all
    b = collate(items)
    assert len(b.x) == len(b.weight)
    with sf.record(model) as tape, sf.rows(inputs={**b.inputs, "batch": b.batch, "x": b.batch}, records=4):
        F.cross_entropy(call(model, b), b.y).backward()
    agree(tape, alone(model, items), 1e-9)


@pytest.mark.parametrize("value", [1.0, 1e15, 1e38, float("inf"), float("nan")])
@pytest.mark.parametrize("name", MODELS)
def test_removing_one_graph_moves_the_clipped_sum_by_at_most_the_bound(name: str, value: float) -> None:
    torch.manual_seed(0)
    model, items = MODELS[name](), graphs("ordinary")
    items[2] = Graph(items[2].x * value, items[2].edges, items[2].weight, items[2].label)
    sums = []
    for kept in (items, items[:2] + items[3:]):
        b = collate([Graph(g.x.float(), g.edges, g.weight.float(), g.label) for g in kept])
        with sf.record(model, loss_reduction="sum") as tape, sf.rows(b.batch, inputs=b.inputs, records=len(b.y)):
            F.cross_entropy(call(model, b), b.y, reduction="sum").backward()
        sums.append(tape.clipped_sum(0.01))
    assert distance(*sums) <= 0.01 * (1 + 1e-5)
    if value == 1.0:
        assert distance(*sums) >= 0.0099
