"""Checks of arguments: each names the argument and the value found, and raises ``ConfigurationError``."""

import math

from sfumato.errors import ConfigurationError


def number(name: str, value: object) -> float:
    """The value as a finite float."""
    try:
        found = float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else math.nan
    except OverflowError:
        found = math.inf
    if not math.isfinite(found):
        raise ConfigurationError(f"{name}={value!r} is not a finite number.", found=value, where=name)
    return found


def non_negative(name: str, value: object) -> float:
    """The value as a finite float >= 0."""
    if (found := number(name, value)) < 0:
        raise ConfigurationError(f"{name}={value!r} is negative.", found=value, where=name)
    return found


def positive(name: str, value: object) -> float:
    """The value as a finite float > 0."""
    if (found := number(name, value)) <= 0:
        raise ConfigurationError(f"{name}={value!r} is not positive.", found=value, where=name)
    return found


def count(name: str, value: object) -> int:
    """The value as a whole number >= 1."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ConfigurationError(f"{name}={value!r} is not a whole number >= 1.", found=value, where=name)
    return value


def one_of(name: str, value: object, allowed: tuple[str, ...]) -> None:
    """Refuse a value outside a closed set."""
    if value not in allowed:
        raise ConfigurationError(f"{name}={value!r} is not one of {', '.join(allowed)}.", found=value, where=name)
