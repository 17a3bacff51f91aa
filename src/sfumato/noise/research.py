"""The research source: seedable and fast, not for production."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from typing import final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..errors import ConfigurationError
from . import integers
from ._request import checked_size


@final
class Research:
    """Noise from PyTorch's and NumPy's own generators: reproducible, and NOT private against a careful adversary.

    The generators are not cryptographic, copies and forks repeat the stream, and the float32 tail is cut off (at 5.77
    standard deviations on the CPU), which alone is a distinguishing event: at noise multiplier 1, sample rate 0.01
    and 10⁴ steps its probability is about 9e-5, above a usual delta. Use it for tests and ablations.
    The global generators of torch and numpy are neither read nor advanced. ``seed=None`` picks a fresh seed, kept in
    ``.seed``. Gaussian noise, integer noise and sampling have separate streams: how many records are drawn does not
    shift the noise.
    """

    level = "research"

    def __init__(self, seed: int | None = None) -> None:
        if seed is not None and (isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**64):
            raise ConfigurationError(
                f"seed must be an integer in [0, 2**64) or None, got {seed!r}.", found=seed, where="seed"
            )
        self.seed = secrets.randbits(63) if seed is None else seed
        self._generators: dict[torch.device, torch.Generator] = {}
        self._coins = np.random.default_rng(self.seed)
        self._integers = np.random.default_rng((self.seed, 1))

    def normal(
        self,
        shape: Sequence[int],
        *,
        std: float,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> Tensor:
        """Return N(0, std²) draws of the given shape on ``device``; ``std=0`` gives zeros and draws nothing.

        float32 or float64 only. Raises ``ConfigurationError`` otherwise, or for a ``std`` that ``dtype`` cannot hold.
        """
        size = checked_size(shape, std, dtype)
        out = torch.zeros(size, dtype=dtype, device=device)
        if std == 0:
            return out
        if out.device not in self._generators:
            self._generators[out.device] = torch.Generator(out.device).manual_seed(self.seed)
        return out.normal_(0.0, std, generator=self._generators[out.device])

    def uniform(self, n: int) -> NDArray[np.float64]:
        """Return ``n`` uniforms in [0, 1) with 53 bits."""
        return self._coins.random(n)

    def skellam(
        self, shape: Sequence[int], *, variance: integers.Rational, device: torch.device | str = "cpu"
    ) -> Tensor:
        """Return int64 Skellam draws, closed under sums; see :func:`.integers.skellam`, also for what is raised."""
        size = checked_size(shape, 0.0, torch.float32)
        drawn = integers.skellam(size.numel(), variance, self._random_bytes)
        return torch.from_numpy(drawn).view(size).to(device)

    def discrete_gaussian(
        self, shape: Sequence[int], *, sigma2: integers.Rational, device: torch.device | str = "cpu"
    ) -> Tensor:
        """Return int64 discrete Gaussian draws; see :func:`.integers.discrete_gaussian`, also for what is raised."""
        size = checked_size(shape, 0.0, torch.float32)
        drawn = integers.discrete_gaussian(size.numel(), sigma2, self._random_bytes)
        return torch.from_numpy(drawn).view(size).to(device)

    def discrete_laplace(
        self, shape: Sequence[int], *, scale: integers.Rational, device: torch.device | str = "cpu"
    ) -> Tensor:
        """Return int64 discrete Laplace draws; see :func:`.integers.discrete_laplace`, also for what is raised."""
        size = checked_size(shape, 0.0, torch.float32)
        drawn = integers.discrete_laplace(size.numel(), scale, self._random_bytes)
        return torch.from_numpy(drawn).view(size).to(device)

    def _random_bytes(self, count: int) -> NDArray[np.uint8]:
        return np.frombuffer(self._integers.bytes(count), np.uint8)
