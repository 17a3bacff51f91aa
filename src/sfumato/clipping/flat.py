"""Flat clipping: one weight a record from the norm of its whole gradient (Abadi et al. 2016, Algorithm 1)."""

import torch
from torch import Tensor


def flat_weights(sq_norms: Tensor, max_grad_norm: float, dtype: torch.dtype) -> Tensor:
    """Clip weights (B,), float64, from squared per-sample norms (B,).

    Guarantee: weight·norm <= max_grad_norm in the arithmetic of ``dtype``, the precision in which gradients are
    summed; a record whose norm is not finite, or beyond about 1e30 times the bound in float32, gets weight 0. Records
    within the bound keep weight 1.
    """
    margin = 32 * torch.finfo(dtype).eps  # norm and sum are rounded separately; the bound must hold after both
    bound = max_grad_norm * (1 - margin)
    weights = (bound / sq_norms.sqrt().clamp_min(torch.finfo(torch.float64).tiny)).clamp_max(1.0)
    # Below this a weight is no longer a normal number of ``dtype``; a gradient so large counts as non-finite.
    smallest = torch.finfo(dtype).tiny * 2**24
    return torch.where(sq_norms.isfinite() & (weights > smallest), weights, 0.0)
