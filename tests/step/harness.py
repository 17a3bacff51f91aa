"""Small private trainings for the tests of the step: chosen draws, released sums, and a loop in one line."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import sfumato as sf

DRAWN, LEFT = 1 - 2.0**-53, 0.0


def chosen(n: int, indices: Iterable[int] | None = None) -> sf.noise.Research:
    """A source whose Poisson draw takes exactly ``indices`` (None: everybody) at any rate; its noise is seeded."""
    coins = np.full(n, DRAWN if indices is None else LEFT)
    if indices is not None:
        coins[list(indices)] = DRAWN
    source = sf.noise.Research(0)
    source.uniform = lambda count: coins[:count].copy()  # type: ignore[method-assign]
    return source


@dataclass
class World:
    """One private training, unpacked."""

    engine: sf.PrivacyEngine
    model: nn.Module
    optimizer: torch.optim.Optimizer
    loader: DataLoader[Any]

    @property
    def grads(self) -> dict[str, Tensor]:
        return {n: p.grad for n, p in self.model.named_parameters() if p.grad is not None}

    @property
    def charges(self) -> int:
        return sum(self.engine.ledger.events().values())


def mlp(inputs: int = 5, classes: int = 3) -> nn.Sequential:
    return nn.Sequential(nn.Linear(inputs, 8), nn.ReLU(inplace=True), nn.Linear(8, classes))


def data(n: int = 24, inputs: int = 5, classes: int = 3) -> tuple[Tensor, Tensor]:
    return torch.randn(n, inputs), torch.randint(0, classes, (n,))


def world(
    model: nn.Module | None = None,
    tensors: tuple[Tensor, ...] | None = None,
    *,
    batch_size: int = 6,
    indices: Iterable[int] | None = None,
    everybody: bool = False,
    optimizer: Callable[..., torch.optim.Optimizer] | None = None,
    engine: sf.PrivacyEngine | None = None,
    workers: int = 0,
    **options: Any,
) -> World:
    """A private training over ``tensors``; ``indices`` (or ``everybody``) fixes who is drawn."""
    model = mlp() if model is None else model
    tensors = data() if tensors is None else tensors
    if everybody or indices is not None:
        options.setdefault("noise", chosen(len(tensors[0]), indices))
    built = (optimizer or (lambda p: torch.optim.SGD(p, lr=0.1)))(model.parameters())
    engine = sf.PrivacyEngine() if engine is None else engine
    options = {"noise_multiplier": 1.0, "max_grad_norm": 1.0, **options}
    loader: DataLoader[Any] = DataLoader(
        TensorDataset(*tensors),
        batch_size=batch_size,
        shuffle=True,
        num_workers=workers,
        persistent_workers=workers > 0,
    )
    return World(engine, *engine.make_private(module=model, optimizer=built, data_loader=loader, **options))


def loss(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(model(x), y)


def train(w: World, epochs: int = 1, compute: Callable[..., Tensor] = loss) -> None:
    """The plain loop."""
    for _ in range(epochs):
        for x, y in w.loader:
            w.optimizer.zero_grad()
            compute(w.model, x, y).backward()
            w.optimizer.step()


def released(w: World, compute: Callable[..., Tensor] = loss) -> dict[str, Tensor]:
    """What the first logical batch releases, times the expected batch size: the clipped sum where there is no noise."""
    before = w.engine.steps
    for x, y in w.loader:
        compute(w.model, x, y).backward()
        if w.engine.steps > before:
            break
    return {n: g.double() * w.engine.plan.expected_batch_size for n, g in w.grads.items()}


def norm(gradients: dict[str, Tensor]) -> float:
    return (
        float(torch.stack([g.double().square().sum() for g in gradients.values()]).sum().sqrt()) if gradients else 0.0
    )


def distance(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    assert a.keys() == b.keys()
    return norm({n: a[n].double() - b[n].double() for n in a})
