"""Norms of per-sample convolution gradients from Gram matrices of pixels, without any per-sample gradient.

‖Σ_t g_t ⊗ patch_t‖² = Σ_{s,t} <g_s, g_t>·Σ_o <x[s + o], x[t + o]>, o over the offsets of the kernel: every pair of
pixels is multiplied once, not once for each offset, so it takes kernel-size times fewer products than unfolded patches.
"""

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from sfumato.terms.types import Conv

_CHUNK_ELEMENTS = 1 << 20  # of one Gram: stays in cache


def suits(term: Conv) -> bool:
    """Whether the pixel Gram costs clearly less than the per-sample gradients themselves."""
    s = term.spec
    if s.transposed or term.grad.dim() not in (4, 5) or term.grad.shape[1] != 1:
        return False
    positions, offsets = math.prod(term.grad.shape[3:]), math.prod(term.shape[2:])
    pixels = math.prod(_reached(term))
    gram = pixels**2 * term.input.shape[2] + positions**2 * (term.grad.shape[2] + offsets * s.groups)
    return 4 * gram < 3 * positions * math.prod(term.shape)


def measured_by_pixels(term: Conv) -> tuple[Tensor, Tensor, Tensor]:
    """(squared norms, sum over positions of |g||patch|, largest squared |g| or |patch|), all (B,) float64."""
    grad, x, groups = term.grad[:, 0], term.input[:, 0], term.spec.groups
    kernel, stride, dilation = term.shape[2:], term.spec.stride, term.spec.dilation
    x = F.pad(x, [p for size in reversed(term.spec.padding) for p in (size, size)])
    reached = _reached(term)
    x = x[(slice(None), slice(None), *(slice(n) for n in reached))]
    positions, axes = grad.shape[2:], len(reached)
    chunk = max(1, _CHUNK_ELEMENTS // (math.prod(reached) ** 2 * groups))
    sq, mass, largest = [], [], []
    for g, v in zip(grad.split(chunk), x.split(chunk), strict=True):
        n = g.shape[0] * groups
        left, right = g.reshape(n, g.shape[1] // groups, -1), v.reshape(n, v.shape[1] // groups, -1)
        patches = torch.bmm(right.mT, right).view(n, *reached, *reached)
        for a in range(axes):
            patches = _shifted(patches, (1 + a, 1 + axes + a), kernel[a], stride[a], dilation[a], positions[a])
        patches = patches.reshape(n, math.prod(positions), -1)
        rows = torch.bmm(left.mT, left)
        left_sq, right_sq = rows.diagonal(dim1=1, dim2=2).double(), patches.diagonal(dim1=1, dim2=2).double()
        sizes = (left_sq * right_sq).clamp_min(0).sqrt()
        largest.append(torch.maximum(left_sq, right_sq).amax(1).view(-1, groups).amax(1))
        mass.append(sizes.sum(1, dtype=torch.float64).view(-1, groups).sum(1))
        sq.append((patches * rows).sum(2).sum(1, dtype=torch.float64).view(-1, groups).sum(1))
    return torch.cat(sq), torch.cat(mass), torch.cat(largest)


def _reached(term: Conv) -> list[int]:
    """Pixels along each axis, padding included, that some patch covers."""
    geometry = zip(term.grad.shape[3:], term.spec.stride, term.shape[2:], term.spec.dilation, strict=True)
    return [(n - 1) * s + (k - 1) * d + 1 for n, s, k, d in geometry]


def _shifted(x: Tensor, axes: tuple[int, int], kernel: int, stride: int, dilation: int, positions: int) -> Tensor:
    """Σ_j of x moved by the j-th kernel offset along both axes at once."""
    index: list[slice] = [slice(None)] * x.dim()
    parts = []
    for j in range(kernel):
        for a in axes:
            index[a] = slice(j * dilation, j * dilation + stride * (positions - 1) + 1, stride)
        parts.append(x[tuple(index)])
    total = parts[0].contiguous() if len(parts) == 1 else parts[0] + parts[1]
    for part in parts[2:]:
        total += part
    return total
