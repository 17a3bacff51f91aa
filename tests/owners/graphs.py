"""Batches of graphs, written out by hand: node features, edges, and the owners of both."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F


@dataclass(frozen=True)
class Graph:
    x: Tensor  # (nodes, 4)
    edges: Tensor  # (2, edges), within the graph
    weight: Tensor  # (edges,)
    label: Tensor  # ()


def graph(nodes: int, edges: int, seed: int) -> Graph:
    g = torch.Generator().manual_seed(seed)
    pairs = torch.randint(0, max(nodes, 1), (2, edges if nodes else 0), generator=g)
    return Graph(
        torch.randn(nodes, 4, generator=g, dtype=torch.float64),
        pairs,
        torch.rand(pairs.shape[1], generator=g, dtype=torch.float64),
        torch.randint(0, 3, (), generator=g),
    )


@dataclass(frozen=True)
class Batch:
    x: Tensor
    edge_index: Tensor
    weight: Tensor
    batch: Tensor  # the graph of each node
    edge_batch: Tensor
    y: Tensor

    @property
    def inputs(self) -> dict[str, object]:
        return {"edge_index": (self.edge_batch, 1), "weight": self.edge_batch}


def collate(graphs: list[Graph]) -> Batch:
    starts = torch.tensor([0, *(len(g.x) for g in graphs)]).cumsum(0).tolist()
    sizes = torch.tensor([len(g.x) for g in graphs])
    counts = torch.tensor([g.edges.shape[1] for g in graphs])
    places = torch.arange(len(graphs))
    return Batch(
        torch.cat([g.x for g in graphs]),
        torch.cat([g.edges + s for g, s in zip(graphs, starts, strict=False)], 1),
        torch.cat([g.weight for g in graphs]),
        places.repeat_interleave(sizes),
        places.repeat_interleave(counts),
        torch.stack([g.label for g in graphs]),
    )


class GCN(nn.Module):
    """Two rounds of weighted messages, self-loops, degree normalisation, mean pooling."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Linear(4, 5), nn.Linear(5, 5), nn.Linear(5, 3)

    def spread(self, h: Tensor, edge_index: Tensor, weight: Tensor) -> Tensor:
        source, target = edge_index[0], edge_index[1]
        degree = torch.ones(len(h), dtype=h.dtype).index_add(0, target, weight)
        norm = degree.rsqrt()
        message = h[source] * (norm[source] * weight * norm[target]).unsqueeze(1)
        return h * (norm * norm).unsqueeze(1) + torch.zeros_like(h).index_add(0, target, message)

    def forward(self, x: Tensor, edge_index: Tensor, weight: Tensor, batch: Tensor, size: int) -> Tensor:
        h = self.spread(self.first(x), edge_index, weight).relu()
        h = self.spread(self.second(h), edge_index, weight).relu()
        total = h.new_zeros(size, h.shape[1]).index_add_(0, batch, h)
        count = torch.zeros(size, dtype=h.dtype).index_add_(0, batch, torch.ones(len(h), dtype=h.dtype))
        return self.head(total / count.clamp(min=1).unsqueeze(1))


class GIN(nn.Module):
    """Unweighted sums through ``index_select`` and ``scatter_add``, an MLP, a learnable ε, sum and max pooling."""

    def __init__(self) -> None:
        super().__init__()
        self.eps = nn.Parameter(torch.tensor(0.1))
        self.mlp = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.LayerNorm(6), nn.Linear(6, 4))
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor, edge_index: Tensor, weight: Tensor, batch: Tensor, size: int) -> Tensor:
        source, target = edge_index
        h = x
        for _ in range(2):
            message = h.index_select(0, source)
            around = h.new_zeros(h.shape).scatter_add_(0, target.unsqueeze(1).expand_as(message), message)
            h = self.mlp((1 + self.eps) * h + around)
        spread = batch.view(-1, 1).expand(-1, h.shape[1])
        total = torch.zeros(size, h.shape[1], dtype=h.dtype).scatter_add(0, spread, h)
        top = torch.zeros(size, h.shape[1], dtype=h.dtype).scatter_reduce(0, spread, h, "amax", include_self=False)
        return self.head(torch.cat([total, top], 1))


class GAT(nn.Module):
    """Attention over the neighbours: a softmax at each node, its sum gathered back to the edges."""

    def __init__(self) -> None:
        super().__init__()
        self.value, self.score, self.head = nn.Linear(4, 5), nn.Linear(10, 1), nn.Linear(5, 3)

    def forward(self, x: Tensor, edge_index: Tensor, weight: Tensor, batch: Tensor, size: int) -> Tensor:
        h = self.value(x)
        source, target = edge_index
        score = F.leaky_relu(self.score(torch.cat([h[source], h[target]], 1)))[:, 0]
        top = torch.zeros(len(h), dtype=h.dtype).scatter_reduce(0, target, score.detach(), "amax", include_self=False)
        share = (score - top[target]).exp() * weight
        share = share / (torch.zeros(len(h), dtype=h.dtype).index_add(0, target, share)[target] + 1e-9)
        h = (h + torch.zeros_like(h).index_add(0, target, h[source] * share.unsqueeze(1))).tanh()
        pooled = torch.segment_reduce(h, "sum", lengths=torch.bincount(batch, minlength=size), axis=0)
        gate = pooled[batch].sigmoid()  # what the whole graph says, back to its nodes
        return self.head(torch.zeros(size, h.shape[1], dtype=h.dtype).index_add(0, batch, gate * h))


MODELS = {"gcn": GCN, "gin": GIN, "gat": GAT}
