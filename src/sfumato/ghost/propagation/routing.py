"""Routed rows: tokens sent to experts by ``nonzero``, ``where`` or ``sort``, worked on, and written back.

A row number that records have chosen is a ``Pointer``: whose choice it is, and how the rows that it names are laid out.
It may pick and place rows of its own record, proven by the owners of what it really names; it is nothing to compute
with, because where a row lies depends on the others.
"""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from sfumato.ghost.propagation.names import Args, Kwargs, Lookup
from sfumato.ghost.rows import Coupled, Histogram, Pointer, Rows, Tag, Unknown, from_owner, owners

_WHOLE = (slice(None), None, Ellipsis)
_VIEWS = set(
    "to long int clone contiguous detach cpu cuda squeeze view reshape flatten unsqueeze expand expand_as".split()
)
CREATES = {"nonzero", "argwhere", "where", "sort", "argsort", "histc", "bincount"}


def creates(name: str, args: Args, x: object, tag: Tag | None) -> bool:
    """Whether ``name(x)`` chooses rows of the batch, or counts them."""
    if not isinstance(x, Tensor) or not isinstance(tag, Rows) or name not in CREATES:
        return False
    if name == "where":
        return len(args) == 1
    return name in ("nonzero", "argwhere") or (x.dim() == 1 and tag.axis == 0)


def create(name: str, x: Tensor, rows: Rows, records: int, out: Any) -> Any:
    """Tags of the row numbers (and sorted values, or counts) that come out."""
    owner = owners(rows, records, x.device)
    if name in ("histc", "bincount"):
        return Histogram(x.detach(), rows)
    if name in ("sort", "argsort"):
        index = out if isinstance(out, Tensor) else out[1]
        chosen = Rows(0, owner=owner[index], arranged=True)
        return Pointer(chosen, rows) if isinstance(out, Tensor) else [chosen, Pointer(chosen, rows)]
    columns = out.unbind(1) if isinstance(out, Tensor) else out
    chosen = Rows(0, owner=owner[columns[rows.axis]], arranged=True)
    if isinstance(out, Tensor):
        return Pointer(chosen, rows.at(0), rows.axis)
    return [Pointer(chosen, rows.at(0)) if k == rows.axis else chosen for k in range(len(columns))]


def follow(name: str, tag_of: Lookup, records: int, args: Args, kwargs: Kwargs, out: Any) -> Any:
    """An operation on a Pointer or a Histogram."""
    first = tag_of(args[0]) if args else None
    if isinstance(first, Histogram):
        keeps = name in _VIEWS | {"float", "double"} or (name == "cumsum" and not first.summed)
        return Histogram(first.values, first.rows, first.summed or name == "cumsum") if keeps else Coupled(name)
    if name == "grouped_mm":
        return _grouped(tag_of, records, args, kwargs)
    if name == "getitem":
        return _picked(tag_of, records, args[0], args[1], out)
    if name in ("index_select", "index_add", "index_copy", "scatter_add"):
        x, dim, index, source = _bound(args, kwargs)
        if name == "index_select":
            return _picked(tag_of, records, x, (slice(None),) * (dim % x.dim()) + (index,), out)
        if kwargs.get("alpha", 1) != 1 or not isinstance(tag_of(index), Pointer):
            return Coupled(name)
        return place(tag_of, records, x, dim % x.dim(), index, source)
    if not isinstance(first, Pointer):
        return Coupled(name)
    if name == "argsort" and _permutes(args[0]) and first.base is not None and first.column is None:
        return Pointer(first.base, first.rows)
    if name in ("floordiv", "floor_divide") and len(args) == 2 and first.base is not None:
        return _coarser(first, args[1])
    if name in _VIEWS and isinstance(out, Tensor):
        if out.dim() == 0 or out.shape[0] != args[0].shape[0] or (first.column is not None and out.dim() != 1):
            return Coupled(name)
        single = first.column is not None and args[0].shape[1] == 1
        if out.dim() == args[0].dim() or first.column is None:
            return first
        return Pointer(first.rows, first.base) if single else Coupled(name)
    if name == "unbind" and first.column is not None and args[1:] in ((1,), (-1,)):
        return [Pointer(first.rows, first.base) if k == first.column else first.rows for k in range(len(out))]
    return Coupled(name)


