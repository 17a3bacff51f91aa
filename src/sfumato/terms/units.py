"""Per-record gradients to those of units that own several records: more rows of one factored sum, never a loop."""

import torch
from torch import Tensor

from sfumato.terms.sums import compact
from sfumato.terms.types import Conv, Dense, Outer, Scatter, Stack, Term, each_part


def joined(term: Term, unit: Tensor, units: int) -> Term:
    """G_u = Σ over the records b of unit u (``unit[b] == u``) of G_b."""
    match term:
        case Stack():
            return each_part(term, lambda t: joined(t, unit, units))
        case Dense(value):
            return Dense(value.new_zeros(units, *value.shape[1:]).index_add_(0, unit.to(value.device), value))
        case Outer(left, right, shape):
            return compact(Outer(_side_by_side(left, unit, units), _side_by_side(right, unit, units), shape))
        case Scatter(grad, index, shape):
            return Scatter(_side_by_side(grad, unit, units), _side_by_side(index, unit, units), shape)
        case Conv(grad, x, weight, spec):
            return Conv(_side_by_side(grad, unit, units), _side_by_side(x, unit, units), weight, spec)


def _side_by_side(x: Tensor, unit: Tensor, units: int) -> Tensor:
    """(B, T, ...) to (U, most records of a unit × T, ...), the rest zero."""
    unit = unit.to(x.device)
    counts = torch.bincount(unit, minlength=units)
    order = torch.argsort(unit, stable=True)
    place = torch.empty_like(order)
    place[order] = torch.arange(len(order), device=x.device) - (counts.cumsum(0) - counts)[unit[order]]
    out = x.new_zeros(units, int(counts.max()) if len(unit) else 0, *x.shape[1:])
    out[unit, place] = x
    return out.flatten(1, 2)
