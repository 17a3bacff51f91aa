"""A privacy budget and the range checks every accounting call shares."""

from __future__ import annotations

import math
from dataclasses import dataclass

from ..errors import ConfigurationError


def number(name: str, value: object) -> float:
    """``value`` as a finite float; :class:`ConfigurationError` otherwise (bools and strings included)."""
    try:
        result = math.nan if isinstance(value, (bool, str)) else float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError, OverflowError):
        result = math.nan
    if not math.isfinite(result):
        raise ConfigurationError(f"{name} must be a finite number, got {value!r}.", found=value, where=name)
    return result


def positive(name: str, value: object) -> float:
    """A finite number > 0."""
    result = number(name, value)
    if result <= 0.0:
        raise ConfigurationError(f"{name} must be > 0, got {value!r}.", found=value, where=name)
    return result


def nonnegative(name: str, value: object) -> float:
    """A finite number >= 0."""
    result = number(name, value)
    if result < 0.0:
        raise ConfigurationError(f"{name} must be >= 0, got {value!r}.", found=value, where=name)
    return result


def probability(name: str, value: object) -> float:
    """A number in the open interval (0, 1), as delta must be."""
    result = number(name, value)
    if not 0.0 < result < 1.0:
        raise ConfigurationError(
            f"{name} must lie strictly between 0 and 1, got {value!r}.",
            found=value,
            where=name,
            fix="a common choice is below 1 / number of records, such as 1e-5.",
        )
    return result


def rate(name: str, value: object) -> float:
    """A sampling rate in (0, 1]."""
    result = number(name, value)
    if not 0.0 < result <= 1.0:
        raise ConfigurationError(f"{name} must lie in (0, 1], got {value!r}.", found=value, where=name)
    return result


def count(name: str, value: object) -> int:
    """A whole number >= 0; floats are refused because rounding one loses or invents releases."""
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise ConfigurationError(f"{name} must be an integer >= 0, got {value!r}.", found=value, where=name)
    result = int(value.__index__())
    if result < 0:
        raise ConfigurationError(f"{name} must be an integer >= 0, got {value!r}.", found=value, where=name)
    return result


@dataclass(frozen=True)
class Budget:
    """(epsilon, delta) that a run may spend and must never exceed."""

    epsilon: float
    delta: float

    def __post_init__(self) -> None:
        object.__setattr__(self, "epsilon", positive("epsilon", self.epsilon))
        object.__setattr__(self, "delta", probability("delta", self.delta))
