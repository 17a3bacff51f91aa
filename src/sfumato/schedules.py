"""Schedules: public factors of a step's number, by which the noise multiplier or the clip bound is multiplied.

A schedule is fixed before training and sees nothing but the step, so that what each step costs is known in advance.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import MISSING, dataclass, fields
from typing import get_args

from . import _validate
from .errors import ConfigurationError


@dataclass(frozen=True)
class Constant:
    """Factor 1 at every step."""


@dataclass(frozen=True)
class Exponential:
    """Factor gamma^(step / every), with gamma > 0: multiplied by ``gamma`` over every ``every`` steps, smoothly."""

    gamma: float
    every: int = 1

    def __post_init__(self) -> None:
        _set(self, gamma=_validate.positive("gamma", self.gamma), every=_validate.count("every", self.every))


@dataclass(frozen=True)
class Step:
    """Factor gamma^⌊step / every⌋, with gamma > 0: multiplied by ``gamma`` at once after every ``every`` steps."""

    gamma: float
    every: int

    def __post_init__(self) -> None:
        _set(self, gamma=_validate.positive("gamma", self.gamma), every=_validate.count("every", self.every))


@dataclass(frozen=True)
class Cosine:
    """From 1 at step 0 to ``final`` > 0 at step ``steps`` along half a cosine, and ``final`` from there on."""

    steps: int
    final: float

    def __post_init__(self) -> None:
        _set(self, steps=_validate.count("steps", self.steps), final=_validate.positive("final", self.final))


@dataclass(frozen=True, init=False)
class Lambda:
    """Factors ``fn(0) … fn(steps - 1)``, each > 0; the last one holds from there on.

    ``fn`` is called for all steps here and never again: a factor that depended on what training shows would be a
    private quantity that nobody accounts for. Raises ``ConfigurationError`` for a value that is not positive.
    """

    values: tuple[float, ...]

    def __init__(self, fn: Callable[[int], float], steps: int):
        if not callable(fn):
            raise ConfigurationError(
                f"fn={fn!r} is not callable: it is called with the number of a step.", found=fn, where="fn"
            )
        steps = _validate.count("steps", steps)
        _set(self, values=tuple(_validate.positive(f"fn({k})", _plain(fn(k))) for k in range(steps)))


Schedule = Constant | Exponential | Step | Cosine | Lambda

_KINDS: dict[str, type[Schedule]] = {kind.__name__.lower(): kind for kind in get_args(Schedule)}


def factor(schedule: Schedule, step: int) -> float:
    """The factor, > 0 and finite, at ``step`` (from 0).

    Raises ``ConfigurationError`` for a negative step, and where the factor leaves the range of a float.
    """
    if isinstance(step, bool) or not isinstance(step, int) or step < 0:
        raise ConfigurationError(f"step={step!r} is not a whole number >= 0.", found=step, where="step")
    try:
        value = _value(schedule, step)
    except OverflowError:
        value = math.inf
    if not 0.0 < value < math.inf:
        raise ConfigurationError(
            f"{schedule!r} is {value} at step {step}: no noise and no clip bound can have that size.",
            found=value,
            where="schedule",
            fix="choose gamma nearer to 1, or a larger every.",
        )
    return value


def _value(schedule: Schedule, step: int) -> float:
    match schedule:
        case Constant():
            return 1.0
        case Exponential(gamma, every):
            return math.pow(gamma, step / every)
        case Step(gamma, every):
            return math.pow(gamma, step // every)
        case Cosine(steps, final):
            # Not 1 - …: a final near 0 would be rounded away.
            share = 0.5 * (1.0 + math.cos(math.pi * step / steps)) if step < steps else 0.0
            return share + final * (1.0 - share)
        case Lambda():
            return schedule.values[min(step, len(schedule.values) - 1)]


def checked(value: object, where: str) -> Schedule:
    """``value`` if it is a schedule (None: ``Constant()``), else ``ConfigurationError`` that names ``where``."""
    if value is None:
        return Constant()
    if not isinstance(value, get_args(Schedule)):
        raise ConfigurationError(
            f"{where}={value!r} is no schedule.",
            found=value,
            where=where,
            fix=f"use one of {', '.join(k.__name__ for k in _KINDS.values())} of sfumato.schedules; "
            "a function goes into Lambda(fn, steps).",
        )
    return value


def to_json(schedule: Schedule) -> dict[str, object]:
    """A plain JSON object; :func:`from_json` restores an equal schedule."""
    checked(schedule, "schedule")
    plain = {f.name: getattr(schedule, f.name) for f in fields(schedule)}
    return {"kind": type(schedule).__name__.lower()} | {k: list(v) if k == "values" else v for k, v in plain.items()}


def from_json(data: Mapping[str, object]) -> Schedule:
    """Restore a schedule; raises ``ConfigurationError`` for an unknown kind, and unknown, missing or bad fields."""
    given = dict(data)
    kind = _KINDS.get(str(given.pop("kind", None)))
    if kind is None:
        raise ConfigurationError(
            f"{data.get('kind')!r} is no kind of schedule.", found=data.get("kind"), fix=f"one of {', '.join(_KINDS)}."
        )
    known = {f.name for f in fields(kind)}
    required = {f.name for f in fields(kind) if f.default is MISSING}
    if wrong := sorted((set(given) - known) | (required - set(given))):
        raise ConfigurationError(f"unknown or missing field(s) of a {kind.__name__}: {', '.join(wrong)}.", found=wrong)
    if kind is Lambda:
        values = given["values"]
        if not isinstance(values, (list, tuple)):
            raise ConfigurationError(f"values={values!r} is not a list.", found=values, where="values")
        return Lambda(values.__getitem__, len(values))
    build: Callable[..., Schedule] = kind
    return build(**given)


def _plain(value: object) -> object:
    """A NumPy or torch scalar as the float that it is."""
    return value.item() if hasattr(value, "item") else value


def _set(schedule: object, **values: object) -> None:
    for name, value in values.items():
        object.__setattr__(schedule, name, value)
