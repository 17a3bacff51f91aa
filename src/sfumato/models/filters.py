"""Filters and bases from closed formulas; none depends on data. float32."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def morlet_bank(scale: int, orientations: int, size: int) -> Tensor:
    """Zero-mean complex Morlet filters at dyadic ``scale``: (2 * orientations, 1, size, size), real and imaginary parts
    alternating. Parameters of Bruna, Mallat 2013, section 2."""
    sigma, frequency, slant = 0.8 * 2**scale, 0.75 * math.pi / 2**scale, 4 / orientations
    r = torch.arange(size, dtype=torch.float64) - size // 2
    y, x = torch.meshgrid(r, r, indexing="ij")
    filters = []
    for k in range(orientations):
        theta = math.pi * k / orientations
        u = x * math.cos(theta) + y * math.sin(theta)
        v = y * math.cos(theta) - x * math.sin(theta)
        envelope = torch.exp(-(u**2 + (slant * v) ** 2) / (2 * sigma**2))
        real = envelope * torch.cos(frequency * u)
        filters += [real - envelope * (real.sum() / envelope.sum()), envelope * torch.sin(frequency * u)]
    return (slant / (2 * math.pi * sigma**2) * torch.stack(filters)[:, None]).float()


def gaussian_pool(length: int, stride: int, sigma: float) -> Tensor:
    """(length / stride, length): a normalised Gaussian average around every block of ``stride`` samples."""
    t = torch.arange(length, dtype=torch.float64)
    centre = torch.arange(0, length, stride, dtype=torch.float64) + (stride - 1) / 2
    weight = torch.exp(-((t - centre[:, None]) ** 2) / (2 * sigma**2))
    return (weight / weight.sum(1, keepdim=True)).float()


def cosine_basis(n: int) -> Tensor:
    """(n, n): orthonormal DCT-II, one frequency a row."""
    k, m = torch.arange(n)[:, None], torch.arange(n)[None]
    basis = torch.cos(math.pi * (m + 0.5) * k / n) * math.sqrt(2 / n)
    basis[0] /= math.sqrt(2)
    return basis


def circular_basis(n: int) -> tuple[Tensor, Tensor]:
    """Orthonormal real Fourier basis (n, n) of a circle of n (even) points, and the frequency (n,) of each row."""
    t = torch.arange(n)
    rows, frequency = [torch.ones(n) / math.sqrt(n)], [0]
    for k in range(1, n // 2):
        angle = 2 * math.pi * k * t / n
        rows += [torch.cos(angle) * math.sqrt(2 / n), torch.sin(angle) * math.sqrt(2 / n)]
        frequency += [k, k]
    rows.append(torch.cos(math.pi * t) / math.sqrt(n))
    return torch.stack(rows), torch.tensor([*frequency, n // 2], dtype=torch.float32)
