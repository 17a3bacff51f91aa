"""Reading the calls of recurrent networks: which axis of which argument holds the records."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from sfumato.ghost.propagation.names import Args, Kwargs, Lookup
from sfumato.ghost.propagation.packing import first_rows
from sfumato.ghost.propagation.routing import steady
from sfumato.ghost.rows import Coupled, Order, Rows, Tag, Unknown

_ALONG = "a recurrence along the axis of the records (see batch_first)"


@dataclass(frozen=True, slots=True)
class Call:
    """``torch.lstm`` and its like, with padded or packed (``sizes``) input."""

    input: Tensor
    sizes: Tensor | None
    states: Sequence[Tensor]
    params: Sequence[Tensor]
    has_biases: bool
    num_layers: int
    dropout: float
    train: bool
    bidirectional: bool
    batch_first: bool = False


def as_call(args: Args, kwargs: Kwargs) -> Call:
    """Both overloads, told apart by where the weights are."""
    packed = "batch_sizes" in kwargs or (len(args) > 3 and isinstance(args[3], (list, tuple)))
    names: tuple[str, ...] = ("data", "batch_sizes") if packed else ("input",)
    names += ("hx", "params", "has_biases", "num_layers", "dropout", "train", "bidirectional", "batch_first")
    given: dict[str, Any] = dict(zip(names, args, strict=False)) | kwargs
    hx = given.pop("hx")
    states = [hx] if isinstance(hx, Tensor) else list(hx)
    return Call(given.pop(names[0]), given.pop("batch_sizes", None), states, **given)


def sequences(name: str, call: Call, tag_of: Lookup, records: int) -> tuple[Rows, Rows] | Tag:
    """(rows of the input, rows on axis 1 of the states), or what is wrong with them."""
    if call.sizes is not None:
        return _packed(name, call, tag_of, records)
    batch = 0 if call.batch_first else 1
    found = _aligned(name, [(call.input, batch), *((s, 1) for s in call.states)], tag_of, records)
    if not isinstance(found, Rows):
        return found
    if records == 1:  # whatever the axis, every row is this record's
        found = Rows(batch, outer=call.input.shape[batch])
    return found.at(batch), found.at(1)


def _packed(name: str, call: Call, tag_of: Lookup, records: int) -> tuple[Rows, Rows] | Tag:
    rows, order = tag_of(call.input), tag_of(call.sizes)
    if not isinstance(rows, Rows) or rows.axis != 0 or not (order is None or isinstance(order, Order)):
        return Unknown(name)
    assert call.sizes is not None
    first = first_rows(rows, call.sizes.tolist(), order, records)
    if first is None:
        return Unknown(name)
    for state in call.states:
        tag = tag_of(state)
        if tag is not None and not (isinstance(tag, Rows) and tag.axis == 1 and tag.same_owners(first)):
            return Coupled(name)
        if tag is None and rows.arranged and not steady(state, first.at(1), state.dim()) and records != 1:
            return Coupled(name)
    return Rows(0, outer=call.input.shape[0]) if records == 1 else rows, first.at(1)


def _aligned(name: str, operands: Sequence[tuple[Tensor, int]], tag_of: Lookup, records: int) -> Rows | Tag:
    """The rows of operands that have them on the given axes."""
    found: Rows | None = None
    for value, axis in operands:
        tag = tag_of(value)
        if tag is None:
            continue
        if not isinstance(tag, Rows):
            return tag if isinstance(tag, (Coupled, Unknown)) else Coupled(name)
        if records != 1 and tag.axis != axis:
            return Coupled(_ALONG)
        if found is not None and not tag.same_owners(found) and records != 1:
            return Coupled(name)
        found = found or tag
    if found is not None and found.arranged and records != 1:
        constants = (v.movedim(axis, 0) for v, axis in operands if tag_of(v) is None)
        if not all(steady(v, found.at(0), v.dim()) for v in constants):
            return Coupled(name)
    return found if found is not None else Unknown(name)


def cell(name: str, input: Tensor, states: Sequence[Tensor], tag_of: Lookup, records: int) -> Rows | Tag:
    """Rows of a single step: axis 0 of everything."""
    found = _aligned(name, [(v, 0) for v in (input, *states)], tag_of, records)
    return Rows(0, outer=input.shape[0]) if records == 1 and isinstance(found, Rows) else found


def frozen(name: str, tag_of: Lookup, records: int, args: Args, kwargs: Kwargs, out: Any) -> Any:
    found = sequences(name, as_call(args, kwargs), tag_of, records)
    return [found[0], found[1], found[1]] if isinstance(found, tuple) else found


def frozen_cell(name: str, tag_of: Lookup, records: int, args: Args, kwargs: Kwargs, out: Any) -> Any:
    hx = args[1] if len(args) > 1 else kwargs["hx"]
    states = [hx] if isinstance(hx, Tensor) else list(hx)
    return cell(name, args[0] if args else kwargs["input"], states, tag_of, records)
