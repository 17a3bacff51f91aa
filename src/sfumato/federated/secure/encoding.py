"""From real vectors to integers of bounded norm, and to residues modulo a power of two and back.

Rounding at random to one of the two neighbouring integers is unbiased but lengthens a vector, so the norm that the
noise is scaled to must be that of what was rounded: rounding is repeated until it obeys the bound of :class:`Grid`
(conditional randomized rounding: Kairouz, Liu & Steinke 2021, "The distributed discrete Gaussian mechanism"), which
biases it by as little as the first rounding is unlikely to fail.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

Integers = NDArray[np.int64]
Residues = NDArray[np.uint32]
Uniform = Callable[[int], NDArray[np.float64]]

LARGEST = 1 << 24  # of one coordinate: squares of 2¹⁴ of them fit into 64 bits together
_CHUNK = 1 << 14
_TRIES = 100


@dataclass(frozen=True)
class Grid:
    """Integer vectors of ``size`` coordinates that stand for real ones of norm <= ``reach`` / ``scale``.

    Args:
        scale: grid steps per unit.
        reach: the clipping norm in grid steps.
        limit: largest absolute value of a coordinate; what is above is cut off, which only shortens the vector.
        beta: how likely, at most, one rounding exceeds the bound.
    """

    size: int
    scale: float
    reach: float
    limit: int
    beta: float

    @cached_property
    def squared(self) -> int:
        """The squared L2 norm that no rounded vector exceeds (Kairouz et al. 2021, section 4)."""
        root = math.sqrt(self.size)
        likely = self.reach**2 + self.size / 4.0
        likely += math.sqrt(2.0 * math.log(1.0 / self.beta)) * (self.reach + root / 2.0)
        return math.floor(min(likely, (self.reach + root) ** 2))

    @cached_property
    def l2(self) -> float:
        """The L2 sensitivity in grid steps, rounded up."""
        return math.nextafter(math.sqrt(self.squared), math.inf)

    @cached_property
    def l1(self) -> float:
        """The L1 sensitivity: at most sqrt(size) times the L2 norm, and in integers at most its square."""
        return max(self.l2, float(min(math.isqrt(self.size * self.squared), self.squared)))

    def rounded(self, vector: NDArray[np.float64], uniform: Uniform) -> Integers:
        """Round ``vector``, (size,) in grid steps and of norm <= ``reach``, to integers within every bound above.

        ``uniform(n)`` gives n uniforms in [0, 1). The bounds hold for any finite vector: after many failures it is
        rounded towards zero, and after that it is zero.
        """
        cut = np.clip(vector, -self.limit, self.limit)
        below = np.floor(cut)
        share = cut - below
        for _ in range(_TRIES):
            found = (below + (uniform(len(cut)) < share)).astype(np.int64)
            if squared_norm(found) <= self.squared:
                return found
        found = np.trunc(cut).astype(np.int64)
        return found if squared_norm(found) <= self.squared else np.zeros_like(found)


def squared_norm(vector: Integers) -> int:
    """Exact, for coordinates of at most 2²⁴ in absolute value."""
    return sum(int(np.dot(part, part)) for part in (vector[i : i + _CHUNK] for i in range(0, len(vector), _CHUNK)))


def clipped(vector: NDArray[np.float64], norm: float) -> NDArray[np.float64]:
    """``vector`` shortened to ``norm`` where it is longer; zero if some number in it is not finite."""
    largest = float(np.max(np.abs(vector), initial=0.0))
    if not math.isfinite(largest) or largest == 0.0:
        return np.zeros_like(vector)
    length = float(np.linalg.norm(vector / largest))  # in two factors: squares of large numbers would overflow
    if length <= norm / largest:
        return vector
    return vector / largest * (norm / length)


def wrapped(vector: Integers, bits: int) -> Residues:
    """Residues modulo 2**bits, for 1 <= bits <= 32."""
    return (vector & ((1 << bits) - 1)).astype(np.uint32)


def centred(residues: Residues, bits: int) -> Integers:
    """The representatives in [-2**(bits-1), 2**(bits-1))."""
    half = 1 << (bits - 1)
    return ((residues.astype(np.int64) + half) & ((1 << bits) - 1)) - half
