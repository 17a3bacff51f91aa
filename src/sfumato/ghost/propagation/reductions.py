"""Reductions, operations along one dim, and losses."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from sfumato.ghost import indexing
from sfumato.ghost.propagation.names import Args, Kwargs, Lookup
from sfumato.ghost.rows import Coupled, Reduced, Rows, Tag, Unknown, Verdict, by_record


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
    rest = args[2:] if name in ("norm", "vector_norm", "linalg_vector_norm", "linalg_norm") else args[1:]
    dims = indexing.dims_of(rest, kwargs, x.dim())
    if dims is None or rows.axis in dims:
        if name in ("all", "any") and isinstance(out, Tensor) and out.numel() == 1:
            return verdict(name, x, rows, records)
        if name == "sum" and isinstance(out, Tensor) and out.dim() == 0 and not x.is_floating_point():
            each = by_record(x.unsqueeze(-1), rows, records, 1).flatten(1).sum(1)
            return Reduced(name, each, x.numel() if rows.owner is None else 0)
        # The mean over a number of rows that the data decide couples records; a sum never does.
        regular = rows.owner is None
        return Reduced(name) if name in ("sum", "nansum") or (name == "mean" and regular) else Coupled(name)
    first = out if isinstance(out, Tensor) else out[0]
    if first.dim() == x.dim():
        return rows
    return rows.at(rows.axis - sum(d < rows.axis for d in dims))


def verdict(name: str, x: Tensor, rows: Rows, records: int) -> Tag:
    """What ``x.all()`` or ``x.any()`` would be for each record alone."""
    if rows.owner is not None and not rows.arranged and rows.owner.unique().numel() < records:
        return Coupled(name)  # some records answer for the others
    hits = x.bool() if name == "any" else ~x.bool()
    each = by_record(hits.unsqueeze(-1), rows, records, 1).flatten(1).any(1)
    return Verdict(name, each if name == "any" else ~each)


def along(name: str, tag_of: Lookup, records: int, args: Args, kwargs: Kwargs, out: Any) -> Tag:
    """Operations that keep the shape and work along one dim (softmax, cumsum, sort, flip)."""
    x = args[0] if args else kwargs["input"]
    rows = tag_of(x)
    if not isinstance(rows, Rows):
        return Unknown(name)
    default = {"sort": -1, "argsort": -1, "topk": -1, "glu": -1, "normalize": 1}.get(name)
    rest = args[2:] if name in ("topk", "normalize", "gumbel_softmax", "roll", "renorm") else args[1:]
    dims = indexing.dims_of(rest, kwargs, x.dim())
    if dims is None and default is not None:
        dims = (default % x.dim(),)
    if name == "renorm":  # norms over every dim but this one
        return rows if dims == (rows.axis,) else Coupled(name)
    return Coupled(name) if dims is None or rows.axis in dims else rows


def cosine(name: str, tag_of: Lookup, records: int, args: Args, kwargs: Kwargs, out: Any) -> Tag:
    """Two operands broadcast against each other; the dim, counted after that, vanishes."""
    pair = list(indexing.tensors(args, kwargs))
    shape = torch.broadcast_shapes(*[t.shape for t in pair])
    tags = [(t, tag) for t in pair if (tag := tag_of(t)) is not None]
    rows = pointwise(name, tags, records, torch.empty(shape, device="meta"))
    (dim,) = indexing.dims_of(args[2:3], {"dim": kwargs["dim"]} if "dim" in kwargs else {}, len(shape)) or (1,)
    if not isinstance(rows, Rows):
        return rows
    return Coupled(name) if dim == rows.axis else rows.at(rows.axis - (dim < rows.axis))


def diff(name: str, tag_of: Lookup, records: int, args: Args, kwargs: Kwargs, out: Any) -> Tag:
    """Differences of neighbours along one dim, with a few values put before or after."""
    operands = list(indexing.tensors(args, kwargs))
    tags = [tag for t in operands if (tag := tag_of(t)) is not None]
    rows = tags[0]
    dim = (args[2] if len(args) > 2 else kwargs.get("dim", -1)) % out.dim()
    if not isinstance(rows, Rows) or dim == rows.axis:
        return Coupled(name)
    alike = all(isinstance(t, Rows) and t.axis == rows.axis and t.same_owners(rows) for t in tags)
    return rows if alike and all(t.dim() == out.dim() for t in operands) else Coupled(name)


def loss(name: str, tag_of: Lookup, records: int, args: Args, kwargs: Kwargs, out: Any) -> Tag:
    """A mean over a number of terms that the data decide (class weights, ignored targets) couples records."""
    operands = [t for t in (*args[:2], kwargs.get("input"), kwargs.get("target")) if isinstance(t, Tensor)]
    weight = args[2] if len(args) > 2 and isinstance(args[2], Tensor) else kwargs.get("weight")
    others = [t for t in indexing.tensors(args, kwargs) if not any(t is o for o in operands)]
    if name in ("cross_entropy", "nll_loss"):
        rows = _labelled(name, operands[0], operands[1], tag_of, records)
        if any(tag_of(t) is not None for t in others):
            return Coupled(name)  # weights of the classes
    else:
        if any(t.dim() < operands[0].dim() and tag_of(t) is not None for t in others):
            return Coupled(name)  # a variance without the last axis
        operands += [t for t in others if tag_of(t) is not None]
        tags = [(t, tag) for t in operands if (tag := tag_of(t)) is not None]
        rows = pointwise(
            name, tags, records, torch.empty(torch.broadcast_shapes(*[t.shape for t in operands]), device="meta")
        )
    if not isinstance(rows, Rows) or out.dim() > 0:
        return rows
    if kwargs.get("reduction", "mean") == "sum":
        return Reduced(name)
    ignored = name in ("cross_entropy", "nll_loss") and not operands[1].is_floating_point()
    counted = ignored and bool((operands[1] == kwargs.get("ignore_index", -100)).any())
    divides = isinstance(weight, Tensor) and not name.startswith(("binary_cross_entropy", "gaussian"))
    return Coupled(name) if counted or divides or rows.owner is not None else Reduced(name)


def _labelled(name: str, scores: Tensor, target: Tensor, tag_of: Lookup, records: int) -> Tag:
    """Scores (N, C, ...) and labels (N, ...), or a probability for each class."""
    classes = min(1, scores.dim() - 1)
    found: list[Rows] = []
    for x in (scores, target):
        tag = tag_of(x)
        if tag is None:
            continue
        if not isinstance(tag, Rows):
            return Unknown(name)
        each = x is scores or x.is_floating_point()
        if each and tag.axis == classes:
            return Coupled(name)  # a softmax over the records
        found.append(tag.at(tag.axis - (each and tag.axis > classes)))
    if not found:
        return Unknown(name)
    if any(r.axis != found[0].axis or not r.same_owners(found[0]) for r in found) and records != 1:
        return Coupled(name)
    return found[0]


def norm_layer(name: str, tag_of: Lookup, records: int, args: Args, kwargs: Kwargs, out: Any) -> Tag:
    x = args[0] if args else kwargs["input"]
    rows = tag_of(x)
    if not isinstance(rows, Rows):
        return Unknown(name)
    if name in ("layer_norm", "rms_norm"):
        normalized = args[1] if len(args) > 1 else kwargs["normalized_shape"]
        return rows if rows.axis < x.dim() - len(normalized) else Coupled(name)
    return rows if rows.axis == 0 else Coupled(name)
