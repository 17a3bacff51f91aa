"""Rows that are added up at an index: pooling of nodes into graphs, messages along edges, counting.

Which record a row of the result belongs to is read off the index itself: all that lands on one row must belong to one
record. Rows on which nothing lands are those of the row space, declared or one a record, that fits all the others.
"""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sfumato.ghost import indexing
from sfumato.ghost.declared import regular
from sfumato.ghost.rows import Coupled, Rows, Tag, Unknown, from_owner, owners

if TYPE_CHECKING:
    from sfumato.ghost.capture import Capture

_NAMES = {
    "index_add": ("dim", "index", "source"),
    "index_reduce": ("dim", "index", "source"),
    "index_copy": ("dim", "index", "source"),
    "scatter_add": ("dim", "index", "src"),
    "scatter_reduce": ("dim", "index", "src"),
}
LANDINGS = {*_NAMES, "segment_reduce", "bincount", "max", "amax"}


def follow(
    c: "Capture", name: str, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any
) -> list[tuple[Tensor, Tag]] | None:
    """Tags of what rows were added up into; None for what the other rules know better."""
    if any(not isinstance(c.tag(t), Rows | None) for t in indexing.tensors(args, kwargs)):
        return None
    if name in ("max", "amax", "bincount"):
        return _of_owners(c, name, args, kwargs, out)
    if name == "segment_reduce":
        return [(out, _segments(c, name, args, kwargs, out))]
    given = [*args[1:4], *(kwargs[k] for k in _NAMES[name][max(0, len(args) - 1) :])]
    into = args[0] if args else kwargs["input"]
    return [(out, _landed(c, name, out, into, given[0] % max(1, out.dim()), *given[1:3]))]


def _of_owners(
    c: "Capture", name: str, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any
) -> list[tuple[Tensor, Tag]] | None:
    """How many rows each record has, or which record is the last: of the owners themselves, which are no secret."""
    x, rest = args[0] if args else kwargs["input"], args[1:]
    rows = c.tag(x)
    if not c.tape.spaces or not isinstance(rows, Rows) or x.dim() != 1 or x.is_floating_point():
        return None
    if name == "bincount":
        weights = rest[0] if rest else kwargs.get("weights")
        return [(out, _landed(c, name, out, None, 0, x, weights))]
    mine = not rest and len(kwargs) <= (not args) and torch.equal(x, owners(rows, c.records, x.device))
    return [] if mine else None


def _landed(
    c: "Capture", name: str, out: Tensor, into: Tensor | None, dim: int, index: Tensor, source: Tensor | None
) -> Tag:
    own, at, rows = c.tag(into), c.tag(index), c.tag(source)
    for tag in (own, at, rows):
        if tag is not None and (not isinstance(tag, Rows) or tag.arranged):
            return tag if isinstance(tag, Unknown) else Coupled(name)
    if isinstance(rows, Rows) and rows.axis != dim:  # along an axis without records
        same = source is not None and out.shape[rows.axis] == source.shape[rows.axis]
        others = [t for t in (own, at) if isinstance(t, Rows)]
        fits = all(t.axis == rows.axis and t.same_owners(rows) for t in others) and (at is None or index.dim() > 1)
        return rows if same and fits else Coupled(name)
    if isinstance(at, Rows) and at.axis != (dim if index.dim() > 1 else 0):
        return Coupled(name)
    if isinstance(at, Rows) and isinstance(rows, Rows) and not at.same_owners(rows) and c.records != 1:
        return Coupled(name)
    whose = rows if isinstance(rows, Rows) else at
    if not isinstance(whose, Rows):  # constants, added to rows of records at fixed places
        return own if isinstance(own, Rows) else Unknown(name)
    owner = owners(whose, c.records, index.device)
    if index.shape[dim if index.dim() > 1 else 0] != owner.numel():
        return Unknown(name)
    places = index.movedim(dim, 0).flatten(1) if index.dim() > 1 else index.reshape(-1, 1)
    return _placed(c, name, own, whose.at(dim), out.shape[dim], places, owner)


