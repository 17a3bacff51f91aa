"""Views, permutations, pieces, joins and index expressions."""

from typing import Any

import torch

from sfumato.ghost import indexing
from sfumato.ghost.propagation.names import Args, Kwargs, Lookup
from sfumato.ghost.rows import Coupled, Rows, Tag, Unknown, from_owner, owners, through_reshape


def view(name: str, tag_of: Lookup, records: int, args: Args, kwargs: Kwargs, out: Any) -> Tag | None:
    x = args[0]
    rows = tag_of(x)
    if not isinstance(rows, Rows):  # view_as(const, tagged)
        return None
    if name in ("squeeze", "unsqueeze", "flatten", "unflatten", "view", "reshape", "ravel", "view_as", "reshape_as"):
        if x.shape == out.shape:
            return rows
        if x.dtype != out.dtype:  # other elements out of the same bytes of the last axis
            return rows if rows.axis != x.dim() - 1 else Unknown(name)
        if name == "unsqueeze":
            dim = args[1] if len(args) > 1 else kwargs["dim"]
            dim = dim % out.dim()
            return rows.at(rows.axis + (dim <= rows.axis))
        if name == "squeeze" and x.shape[rows.axis] == 1:
            dims = indexing.dims_of(args[1:], kwargs, x.dim())
            gone = [d for d in range(x.dim()) if x.shape[d] == 1 and (dims is None or d in dims)]
            if rows.axis in gone:
                return Unknown(name)
            return rows.at(rows.axis - sum(d < rows.axis for d in gone))
        return through_reshape(rows, x.shape, out.shape, records)
    if name in ("expand", "expand_as", "broadcast_to"):
        return rows.at(rows.axis + out.dim() - x.dim())
    raise AssertionError(name)


def permute(name: str, tag_of: Lookup, records: int, args: Args, kwargs: Kwargs, out: Any) -> Tag:
    """Permutations are read off a tensor that carries its own axis numbers."""
    x = args[0]
    rows = tag_of(x)
    if not isinstance(rows, Rows):
        return Unknown(name)
    order = indexing.permutation(name, x.dim(), args[1:], kwargs)
    return rows.at(order.index(rows.axis))


def pad(name: str, tag_of: Lookup, records: int, args: Args, kwargs: Kwargs, out: Any) -> Tag:
    x = args[0]
    rows = tag_of(x)
    amounts = list(args[1] if len(args) > 1 else kwargs["pad"])
    if not isinstance(rows, Rows):
        return Unknown(name)
    own = amounts[2 * (x.dim() - 1 - rows.axis) :][:2]
    return rows if not any(own) else Unknown(name)


def pieces(name: str, tag_of: Lookup, records: int, args: Args, kwargs: Kwargs, out: Any) -> Any:
    """split, chunk, unbind, narrow, select: pieces along the record axis get the owners of their rows."""
    x = args[0]
    rows = tag_of(x)
    if not isinstance(rows, Rows):
        return Unknown(name)
    if name in ("narrow", "select"):
        dim = (args[1] if len(args) > 1 else kwargs["dim"]) % x.dim()
    elif name == "unbind":
        dim = (args[1] if len(args) > 1 else kwargs.get("dim", 0)) % x.dim()
    else:
        dim = (args[2] if len(args) > 2 else kwargs.get("dim", 0)) % x.dim()
    if dim != rows.axis:
        return rows.at(rows.axis - (dim < rows.axis)) if name in ("unbind", "select") else rows
    if name in ("unbind", "select"):
        return Unknown(name)
    owner = owners(rows, records, x.device)
    if name == "narrow":
        start = args[2] if len(args) > 2 else kwargs["start"]
        return from_owner(dim, owner[int(start) : int(start) + out.shape[dim]], records)
    result, start = [], 0
    for piece in out:
        result.append(from_owner(dim, owner[start : start + piece.shape[dim]], records))
        start += piece.shape[dim]
    return result


