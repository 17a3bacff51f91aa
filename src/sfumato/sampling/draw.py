"""Draw record indices. ``uniform(n)`` is a source of n uniforms in [0, 1) that are multiples of 2⁻⁵³."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from ._checks import checked_count, checked_rate

Indices = NDArray[np.int64]
Uniform = Callable[[int], NDArray[np.float64]]

# Records per pass, so that a data set of any size costs 8 MiB beyond the result.
_CHUNK = 1 << 20


def draw_poisson(n: int, rate: float, uniform: Uniform) -> Indices:
    """Return the ascending indices of a Poisson sample of ``n`` records: each independently, with probability ``rate``.

    The result may be empty. The realised probability is ``rate`` rounded down to a multiple of 2⁻⁵³, never above it.
    Exactly one uniform is consumed per record. Raises ``ConfigurationError`` for a bad ``n`` or ``rate``.
    """
    n, rate = checked_count(n, "n", least=0), checked_rate(rate)
    drawn = [np.empty(0, np.int64)]
    for start in range(0, n, _CHUNK):
        # 1 - u is exact and lies in (0, 1], so "<=" never rounds the probability up, as "u < rate" would.
        taken = 1.0 - uniform(min(_CHUNK, n - start)) <= rate
        drawn.append(np.flatnonzero(taken).astype(np.int64, copy=False) + start)
    return np.concatenate(drawn)


def shuffle_epoch(n: int, batch_size: int, uniform: Uniform) -> list[Indices]:
    """Return one epoch of ``n`` records in random order, cut into batches of ``batch_size`` (the last may be smaller).

    Every record occurs exactly once, whatever ``uniform`` returns; privacy rests on that alone, not on the order.
    Raises ``ConfigurationError`` for a bad ``n`` or ``batch_size``.
    """
    n, batch_size = checked_count(n, "n", least=0), checked_count(batch_size, "batch_size", least=1)
    order = np.argsort(uniform(n), kind="stable").astype(np.int64, copy=False)
    return [order[start : start + batch_size] for start in range(0, n, batch_size)]


def physical(indices: Indices, max_physical_batch_size: int | None) -> list[Indices]:
    """Cut one logical batch into physical ones of ``max_physical_batch_size`` (None: one), the last one smaller.

    All but the last have the same size, so shapes and compiled graphs repeat. An empty batch gives an empty list.
    Raises ``ConfigurationError`` unless the size is an integer >= 1.
    """
    if max_physical_batch_size is None:
        return [indices] if len(indices) else []
    size = checked_count(max_physical_batch_size, "max_physical_batch_size", least=1)
    return [indices[start : start + size] for start in range(0, len(indices), size)]
