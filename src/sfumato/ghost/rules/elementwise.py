"""Broadcasting elementwise operations: the parameter is spread, one copy for each record."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sfumato.errors import CoupledRecords
from sfumato.ghost import copies, indexing
from sfumato.ghost.propagation import routing
from sfumato.ghost.rows import Rows
from sfumato.ghost.rules.table import NoRule, rule

if TYPE_CHECKING:
    from sfumato.ghost.capture import Capture


def broadcast(c: "Capture", name: str, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Any broadcasting elementwise operation: parameters are spread along the record axis of the result."""
    operands = list(indexing.tensors(args, kwargs))
    ndim = max(t.dim() for t in operands)
    found = [r.at(r.axis + ndim - t.dim()) for t in operands if isinstance(r := c.tag(t), Rows)]
    if len(found) < sum(c.tag(t) is not None for t in operands):
        mixed = next(t for t in operands if c.tag(t) is not None and not isinstance(c.tag(t), Rows))
        c.refuse_mixed(name, c.tag(mixed))
    if any(f.axis != found[0].axis or not f.same_owners(found[0]) for f in found) and c.records != 1:
        raise CoupledRecords(f"{name} combines different records of the batch.", where=c.where())
    rows = next((f for f in found if f.arranged), found[0])
    constants = (t for t in operands if rows.arranged and t.dim() and c.tag(t) is None and c.target(t) is None)
    if not all(routing.steady(t, rows, ndim) for t in constants):
        raise CoupledRecords(f"{name} joins rows that the batch arranged to constants by their place.", where=c.where())
    if name.endswith("_") and not name.startswith("_") and c.target(args[0]) is not None:
        raise NoRule(name, "records written into a parameter")

    def swap(value: Any) -> Any:
        if isinstance(value, Tensor) and c.target(value) is not None:
            return copies.align(c, value, rows, ndim)
        return type(value)(swap(v) for v in value) if isinstance(value, (list, tuple)) else value

    out = func(*(swap(a) for a in args), **{k: swap(v) for k, v in kwargs.items()})
    return c.tagged(out, rows)


@rule("prelu")
def prelu(c: "Capture", input: Tensor, weight: Tensor) -> Tensor:
    shaped = weight if weight.numel() == 1 else c.derive("reshape", weight, (-1, *[1] * (input.dim() - 2)))
    out: Tensor = c.call(torch.where, c.call(torch.gt, input, 0), input, c.call(torch.mul, input, shaped))
    return out


@rule("masked_fill")
def masked_fill(c: "Capture", input: Tensor, mask: Tensor, value: Tensor) -> Tensor:
    out: Tensor = c.call(torch.where, mask, value, input)
    return out
