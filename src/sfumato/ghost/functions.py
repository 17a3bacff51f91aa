"""Autograd Functions that compute no weight gradient and leave a term on the tape instead.

Each takes detached parameters, the tape's anchor (so that its backward runs before the tape completes) and
static facts in a frozen record. Tensors go through ``save_for_backward`` so that activation checkpointing works; the
anchor goes first, so that a recomputation outside the capture never passes for this one.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import wraps
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.nn import functional as F

from sfumato.ghost.rows import Rows, by_record, owners
from sfumato.ghost.tape import Tape
from sfumato.ghost.targets import Derived, Target, settle, shape_of
from sfumato.terms import Conv, ConvSpec, Dense, Outer, Scatter, Term, compact


@dataclass(frozen=True, slots=True)
class Use:
    """One use of parameters: where its terms go and which record each row belongs to."""

    tape: Tape
    rows: Rows
    records: int
    weight: Target | None = None
    bias: Target | None = None

    def leave(self, target: Target | None, term: Term) -> None:
        if target is not None:
            self.tape.add(*settle(target, compact(term)))


def exactly(backward: Callable[..., Any]) -> Callable[..., Any]:
    """Without autocast: gradients are multiplied and summed in the precision they have, or better."""

    @wraps(backward)
    def run(ctx: Any, grad: Tensor) -> Any:
        if grad.dtype in HALF:
            _tape_of(ctx).half = True
        with full_precision():
            return backward(ctx, grad)

    return run


HALF = (torch.bfloat16, torch.float16)


def _tape_of(ctx: Any) -> Tape:
    for holder in (ctx, getattr(ctx, "use", None), getattr(ctx, "call", None)):
        if isinstance(tape := getattr(holder, "tape", None), Tape):
            return tape
    raise AssertionError("a Function without a tape")


@contextmanager
def full_precision() -> Iterator[None]:
    """Autocast off on every device that has it on."""
    with ExitStack() as stack:
        for device in ("cpu", "cuda"):
            if torch.is_autocast_enabled(device):
                stack.enter_context(torch.autocast(device, enabled=False))
        yield


def wide(x: Tensor) -> Tensor:
    """Float32 or better: norms and sums are never taken in half precision."""
    return x if x.dtype in (torch.float32, torch.float64) or x.is_complex() else x.float()


class LinearFn(Function):
    """out = x Wᵀ + b. Terms: Outer(grad, x) for W, the row sum of grad for b."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, anchor: Tensor, use: Use) -> Tensor:
        ctx.use = use
        ctx.save_for_backward(anchor, x if use.weight is not None else None, weight)
        return F.linear(x, weight, bias)

    @staticmethod
    @exactly
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        use: Use = ctx.use
        _, x, weight = ctx.saved_tensors
        grad_x = grad @ weight.to(grad.dtype).conj() if ctx.needs_input_grad[0] else None
        g = wide(by_record(grad, use.rows, use.records, 1))
        if use.weight is not None:
            inputs = wide(by_record(x, use.rows, use.records, 1)).conj()  # itself where it is real
            use.leave(use.weight, Outer(g, inputs, shape_of(use.weight)))
        if use.bias is not None:
            use.leave(use.bias, Dense(g.sum(1) if g.shape[1] != 1 else g[:, 0]))
        return grad_x, None, None, use.tape.zero, None


class ConvFn(Function):
    """Convolution of any rank, transposed or not. Terms: Conv for the weight, summed grad for the bias."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, anchor: Tensor, spec: ConvSpec, use: Use
    ) -> Tensor:
        ctx.use, ctx.spec = use, spec
        ctx.save_for_backward(anchor, x, weight)
        return torch.convolution(
            x,
            weight,
            bias,
            spec.stride,
            spec.padding,
            spec.dilation,
            spec.transposed,
            spec.output_padding,
            spec.groups,
        )

    @staticmethod
    @exactly
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        use: Use = ctx.use
        spec: ConvSpec = ctx.spec
        _, x, weight = ctx.saved_tensors
        image = grad.dim() - 1
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = torch.ops.aten.convolution_backward(
                grad,
                x.to(grad.dtype),
                weight.to(grad.dtype),
                None,
                spec.stride,
                spec.padding,
                spec.dilation,
                spec.transposed,
                spec.output_padding,
                spec.groups,
                (True, False, False),
            )[0]
        g = wide(by_record(grad, use.rows, use.records, image))
        if use.weight is not None:
            inputs = wide(by_record(x, use.rows, use.records, image))
            use.leave(use.weight, Conv(g, inputs, weight, spec))
        if use.bias is not None:
            use.leave(use.bias, Dense(g.flatten(3).sum((1, 3)) if g.dim() > 3 else g.sum(1)))
        return grad_x, None, None, use.tape.zero, None, None


class EmbeddingFn(Function):
    """out = weight[index]. Term: Scatter; rows at ``padding_idx`` carry no gradient."""

    @staticmethod
    def forward(ctx: Any, index: Tensor, weight: Tensor, anchor: Tensor, padding_idx: int | None, use: Use) -> Tensor:
        ctx.use, ctx.padding_idx = use, padding_idx
        ctx.save_for_backward(anchor, index)
        return F.embedding(index, weight)

    @staticmethod
    @exactly
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        use: Use = ctx.use
        _, index = ctx.saved_tensors
        g = wide(by_record(grad, use.rows, use.records, 1))
        ids = by_record(index.unsqueeze(-1), use.rows, use.records, 1)[..., 0]
        if ctx.padding_idx is not None:
            g = g.masked_fill((ids == ctx.padding_idx).unsqueeze(-1), 0)
        if use.weight is not None:
            use.leave(use.weight, Scatter(g, ids.long(), shape_of(use.weight)))
        return None, None, use.tape.zero, None, None


class SpreadFn(Function):
    """One copy of a parameter for each record, (B, *shape), without memory: the door through which any
    batched operation can use a parameter exactly. Term: Dense, the gradient of the copies."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, anchor: Tensor, target: Target, tape: Tape, records: int) -> Tensor:
        ctx.target, ctx.tape = target, tape
        return value.expand(records, *value.shape)

    @staticmethod
    @exactly
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        ctx.tape.add(*settle(ctx.target, Dense(wide(grad))))
        return None, ctx.tape.zero, None, None, None


class RowsFn(Function):
    """A derived tensor that already has one row for each record along ``rows.axis`` (an expanded token)."""

    @staticmethod
    def forward(
        ctx: Any, value: Tensor, anchor: Tensor, target: Derived, rows: Rows, tape: Tape, records: int
    ) -> Tensor:
        ctx.target, ctx.rows, ctx.tape, ctx.records = target, rows, tape, records
        return value.view_as(value)

    @staticmethod
    @exactly
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        rows: Rows = ctx.rows
        owner = None if rows.plain else owners(rows, ctx.records, grad.device)
        ctx.tape.add_rows(ctx.target, rows.axis, wide(grad), owner)
        return None, ctx.tape.zero, None, None, None, None
