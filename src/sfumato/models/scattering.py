"""Wavelet features that need no training data, under one trained linear layer.

With few private steps, good fixed features beat learned ones: Tramèr, Boneh 2021. The features are a scattering
transform of order 2 (Bruna, Mallat 2013; Oyallon, Mallat 2015), normalised within each record, then rotated into
frequencies of space and orientation and re-weighted by a fixed formula, which evens out how strongly the directions
of the linear problem vary.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import ConfigurationError
from ._shapes import require_image
from .dense import linear
from .features import Features
from .filters import circular_basis, cosine_basis, gaussian_pool, morlet_bank

ORIENTATIONS = 8
GROUPS = 27  # of the 81 scattering channels
SMALLEST = 16
SPACE, TURN, GAIN = 1.0, 0.5, 0.5  # powers of the spatial and the angular frequency, and a common factor


def scattering(input_shape: tuple[int, ...], classes: int) -> nn.Module:
    """39,700 trained parameters for 28 x 28 grey images and 10 classes."""
    channels, height, width = require_image("scattering", input_shape)
    if channels != 1 or height != width or height % 4 or height < SMALLEST:
        raise ConfigurationError(
            f"model scattering needs square grey images of {SMALLEST} pixels or more, divisible by 4; "
            f"these have shape {input_shape}.",
            fix="use --model cnn, or resize a folder of images with --image-size.",
        )
    side, paths = height // 4, (1 + ORIENTATIONS) ** 2
    features = nn.Sequential(
        Scattering(height, ORIENTATIONS), nn.GroupNorm(GROUPS, paths, affine=False), Frequencies(side, ORIENTATIONS)
    )
    return Features(features, linear((paths * side * side,), classes))


class Scattering(nn.Module):
    """Moduli of wavelet coefficients at two dyadic scales: (B, 1, n, n) -> (B, (1 + L)^2, n/4, n/4)."""

    fine: Tensor
    coarse: Tensor
    pool: Tensor
    half_pool: Tensor

    def __init__(self, size: int, orientations: int):
        super().__init__()
        self.orientations = orientations
        self.register_buffer("fine", morlet_bank(0, orientations, 9))
        self.register_buffer("coarse", morlet_bank(1, orientations, 13))
        self.register_buffer("pool", gaussian_pool(size, 4, 3.2))
        self.register_buffer("half_pool", gaussian_pool(size // 2, 2, 1.6))

    def forward(self, x: Tensor) -> Tensor:
        fine = modulus(x, self.fine, stride=1)
        coarse = modulus(x, self.coarse, stride=2)
        second = modulus(fine, self.coarse, stride=2)
        averages = [
            self.pool @ torch.cat([x, fine], 1) @ self.pool.T,
            self.half_pool @ torch.cat([coarse, second], 1) @ self.half_pool.T,
        ]
        return torch.cat(averages, 1)


class Frequencies(nn.Module):
    """Scattering channels (B, (1 + L)^2, m, m) -> (B, (1 + L)^2 m^2): orthonormal cosines over space, Fourier over the
    orientations, high frequencies raised by a fixed power."""

    cosine: Tensor
    circle: Tensor
    weight: Tensor
    first: Tensor
    relative: Tensor

    def __init__(self, side: int, orientations: int):
        super().__init__()
        self.orientations = orientations
        self.register_buffer("cosine", cosine_basis(side))
        circle, frequency = circular_basis(orientations)
        self.register_buffer("circle", circle)
        both = torch.hypot(frequency[:, None], frequency[None]).flatten()
        angular = torch.cat([torch.zeros(1), frequency, frequency, both])[:, None, None]
        k = torch.arange(side).float()
        spatial = 1 + k[:, None] ** 2 + k[None] ** 2
        self.register_buffer("weight", GAIN * spatial ** (SPACE / 2) * (1 + angular) ** TURN)
        i = torch.arange(orientations)
        self.register_buffer("first", i[:, None].expand(orientations, orientations).clone())
        self.register_buffer("relative", (i[:, None] + i) % orientations)  # second angle, relative to the first

    def forward(self, x: Tensor) -> Tensor:
        n = self.orientations
        x = self.cosine @ x @ self.cosine.T
        mean, fine, coarse, second = x.split([1, n, n, n * n], 1)
        second = second.unflatten(1, (n, n))[:, self.first, self.relative]
        rotated = [
            mean,
            torch.einsum("kl,bluv->bkuv", self.circle, fine),
            torch.einsum("kl,bluv->bkuv", self.circle, coarse),
            torch.einsum("kl,jm,blmuv->bkjuv", self.circle, self.circle, second).flatten(1, 2),
        ]
        return (torch.cat(rotated, 1) * self.weight).flatten(1)


def modulus(x: Tensor, filters: Tensor, *, stride: int) -> Tensor:
    """|x * filter| for each channel and complex filter: (B, C, n, n) -> (B, C L, n/stride, n/stride)."""
    batch, channels = x.shape[:2]
    x = F.pad(x, (filters.shape[-1] // 2,) * 4, mode="reflect")
    y = F.conv2d(x.reshape(batch * channels, 1, *x.shape[2:]), filters, stride=stride)
    y = y.view(batch, channels * (len(filters) // 2), 2, *y.shape[2:])
    return (y.square().sum(2) + 1e-12).sqrt()
