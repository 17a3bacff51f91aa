"""Argument checks shared by schemes and draws."""

from __future__ import annotations

import operator
from typing import SupportsIndex

from ..errors import ConfigurationError


def checked_rate(rate: float) -> float:
    """Return ``rate`` as a float in (0, 1], or raise ``ConfigurationError`` (NaN included)."""
    try:
        value = float(rate)
    except (TypeError, ValueError):
        value = float("nan")
    if isinstance(rate, (bool, str)) or not 0.0 < value <= 1.0:
        raise ConfigurationError(
            f"rate must be a number in (0, 1], got {rate!r}: it is the probability with which each record takes part.",
            found=rate,
            where="rate",
        )
    return value


def checked_count(value: SupportsIndex, where: str, *, least: int) -> int:
    """Return ``value`` as an int >= ``least``, or raise ``ConfigurationError``."""
    try:
        count = operator.index(value)
    except TypeError:
        count = least - 1
    if isinstance(value, bool) or count < least:
        raise ConfigurationError(f"{where} must be an integer >= {least}, got {value!r}.", found=value, where=where)
    return count
