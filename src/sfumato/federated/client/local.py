"""What a client does with the global model: plain SGD (clipped afterwards, as a whole), or DP-SGD."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sized
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from sfumato import _validate
from sfumato.accounting import Budget, Event
from sfumato.engine import PrivacyEngine
from sfumato.errors import BudgetExceeded, ConfigurationError
from sfumato.noise import Research, Secure
from sfumato.sampling import Poisson

from ..units import SampleLevel
from .live import Live
from .participant import Batch, Client, batches, tensors

Loss = Callable[[Any, Any], Tensor]
LARGE = 1 << 17  # from here on adding gradients into one flat tensor costs more than handling them one by one


@dataclass(frozen=True)
class LocalTraining:
    """SGD at the client, for ``epochs`` passes over its records or for ``steps`` batches of about ``batch_size``.

    ``proximal``: strength of FedProx's pull towards the global model. Under DP-SGD the batches are Poisson samples, and
    ``max_physical_batch_size`` the most records of one in memory at once.
    """

    epochs: int | None = None
    steps: int | None = None
    batch_size: int = 32
    lr: float = 0.1
    momentum: float = 0.0
    proximal: float = 0.0
    max_physical_batch_size: int | None = None

    def __post_init__(self) -> None:
        if self.epochs is not None and self.steps is not None:
            raise ConfigurationError("give epochs or steps, not both.", where="epochs")
        if self.epochs is None and self.steps is None:
            object.__setattr__(self, "epochs", 1)
        for name in ("epochs", "steps", "batch_size", "max_physical_batch_size"):
            if getattr(self, name) is not None:
                _validate.count(name, getattr(self, name))
        _validate.positive("lr", self.lr)
        _validate.non_negative("proximal", self.proximal)
        if not 0.0 <= _validate.number("momentum", self.momentum) < 1.0:
            raise ConfigurationError(f"momentum={self.momentum!r} is not in [0, 1).", where="momentum")

    def count(self, records: int) -> int:
        """Steps of one round on so many records."""
        return self.steps or (self.epochs or 1) * -(-records // self.batch_size)

    def rate(self, records: int) -> float:
        """The chance of each record to be in one step of DP-SGD."""
        return min(1.0, self.batch_size / records)


def plain(live: Live, data: Any, local: LocalTraining, loss: Loss, seed: int) -> None:
    """Train ``live`` on ``data``, no privacy: the update as a whole is clipped afterwards."""
    generator = torch.Generator().manual_seed(seed)
    index, size = live.index, len(cast(Sized, data))
    live.model.train()
    steps = _endless(data, local, generator, local.count(size))
    if len(live.flat) > LARGE and index is None and not (local.momentum or local.proximal):
        moving = [(p, p.detach()) for p in live.active]
        for x, y in steps:
            loss(live.model(x), y).backward()
            for p, values in moving:
                if p.grad is not None:
                    values.add_(p.grad, alpha=-local.lr)
                    p.grad = None
        return
    velocity: Tensor | None = None
    with live.flat_gradients() as gradient:
        for x, y in steps:
            gradient.zero_()
            loss(live.model(x), y).backward()
            if local.proximal:
                gradient.add_(live.flat - live.base, alpha=local.proximal)
            step = gradient if index is None else _only(gradient, index)
            if local.momentum:
                step = velocity = step.clone() if velocity is None else velocity.mul_(local.momentum).add_(step)
            live.flat.add_(step, alpha=-local.lr)


def private(
    live: Live,
    client: Client,
    local: LocalTraining,
    loss: Loss,
    unit: SampleLevel,
    *,
    round: int,
    noise_multiplier: float,
    adaptive: bool,
    budget: Budget | None,
    origin: Secure | Research,
    check: bool,
) -> bool:
    """Train ``live`` with DP-SGD, charged to the client's ledger; whether its budget ended it.

    Raises ``BudgetExceeded`` if that was before the first step.
    """
    data: Any = client.records(round)
    size = len(cast(Sized, data))
    if (held := tensors(data)) is not None:  # a data set that only looks like one is collated in a way of its own
        data = TensorDataset(*held)
    optimizer = torch.optim.SGD(live.active, lr=local.lr, momentum=local.momentum)
    wanted = local.count(size)
    live.model.train()
    with PrivacyEngine(ledger=client.ledger) as engine:
        _, _, loader = engine.make_private(
            module=live.model,
            optimizer=optimizer,
            data_loader=DataLoader(data, batch_size=min(local.batch_size, size)),
            noise_multiplier=noise_multiplier,
            max_grad_norm=unit.max_grad_norm,
            clipping=unit.clipping,
            noise=origin,
            sampling=Poisson(local.rate(size)),
            max_physical_batch_size=local.max_physical_batch_size,
            budget=budget,
            check_first_batch=check,
            dataset=f"client {client.id}",
            group=client.group(round),
        )
        if local.proximal:  # a hook, for the loader makes steps of its own when nobody is drawn
            optimizer.register_step_pre_hook(lambda *_: live.proximal(local.proximal))
        if adaptive:  # chosen after releases had been seen: charged by the odometer
            engine.change(noise_multiplier=noise_multiplier)
        while engine.steps < wanted and not engine.stopped:
            for x, y in loader:
                if engine.steps >= wanted:  # what is drawn and not used is not charged
                    break
                optimizer.zero_grad()
                loss(live.model(x), y).backward()
                optimizer.step()
        if engine.stopped and not engine.steps:
            raise BudgetExceeded(
                f"client {client.id!r} has nothing left for this round.", found=budget, where="epsilon"
            )
        return engine.stopped


def step_event(local: LocalTraining, records: int, noise_multiplier: float, *, adaptive: bool = False) -> Event:
    """What one step of :func:`private` costs."""
    return Event("poisson-gaussian", noise_multiplier, local.rate(records), "add-remove", "record", adaptive=adaptive)


def _endless(data: Any, local: LocalTraining, generator: torch.Generator, steps: int) -> Iterator[Batch]:
    held = tensors(data)
    done = 0
    while done < steps:
        if held is None:
            epoch: Iterator[Batch] = batches(data, local.batch_size, generator)
        else:
            order = torch.randperm(len(held[1]), generator=generator).split(local.batch_size)
            epoch = ((held[0][rows], held[1][rows]) for rows in order)
        for batch in epoch:
            yield batch
            done += 1
            if done == steps:
                return


def _only(gradient: Tensor, index: Tensor) -> Tensor:
    kept = torch.zeros_like(gradient)
    kept[index] = gradient[index]
    return kept
