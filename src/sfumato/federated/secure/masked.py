"""Questions under Distributed: every answer is a masked vector of integers with a share of the noise in it."""

from __future__ import annotations

import json
import math
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from sfumato import _validate
from sfumato.accounting import Budget, Event, compose
from sfumato.errors import ConfigurationError
from sfumato.noise import Source

from ..contributions import Rejected
from ..units import Distributed
from ..validation import MEASURE, Validation
from ..wire.messages import Arrays, Scalar, Task
from .encoding import Residues
from .masks import Masks
from .secure_sum import SecureSum

MESSAGE = "message"
_CLOSE = 1e-4  # relative precision of a calibrated noise multiplier


@lru_cache(maxsize=64)
def plan_of(unit: Distributed, size: int, clients: int, bound: float, noise_multiplier: float) -> SecureSum:
    """The secure sum of one question, the same on the server and on every client."""
    return SecureSum(
        size=size,
        clients=clients,
        max_update_norm=bound,
        noise_multiplier=noise_multiplier,
        mechanism=unit.mechanism,
        bits=unit.bits,
        max_dropout=unit.max_dropout,
        max_colluding=unit.max_colluding,
    )


@lru_cache(maxsize=64)
def noise_for(
    unit: Distributed,
    size: int,
    clients: int,
    factors: tuple[float, ...],
    beside: tuple[tuple[int, float, int], ...],
    adaptive: bool = False,
) -> float:
    """Least noise multiplier of updates with ``size`` numbers that lasts for rounds with these ``factors`` of it.

    ``beside``: (size, noise multiplier, times) of other questions, bounded by 1. ``adaptive``: all are charged by the
    Rényi odometer.
    """
    if unit.noise_multiplier is not None:
        return unit.noise_multiplier
    assert isinstance(unit.epsilon, float)
    budget = Budget(unit.epsilon, unit.delta)

    def within(z: float) -> bool:
        spent: dict[Event, int] = {}
        for factor in factors:
            event = replace(plan_of(unit, size, clients, unit.max_update_norm, z * factor).event(), adaptive=adaptive)
            spent[event] = spent.get(event, 0) + 1
        for other, own, times in beside:
            event = replace(plan_of(unit, other, clients, 1.0, own).event(), adaptive=adaptive)
            spent[event] = spent.get(event, 0) + times
        return float(compose(spent, delta=budget.delta)) <= budget.epsilon

    low = high = 2.0**-5
    while not within(high):
        low, high = high, 1.25 * high
    while high > low * (1.0 + _CLOSE):
        middle = (low * high) ** 0.5
        low, high = (low, middle) if within(middle) else (middle, high)
    return high


def lasting_noise(
    unit: Distributed,
    size: int,
    clients: int,
    factors: tuple[float, ...],
    validation: Validation | None,
    *,
    adaptive: bool = False,
) -> float:
    """:func:`noise_for` beside the measures of ``validation``: server and clients agree on it without asking."""
    times = 0 if validation is None else validation.times(len(factors))
    beside = ((MEASURE.size, validation.noise_multiplier, times),) if validation is not None and times else ()
    return noise_for(unit, size, clients, factors, beside, adaptive)


def settings(cohort: Sequence[str], rotation: int) -> dict[str, Scalar]:
    """What clients need to know of each other. The secret of the masks is sent to all: they are SIMULATED."""
    return {"cohort": json.dumps(cohort), "rotation": str(rotation), "mask_secret": secrets.token_hex(32)}


def encoded(
    unit: Distributed,
    task: Task,
    client: str,
    vector: Tensor,
    bound: float,
    noise_multiplier: float,
    origin: Source,
    *,
    most: int,
) -> dict[str, NDArray[np.uint32]]:
    """What ``client`` sends: its share of the noise is made for the declared cohort.

    Raises ``ConfigurationError`` if that has more than ``most`` clients: shares would be too small.
    """
    plan, masks = _planned(unit, task, len(vector), bound, noise_multiplier)
    if plan.clients > most or client not in masks.cohort:
        raise ConfigurationError(
            f"a cohort of {plan.clients} was declared, and {most} was agreed on: this client's share of the noise "
            "would be too small.",
            found=plan.clients,
            where="task.settings",
        )
    message = plan.encode(vector, origin, rotation=str(task.settings["rotation"]))
    return {MESSAGE: masks.hide(client, message)}


def message_of(
    unit: Distributed, task: Task, size: int, bound: float, noise_multiplier: float, arrays: Arrays
) -> Residues:
    """The message in a reply. Raises :class:`Rejected` for anything that no client following the plan would send."""
    plan, _ = _planned(unit, task, size, bound, noise_multiplier)
    message = arrays.get(MESSAGE) if isinstance(arrays, Mapping) and set(arrays) == {MESSAGE} else None
    if not plan.accepts(message):
        raise Rejected("malformed")
    assert isinstance(message, np.ndarray)
    return message


def total(
    unit: Distributed, task: Task, size: int, bound: float, noise_multiplier: float, messages: Mapping[str, Residues]
) -> tuple[Tensor, float]:
    """(noised sum (size,), standard deviation of the noise in it). Raises ``Void`` if too few clients arrived."""
    plan, masks = _planned(unit, task, size, bound, noise_multiplier)
    found = plan.total(messages, masks)
    std = plan.noise_std * math.sqrt(len(messages) / plan.clients)
    return plan.decode(found, rotation=str(task.settings["rotation"])), std


def _planned(
    unit: Distributed, task: Task, size: int, bound: float, noise_multiplier: float
) -> tuple[SecureSum, Masks]:
    cohort = tuple(json.loads(str(task.settings["cohort"])))
    plan = plan_of(unit, size, _validate.count("cohort", len(cohort)), bound, noise_multiplier)
    label = f"{task.run}/{task.round}/{task.nonce}"
    secret = bytes.fromhex(str(task.settings["mask_secret"]))
    return plan, Masks(secret, label, cohort, plan.padded, plan.bits)