def _placed(c: "Capture", name: str, own: Tag | None, rows: Rows, length: int, places: Tensor, owner: Tensor) -> Tag:
    """``places`` (R, n): where each of ``rows`` goes; ``owner`` (R,): whose it is."""
    dim = rows.axis
    whose = owner.unsqueeze(1).expand_as(places).reshape(-1)
    places = places.reshape(-1)
    landed = torch.full((length,), -1, device=places.device).index_copy_(0, places, whose)
    if not torch.equal(landed[places], whose):
        return Coupled(name)  # rows of different records on one place
    touched = landed >= 0
    if isinstance(own, Rows):
        fits = own.axis == dim and torch.equal(owners(own, c.records, places.device)[touched], landed[touched])
        return own if fits else Coupled(name)
    found: list[Rows] = []
    for space in (torch.arange(c.records), *c.tape.spaces):
        space = space.to(places.device)
        if space.numel() == length and torch.equal(space[touched], landed[touched]):
            there = regular(dim, space, c.records)
            if not any(there.same_owners(other) for other in found):
                found.append(there)
    if not found and bool(touched.all()):
        return from_owner(dim, landed, c.records)
    if len(found) > 1:
        # By chance as many edges as nodes. Rows go to another space than their own; if not, they meet that of the
        # other owners and are refused there, or at the way out (declared.check_leaving).
        c.tape.taken.extend(found)
        found = [there for there in found if not there.same_owners(rows)]
    told = len(found) == 1
    return found[0] if told else Unknown(f"{name} (nothing lands on some rows, and by number they may be of two kinds)")


def after_put(c: "Capture", x: Tensor, items: tuple[Any, ...], value: Any) -> Tag | None:
    """The tag of x after x[i, j, ...] = value, a row of the value at each place (tokens back to their sequences)."""
    whole = all(
        isinstance(i, Tensor) and i.dim() == 1 and not i.is_floating_point() and i.dtype != torch.bool for i in items
    )
    tags = [c.tag(t) for t in (*items, value)]
    rows = next((t for t in tags if t is not None), None)
    if not whole or not isinstance(rows, Rows):
        return None
    if any(t is not None and not (isinstance(t, Rows) and t.axis == 0 and not t.arranged) for t in tags):
        return None
    if isinstance(value, Tensor) and value.dim() > 0 and (tags[-1] is None or value.shape[0] != len(items[0])):
        return None
    if any(isinstance(t, Rows) and not t.same_owners(rows) for t in tags) and c.records != 1:
        return Coupled("setitem")
    own, owner = c.tag(x), owners(rows, c.records, x.device)
    if own is not None and not isinstance(own, Rows):
        return None
    for k, places in enumerate(items):
        if len(places) == owner.numel() and (own is None or own.axis == k):
            found = _placed(c, "setitem", own, rows.at(k), x.shape[k], places.unsqueeze(1), owner)
            if isinstance(found, Rows):
                return found
    return Coupled("setitem")


def _segments(c: "Capture", name: str, args: tuple[Any, ...], kwargs: dict[str, Any], out: Tensor) -> Tag:
    data, lengths, offsets = args[0] if args else kwargs["data"], kwargs.get("lengths"), kwargs.get("offsets")
    if offsets is not None and lengths is None:
        lengths = offsets.diff()
    if lengths is None or lengths.dim() != 1 or kwargs.get("axis", 0) != 0:
        return Unknown(name)
    index = torch.arange(lengths.numel(), device=lengths.device).repeat_interleave(lengths)
    if index.numel() != data.shape[0]:
        return Unknown(name)
    result = _landed(c, name, out, None, 0, index, data)
    by = c.tag(kwargs.get("lengths") if offsets is None else offsets)
    told = by is None or (isinstance(by, Rows) and isinstance(result, Rows) and by.axis == 0 and by.same_owners(result))
    return result if told or c.records == 1 else Coupled(name)
