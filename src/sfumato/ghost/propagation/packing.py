"""Packed sequences: records sorted by length, packed step by step, padded again and put back in order.

What is known of an arrangement is its owner vector. Rows that the batch itself arranged keep it through any operation
or count as mixed: the first three of a sorted batch are a choice that the other records made.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from sfumato.ghost.propagation.names import Args, Kwargs, Lookup
from sfumato.ghost.rows import Coupled, Order, Reduced, Rows, Tag, Unknown, from_owner, owners


def first_rows(rows: Rows, sizes: Sequence[int], order: Order | None, records: int) -> Rows | None:
    """Rows (axis 0) of the first step, if packed ``rows`` are proven to be theirs in every later step."""
    if records == 1:
        return Rows(0, outer=sizes[0])
    owner = owners(rows, records, torch.device("cpu"))
    first = owner[: sizes[0]]
    if not torch.equal(owner, torch.cat([first[:n] for n in sizes])):
        return None
    if rows.arranged and (order is None or order.permuted):
        return Rows(0, owner=first, arranged=True)
    return from_owner(0, first, records)


def sort(name: str, tag_of: Lookup, records: int, args: Args, kwargs: Kwargs, out: Any) -> Any:
    """Lengths in descending order, and the permutation that puts them so."""
    values, index = (None, out) if name == "argsort" else out
    if isinstance(args[0], Tensor) and isinstance(tag_of(args[0]), Order):
        return Order(name) if values is None else [Coupled(name), Order(name)]
    arranged = Rows(0, owner=index, arranged=True)
    return Order(name) if values is None else [arranged, Order(name)]


def sorts_lengths(name: str, x: Tensor, tag: Tag) -> bool:
    """One whole number a record: what sorting by length sorts."""
    whole = x.dim() == 1 and not x.is_floating_point() and not x.is_complex()
    return name in ("sort", "argsort") and whole and isinstance(tag, Rows) and tag.plain


def pack(name: str, tag_of: Lookup, records: int, args: Args, kwargs: Kwargs, out: Any) -> Any:
    x, lengths, batch_first = args
    rows, by = tag_of(x), tag_of(lengths)
    if not isinstance(rows, Rows) or rows.axis != (0 if batch_first else 1):
        return Unknown(name)
    if by is None and rows.arranged and bool((lengths != lengths[0]).any()) and records != 1:
        return Coupled(name)  # a length for each place of rows that the batch arranged
    if by is not None and not (isinstance(by, Rows) and by.axis == 0 and by.same_owners(rows)) and records != 1:
        return Coupled(name)  # lengths of other records
    owner = owners(rows, records, torch.device("cpu"))
    arranged = rows.arranged or by is not None
    data = Rows(0, owner=torch.cat([owner[:n] for n in out[1].tolist()]), arranged=arranged)
    return [data, Order(name, x.shape[1 if batch_first else 0], rows.arranged) if arranged else None]


def pad(name: str, tag_of: Lookup, records: int, args: Args, kwargs: Kwargs, out: Any) -> Any:
    data, sizes, batch_first = args[:3]
    rows, order = tag_of(data), tag_of(sizes)
    if not isinstance(rows, Rows) or rows.axis != 0 or not (order is None or isinstance(order, Order)):
        return Unknown(name)
    steps = out[0].shape[1 if batch_first else 0]
    if order is not None and steps == len(sizes) != order.length and records != 1:
        return Coupled("padding to the longest record of the batch (pad_packed_sequence without total_length=)")
    first = first_rows(rows, sizes.tolist(), order, records)
    return Unknown(name) if first is None else [first.at(0 if batch_first else 1), first]


def _select(name: str, tag_of: Lookup, records: int, args: Args, kwargs: Kwargs, out: Any) -> Tag | None:
    """x[permutation] or x.index_select(dim, permutation)."""
    x = args[0]
    own = tag_of(x)
    if name == "index_select":
        dim, index = args[1] % x.dim(), args[2]
    else:
        items = args[1] if isinstance(args[1], tuple) else (args[1],)
        if isinstance(own, Order) and items == (0,):
            return None  # the size of the first step is the number of records
        dim, index = len(items) - 1, items[-1]
        if any(not isinstance(i, slice) or i != slice(None) for i in items[:-1]):
            return Coupled(name)
    if not isinstance(index, Tensor) or not isinstance(tag_of(index), Order) or isinstance(own, Order):
        return Coupled(name)
    whole = torch.arange(records, device=index.device)
    if x.shape[dim] != records or index.dim() != 1 or not torch.equal(index.sort().values, whole):
        return Coupled(name)
    if own is None:  # a constant for each place in the batch
        return Rows(dim, owner=index, arranged=records != 1)
    if not isinstance(own, Rows) or own.axis != dim:
        return Coupled(name)
    owner = owners(own, records, index.device)[index]
    if records == 1 or (own.arranged and torch.equal(owner, whole)):
        return Rows(dim)
    return Rows(dim, owner=owner, arranged=True)


def _scatter(name: str, tag_of: Lookup, records: int, args: Args, kwargs: Kwargs, out: Any) -> Tag:
    """The inverse of a permutation, as PackedSequence makes it."""
    x, dim, index, source = args
    plain = isinstance(source, Tensor) and torch.equal(source, torch.arange(len(index), device=source.device))
    inverts = plain and dim == 0 and x.shape == index.shape and isinstance(tag_of(index), Order)
    return Order(name) if inverts else Coupled(name)


def _same(name: str, tag_of: Lookup, records: int, args: Args, kwargs: Kwargs, out: Any) -> Tag:
    tag = tag_of(args[0])
    return tag if isinstance(tag, Order) else Coupled(name)


TABLE: dict[str, Callable[..., Any]] = {
    **dict.fromkeys("to cpu cuda long clone detach contiguous empty_like".split(), _same),
    **dict.fromkeys(("sort", "argsort"), sort),
    **dict.fromkeys(("index_select", "getitem"), _select),
    "scatter": _scatter,
    "pack_padded_sequence": pack,
    "pad_packed_sequence": pad,
}


def kept(result: Any, arranged: Rows) -> Any:
    """``result`` of an operation that is not in the table, on rows that the batch arranged."""
    if isinstance(result, list):
        return [kept(r, arranged) for r in result]
    if isinstance(result, Rows):
        return replace(result, arranged=True) if result.same_owners(arranged) else Coupled("a choice among sorted rows")
    return result if result is None or isinstance(result, (Reduced, Unknown)) else Coupled("a choice among sorted rows")
