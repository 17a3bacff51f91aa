"""Flat clipping: one weight a record from the norm of its whole gradient (Abadi et al. 2016, Algorithm 1)."""

import torch
from torch import Tensor


def flat_weights(sq_norms: Tensor, max_grad_norm: float, dtype: torch.dtype) -> Tensor:
    """Clip weights (B,), float64, from squared per-sample norms (B,).

    Guarantee: weight·norm <= max_grad_norm in the arithmetic of ``dtype``, the precision in which gradients are
    summed; a record with a non-finite norm gets weight 0. Records within the bound keep weight 1.
    """
    margin = 32 * torch.finfo(dtype).eps  # norm and sum are rounded separately; the bound must hold after both
    bound = max_grad_norm * (1 - margin)
    weights = (bound / sq_norms.sqrt().clamp_min(torch.finfo(torch.float64).tiny)).clamp_max(1.0)
    return torch.where(sq_norms.isfinite(), weights, 0.0)
