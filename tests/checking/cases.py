"""What the tests of check share: a case, and a model around one function of its hidden rows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

B = 8
CE = nn.CrossEntropyLoss()


@dataclass(frozen=True)
class Case:
    """``where`` and ``fix``: a part of what the first problem must say (violations only)."""

    model: Callable[[], nn.Module]
    criterion: Any = CE
    batch: Callable[[], Any] = field(default=lambda: vectors())
    where: str = ""
    fix: str = ""
    options: dict[str, Any] = field(default_factory=dict)


class Hidden(nn.Module):
    """decode(mix(encode(x)))"""

    def __init__(self, mix: Callable[[Tensor], Tensor] = lambda h: h):
        super().__init__()
        self.encode, self.decode, self.mix = nn.Linear(5, 6), nn.Linear(6, 3), mix

    def forward(self, x: Tensor) -> Tensor:
        return self.decode(self.mix(self.encode(x)))


class Layer(nn.Module):
    """A function as a module."""

    def __init__(self, body: Callable[..., Any], **members: Any):
        super().__init__()
        self.body = body
        for name, value in members.items():
            setattr(self, name, value)

    def forward(self, *args: Any) -> Any:
        return self.body(self, *args)


def around(layer: nn.Module) -> nn.Sequential:
    """The layer is module 1, its rows have 6 entries."""
    return nn.Sequential(nn.Linear(5, 6), layer, nn.Linear(6, 3))


def vectors(n: int = B) -> tuple[Tensor, Tensor]:
    return torch.randn(n, 5), torch.arange(n) % 3


def sequences(n: int = B, steps: int = 4) -> tuple[Tensor, Tensor]:
    return torch.randn(n, steps, 5), torch.arange(n) % 3


def tokens(n: int = B, steps: int = 6) -> tuple[Tensor, Tensor]:
    return torch.randint(1, 11, (n, steps)), torch.arange(n) % 3


def ragged(n: int = B, steps: int = 6) -> Tensor:
    """A mask of right-padded records of different lengths."""
    lengths = torch.arange(n) % (steps - 1) + 2
    return (torch.arange(steps)[None] < lengths[:, None]).long()
