"""Matrix products by oneDNN where PyTorch would call a BLAS that is slower: float32 on CPUs, about twice on AMD's."""

from collections.abc import Callable

import torch
from torch import Tensor

_LEAST_FLOPS = 1 << 23  # below, the call itself costs more than is won


def _available(x: Tensor, flops: int) -> bool:
    """No autograd formula behind these kernels, and none is needed where gradients are off."""
    return bool(
        x.device.type == "cpu"
        and x.dtype == torch.float32
        and flops >= _LEAST_FLOPS
        and not torch.is_grad_enabled()
        and not torch.is_autocast_enabled("cpu")
        and torch.backends.mkldnn.is_available()
        and torch.backends.mkldnn.enabled
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    )


def _multiply(x: Tensor, w: Tensor) -> Tensor:
    out: Tensor = torch.ops.mkldnn._linear_pointwise.default(x, w, None, "none", [], "")
    return out


def product(x: Tensor, w: Tensor) -> Tensor:
    """x wᵀ: x (N, d), w (p, d)."""
    return _multiply(x, w) if _available(x, 2 * x.shape[0] * w.numel()) else x @ w.mT


def crossed(left: Tensor, right: Tensor) -> Tensor:
    """leftᵀ right: left (N, p), right (N, d)."""
    if not _available(left, 2 * left.numel() * right.shape[1]):
        return left.mT @ right
    if left.shape[1] > right.shape[1]:  # the first argument is copied to be contiguous, the second is not
        return _multiply(right.mT, left.mT).mT.contiguous()
    return _multiply(left.mT, right.mT)


def times(w: Tensor, rows: int) -> Callable[[Tensor], Tensor]:
    """x ↦ x wᵀ for many x of about ``rows`` rows, with w packed once."""
    w = w.contiguous()
    if not _available(w, 2 * rows * w.numel()):
        return lambda x: x @ w.mT
    packed = torch.ops.mkldnn._reorder_linear_weight(w, rows)
    return lambda x: _multiply(x, packed)
