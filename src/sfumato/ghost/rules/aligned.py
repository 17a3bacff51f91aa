"""Operations between tensors of several axes: a parameter gets one copy for each record, and runs as records do."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional as F

from sfumato.errors import CoupledRecords
from sfumato.ghost import copies, indexing
from sfumato.ghost.rows import Rows
from sfumato.ghost.rules.table import RULES, NoRule, rule

if TYPE_CHECKING:
    from sfumato.ghost.capture import Capture


def _aligned(name: str, func: Callable[..., Any]) -> Callable[..., Any]:
    """The rows of the result are those that ``propagate`` finds: all operands have records now."""

    def run(c: "Capture", *args: Any, **kwargs: Any) -> Any:
        operands = list(indexing.tensors(args, kwargs))
        ndim = max(t.dim() for t in operands)
        found = [r.at(r.axis + ndim - t.dim()) for t in operands if isinstance(r := c.tag(t), Rows)]
        if any(f.axis != found[0].axis or not f.same_owners(found[0]) for f in found) and c.records != 1:
            raise CoupledRecords(f"{name} combines different records of the batch.", where=c.where())
        rows = found[0]

        def swap(value: Any) -> Any:
            if not isinstance(value, Tensor) or c.target(value) is None:
                return value
            ready = copies.align(c, value, rows, ndim)
            c.set_tag(ready, rows.at(rows.axis - ndim + ready.dim()))
            return ready

        return c.call(func, *(swap(a) for a in args), **{k: swap(v) for k, v in kwargs.items()})

    return run


_FUNCTIONS: dict[str, Callable[..., Any]] = {
    "cosine_similarity": F.cosine_similarity,
    "pairwise_distance": F.pairwise_distance,
    "linalg_vecdot": torch.linalg.vecdot,
    "linalg_cross": torch.linalg.cross,
    "linalg_solve_triangular": torch.linalg.solve_triangular,
}
RULES.update({name: _aligned(name, func) for name, func in _FUNCTIONS.items()})
_ALIGNED_CDIST = _aligned("cdist", torch.cdist)


@rule("cdist")
def cdist(c: "Capture", x1: Tensor, x2: Tensor, *options: Any, **named: Any) -> Tensor:
    """Records may also be the points: each is then a batch of one point."""
    for i, (x, other) in enumerate(((x1, x2), (x2, x1))):
        rows = c.tag(x)
        if isinstance(rows, Rows) and rows.axis == x.dim() - 2 and c.target(other) is not None:
            point = c.call(Tensor.unsqueeze, x, -2)
            other = c.call(Tensor.unsqueeze, other, -3)
            pair = (other, point) if i else (point, other)
            out: Tensor = c.call(Tensor.squeeze, _ALIGNED_CDIST(c, *pair, *options, **named), -1 if i else -2)
            return c.call(Tensor.transpose, out, -1, -2) if i else out
    result: Tensor = _ALIGNED_CDIST(c, x1, x2, *options, **named)
    return result


@rule("grid_sample")
def grid_sample(c: "Capture", input: Tensor, grid: Tensor, *options: Any, **named: Any) -> Tensor:
    found = next((r for t in (input, grid) if isinstance(r := c.tag(t), Rows)), None)
    if found is None or found.axis != 0:
        raise NoRule("grid_sample", "the records are not the images")
    ready = [copies.as_rows(c, t, found) if c.target(t) is not None else t for t in (input, grid)]
    out: Tensor = c.call(F.grid_sample, *ready, *options, **named)
    return out


@rule("broadcast_tensors")
def broadcast_tensors(c: "Capture", *tensors: Tensor) -> list[Tensor]:
    """A parameter stays as it is: whatever it meets broadcasts it."""
    shape = torch.broadcast_shapes(*[t.shape for t in tensors])
    return [c.call(Tensor.expand, t, shape) for t in tensors]


@rule("expand_as", "view_as", "reshape_as")
def expand_as(c: "Capture", input: Tensor, other: Tensor) -> Tensor:
    """Of the other tensor nothing but the shape is used."""
    shape = torch.broadcast_shapes(input.shape, other.shape) if input.numel() != other.numel() else other.shape
    out: Tensor = c.call(Tensor.expand if input.numel() != other.numel() else Tensor.reshape, input, shape)
    return out
