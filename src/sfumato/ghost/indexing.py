"""Reading the arguments of torch calls: tensors among them, dims, permutations, einsum letters, index expressions."""

import string
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from sfumato.ghost.rows import Coupled, Rows, Tag, Unknown, from_owner, owners

T = TypeVar("T")


def tensors(args: Any, kwargs: dict[str, Any] | None = None) -> Iterator[Tensor]:
    """Tensors among positional and keyword arguments, lists and tuples included."""
    for value in args:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from tensors(value)
    if kwargs:
        yield from tensors(tuple(kwargs.values()))


def deep_tensors(value: Any) -> Iterator[Tensor]:
    """Tensors with a batch axis anywhere in the arguments of a model: containers, mappings, plain objects."""
    return (tensor for _, tensor in named_tensors(value))


def named_tensors(value: Any, path: str = "", depth: int = 12) -> Iterator[tuple[str, Tensor]]:
    """(path, tensor) for each of them."""
    return ((name, tensor) for name, tensor in named(Tensor, value, path, depth) if tensor.dim() > 0)


def named(kind: type[T], value: Any, path: str = "", depth: int = 12) -> Iterator[tuple[str, T]]:
    """(path, value) for each value of a kind."""
    if isinstance(value, kind):
        yield path, value
        return
    if depth == 0 or isinstance(value, (Tensor, str, bytes, int, float, type, torch.nn.Module)) or value is None:
        return
    if isinstance(value, Mapping):
        items = [(str(k), v) for k, v in value.items()]
    elif isinstance(value, (list, tuple, set)):
        items = [(str(k), v) for k, v in enumerate(value)]
    elif callable(value):
        return
    else:
        items = attributes(value)
    for key, item in items:
        yield from named(kind, item, f"{path}.{key}", depth - 1)


def attributes(value: Any) -> list[tuple[str, Any]]:
    """(name, value) of what a plain object holds."""
    names = [*getattr(value, "__dict__", ()), *(n for t in type(value).__mro__ for n in _slots(t))]
    return [(n, getattr(value, n)) for n in names if hasattr(value, n)]


def _slots(kind: type) -> tuple[str, ...]:
    found = getattr(kind, "__slots__", ())
    return (found,) if isinstance(found, str) else tuple(found)


def dims_of(rest: tuple[Any, ...], kwargs: dict[str, Any], ndim: int) -> tuple[int, ...] | None:
    """The ``dim`` argument as a tuple of non-negative ints; None when absent."""
    dim = kwargs.get("dim", kwargs.get("axis", kwargs.get("dims")))
    if dim is None and rest and not isinstance(rest[0], bool):
        dim = rest[0]
        if isinstance(dim, int) and len(rest) > 1 and all(isinstance(r, int) and not isinstance(r, bool) for r in rest):
            dim = rest  # flip(0, 1)
    if isinstance(dim, int):
        return (dim % max(ndim, 1),)
    if isinstance(dim, (tuple, list)) and all(isinstance(d, int) for d in dim):
        return tuple(d % ndim for d in dim) if dim else None
    return None


def permutation(name: str, ndim: int, rest: tuple[Any, ...], kwargs: dict[str, Any]) -> list[int]:
    """Source axis of each output axis, found by applying the call to a tensor whose sizes name its axes."""
    probe = torch.empty(tuple(range(2, ndim + 2)), device="meta")
    call = getattr(Tensor, name)
    moved = getattr(probe, name) if not callable(call) else call(probe, *rest, **kwargs)
    return [size - 2 for size in moved.shape]


def einsum_letters(args: tuple[Any, ...]) -> tuple[list[str], str, list[Tensor]] | None:
    """(letters of each operand, letters of the output, operands); None for the sublist form."""
    if not args or not isinstance(args[0], str):
        return None
    operands = list(args[1]) if len(args) == 2 and isinstance(args[1], (list, tuple)) else list(args[1:])
    equation = args[0].replace(" ", "")
    left, arrow, output = equation.partition("->")
    inputs = left.split(",")
    if not arrow:
        joined = left.replace(",", "").replace(".", "")
        output = "..." * ("..." in left) + "".join(sorted(c for c in set(joined) if joined.count(c) == 1))
    if "..." in equation:  # right-aligned, under letters of its own
        spare = "".join(c for c in string.ascii_letters if c not in equation)
        hidden = [x.dim() - len(spec) + 3 for spec, x in zip(inputs, operands, strict=True) if "..." in spec]
        most = max(hidden, default=0)
        widths = iter(hidden)
        inputs = [s.replace("...", spare[most - next(widths) : most]) if "..." in s else s for s in inputs]
        output = output.replace("...", spare[:most])
    return inputs, output, operands


