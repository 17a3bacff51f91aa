"""What every noise source checks before it draws."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from ..errors import ConfigurationError

# Box-Muller on 63 bits reaches 9.42 standard deviations; ten leaves headroom against overflow to infinity.
_REACH = 10.0


def checked_size(shape: Sequence[int], std: float, dtype: torch.dtype) -> torch.Size:
    """Return ``shape`` as a ``torch.Size`` once shape, ``std`` and ``dtype`` can be honoured exactly.

    Raises ``ConfigurationError`` for a dtype below float32, a negative dimension, or a ``std`` that is negative,
    not finite, or outside what ``dtype`` can hold: a std that underflows would silently add no noise at all.
    """
    if dtype not in (torch.float32, torch.float64):
        raise ConfigurationError(
            f"noise is drawn in float32 or float64, not {dtype}: fewer bits thin out the tail.",
            found=dtype,
            where="dtype",
            fix="draw in float32, add to a float32 sum, and cast the result.",
        )
    if isinstance(std, bool) or not isinstance(std, (int, float)) or not math.isfinite(std) or std < 0:
        raise ConfigurationError(f"std must be a finite number >= 0, got {std!r}.", found=std, where="std")
    limits = torch.finfo(dtype)
    if std != 0 and not limits.tiny <= std <= limits.max / _REACH:
        raise ConfigurationError(
            f"std={std!r} cannot be represented in {dtype}: the noise would underflow to zero or overflow.",
            found=std,
            where="std",
            fix="rescale the clipping norm, or draw in float64.",
        )
    try:
        size = torch.Size(shape)
    except TypeError:
        raise ConfigurationError(
            f"shape must be a sequence of integers, got {shape!r}.", found=shape, where="shape"
        ) from None
    if any(length < 0 for length in size):
        raise ConfigurationError(f"shape must not hold a negative length, got {shape!r}.", found=shape, where="shape")
    return size
