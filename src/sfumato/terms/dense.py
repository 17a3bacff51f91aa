"""materialize: any term as the dense per-sample gradient (B, *shape); the one operation every term must have."""

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from sfumato.terms.types import Conv, Dense, Outer, Scatter, Stack, Term, batch_size


def materialize(term: Term) -> Tensor:
    """Per-sample gradients, shape (B, *term.shape)."""
    match term:
        case Dense(value):
            return value
        case Outer(left, right, shape):
            return torch.bmm(left.mT, right).reshape(left.shape[0], *shape)
        case Scatter(grad, index, shape):
            records, _ = index.shape
            out = grad.new_zeros(records * shape[0], shape[1])
            offset = torch.arange(records, device=index.device).unsqueeze(1) * shape[0]
            out.index_add_(0, (index + offset).reshape(-1), grad.reshape(-1, shape[1]))
            return out.reshape(records, *shape)
        case Conv():
            return _conv(term)
        case Stack(parts, shape):
            slices = {k: sum(materialize(t) for t in terms) for k, terms in parts.items()}
            first: Any = next(iter(slices.values()))
            whole: Tensor = first.new_zeros(batch_size(term), *shape)
            for (start, rows), dense in slices.items():
                whole[:, start : start + rows] = dense.reshape(-1, rows, *shape[1:])  # type: ignore[union-attr]
            return whole


def conv_weight_grad(grad: Tensor, x: Tensor, term: Conv) -> Tensor:
    """The native weight gradient summed over the leading axis: grad (N, o, *), x (N, i, *)."""
    s = term.spec
    out = torch.ops.aten.convolution_backward(
        grad,
        x,
        term.weight.to(grad.dtype),
        None,
        s.stride,
        s.padding,
        s.dilation,
        s.transposed,
        s.output_padding,
        s.groups,
        (False, True, False),
    )
    return out[1]


def _conv(term: Conv) -> Tensor:
    records, images = term.grad.shape[:2]
    if records == 0 or images == 0:
        return term.grad.new_zeros(records, *term.shape)
    if unfolds(term):
        return _unfolded(term)
    # A loop over the native kernel beats unfolding by about three on a CPU once a record is worth a kernel call.
    return torch.stack([conv_weight_grad(term.grad[b], term.input[b], term) for b in range(records)])


def unfolds(term: Conv) -> bool:
    """Small plain 1-d and 2-d convolutions: one batched product beats B kernel launches."""
    s = term.spec
    spatial = term.grad.dim() - 3
    if s.transposed or s.groups != 1 or spatial > 2:
        return False
    flops = 2 * math.prod(term.shape) * math.prod(term.grad.shape[3:]) * term.grad.shape[1]
    return flops < 2_000_000


def _unfolded(term: Conv) -> Tensor:
    """Patches as one strided view, contracted with the output gradient."""
    records, images = term.grad.shape[:2]
    s, kernel = term.spec, term.shape[2:]
    pad = [p for size in reversed(s.padding) for p in (size, size)]
    x = F.pad(term.input, pad) if any(pad) else term.input
    positions = term.grad.shape[3:]
    strides = x.stride()
    # (B, N, i, *kernel, *positions): rows of one record are contracted together
    view = x.as_strided(
        (*x.shape[:3], *kernel, *positions),
        (
            *strides[:3],
            *(st * d for st, d in zip(strides[3:], s.dilation, strict=True)),
            *(st * d for st, d in zip(strides[3:], s.stride, strict=True)),
        ),
    )
    if images == 1:
        patches = view.reshape(records, math.prod(term.shape[1:]), -1)
        grad = term.grad.reshape(records, term.shape[0], -1)
    else:
        patches = view.movedim(1, -1).reshape(records, math.prod(term.shape[1:]), -1)
        grad = term.grad.movedim(1, -1).reshape(records, term.shape[0], -1)
    return torch.bmm(grad, patches.mT).reshape(records, *term.shape)