def after_getitem(tag_of: Callable[[object], Tag | None], records: int, x: Tensor, index: Any, out: Any) -> Tag | None:
    """The record axis of x[index]."""
    items = list(index) if isinstance(index, tuple) else [index]
    items = [torch.tensor(i) if isinstance(i, list) and all(type(n) is int for n in i) else i for i in items]
    if any(
        isinstance(i, bool) or not (i is None or i is Ellipsis or isinstance(i, (slice, int, Tensor))) for i in items
    ):
        return Unknown("getitem")
    used = sum(
        i.dim() if isinstance(i, Tensor) and i.dtype == torch.bool else 1
        for i in items
        if i is not None and i is not Ellipsis
    )
    if any(i is Ellipsis for i in items):
        at = next(k for k, i in enumerate(items) if i is Ellipsis)
        items[at : at + 1] = [slice(None)] * (x.dim() - used)
    else:
        items += [slice(None)] * (x.dim() - used)
    rows = tag_of(x)
    picks = [i for i in items if isinstance(i, Tensor)]
    if picks:
        items, rows = _selected(items, rows)
        if isinstance(rows, Unknown):
            return rows
        return _advanced(tag_of, records, x, rows, items, picks)
    if not isinstance(rows, Rows):
        return None
    source, target = 0, 0
    for item in items:
        if item is None:
            target += 1
        elif isinstance(item, slice):
            if source == rows.axis:
                if item == slice(None) or (out.shape[target] == x.shape[source] and (item.step or 1) == 1):
                    return rows.at(target)
                return from_owner(target, owners(rows, records, x.device)[item], records)
            source, target = source + 1, target + 1
        else:
            if source == rows.axis:
                return Unknown("getitem")
            source += 1
    return Unknown("getitem")


def _selected(items: list[Any], rows: Tag | None) -> tuple[list[Any], Tag | None]:
    """Integers among index tensors are applied first: their axes are gone."""
    kept: list[Any] = []
    axis = 0
    for item in items:
        if isinstance(item, int):
            if isinstance(rows, Rows) and rows.axis >= axis:
                rows = rows.at(rows.axis - 1) if rows.axis > axis else Unknown("getitem")
        else:
            kept.append(item)
            mask = isinstance(item, Tensor) and item.dtype == torch.bool
            axis += item.dim() if mask else item is not None
    return kept, rows


def _advanced(
    tag_of: Callable[[object], Tag | None],
    records: int,
    x: Tensor,
    rows: Tag | None,
    items: list[Any],
    picks: list[Tensor],
) -> Tag | None:
    kinds = [isinstance(i, Tensor) for i in items]
    first = kinds.index(True)
    if any(kinds[first + len(picks) :]) or not all(kinds[first : first + len(picks)]) or None in items[:first]:
        return Unknown("getitem")  # separated index tensors: the result axis moves to the front
    if not all(isinstance(i, slice) and i == slice(None) for k, i in enumerate(items) if not kinds[k]):
        return Unknown("getitem")
    mask = picks[0].dtype == torch.bool
    if mask and len(picks) > 1:
        return Unknown("getitem")
    span = picks[0].dim() if mask else len(picks)
    width = 1 if mask else max(p.dim() for p in picks)
    if not isinstance(rows, Rows):  # a constant table indexed by records
        tagged = [(p, t) for p in picks if isinstance(t := tag_of(p), Rows)]
        if mask or not tagged:
            return Unknown("getitem")
        moved = [t.at(first + t.axis + width - p.dim()) for p, t in tagged]
        return (
            moved[0] if all(m.axis == moved[0].axis and m.same_owners(moved[0]) for m in moved) else Coupled("getitem")
        )
    if rows.axis < first:
        return rows if all(tag_of(p) is None for p in picks) else Coupled("getitem")
    if rows.axis >= first + span:
        return rows.at(rows.axis - span + width) if all(tag_of(p) is None for p in picks) else Coupled("getitem")
    owner = owners(rows, records, x.device)
    if mask:
        place = tag_of(picks[0])
        aligned = isinstance(place, Rows) and place.axis == rows.axis - first and place.same_owners(rows)
        if place is not None and not aligned and records != 1:
            return Coupled("getitem")
        chosen = from_owner(first, owner[picks[0].nonzero()[:, rows.axis - first]], records)
        return (
            chosen if place is None or records == 1 else replace(chosen, arranged=True)
        )  # where one lies, others decide
    pick = picks[rows.axis - first]
    if not isinstance(tag_of(pick), Rows | None) and records != 1:
        return Coupled("getitem")  # a record chose whose row it reads
    # Each position of the broadcast index is one row; its owner must vary along a single axis.
    shape = torch.broadcast_shapes(*[p.shape for p in picks])
    full = owner[pick].expand(shape)
    for k in range(len(shape)):
        vector = full.movedim(k, 0).reshape(shape[k], full.numel() // max(1, shape[k]) or 1)
        if bool((vector == vector[:, :1]).all()):
            found = vector[:, 0].contiguous() if vector.shape[1] else vector.new_zeros(shape[k])
            if records != 1 and not _agree(tag_of, records, picks, len(shape), k, found):
                return Coupled("getitem")
            return from_owner(first + k, found, records)
    return Coupled("getitem")


def _agree(
    tag_of: Callable[[object], Tag | None], records: int, picks: list[Tensor], ndim: int, axis: int, owner: Tensor
) -> bool:
    """Index tensors that carry records must belong to the records whose rows they pick."""
    for p in picks:
        tag = tag_of(p)
        if tag is None:
            continue
        if not isinstance(tag, Rows) or tag.axis + ndim - p.dim() != axis:
            return False
        if not torch.equal(owners(tag, records, owner.device), owner):
            return False
    return True
