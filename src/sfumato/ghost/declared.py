"""Batches whose rows are not one for each record: around the forward, the user declares whose row each one is."""

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextvars import ContextVar, Token
from types import TracebackType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sfumato import _validate
from sfumato.errors import ConfigurationError, CoupledRecords, PrivacyError, RowsMismatch
from sfumato.ghost import indexing
from sfumato.ghost.rows import Rows

if TYPE_CHECKING:
    from sfumato.ghost.capture import Capture

Owner = Tensor | tuple[Tensor, int] | None
_ACTIVE: ContextVar["rows | None"] = ContextVar("rows", default=None)


class rows:
    """``with sf.rows(owner):`` around the forward: row r of the model's inputs belongs to record ``owner[r]``.

    For flattened or packed tokens, nodes and edges of graphs, several views of a record. The records are still those
    that the loader drew, by their position in the batch, and each is clipped once, whatever rows it has (none is fine).

    Declared, and only in part checked: that row r was computed from record ``owner[r]`` and from no other. A row that
    in truth belongs to another record voids the bound. Refused is what contradicts itself: another number of rows,
    owners beyond the batch, rows of different records that meet in the model.

    An input with as many rows as ``owner`` has those owners, one with a row for each record is as ever, and any other
    must be named. With ``loss_reduction="mean"`` the loss must be a mean over records, or over equally many rows of
    each; if rows are unequal, pool them to one a record inside the model, or use ``loss_reduction="sum"``.

    Args:
        owner: (R,) integers in [0, B).
        views: K rows of each record in turn, as ``repeat_interleave(K)`` lays them: instead of ``owner``.
        inputs: {name of an argument of the model's forward, or of an attribute or key inside one: owners of its rows};
            ``(owners, axis)`` if they do not lie on ``batch_dim``; None for an input that carries no records.
        records: B, where the loader does not say it (in ``sf.record``); by default the largest owner plus one.

    Raises:
        ConfigurationError: not a vector of integers >= 0. RowsMismatch, in the forward: it does not fit the inputs.
    """

    def __init__(
        self,
        owner: Tensor | None = None,
        *,
        views: int | None = None,
        inputs: Mapping[str, Owner] | None = None,
        records: int | None = None,
    ):
        if owner is not None and views is not None:
            raise ConfigurationError("sf.rows takes owner or views, not both.", where="views")
        if owner is None and views is None and not inputs:
            raise ConfigurationError("sf.rows declares nothing.", fix="give owner, views= or inputs=.")
        self.owner = None if owner is None else _vector("owner", owner)
        self.views = None if views is None else _validate.count("views", views)
        self.records = None if records is None else _validate.count("records", records)
        self.inputs = {name: _named(name, given) for name, given in (inputs or {}).items()}
        self._reset: Token[rows | None] | None = None

    def __enter__(self) -> "rows":
        if _ACTIVE.get() is not None:
            raise PrivacyError("sf.rows inside sf.rows.", fix="declare all rows in one, with inputs={name: owners}.")
        self._reset = _ACTIVE.set(self)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._reset is not None:
            _ACTIVE.reset(self._reset)
            self._reset = None

    def _vectors(self) -> Iterator[Tensor]:
        if self.owner is not None:
            yield self.owner
        yield from (owner for owner, _ in filter(None, self.inputs.values()))

    def _counted(self, slots: list[tuple[str, Tensor]], batch_dim: int) -> int:
        """The number of records, where no loader says it."""
        if self.records is not None:
            return self.records
        if self.views is not None:
            sizes = [t.shape[batch_dim] for n, t in slots if n not in self.inputs and t.dim() > batch_dim]
            if sizes and sizes[0] % self.views == 0:
                return sizes[0] // self.views
            raise RowsMismatch(f"Inputs with {sizes} rows are not {self.views} views of each record.", found=sizes)
        return max((int(v.max()) + 1 for v in self._vectors() if v.numel()), default=0)


def _vector(name: str, value: object) -> Tensor:
    if not isinstance(value, Tensor) or value.dim() != 1 or value.dtype.is_floating_point or value.dtype.is_complex:
        kind = f"{value.dtype} tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value)
        raise ConfigurationError(f"{name} is a {kind}, not a vector of integers.", found=value, where=name)
    if value.dtype == torch.bool or bool((value < 0).any()):
        raise ConfigurationError(f"{name} must hold positions in the batch, all >= 0.", found=value, where=name)
    return value.detach().long().clone()  # a copy: what was declared stays, whatever becomes of the tensor


def _named(name: str, given: Owner) -> tuple[Tensor, int | None] | None:
    if given is None:
        return None
    owner, axis = given if isinstance(given, tuple) and len(given) == 2 else (given, None)
    if axis is not None and (isinstance(axis, bool) or not isinstance(axis, int) or axis < 0):
        raise ConfigurationError(f"inputs[{name!r}]: {axis!r} is not an axis number >= 0.", found=axis, where="inputs")
    return _vector(f"inputs[{name!r}]", owner), axis


