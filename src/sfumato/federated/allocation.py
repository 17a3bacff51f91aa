"""How a budget is spread over rounds and over clients: by public rules, or by what was released before."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import get_args

import torch
from torch import Tensor

from sfumato import _validate
from sfumato.errors import ConfigurationError
from sfumato.schedules import Schedule, factor


@dataclass(frozen=True)
class Uniform:
    """The same noise in every round."""


@dataclass(frozen=True)
class Adaptive:
    """Less noise when progress stalls, so that the budget goes where it is needed (Lee and Kifer 2018, adapted).

    Whenever the best of the last ``patience`` measures is not more than ``min_delta`` above the best one before, the
    noise multiplier of the coming rounds is multiplied by ``factor``, down to ``lowest`` times the first. Measures are
    released with noise, so the rule sees nothing private; the rounds are charged by the Rényi odometer, which holds
    for noise that was chosen on the way, and end when the budget does.

    ``clients``: before the first round each client of a SampleLevel federation releases its counts of records by class,
    with noise of standard deviation ``count_noise``, and gets a share of ε by them: √(records / most records), times
    the evenness of its classes, but at least ``least``.
    """

    patience: int = 2
    min_delta: float = 0.005
    factor: float = 0.8
    lowest: float = 0.3
    clients: bool = False
    count_noise: float = 20.0
    least: float = 0.5

    def __post_init__(self) -> None:
        _validate.count("patience", self.patience)
        _validate.non_negative("min_delta", self.min_delta)
        _validate.positive("count_noise", self.count_noise)
        for name in ("factor", "lowest", "least"):
            if _validate.positive(name, getattr(self, name)) > 1.0:
                raise ConfigurationError(f"{name}={getattr(self, name)!r} is above 1.", where=name)


Allocation = Uniform | Schedule | Adaptive


def checked(allocation: object) -> Allocation:
    """Refuse anything that is not an allocation."""
    if not isinstance(allocation, (Uniform, Adaptive, *get_args(Schedule))):
        raise ConfigurationError(
            f"allocation={allocation!r} is no way to spread a budget.",
            found=allocation,
            where="allocation",
            fix="Uniform(), Adaptive(), or a schedule from sf.schedules: factors of the noise by round.",
        )
    return allocation  # type: ignore[return-value]


def planned(allocation: Allocation, rounds: int) -> tuple[float, ...] | None:
    """The noise of each round relative to the calibrated one, known in advance; None if all are 1."""
    if isinstance(allocation, Uniform | Adaptive):
        return None
    return tuple(factor(allocation, step) for step in range(rounds))


def stalled(allocation: Adaptive, measures: Sequence[float]) -> bool:
    """Whether the noise should fall now; called after each new measure."""
    if len(measures) <= allocation.patience:
        return False
    best = max(measures[: -allocation.patience])
    return max(measures[-allocation.patience :]) <= best + allocation.min_delta


def shares(allocation: Adaptive, counts: Mapping[str, Tensor]) -> dict[str, float]:
    """{client: share of ε in [least, 1]}, from its released counts by class (K,)."""
    clean = {client: c.double().clamp_min(0.0) for client, c in counts.items()}
    most = max((float(c.sum()) for c in clean.values()), default=0.0)
    found = {}
    for client, c in clean.items():
        total = float(c.sum())
        if total <= 0.0 or most <= 0.0:
            found[client] = allocation.least
            continue
        p = c / total
        entropy = float(-(p * torch.log(p.clamp_min(1e-12))).sum())
        evenness = entropy / math.log(len(p)) if len(p) > 1 else 1.0
        found[client] = min(1.0, max(allocation.least, math.sqrt(total / most) * evenness))
    return found
