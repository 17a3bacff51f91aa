"""Rows: which axis of a tensor holds the records, and which record each row belongs to.

Propagated through operations, never guessed from a shape. An axis of size outer·B·inner in the regular case
(index = (o·B + b)·inner + i covers flattened tokens, folded heads and windows), or any explicit owner vector.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Rows:
    """``axis`` holds the records; ``owner`` (None: regular) names each row's record.

    ``arranged``: records of the batch decided where the rows lie (sorting by length), so none may be picked by place.
    """

    axis: int
    outer: int = 1
    inner: int = 1
    owner: Tensor | None = None
    arranged: bool = False

    @property
    def plain(self) -> bool:
        """One row a record, in order."""
        return self.owner is None and self.outer == 1 and self.inner == 1

    def at(self, axis: int) -> "Rows":
        return Rows(axis, self.outer, self.inner, self.owner, self.arranged)

    def same_owners(self, other: "Rows") -> bool:
        if self.owner is None and other.owner is None:
            return (self.outer, self.inner) == (other.outer, other.inner)
        if self.owner is None:
            return other.same_owners(self)
        if other.owner is None:
            total, block = self.owner.numel(), other.outer * other.inner
            if total % block or total == block:  # a single record's rows would be broadcast to all the others
                return False
            return torch.equal(self.owner, owners(other, total // block, self.owner.device))
        return self.owner is other.owner or torch.equal(self.owner, other.owner)


@dataclass(frozen=True, eq=False, slots=True)
class Reduced:
    """A sum or mean over the records (a loss): allowed to leave the model, not to meet a record again."""

    by: str
    each: Tensor | None = None  # (B,): of whole numbers, the sum of each record alone
    size: int = 0  # how many were summed


@dataclass(frozen=True, slots=True)
class Coupled:
    """A value in which records are mixed beyond a sum: must never carry a gradient."""

    by: str


@dataclass(frozen=True, slots=True)
class Unknown:
    """The result of an operation whose effect on the record axis is not known."""

    by: str


@dataclass(frozen=True, slots=True)
class Order:
    """A permutation of the records, or the step sizes of a packed batch: says where rows lie, and is nothing to
    compute with. Of a packed batch: the steps of what was packed, and whether its records had been permuted."""

    by: str
    length: int = 0
    permuted: bool = True


@dataclass(frozen=True, eq=False, slots=True)
class Pointer:
    """Row numbers: entry r belongs to the record of ``rows``' row r and names a row of an axis laid out as ``base``."""

    rows: Rows
    base: Rows | None
    column: int | None = None  # (n, ndim) from nonzero(): the column that holds the row numbers


@dataclass(frozen=True, eq=False, slots=True)
class Histogram:
    """How many rows chose which expert: the counts, or running counts, of ``values``."""

    values: Tensor
    rows: Rows
    summed: bool = False


class Whole(int):
    """``x.numel()``: a number of the whole batch, told from a constant that happens to equal it."""


@dataclass(frozen=True, eq=False, slots=True)
class Verdict:
    """A yes or no that the whole batch decides (``mask.all()``), and what each record alone would say."""

    by: str
    each: Tensor  # (B,) bool


Tag = Rows | Reduced | Coupled | Unknown | Order | Verdict | Pointer | Histogram


def owners(rows: Rows, records: int, device: torch.device) -> Tensor:
    """The record of each row along the axis, shape (rows,)."""
    if rows.owner is not None:
        return rows.owner.to(device)
    return torch.arange(records, device=device).repeat_interleave(rows.inner).repeat(rows.outer)


def from_owner(axis: int, owner: Tensor, records: int) -> Rows:
    """Rows with an explicit owner vector, recognised as plain where it is the identity."""
    if owner.numel() == records and torch.equal(owner, torch.arange(records, device=owner.device)):
        return Rows(axis)
    return Rows(axis, owner=owner)


def by_record(x: Tensor, rows: Rows, records: int, features: int) -> Tensor:
    """x regrouped to (B, T, *last ``features`` dims); rows of a record that has fewer than T are zero."""
    tail = x.shape[x.dim() - features :]
    lead = x.shape[: x.dim() - features]
    if rows.owner is not None:
        return _padded(x.movedim(rows.axis, 0), rows.owner, records, lead.numel() // max(lead[rows.axis], 1), tail)
    if rows.axis == 0 and rows.outer == 1:
        per_record = rows.inner * math.prod(lead[1:])
        return x.reshape(records, per_record, *tail)
    split = x.reshape(*lead[: rows.axis], rows.outer, records, rows.inner, *x.shape[rows.axis + 1 :])
    front = split.movedim(rows.axis + 1, 0)
    per_record = math.prod(lead[: rows.axis]) * rows.outer * rows.inner * math.prod(lead[rows.axis + 1 :])
    return front.reshape(records, per_record, *tail)


def _padded(x: Tensor, owner: Tensor, records: int, per_row: int, tail: torch.Size) -> Tensor:
    owner = owner.to(x.device)
    counts = torch.bincount(owner, minlength=records)
    longest = int(counts.max()) if owner.numel() else 0
    order = torch.argsort(owner, stable=True)
    starts = counts.cumsum(0) - counts
    sorted_owner = owner[order]
    slot = torch.arange(owner.numel(), device=x.device) - starts[sorted_owner]
    out = x.new_zeros(records, longest, *x.shape[1:])
    out[sorted_owner, slot] = x[order]
    return out.reshape(records, longest * per_row, *tail)


def through_reshape(rows: Rows, shape: torch.Size, out: torch.Size, records: int) -> Tag:
    """Where the records are after a reshape from ``shape`` to ``out``, by comparing strides in elements."""
    if records == 0 or 0 in shape:
        empty = Rows(0) if rows.owner is None else rows
        return empty.at(list(out).index(0)) if 0 in out else Unknown("reshape")
    before, after = math.prod(shape[: rows.axis]), math.prod(shape[rows.axis + 1 :])
    if rows.owner is not None:
        for k, size in enumerate(out):
            if size == shape[rows.axis] and math.prod(out[:k]) == before:
                return rows.at(k)
        return _merged_owner(rows, shape, out)
    stride = rows.inner * after
    candidates = []
    for k, size in enumerate(out):
        tail = math.prod(out[k + 1 :])
        if stride % tail or (not tail <= stride < tail * size and not (records == 1 and tail <= stride <= tail * size)):
            continue
        inner = stride // tail
        if size % (records * inner) == 0:
            candidates.append(Rows(k, size // (records * inner), inner))
    if not candidates:
        return Unknown("reshape")
    # With one record every matching axis says the same; keep the plainest and leftmost.
    return min(candidates, key=lambda r: (not r.plain, abs(r.axis - rows.axis)))


def _merged_owner(rows: Rows, shape: torch.Size, out: torch.Size) -> Tag:
    if rows.owner is None:
        return Unknown("reshape")
    view = rows.owner.reshape(-1, *[1] * (len(shape) - rows.axis - 1)).expand(shape).reshape(out)
    for k in range(len(out)):
        vector = view.movedim(k, 0).reshape(out[k], -1)
        if bool((vector == vector[:, :1]).all()):
            return Rows(k, owner=vector[:, 0].contiguous())
    return Unknown("reshape")
