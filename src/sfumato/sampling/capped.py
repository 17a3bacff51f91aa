"""Draws beside the plain Poisson one: capped, from public groups in turn, and padded to one shape.

``uniform(n)`` is a source of n uniforms in [0, 1) that are multiples of 2⁻⁵³.
"""

from __future__ import annotations

import math

import numpy as np

from ..errors import ConfigurationError, PrivacyError
from ._checks import checked_count, checked_rate
from .draw import Indices, Uniform, draw_poisson

# Two of k keys are equal with probability below k² · 2⁻⁵⁴: a source that repeats itself so often is broken.
_TRIES = 32


def truncation(n: int, rate: float) -> int:
    """The largest batch that is drawn of ``n`` records unless another is chosen: mean + 5 standard deviations."""
    n, rate = checked_count(n, "n", least=1), checked_rate(rate)
    return min(n, math.ceil(n * rate + 5.0 * math.sqrt(n * rate * (1.0 - rate))))


def draw_truncated(n: int, rate: float, max_batch_size: int, uniform: Uniform) -> Indices:
    """Return the ascending indices of a Poisson sample; if larger than ``max_batch_size``, a uniform subset of it.

    Every subset of that size is equally likely: keys that tie, which would favour the lower index, are drawn again.
    A record takes part with probability ``rate`` rounded down to a multiple of 2⁻⁵³ at most. Which records remain
    depends on how many there are, so the privacy is that of a zeroed record, not of a removed one.
    Raises ``ConfigurationError`` for a bad ``n``, ``rate`` or ``max_batch_size``.
    """
    cap = checked_count(max_batch_size, "max_batch_size", least=1)
    drawn = draw_poisson(n, rate, uniform)
    return drawn if len(drawn) <= cap else np.sort(drawn[_order(len(drawn), uniform)[:cap]])


def _order(k: int, uniform: Uniform) -> Indices:
    """A uniform permutation of k."""
    for _ in range(_TRIES):
        keys = uniform(k)
        order = np.argsort(keys, kind="stable").astype(np.int64, copy=False)
        if (np.diff(keys[order]) > 0).all():
            return order
    raise PrivacyError(
        f"The random source repeated itself among {k} keys in each of {_TRIES} tries, so no subset of the draw is "
        "uniform.",
        found=k,
        where="noise",
        fix='use noise="secure".',
    )


def cyclic_group(n: int, cycle: int, step: int) -> int:
    """Number of records of ``n`` that ``step`` draws from: those whose index is ``step`` modulo ``cycle``."""
    n, cycle = checked_count(n, "n", least=0), checked_count(cycle, "cycle", least=1)
    step = checked_count(step, "step", least=0)
    if cycle > max(1, n):
        raise ConfigurationError(
            f"cycle={cycle} is more than the {n} records: some steps would draw from an empty group.",
            found=cycle,
            where="cycle",
            fix=f"choose cycle <= {n}.",
        )
    return len(range(step % cycle, n, cycle))


def draw_cyclic(n: int, rate: float, cycle: int, step: int, uniform: Uniform) -> Indices:
    """Return the ascending indices of a Poisson sample of the public group of ``step``: those ≡ step modulo ``cycle``.

    A record takes part in one step of every ``cycle``, then with probability ``rate`` (rounded down to a multiple of
    2⁻⁵³), independently of all others. ``step`` counts from 0 over the whole training. A removed record would move
    those behind it to other groups, so the privacy is that of a zeroed record.
    Raises ``ConfigurationError`` for a bad argument, and for a ``cycle`` of more than ``n`` groups.
    """
    drawn = draw_poisson(cyclic_group(n, cycle, step), rate, uniform)
    return step % cycle + cycle * drawn


def pad(indices: Indices, size: int) -> tuple[Indices, int]:
    """(``size`` indices, how many of them were drawn): the rest, at the end, repeat the last one drawn.

    What is repeated must get weight 0. An empty draw stays empty, for there is no record to repeat.
    Raises ``ConfigurationError`` for a draw of more than ``size``.
    """
    size, real = checked_count(size, "size", least=1), len(indices)
    if real > size:
        raise ConfigurationError(f"{real} records do not fit into a batch of {size}.", found=real, where="size")
    return (np.pad(indices, (0, size - real), mode="edge") if real else indices), real
