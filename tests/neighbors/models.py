"""Models for the replay: each with data of its own, and a loss for each record."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F


@dataclass(frozen=True)
class Case:
    build: Callable[[], nn.Module]
    inputs: Callable[[int], Tensor]  # records of a data set
    words: bool = False  # integer inputs: hostile values cannot be put in
    loss: str = "cross_entropy"


class Attention(nn.Module):
    """One block with learned positions, causal attention and a mean over tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.inp, self.qkv = nn.Linear(3, 4), nn.Linear(4, 12)
        self.position = nn.Parameter(torch.randn(5, 4))
        self.norm, self.out = nn.LayerNorm(4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.inp(x) + self.position
        q, k, v = self.qkv(self.norm(h)).chunk(3, -1)
        return self.out((h + F.scaled_dot_product_attention(q, k, v, is_causal=True)).mean(1))


class Tied(nn.Module):
    """The embedding is the head, and is used once more as a bare parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.mix = nn.Embedding(7, 4), nn.Linear(4, 4)

    def forward(self, ids: Tensor) -> Tensor:
        h = torch.tanh(self.mix(self.embed(ids).mean(1)))
        return F.linear(h, self.embed.weight) + self.embed.weight.sum(1)


class Siamese(nn.Module):
    """Twice the same weight on halves that may cancel."""

    def __init__(self) -> None:
        super().__init__()
        self.encode, self.out = nn.Linear(3, 4, bias=False), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.encode(x[:, 0]) - self.encode(x[:, 1]))


class Mean(nn.Module):
    """A linear layer on tokens, whose gradients may cancel within a record."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Linear(3, 3, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.tokens(x).mean(1)


class Twice(nn.Module):
    """One weight in a matrix product and in an elementwise one: two kinds of term that may cancel."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 3, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x[:, 0]) - (self.linear.weight * x[:, 1].unsqueeze(1)).sum(-1)


def _mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 6), nn.ReLU(inplace=True), nn.Linear(6, 3))


def _conv() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1, padding_mode="circular"),
        nn.GroupNorm(2, 4),
        nn.ReLU(),
        nn.Conv2d(4, 4, 2, stride=2, groups=2, bias=False),
        nn.Flatten(),
        nn.Linear(16, 3),
    )


def _bag() -> nn.Module:
    class Bag(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.out = nn.Embedding(7, 4, padding_idx=0), nn.Linear(4, 3)

        def forward(self, ids: Tensor) -> Tensor:
            return self.out(self.embed(ids).sum(1))

    return Bag()


def _regression() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 1))


CASES: dict[str, Case] = {
    "mlp": Case(_mlp, lambda n: torch.randn(n, 4)),
    "regression": Case(_regression, lambda n: torch.randn(n, 4), loss="mse"),
    "conv": Case(_conv, lambda n: torch.randn(n, 2, 4, 4)),
    "embedding": Case(_bag, lambda n: torch.randint(0, 7, (n, 5)), words=True),
    "attention": Case(Attention, lambda n: torch.randn(n, 5, 3)),
    "tied": Case(Tied, lambda n: torch.randint(0, 7, (n, 5)), words=True),
    "siamese": Case(Siamese, lambda n: torch.randn(n, 2, 3)),
    "tokens": Case(Mean, lambda n: torch.randn(n, 16, 3)),
    "twice": Case(Twice, lambda n: torch.randn(n, 2, 3)),
}
