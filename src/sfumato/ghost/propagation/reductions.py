"""Reductions, operations along one dim, and losses."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from sfumato.ghost import indexing
from sfumato.ghost.propagation.names import Args, Kwargs, Lookup
from sfumato.ghost.rows import Coupled, Reduced, Rows, Tag, Unknown


def pointwise(name: str, tags: Sequence[tuple[Tensor, Tag]], records: int, out: Any) -> Tag:
    """Operands are aligned from the right; their record axes must coincide."""
    shape = out.shape if isinstance(out, Tensor) else out[0].shape
    found: Rows | None = None
    for tensor, tag in tags:
        if not isinstance(tag, Rows):
            return Unknown(name)
        moved = tag.at(tag.axis + len(shape) - tensor.dim())
        if found is None:
            found = moved
        elif found.axis != moved.axis or not found.same_owners(moved):
            if records == 1:
                continue
            return Coupled(name)
    return found if found is not None else Unknown(name)


def reduce(name: str, tag_of: Lookup, records: int, args: Args, kwargs: Kwargs, out: Any) -> Tag:
    x = args[0] if args else kwargs["input"]
    if len(args) > 1 and isinstance(args[1], Tensor):
        return pointwise(name, [(t, tag) for t in args[:2] if (tag := tag_of(t)) is not None], records, out)
    rows = tag_of(x)
    if not isinstance(rows, Rows):
        return Unknown(name)
    rest = args[2:] if name in ("norm", "vector_norm") else args[1:]
    dims = indexing.dims_of(rest, kwargs, x.dim())
    if dims is None or rows.axis in dims:
        # The mean over a number of rows that the data decide couples records; a sum never does.
        regular = rows.owner is None
        return Reduced(name) if name in ("sum", "nansum") or (name == "mean" and regular) else Coupled(name)
    first = out if isinstance(out, Tensor) else out[0]
    if first.dim() == x.dim():
        return rows
    return rows.at(rows.axis - sum(d < rows.axis for d in dims))


def along(name: str, tag_of: Lookup, records: int, args: Args, kwargs: Kwargs, out: Any) -> Tag:
    """Operations that keep the shape and work along one dim (softmax, cumsum, sort, flip)."""
    x = args[0] if args else kwargs["input"]
    rows = tag_of(x)
    if not isinstance(rows, Rows):
        return Unknown(name)
    default = {"sort": -1, "argsort": -1, "topk": -1, "glu": -1, "normalize": 1, "cosine_similarity": 1}.get(name)
    rest = (
        args[2:] if name in ("topk", "normalize", "cosine_similarity", "gumbel_softmax", "roll", "renorm") else args[1:]
    )
    dims = indexing.dims_of(rest, kwargs, x.dim())
    if dims is None and default is not None:
        dims = (default % x.dim(),)
    if dims is None or rows.axis in dims:
        return Coupled(name)
    return rows.at(rows.axis - (dims[0] < rows.axis)) if name == "cosine_similarity" else rows


def loss(name: str, tag_of: Lookup, records: int, args: Args, kwargs: Kwargs, out: Any) -> Tag:
    """A mean over a number of terms that the data decide (class weights, ignored targets) couples records."""
    x = args[0]
    rows = tag_of(x)
    if not isinstance(rows, Rows):
        return Unknown(name)
    if out.dim() == 0 and kwargs.get("reduction", "mean") != "none":
        if name in ("cross_entropy", "nll_loss") and kwargs.get("reduction", "mean") == "mean":
            target = args[1] if len(args) > 1 else kwargs["target"]
            weight = args[2] if len(args) > 2 else kwargs.get("weight")
            ignored = kwargs.get("ignore_index", -100)
            if weight is not None or (not target.is_floating_point() and bool((target == ignored).any())):
                return Coupled(name)
        return Reduced(name)
    if name in ("cross_entropy", "nll_loss"):
        return rows if rows.axis == 0 else rows.at(rows.axis - 1)
    return pointwise(name, [(t, tag) for t in args[:2] if (tag := tag_of(t)) is not None], records, out)


def norm_layer(name: str, tag_of: Lookup, records: int, args: Args, kwargs: Kwargs, out: Any) -> Tag:
    x = args[0] if args else kwargs["input"]
    rows = tag_of(x)
    if not isinstance(rows, Rows):
        return Unknown(name)
    if name in ("layer_norm", "rms_norm"):
        normalized = args[1] if len(args) > 1 else kwargs["normalized_shape"]
        return rows if rows.axis < x.dim() - len(normalized) else Coupled(name)
    return rows if rows.axis == 0 else Coupled(name)