def cat(name: str, tag_of: Lookup, records: int, args: Args, kwargs: Kwargs, out: Any) -> Tag:
    tensors: Any = args[0] if args else kwargs.get("tensors", kwargs.get("input"))
    parts = list(tensors)
    dim = args[1] if len(args) > 1 else kwargs.get("dim", kwargs.get("axis", 0))
    if name in ("hstack", "vstack", "dstack"):
        dim = {"hstack": 1, "vstack": 0, "dstack": 2}[name]
        if any(p.dim() <= max(dim, 1) for p in parts):
            return Unknown(name)
    dim = dim % out.dim()
    tags = [tag_of(p) for p in parts]
    rows = [t for t in tags if isinstance(t, Rows)]
    if name == "stack":
        moved = {r.axis for r in rows}
        if len(moved) != 1 or any(not rows[0].same_owners(r) for r in rows):
            return Coupled(name) if records != 1 else rows[0]
        return rows[0].at(rows[0].axis + (dim <= rows[0].axis))
    if dim != rows[0].axis:
        if any(r.axis != rows[0].axis or not r.same_owners(rows[0]) for r in rows) and records != 1:
            return Coupled(name)
        return rows[0]
    if len(rows) != len(parts) or any(r.axis != dim for r in rows):
        return Unknown(name)  # rows that belong to nobody
    if all(r.plain for r in rows):
        return Rows(dim, outer=len(rows))
    return from_owner(dim, torch.cat([owners(r, records, out.device) for r in rows]), records)


def repeat(name: str, tag_of: Lookup, records: int, args: Args, kwargs: Kwargs, out: Any) -> Tag:
    x = args[0]
    rows = tag_of(x)
    if not isinstance(rows, Rows):
        return Unknown(name)
    if name == "repeat_interleave":
        dim = args[2] if len(args) > 2 else kwargs.get("dim")
        times = args[1] if len(args) > 1 else kwargs["repeats"]
        if dim is None or not isinstance(times, int):
            return Unknown(name)
        if dim % x.dim() != rows.axis:
            return rows
        return Rows(rows.axis, rows.outer, rows.inner * times) if rows.owner is None else Unknown(name)
    axis = rows.axis + out.dim() - x.dim()
    times = out.shape[axis] // max(1, x.shape[rows.axis])
    if times == 1:
        return rows.at(axis)
    return Rows(axis, rows.outer * times, rows.inner) if rows.owner is None else Unknown(name)


def getitem(name: str, tag_of: Lookup, records: int, args: Args, kwargs: Kwargs, out: Any) -> Tag | None:
    return indexing.after_getitem(tag_of, records, args[0], args[1], out)


def gather(name: str, tag_of: Lookup, records: int, args: Args, kwargs: Kwargs, out: Any) -> Tag:
    """gather / take_along_dim / index_select along an axis that is not the record axis."""
    if name == "take_along_dim":
        index = args[1] if len(args) > 1 else kwargs["indices"]
        x, dim = args[0] if args else kwargs["input"], args[2] if len(args) > 2 else kwargs.get("dim")
        other = [] if dim is None else [k for k in range(x.dim()) if k != dim % x.dim()]
        if dim is None or x.dim() != index.dim() or any(x.shape[k] != index.shape[k] for k in other):
            return Unknown(name)  # flattened, or broadcast against each other
    else:
        x, dim = args[0] if args else kwargs["input"], args[1] if len(args) > 1 else kwargs["dim"]
        index = args[2] if len(args) > 2 else kwargs["index"]
    rows, picks = tag_of(x), tag_of(index)
    dim = dim % x.dim()
    if rows is None and name != "index_select":
        return picks if picks is not None else Unknown(name)  # of a constant, one entry for each entry of the index
    if name == "index_select":
        if not isinstance(rows, Rows):
            return picks.at(dim) if isinstance(picks, Rows) else Unknown(name)
        if dim != rows.axis:
            return rows if picks is None else Coupled(name)
        found = from_owner(dim, owners(rows, records, x.device)[index], records)
        own = picks is None or (isinstance(picks, Rows) and picks.at(dim).same_owners(found))
        return found if own or records == 1 else Coupled(name)  # a record may pick rows of its own
    if isinstance(rows, Rows) and dim != rows.axis:
        if isinstance(picks, Rows) and (picks.axis != rows.axis or not picks.same_owners(rows)) and records != 1:
            return Coupled(name)
        return rows
    return Unknown(name)


def triangle(name: str, tag_of: Lookup, records: int, args: Args, kwargs: Kwargs, out: Any) -> Tag:
    x = args[0]
    rows = tag_of(x)
    return rows if isinstance(rows, Rows) and rows.axis < x.dim() - 2 else Unknown(name)
