"""A public random rotation: it spreads a vector evenly over its coordinates, so that few bits hold each of them.

x -> H D x / sqrt(d), with D random signs and H the Hadamard matrix of order d, the next power of two (Suresh et al.
2017, "Distributed mean estimation with limited communication"). The signs come from a public seed and depend on no
data: the rotation costs no privacy, and gives none.
"""

from __future__ import annotations

import hashlib
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

Vector = NDArray[np.float64]
_BLOCK = 64


def padded(size: int) -> int:
    """The next power of two."""
    return 1 << (size - 1).bit_length()


def rotate(vector: Vector, seed: str) -> Vector:
    """(size,) -> (padded(size),), of the same norm up to rounding errors.

    Over the seed, one coordinate of a vector of norm 1 exceeds t / sqrt(d) with probability at most 2·exp(-t²/2).
    """
    longer = np.zeros(padded(len(vector)))
    longer[: len(vector)] = vector
    return _hadamard(longer * _signs(seed, len(longer)))


def unrotate(vector: Vector, seed: str, size: int) -> Vector:
    """Invert :func:`rotate` under the same seed: (padded(size),) -> (size,)."""
    return (_hadamard(vector) * _signs(seed, len(vector)))[:size]


def _signs(seed: str, count: int) -> Vector:
    bits = np.unpackbits(np.frombuffer(hashlib.shake_256(seed.encode()).digest(-(-count // 8)), np.uint8), count=count)
    return 1.0 - 2.0 * bits.astype(np.float64)


@lru_cache(maxsize=8)
def _block(order: int) -> Vector:
    matrix: Vector = np.ones((1, 1))
    while len(matrix) < order:
        matrix = np.block([[matrix, matrix], [matrix, -matrix]]) / np.sqrt(2.0)
    matrix.flags.writeable = False
    return matrix


def _hadamard(vector: Vector) -> Vector:
    # H is a Kronecker product of small blocks. Each pass multiplies the leading digit of the index by its block and
    # moves it to the end, so that after the last pass all digits are back in order.
    left = len(vector)
    while left > 1:
        order = min(_BLOCK, left)
        vector = (vector.reshape(order, -1).T @ _block(order)).reshape(-1)
        left //= order
    return vector
