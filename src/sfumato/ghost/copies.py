"""One copy of a parameter for each record, or for each row: how any batched operation can use a parameter exactly."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from sfumato.errors import CoupledRecords
from sfumato.ghost.functions import RowsFn, SpreadFn
from sfumato.ghost.rows import Rows, owners
from sfumato.ghost.rules.table import NoRule
from sfumato.ghost.targets import Derived, Param

if TYPE_CHECKING:
    from sfumato.ghost.capture import Capture


def spread(c: "Capture", value: Tensor) -> Tensor:
    """(B, *shape): the parameter, once for each record."""
    target = c.target(value)
    out: Tensor = SpreadFn.apply(value.detach(), c.tape.anchor, target, c.tape, c.records)  # type: ignore[no-untyped-call]
    return out


def spread_rows(c: "Capture", value: Tensor, rows: Rows) -> Tensor:
    """(R, *shape): the parameter, once for each row."""
    copies = spread(c, value)
    return copies if rows.plain else copies.index_select(0, owners(rows, c.records, value.device))


def spread_along(c: "Capture", value: Tensor, rows: Rows, ndim: int, axis: int) -> Tensor:
    """The parameter with the rows inserted on ``axis`` of its right-aligned ``ndim`` axes."""
    own = axis - (ndim - value.dim())
    if own >= 0 and value.shape[own] != 1:
        raise NoRule("spread", "the parameter has an axis of its own where the records are")
    copies = spread_rows(c, value, rows)
    shaped = copies.reshape(copies.shape[0], *[1] * (ndim - value.dim()), *value.shape)
    return shaped.movedim(0, axis).squeeze(axis + 1)


def as_rows(c: "Capture", value: Tensor, rows: Rows) -> Tensor:
    """A derived tensor that already has the rows on ``rows.axis``."""
    if rows.arranged:
        raise CoupledRecords(
            "A parameter has an entry for each place of rows that the batch arranged: which entry a record gets "
            "depends on the others.",
            where=c.where(),
            fix="use the parameter before the rows are sorted or routed.",
        )
    if rows.owner is None and c.records > 1 and not _same_for_all(value.detach(), rows, c.records):
        raise CoupledRecords(
            "A parameter has a different entry for each place in the batch: which one a record gets depends on how "
            "many come before it.",
            where=c.where(),
            fix="index it by something that the record itself holds.",
        )
    target = c.target(value)
    if isinstance(target, Param):
        target = Derived(value, (target.name,))
    out: Tensor = RowsFn.apply(value.detach(), c.tape.anchor, target, rows, c.tape, c.records)  # type: ignore[no-untyped-call]
    c.set_tag(out, rows)
    return out


def align(c: "Capture", value: Tensor, rows: Rows, ndim: int) -> Tensor:
    """A parameter made ready to be broadcast against records on ``rows.axis`` of ``ndim`` axes."""
    if c.target(value) is None:
        return value
    own = rows.axis - (ndim - value.dim())
    if own >= 0 and value.shape[own] != 1:
        return as_rows(c, value, rows.at(own))
    return spread_along(c, value, rows, ndim, rows.axis)


def _same_for_all(value: Tensor, rows: Rows, records: int) -> bool:
    """Whether every record's block of rows is that of the first, up to rounding."""
    blocks = value.movedim(rows.axis, 0).unflatten(0, (rows.outer, records, rows.inner))
    tolerance = 1e3 * torch.finfo(value.dtype).eps
    return torch.allclose(blocks, blocks[:, :1].expand_as(blocks), rtol=tolerance, atol=tolerance, equal_nan=True)
