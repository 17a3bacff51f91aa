"""Routed experts: one matrix product for each expert, on the rows that chose it."""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.autograd import Function

from sfumato.ghost.functions import Use, exactly, wide
from sfumato.ghost.propagation import routing
from sfumato.ghost.rows import Rows, by_record, owners
from sfumato.ghost.rules.table import NoRule, rule
from sfumato.terms import Outer, Stack, Term

if TYPE_CHECKING:
    from sfumato.ghost.capture import Capture


@rule("grouped_mm")
def grouped_mm(
    c: "Capture",
    mat_a: Tensor,
    mat_b: Tensor,
    offs: Tensor | None = None,
    bias: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    rows = c.tag(mat_a)
    if offs is None or bias is not None or mat_a.dim() != 2 or mat_b.dim() != 3 or not isinstance(rows, Rows):
        raise NoRule("grouped_mm", "not rows by experts")
    if not routing.proven(rows, c.tag(offs), offs, c.records):
        raise NoRule("grouped_mm", "the rows of an expert are not proven to be those that chose it")
    out = GroupedFn.apply(mat_a, mat_b.detach(), c.tape.anchor, offs, out_dtype, c.use(rows, mat_b, None))  # type: ignore[no-untyped-call]
    return c.tagged(out, rows)


class GroupedFn(Function):
    """out[r] = x[r] @ weight[expert of r], rows sorted by expert. Term: an Outer for each expert."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, anchor: Tensor, offs: Tensor, dtype: torch.dtype | None, use: Use
    ) -> Tensor:
        ctx.use = use
        ctx.save_for_backward(anchor, x, weight, offs)
        return torch._grouped_mm(x, weight, offs=offs, out_dtype=dtype)

    @staticmethod
    @exactly
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        use: Use = ctx.use
        _, x, weight, offs = ctx.saved_tensors
        grad_x = torch.zeros_like(x) if ctx.needs_input_grad[0] else None
        owner = owners(use.rows, use.records, grad.device)
        parts: dict[tuple[int, int], tuple[Term, ...]] = {}
        start = 0
        for expert, end in enumerate(offs.tolist()):
            if end > start:
                g, a = grad[start:end], x[start:end]
                if grad_x is not None:
                    grad_x[start:end] = g @ weight[expert].mT.to(g.dtype)
                mine = Rows(0, owner=owner[start:end])
                left, right = (wide(by_record(t, mine, use.records, 1)) for t in (a, g))
                parts[expert, 1] = (Outer(left, right, torch.Size((1, *weight.shape[1:]))),)
            start = end
        if parts:
            use.leave(use.weight, Stack(parts, weight.shape))
        return grad_x, None, use.tape.zero, None, None, None