def _bound(args: Args, kwargs: Kwargs) -> tuple[Any, int, Any, Any]:
    """(x, dim, index, source), however they were passed."""
    names = ("input", "dim", "index", "source")
    given = dict(zip(names, args, strict=False)) | kwargs
    return given["input"], given["dim"], given["index"], given.get("source", given.get("src"))


def _coarser(pointer: Pointer, size: Any) -> Tag:
    """Numbers of blocks of ``size`` rows, if the rows of a record are whole blocks (choices of one token)."""
    base = pointer.base
    if type(size) is not int or size < 1 or base is None or base.owner is not None or base.inner % size:
        return Coupled("floordiv")
    return Pointer(pointer.rows, replace(base, inner=base.inner // size), pointer.column)


def _picked(tag_of: Lookup, records: int, x: Tensor, index: Any, out: Tensor) -> Tag:
    """x[..., pointer, ...]: rows of the records that point to them."""
    own, items = tag_of(x), index if isinstance(index, tuple) else (index,)
    carried = own if isinstance(own, Pointer) else None
    if carried is not None:
        if carried.column is not None and len(items) == 2 and items[0] == slice(None) and isinstance(items[1], int):
            return Pointer(carried.rows, carried.base) if items[1] % x.shape[1] == carried.column else carried.rows
        own = carried.rows
    if any(not isinstance(i, Tensor) and i not in _WHOLE for i in items):
        return Coupled("getitem")
    at = [k for k, i in enumerate(items) if isinstance(i, Tensor)]
    if not at:
        return (
            carried
            if carried is not None and items[:1] == (slice(None),) and out.dim() > x.dim()
            else Coupled("getitem")
        )
    axis = at[0]
    if items[:axis] != (slice(None),) * axis or at != list(range(axis, axis + len(at))):
        return Coupled("getitem")
    picks = [tag_of(items[k]) for k in at]
    chosen = next((p.rows for p in picks if isinstance(p, Pointer)), None)
    if chosen is None or chosen.axis != 0 or any(items[k].dim() != 1 for k in at):
        return Coupled("getitem")
    aligned = (
        isinstance(p, Rows) and p.axis == 0 and p.same_owners(chosen) for p in picks if not isinstance(p, Pointer)
    )
    if not all(aligned):
        return Coupled("getitem")
    if own is None:  # a constant: the same for every row, or a choice that depends on the others
        return chosen.at(axis) if _uniform(x, axis) and len(at) == 1 else Coupled("getitem")
    if not isinstance(own, Rows) or not axis <= own.axis < axis + len(at):
        return Coupled("getitem")
    pick = picks[own.axis - axis]
    named = owners(own, records, x.device)[items[own.axis]]
    if not isinstance(pick, Pointer) or not torch.equal(named, owners(pick.rows, records, x.device)):
        return Coupled("getitem")
    if pick.base is None or pick.base.arranged != own.arranged or not pick.base.same_owners(own):
        return Coupled("getitem")  # numbers of other rows: which of its own a record reads is chance
    found = _regular(pick.rows, records).at(axis)
    return Pointer(found, carried.base) if carried is not None else found


def place(tag_of: Lookup, records: int, x: Tensor, dim: int, index: Tensor, value: Any) -> Tag:
    """x with rows of ``value`` put (or added) where ``index`` along ``dim`` says."""
    pointer, own, tag = tag_of(index), tag_of(x), tag_of(value)
    if not isinstance(pointer, Pointer) or pointer.rows.axis != 0 or pointer.column is not None:
        return Coupled("placing rows")
    layout = own.at(0) if isinstance(own, Rows) and own.axis == dim else pointer.base if own is None else None
    if layout is None:
        return Coupled("placing rows")
    owner = owners(layout, records, x.device)
    known = pointer.base is not None and pointer.base.arranged == layout.arranged and pointer.base.same_owners(layout)
    if owner.numel() != x.shape[dim] or not known or (own is None and layout.arranged and not _uniform(x, dim)):
        return Coupled("placing rows")
    numbers = index if index.dim() == 1 else index.select(1, 0)
    if index.dim() > 1 and (dim != 0 or not bool((index == numbers.reshape(-1, *[1] * (index.dim() - 1))).all())):
        return Coupled("placing rows")
    source = owners(pointer.rows, records, x.device)
    if not torch.equal(owner[numbers], source):
        return Coupled("placing rows")
    if tag is None and isinstance(value, Tensor) and value.dim() > 0:
        counts = x.dim() == 1 and torch.equal(value, torch.arange(len(numbers), device=value.device))
        if own is None and counts and len(numbers) == x.shape[0] and _permutes(numbers):
            return Pointer(layout, pointer.rows)  # the inverse of a permutation
        if not _uniform(value, min(dim, value.dim() - 1)):
            return Coupled("placing rows")
    elif tag is not None:
        fits = isinstance(tag, Rows) and tag.axis == dim and torch.equal(owners(tag, records, x.device), source)
        if not fits:
            return Coupled("placing rows")
    return layout.at(dim)


def _grouped(tag_of: Lookup, records: int, args: Args, kwargs: Kwargs) -> Tag:
    offs = kwargs.get("offs", args[2] if len(args) > 2 else None)
    rows = tag_of(args[0])
    if not isinstance(rows, Rows) or tag_of(args[1]) is not None or len(args) > 3 or kwargs.get("bias") is not None:
        return Unknown("grouped_mm")
    return rows if proven(rows, tag_of(offs), offs, records) else Coupled("grouped_mm")


def proven(rows: Rows, counted: Tag | None, offs: Any, records: int) -> bool:
    """Whether each row goes to the expert that its own record chose: ``offs`` are the counts of sorted choices."""
    if not isinstance(counted, Histogram) or not counted.summed or rows.axis != 0:
        return False
    chosen, place = counted.values, torch.arange(len(counted.values), device=offs.device)
    expert = torch.bucketize(place, offs, right=True)
    mine, theirs = owners(rows, records, offs.device), owners(counted.rows, records, offs.device)
    return bool(offs[-1] == len(chosen)) and torch.equal(expert, chosen.long()) and torch.equal(mine, theirs)


def steady(x: Tensor, rows: Rows, ndim: int) -> bool:
    """Whether a constant, broadcast against arranged rows, is the same for each: its place there is others' choice."""
    axis = rows.axis - (ndim - x.dim())
    return axis < 0 or _uniform(x, axis)


def indifferent(x: Tensor, size: int) -> bool:
    """The same of a constant of which only the sizes are known: whichever axis the ``size`` rows may meet."""
    return all(_uniform(x, k) for k in range(x.dim()) if x.shape[k] == size)


def indices(tag_of: Lookup, x: Tensor, index: Any) -> list[Tensor]:
    """The constant indices of x[index] that may tell its rows apart; that of the rows themselves names their owners."""
    items = index if isinstance(index, tuple) else (index,)
    rows, axis, found, own = tag_of(x), 0, [], False
    for item in items:
        picks = isinstance(item, Tensor) and item.dim() > 0
        span = item.dim() if picks and item.dtype == torch.bool else item is not None
        if item is Ellipsis:
            axis += x.dim() - sum(i.dim() if _is_mask(i) else i is not None and i is not Ellipsis for i in items)
            continue
        here = isinstance(rows, Rows) and axis <= rows.axis < axis + span
        own |= here and picks
        if picks and tag_of(item) is None and not (here and item.dim() == 1):
            found.append(item)
        axis += span
    return found if own or rows is None else []


def _is_mask(item: object) -> bool:
    return isinstance(item, Tensor) and item.dtype == torch.bool


def _uniform(x: Tensor, axis: int) -> bool:
    return x.shape[axis] < 2 or bool((x == x.narrow(axis, 0, 1)).all())


def _permutes(index: Tensor) -> bool:
    return index.dim() == 1 and torch.equal(index.sort().values, torch.arange(len(index), device=index.device))


def _regular(rows: Rows, records: int) -> Rows:
    """Rows whose owners turn out to lie in blocks of one size, as they came from the model's own reshape."""
    if rows.owner is None or rows.arranged:
        return rows
    return from_owner(rows.axis, rows.owner, records)
