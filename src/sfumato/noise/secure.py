"""The production source: unpredictable noise whose tail is not cut off."""

from __future__ import annotations

from collections.abc import Sequence
from typing import final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from . import integers
from ._box_muller import box_muller
from ._keystream import random_bytes
from ._request import checked_size

# Pairs per pass. The working set (under 1 MiB) stays in cache and bounds memory beyond the result; 2¹⁵ is also torch's
# grain size, below which it starts no threads: barriers between passes this short cost more than they gain.
_PAIRS = 1 << 15


@final
class Secure:
    """Gaussian and integer noise from AES-256 in counter mode, keyed by the operating system.

    Guarantee: draws are computationally indistinguishable from independent ones, across calls, tensors, threads,
    forked processes, copies and restarts. The instance holds no state and accepts no seed, so it cannot be replayed.
    Not covered: attacks on floating-point addition itself (Mironov 2012; Haney et al. 2022), and a bound of 9.42
    standard deviations on the noise, exceeded by a true Gaussian with probability 5e-21 per draw. Integer noise has
    neither limit: its law is met up to 2⁻¹⁰⁰ per draw, and integers add exactly.
    Draws on the CPU and moves the result to ``device``.
    """

    __slots__ = ()
    level = "secure"

    def normal(
        self,
        shape: Sequence[int],
        *,
        std: float,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> Tensor:
        """Return independent N(0, std²) draws of the given shape; ``std=0`` gives zeros.

        float32 or float64 only. Raises ``ConfigurationError`` otherwise, or for a ``std`` that ``dtype`` cannot hold.
        """
        size = checked_size(shape, std, dtype)
        if std == 0:
            return torch.zeros(size, dtype=dtype, device=device)
        flat = torch.empty(size.numel(), dtype=dtype, device="cpu")
        angle_type = np.int32 if dtype == torch.float32 else np.int64
        for part in flat.split(2 * _PAIRS):
            pairs = (len(part) + 1) // 2
            radius_bytes = 8 * pairs
            drawn = random_bytes(radius_bytes + np.dtype(angle_type).itemsize * pairs)
            radius_bits = torch.from_numpy(drawn[:radius_bytes].view(np.int64))
            angle_bits = torch.from_numpy(drawn[radius_bytes:].view(angle_type))
            first, second = box_muller(radius_bits, angle_bits, std, dtype)
            part[:pairs] = first
            part[pairs:] = second[: len(part) - pairs]
        return flat.view(size).to(device)

    def uniform(self, n: int) -> NDArray[np.float64]:
        """Return ``n`` independent uniforms in [0, 1): multiples of 2⁻⁵³, all equally likely."""
        return (random_bytes(8 * n).view(np.uint64) >> np.uint64(11)).astype(np.float64) * 2.0**-53

    def skellam(
        self, shape: Sequence[int], *, variance: integers.Rational, device: torch.device | str = "cpu"
    ) -> Tensor:
        """Return int64 Skellam draws, closed under sums; see :func:`.integers.skellam`, also for what is raised."""
        size = checked_size(shape, 0.0, torch.float32)
        drawn = integers.skellam(size.numel(), variance, random_bytes)
        return torch.from_numpy(drawn).view(size).to(device)

    def discrete_gaussian(
        self, shape: Sequence[int], *, sigma2: integers.Rational, device: torch.device | str = "cpu"
    ) -> Tensor:
        """Return int64 discrete Gaussian draws; see :func:`.integers.discrete_gaussian`, also for what is raised."""
        size = checked_size(shape, 0.0, torch.float32)
        drawn = integers.discrete_gaussian(size.numel(), sigma2, random_bytes)
        return torch.from_numpy(drawn).view(size).to(device)

    def discrete_laplace(
        self, shape: Sequence[int], *, scale: integers.Rational, device: torch.device | str = "cpu"
    ) -> Tensor:
        """Return int64 discrete Laplace draws; see :func:`.integers.discrete_laplace`, also for what is raised."""
        size = checked_size(shape, 0.0, torch.float32)
        drawn = integers.discrete_laplace(size.numel(), scale, random_bytes)
        return torch.from_numpy(drawn).view(size).to(device)
