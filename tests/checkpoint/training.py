"""A small training whose every number is determined by its weights and its optimizer: any lost bit shows."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sfumato.session import checkpoint

HEAD = "a" * 64
PLAN = {"unit": "record", "sampler": {"kind": "poisson", "rate": 0.1}, "dataset_size": 100}


class Net(nn.Module):
    """Tied weights, a buffer, a scalar parameter, one without elements, and two of one shape."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 6), nn.Linear(6, 6)
        self.out = nn.Linear(6, 3)
        self.again = nn.Linear(6, 3)
        self.again.weight = self.out.weight
        self.scale = nn.Parameter(torch.tensor(1.5))
        self.none = nn.Parameter(torch.zeros(0, 4))
        self.register_buffer("mask", torch.randn(6) > 0)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.second(torch.tanh(self.first(x)) * self.mask))
        return self.out(h) * self.scale + self.again(h)


def split(model: nn.Module) -> list[dict[str, Any]]:
    """Two groups with settings of their own."""
    whole = list(model.parameters())
    return [{"params": whole[:2], "lr": 0.02}, {"params": whole[2:], "weight_decay": 0.01}]


Build = Callable[[], tuple[nn.Module, list[torch.optim.Optimizer]]]


def net(kind: type[torch.optim.Optimizer], dtype: torch.dtype = torch.float32, **settings: Any) -> Build:
    def build() -> tuple[nn.Module, list[torch.optim.Optimizer]]:
        model = Net().to(dtype)
        return model, [kind(split(model), lr=0.05, **settings)]

    return build


def train(model: nn.Module, optimizers: list[torch.optim.Optimizer], steps: range, schedulers: Any = ()) -> None:
    for t in steps:
        given = torch.Generator().manual_seed(t)
        x = torch.randn(5, 6, generator=given).to(next(model.parameters()).dtype)
        for optimizer in optimizers:
            optimizer.zero_grad()
        loss = model(x).square().sum()
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
        for scheduler in schedulers:
            plateau = isinstance(scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau)
            scheduler.step(*([float(loss.detach())] if plateau else []))


def save(
    path: Path, model: nn.Module, optimizers: list[torch.optim.Optimizer], steps: int = 3, extra: Any = None
) -> Path:
    checkpoint.save(
        path,
        module=model,
        optimizers=optimizers,
        position={"steps": steps, "max_grad_norm": 1.25},
        plan=PLAN,
        ledger_head=HEAD,
        extra=extra,
    )
    return path


def bits(value: Any) -> Any:
    """A nested value with every tensor as its dtype, shape and bytes: equal only if equal bit for bit."""
    if isinstance(value, Tensor):
        plain = torch.empty(value.shape, dtype=value.dtype).copy_(value.detach())
        return str(value.dtype), tuple(value.shape), plain.reshape(-1).view(torch.uint8).tolist()
    if isinstance(value, dict):
        return {k: bits(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(bits(v) for v in value)
    return repr(value)


def everything(model: nn.Module, optimizers: list[torch.optim.Optimizer]) -> Any:
    return bits([dict(model.state_dict()), [o.state_dict() for o in optimizers]])
