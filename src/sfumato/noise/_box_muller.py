"""Uniform bits to Gaussian pairs (Box & Muller 1958), keeping the tail."""

from __future__ import annotations

import math

from torch import Tensor, dtype

RADIUS_BITS = 63


def box_muller(radius_bits: Tensor, angle_bits: Tensor, std: float, dtype: dtype) -> tuple[Tensor, Tensor]:
    """Turn uniform signed integers into two independent N(0, std²) tensors of the same shape.

    ``radius_bits``: int64, of which 63 bits are used; ``angle_bits``: int32 or int64, all bits used. Overwrites
    ``radius_bits``. The radius is sqrt(-2 ln u) with u = (k + 1/2) / 2⁶³, so u is never 0, the support ends at
    sqrt(2 ln 2⁶⁴) = 9.42 standard deviations, and because k is converted to floating point *before* it is scaled, a
    small u keeps its full relative precision: the tail is as finely resolved as the centre (a 24-bit uniform, as in
    ``torch.randn``, ends at 5.77).
    """
    k = radius_bits.bitwise_and_((1 << RADIUS_BITS) - 1)
    radius = k.to(dtype).add_(0.5).mul_(2.0**-RADIUS_BITS).log_().mul_(-2.0).sqrt_().mul_(std)
    width = 8 * angle_bits.element_size()
    angle = angle_bits.to(dtype).mul_(2.0 * math.pi / 2.0**width)
    cosine = angle.cos()
    return cosine.mul_(radius), angle.sin_().mul_(radius)
