"""The training loop: the plain PyTorch loop, plus bookkeeping that looks on."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..data import Records
from ..engine import PrivacyEngine
from ..report import EpochRow, StepRow
from .averaging import Average
from .metrics import Metrics
from .settings import Settings

EVALUATIONS = 10  # test evaluations per run, evenly spread
EPSILON_POINTS = 100  # exact ε is asked for at about so many steps
CHUNK = 2048


@dataclass
class _Running:
    """Sums over the physical microbatches of one logical step."""

    loss: float = 0.0
    correct: int = 0
    rows: int = 0

    def add(self, loss: Tensor, output: Tensor, y: Tensor) -> None:
        self.loss += float(loss.detach()) * len(y)
        self.correct += int((output.detach().argmax(1) == y).sum())
        self.rows += len(y)


def train(
    *,
    engine: PrivacyEngine,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    loader: Iterable[tuple[Tensor, Tensor]],
    average: Average,
    test: Records,
    settings: Settings,
    device: torch.device,
    planned_steps: int,
    metrics: Metrics,
) -> None:
    """Train until the epochs are done or the budget ends the loader. Rows go to ``metrics`` after each release."""
    epochs = settings.recipe.epochs
    every_epochs = max(1, math.ceil(epochs / EVALUATIONS))
    every_steps = max(1, planned_steps // EPSILON_POINTS)
    running, asked, evaluated = _Running(), -every_steps, 0
    model.train()
    for epoch in range(1, epochs + 1):
        for x, y in loader:
            x, y = x.to(device), y.to(device)
            before = engine.steps
            _set_lr(optimizer, settings, before / planned_steps)
            optimizer.zero_grad()
            output = model(x)
            loss = F.cross_entropy(output, y)
            loss.backward()
            optimizer.step()
            running.add(loss, output, y)
            if (step := engine.steps) == before:
                continue  # a physical microbatch that is not the last of its step
            average.update(step / planned_steps)
            spent: float | None = None
            if step - asked >= every_steps:
                spent, asked = float(engine.get_epsilon(delta=settings.delta)), step
            metrics.step(_row(step, epoch, spent, running, engine, private=settings.private_metrics))
            running = _Running()
        if engine.steps > evaluated and (epoch % every_epochs == 0 or epoch == epochs or engine.stopped):
            evaluated = engine.steps
            spent = float(engine.get_epsilon(delta=settings.delta))
            metrics.epoch(EpochRow(evaluated, epoch, spent, accuracy(average.model, test, device)))
        if engine.stopped:
            break


def accuracy(model: nn.Module, test: Records, device: torch.device) -> float:
    """Part of the test records that ``model`` classifies right, in evaluation mode."""
    training = model.training
    model.eval()
    correct = 0
    with torch.no_grad():
        for x, y in zip(test.x.split(CHUNK), test.y.split(CHUNK), strict=True):
            correct += int((model(x.to(device)).argmax(1).cpu() == y).sum())
    model.train(training)
    return correct / len(test)


def mean_loss(model: nn.Module, test: Records, device: torch.device) -> float:
    """Mean cross-entropy of ``model`` on the test records, in evaluation mode."""
    training = model.training
    model.eval()
    total = 0.0
    with torch.no_grad():
        for x, y in zip(test.x.split(CHUNK), test.y.split(CHUNK), strict=True):
            total += float(F.cross_entropy(model(x.to(device)), y.to(device), reduction="sum"))
    model.train(training)
    return total / len(test)


def _row(
    step: int, epoch: int, spent: float | None, running: _Running, engine: PrivacyEngine, *, private: bool
) -> StepRow:
    if not private or running.rows == 0:
        return StepRow(step, epoch, spent, None, None, None)
    return StepRow(
        step=step,
        epoch=epoch,
        epsilon=spent,
        loss=running.loss / running.rows,
        train_accuracy=running.correct / running.rows,
        clip_rate=float(engine.last_step.clip_fraction),
    )


def _set_lr(optimizer: torch.optim.Optimizer, settings: Settings, done: float) -> None:
    """A schedule over planned steps, a public number; ``done`` in [0, 1]."""
    recipe = settings.recipe
    factor = {
        "constant": 1.0,
        "linear": max(0.0, 1.0 - done),
        "cosine": 0.5 * (1.0 + math.cos(math.pi * min(1.0, done))),
    }[recipe.lr_schedule]
    for group in optimizer.param_groups:
        group["lr"] = recipe.lr * factor
