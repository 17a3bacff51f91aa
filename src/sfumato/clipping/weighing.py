"""Squared norms to clip weights, for every way to clip."""

import torch
from torch import Tensor

from sfumato.clipping.kinds import Automatic, Clip, shares
from sfumato.errors import ConfigurationError


def weights(clip: Clip, sq_norms: Tensor, max_grad_norm: float, dtype: torch.dtype) -> Tensor:
    """Clip weights (G, B), float64, from the squared norms (G, B) of the parts of per-sample gradients by group.

    Guarantee: weight·norm <= C_k in the arithmetic of ``dtype``, the precision in which gradients are summed, with
    C_1 … C_G equal to ``max_grad_norm`` in quadrature; so the clipped gradient of a record is that long at most. A
    record with a norm in any group that is not finite, or beyond about 1e30 times the bound in float32, gets weight 0
    in all of them.
    """
    margin = 32 * torch.finfo(dtype).eps  # norm and sum are rounded separately; the bound must hold after both
    bound = max_grad_norm * (1 - margin)
    norms = sq_norms.sqrt()
    if isinstance(clip, Automatic):
        found = bound / (norms + clip.gamma)
    else:
        parts = shares(clip, len(norms))
        if len(parts) != len(norms):
            raise ConfigurationError(
                f"norms of {len(norms)} groups for a clip with {len(parts)}.", found=len(norms), where="clipping"
            )
        bounds = bound * parts[0] if len(parts) == 1 else norms.new_tensor(parts)[:, None] * bound
        found = (bounds / norms.clamp_min(torch.finfo(torch.float64).tiny)).clamp_max(1.0)
    # Below this a weight is no longer a normal number of ``dtype``; a gradient so large counts as non-finite.
    smallest = torch.finfo(dtype).tiny * 2**24
    whole = (sq_norms.isfinite() & (found > smallest)).all(0)
    return torch.where(whole, found, 0.0)
