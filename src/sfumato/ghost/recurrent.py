"""One layer and direction of a recurrent network as one autograd Function, in the style of ``functions``."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from sfumato.ghost.cells import BACK, RUN, Grads, Steps
from sfumato.ghost.functions import Use, full_precision, wide
from sfumato.ghost.rows import by_record
from sfumato.ghost.targets import shape_of
from sfumato.terms import Dense, Outer, product


@dataclass(frozen=True, slots=True)
class Layer:
    """What is static in one run: the cell, its steps, and where the terms of its weights go."""

    kind: str
    steps: Steps
    input: Use
    hidden: Use
    projection: Use


def _by_record(x: Tensor, use: Use) -> Tensor:
    return by_record(x, use.rows, use.records, 1).contiguous()  # read several times by what follows


def _leave(layer: Layer, grads: Grads, x: Tensor | None, out: Tensor, h0: Tensor, hidden: Tensor | None) -> None:
    """The terms of every weight: ``x``, ``out`` and ``hidden`` (before the projection) as stored, (N, ·)."""
    left = rows = None
    for use, grad in ((layer.input, grads.inputs), (layer.hidden, grads.hiddens)):
        if use.weight is None and use.bias is None:
            continue
        if left is None or grads.hiddens is not grads.inputs:
            left, rows = _by_record(grad, use), None
        if use.weight is not None:
            right = x if use is layer.input else torch.cat(layer.steps.previous(out, h0))
            assert right is not None
            use.leave(use.weight, Outer(left, _by_record(right, use), shape_of(use.weight)))
        if use.bias is not None:
            rows = left.sum(1) if rows is None else rows
            use.leave(use.bias, Dense(rows))
    use = layer.projection
    if use.weight is not None and grads.projected is not None and hidden is not None:
        use.leave(use.weight, Outer(_by_record(grads.projected, use), _by_record(hidden, use), shape_of(use.weight)))


def _affine(x: Tensor, w: Tensor, bias: Tensor | None) -> Tensor:
    out = product(x, w)
    return out if bias is None else out.add_(bias)


class RecurrentFn(Function):
    """(x (N, d), h0, c0, weights) to (outputs (N, ·), last h, last c). Terms, with g the gate gradients:
    Outer(g, x) for W_ih, Outer(g, previous h) for W_hh, Outer(grad of h, o tanh c) for W_hr, row sums for biases.

    Runs in float32 or better whatever the weights have, and outside autocast: a product of two hundred halves is noise.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        h0: Tensor,
        c0: Tensor | None,
        w_ih: Tensor,
        w_hh: Tensor,
        b_ih: Tensor | None,
        b_hh: Tensor | None,
        w_hr: Tensor | None,
        anchor: Tensor,
        layer: Layer,
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        ctx.layer, ctx.dtypes = layer, (x.dtype, h0.dtype)
        ctx.set_materialize_grads(False)
        with full_precision():
            w_ih, w_hh = wide(w_ih), wide(w_hh)
            b_ih, b_hh, w_hr = (None if v is None else v.to(w_ih.dtype) for v in (b_ih, b_hh, w_hr))
            x, h0 = x.to(w_ih.dtype), h0.to(w_ih.dtype).contiguous()
            c0 = h0 if c0 is None else c0.to(w_ih.dtype).contiguous()
            b_hn = None
            if b_ih is not None and b_hh is not None:
                if layer.kind == "gru":  # the last third is multiplied by the reset gate
                    b_hn = b_hh[2 * h0.shape[1] :]
                    b_hh = torch.cat([b_hh[: 2 * h0.shape[1]], torch.zeros_like(b_hn)])
                b_ih = b_ih + b_hh
            run = RUN[layer.kind](_affine(x, w_ih, b_ih), layer.steps, h0, c0, w_hh, w_hr, b_hn)
        own = x if layer.input.weight is not None else None
        ctx.save_for_backward(anchor, own, h0, c0, w_ih, w_hh, w_hr, run.out, *run.kept)
        return run.out, run.hidden, run.cell

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor | None, grad_h: Tensor | None, grad_c: Tensor | None) -> tuple[Any, ...]:
        layer: Layer = ctx.layer
        steps = layer.steps
        _, x, h0, c0, w_ih, w_hh, w_hr, out, *kept = ctx.saved_tensors
        with full_precision():
            grad_out = None if grad_out is None else grad_out.to(out.dtype)
            grad_h = torch.zeros_like(h0) if grad_h is None else grad_h.to(out.dtype)
            grad_c = torch.zeros_like(c0) if grad_c is None else grad_c.to(out.dtype)
            grads = BACK[layer.kind](out, kept, steps, h0, c0, w_hh, w_hr, (grad_out, grad_h, grad_c))
            grad_x = product(grads.inputs, w_ih.mT).to(ctx.dtypes[0]) if ctx.needs_input_grad[0] else None
            _leave(layer, grads, x, out, h0, kept[-1] if kept else None)
        dtype = ctx.dtypes[1]
        grad_c0 = None if grads.cell is None else grads.cell.to(dtype)
        return grad_x, grads.hidden.to(dtype), grad_c0, *[None] * 5, layer.input.tape.zero, None
