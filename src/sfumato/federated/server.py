"""What the server does with a released update: post-processing, so none of it costs privacy."""

from __future__ import annotations

from dataclasses import dataclass
from typing import get_args

import torch
from torch import Tensor

from sfumato import _validate
from sfumato.errors import ConfigurationError


@dataclass(frozen=True)
class Average:
    """w ← w + lr·Δ: with lr = 1 the average of the clients' models (FedAvg, McMahan et al. 2017)."""

    lr: float = 1.0

    def __post_init__(self) -> None:
        _validate.positive("lr", self.lr)


@dataclass(frozen=True)
class Momentum:
    """m ← momentum·m + Δ, w ← w + lr·m (FedAvgM, Hsu et al. 2019)."""

    lr: float = 1.0
    momentum: float = 0.9

    def __post_init__(self) -> None:
        _validate.positive("lr", self.lr)
        _unit_interval("momentum", self.momentum)


@dataclass(frozen=True)
class Adam:
    """FedAdam (Reddi et al. 2021, Algorithm 2), with the bias correction of Kingma and Ba 2015.

    ``eps`` is τ of the paper, in units of an update: without noise, parameters that hardly move stay where they are.
    """

    lr: float = 0.01
    beta1: float = 0.9
    beta2: float = 0.99
    eps: float = 1e-3

    def __post_init__(self) -> None:
        _validate.positive("lr", self.lr)
        _validate.positive("eps", self.eps)
        _unit_interval("beta1", self.beta1)
        _unit_interval("beta2", self.beta2)


ServerOptimizer = Average | Momentum | Adam


def checked(server: object) -> ServerOptimizer:
    """Refuse anything that is not one of the three."""
    if not isinstance(server, get_args(ServerOptimizer)):
        raise ConfigurationError(
            f"server={server!r} is no server optimizer.", found=server, where="server", fix="Average, Momentum or Adam."
        )
    return server


def advance(server: ServerOptimizer, state: dict[str, Tensor], vector: Tensor, change: Tensor) -> None:
    """Move ``vector`` (d,) in place by the released ``change`` (d,); ``state`` starts as an empty dict."""
    match server:
        case Average():
            vector.add_(change, alpha=server.lr)
        case Momentum():
            held = state.setdefault("momentum", torch.zeros_like(vector))
            vector.add_(held.mul_(server.momentum).add_(change), alpha=server.lr)
        case Adam():
            first = state.setdefault("first", torch.zeros_like(vector))
            second = state.setdefault("second", torch.zeros_like(vector))
            times = state.setdefault("times", torch.zeros((), dtype=torch.int64)).add_(1).item()
            first.lerp_(change.to(first.dtype), 1.0 - server.beta1)
            second.lerp_(change.to(second.dtype).square(), 1.0 - server.beta2)
            scale = (second / (1.0 - server.beta2**times)).sqrt_().add_(server.eps)
            vector.addcdiv_(first, scale, value=server.lr / (1.0 - server.beta1**times))


def _unit_interval(name: str, value: float) -> None:
    if not 0.0 <= _validate.number(name, value) < 1.0:
        raise ConfigurationError(f"{name}={value!r} is not in [0, 1).", found=value, where=name)