def regular(axis: int, owner: Tensor, records: int) -> Rows:
    """Rows with these owners, in the regular form where they repeat regularly."""
    total = owner.numel()
    if records and total and total % records == 0:
        inner = int((owner != 0).int().argmax()) if bool((owner != 0).any()) else total // records
        if inner and total % (records * inner) == 0:
            repeated = Rows(axis, total // (records * inner), inner)
            steps = torch.arange(records, device=owner.device).repeat_interleave(inner).repeat(repeated.outer)
            if torch.equal(owner, steps):
                return repeated
    return Rows(axis) if total == records == 0 else Rows(axis, owner=owner)


def active(c: "Capture") -> rows | None:
    """The declaration in force; in a recomputation, that of its forward."""
    return c.tape.declared if torch._C._current_graph_task_id() != -1 else _ACTIVE.get()


def admitted(
    c: "Capture", declared: rows, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> list[tuple[Tensor, Rows | None, bool]]:
    """(input, its rows, whether their axis was named) for every input that has no tag yet."""
    slots = [(n, t) for n, t in _slots(forward, args, kwargs) if c.known_target(t) is None]
    tape = c.tape
    if tape.records is None:
        tape.records = declared._counted(slots, c.batch_dim) if c.expected is None else c.expected
    records = tape.records
    if declared.records not in (None, records):
        raise _mismatch(c, f"records={declared.records}, but the batch has {records}.")
    for owner in declared._vectors():
        if owner.numel() and int(owner.max()) >= records:
            raise _mismatch(c, f"An owner is {int(owner.max())}, but the batch has {records} records, from 0 on.")
    missing = [n for n in declared.inputs if all(n != name for name, _ in slots)]
    if missing and forward is c.module.forward:
        raise _mismatch(c, f"inputs names {missing}, but the model got tensors named {sorted({n for n, _ in slots})}.")
    tape.declared = declared
    tape.spaces = list(declared._vectors())
    if declared.views is not None:
        tape.spaces.append(torch.arange(records).repeat_interleave(declared.views))
    found = []
    for name, tensor in slots:
        own, known = c.own_tag(tensor), name in declared.inputs
        if own is not None and not known:
            continue
        rows = _rows_of(c, declared, name, tensor)
        if own is None:
            found.append((tensor, rows, known and rows is not None and rows.axis != c.batch_dim))
        elif not (isinstance(own, Rows) and rows is not None and own.axis == rows.axis and own.same_owners(rows)):
            raise _mismatch(c, f"{name} came into a model before, in this batch, with other owners.")
    return found


def _slots(forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[tuple[str, Tensor]]:
    """(name, tensor) of every input; the name is that of the argument, or of what holds it inside the argument."""
    bound = inspect.signature(forward).bind(*args, **kwargs).arguments
    return [
        (next((p for p in reversed(path.split(".")) if not p.isdigit()), path), tensor)
        for path, tensor in indexing.named_tensors(bound)
    ]


def _rows_of(c: "Capture", declared: rows, name: str, tensor: Tensor) -> Rows | None:
    records, shape = c.records, tuple(tensor.shape)
    if name in declared.inputs:
        given = declared.inputs[name]
        if given is None:
            return None
        owner, axis = given[0], c.batch_dim if given[1] is None else given[1]
        if axis >= len(shape) or shape[axis] != owner.numel():
            raise _mismatch(
                c, f"{name} has shape {shape}, but {owner.numel()} owners were declared for its axis {axis}."
            )
        return regular(axis, owner, records)
    size = shape[c.batch_dim] if len(shape) > c.batch_dim else -1
    rows = None
    if declared.views is not None and size == declared.views * records:
        rows = Rows(c.batch_dim, inner=declared.views)
    elif declared.owner is not None and size == declared.owner.numel():
        rows = regular(c.batch_dim, declared.owner, records)
    if size == records:
        if rows is not None and not rows.plain:
            raise _mismatch(
                c, f"{name} has {size} rows: one for each record, or those that were declared; that is ambiguous."
            )
        return Rows(c.batch_dim)
    if rows is None:
        raise _mismatch(
            c, f"{name} has shape {shape}: neither a row for each of {records} records, nor those declared."
        )
    return rows


def _mismatch(c: "Capture", what: str) -> RowsMismatch:
    return RowsMismatch(
        f"sf.rows: {what}",
        where=c.where(),
        fix="name it: sf.rows(owner, inputs={'name of the input': its owners, (its owners, axis) or None}).",
    )


def check_leaving(c: "Capture", tag: Rows) -> None:
    """Rows in an order of their own leave only as they were declared, and never into a mean over unequal numbers."""
    if any(tag.same_owners(other) for other in c.tape.taken):
        raise CoupledRecords(
            "By chance this batch has as many rows of one kind as of another, some with nothing added to them, and "
            "which of the two an output holds cannot be told.",
            where=c.where(),
            fix="pool the rows to one a record inside the model.",
        )
    if tag.owner is None:
        return
    declared = any(torch.equal(tag.owner, s.to(tag.owner.device)) for s in c.tape.spaces)
    if not declared or tag.arranged:
        raise CoupledRecords(
            "The rows of an output are not those of the batch in order, so the loss would pair them with labels of "
            "other records.",
            where=c.where(),
            fix="return one row, or one block of rows, for each record, in the order of the batch"
            + (", or the rows in the order declared to sf.rows." if c.tape.spaces else "."),
        )
    if c.reduction == "mean":
        raise CoupledRecords(
            "An output has unequal numbers of rows for the records, and the mean over all of them divides one record's "
            "gradient by how many rows the others have.",
            where=c.where(),
            fix="pool the rows to one a record inside the model, or sum the loss and say loss_reduction='sum'.",
        )
