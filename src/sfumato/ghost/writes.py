"""In-place writes: what they do to the tag of the tensor written, and to everything that shares its memory."""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sfumato.ghost import indexing, landing
from sfumato.ghost.propagation import routing
from sfumato.ghost.rows import Coupled, Order, Pointer, Reduced, Rows, Tag, Unknown

if TYPE_CHECKING:
    from sfumato.ghost.capture import Capture


def storage(tensor: Tensor) -> int:
    """The memory that a tensor looks at; what has none (empty tensors are all at address 0) shares it with nobody."""
    address = tensor.untyped_storage().data_ptr() if tensor.layout == torch.strided and not tensor.is_meta else 0
    return address or -id(tensor)


def place(tensor: Tensor) -> tuple[object, ...]:
    """Where in which memory, and how: equal for two objects that are the same tensor."""
    return (
        (storage(tensor), tensor.storage_offset(), tensor.shape, tensor.stride())
        if not tensor.is_meta
        else (id(tensor),)
    )


def same(a: Tag | None, b: Tag | None) -> bool:
    """Whether both carry the same records on the same axis, or both say where they lie."""
    if isinstance(a, Order) and isinstance(b, Order):
        return True
    return isinstance(a, Rows) and isinstance(b, Rows) and a.axis == b.axis and a.same_owners(b)


def written_by(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    """The tensor that an operation writes into, if any."""
    out = kwargs.get("out")
    if isinstance(out, Tensor):
        return out
    in_place = name == "__set__" or name == "__setitem__" or (name.endswith("_") and not name.startswith("__"))
    if (in_place or (name.startswith("__i") and name not in ("__invert__", "__index__", "__int__"))) and args:
        return args[0] if isinstance(args[0], Tensor) else None
    return None


def taint(c: "Capture", written: Tensor, after: Tag | None) -> None:
    """What else looks at this storage has changed without an operation of its own."""
    memory = storage(written)
    if written.layout == torch.strided:
        c.tape.held.append(written.untyped_storage())  # freed, its address would taint whatever comes to lie there
    mixed = isinstance(after, (Coupled, Reduced))
    c.tainted[memory] = (Coupled if mixed else Unknown)("a write through another view")
    for key, (ref, _) in list(c.tags.items()):
        other = ref()
        if other is not None and other is not written and storage(other) == memory:
            c.tags[key] = (ref, c.tainted[memory])


def after_setitem(c: "Capture", x: Tensor, index: Any, value: Any) -> Tag:
    """The tag of x after x[index] = value."""
    after = _after_setitem(c, x, index, value)
    if c.records == 1 or not isinstance(after, Rows):
        return after
    chosen = any(c.tag(t) is not None for t in indexing.tensors((index,)))
    constants = [t for t in (x, value) if isinstance(t, Tensor) and c.tag(t) is None]
    if chosen and any(t is value and t.dim() and not routing.indifferent(t, t.shape[0]) for t in constants):
        return Coupled("setitem")  # which of these constants a record gets is a matter of how many come before it
    if not after.arranged:
        return after
    # A constant may not tell places of rows apart that the batch arranged, nor may where it is written.
    if not chosen:
        region = torch.zeros(x.shape, dtype=torch.bool, device=x.device)
        region[index] = True
        constants.append(region)
    return after if all(routing.indifferent(t, x.shape[after.axis]) for t in constants) else Coupled("setitem")


def _after_setitem(c: "Capture", x: Tensor, index: Any, value: Any) -> Tag:
    own, tag = c.tag(x), c.tag(value)
    items = index if isinstance(index, tuple) else (index,)
    picks = [t for t in indexing.tensors(items) if c.tag(t) is not None]
    if any(isinstance(c.tag(t), Pointer) for t in picks):
        dim = len(items) - 1
        alone = len(picks) == 1 and picks[0] is items[-1] and items[:-1] == (slice(None),) * dim
        return routing.place(c.tag, c.records, x, dim, picks[0], value) if alone else Coupled("setitem")
    if picks and (put := landing.after_put(c, x, items, value)) is not None:
        return put
    masks = len(picks) == len(items) == 1 and picks[0] is items[0] and picks[0].dtype == torch.bool
    if masks and own is None and isinstance(by := c.tag(picks[0]), Rows):
        own = by  # a constant written where records say so: its rows lie as those of the mask
    if own is not None and tag is None:
        aligned = all(t.dtype == torch.bool and same(c.tag(t), own) for t in picks)
        return own if aligned else Unknown("setitem")
    if picks and not (masks and same(c.tag(picks[0]), own)):
        return Unknown("setitem")
    probe = torch.zeros((), device=x.device).expand(x.shape)
    if own is not None:
        c.set_tag(probe, own)
    region = c.call(Tensor.__getitem__, probe, index) if own is not None else probe[index]
    if not isinstance(tag, Rows):
        return tag if isinstance(tag, Unknown) else Coupled("setitem")
    if own is not None:
        place = c.tag(region)
        aligned = same(place, tag.at(tag.axis + region.dim() - value.dim()))
        return own if aligned or c.records == 1 else Coupled("setitem")
    if any(i is None or isinstance(i, (Tensor, list)) for i in items):
        return Unknown("setitem")
    if Ellipsis in items:
        at = items.index(Ellipsis)
        items = (*items[:at], *[slice(None)] * (x.dim() - len(items) + 1), *items[at + 1 :])
    kept = [k for k in range(x.dim()) if k >= len(items) or isinstance(items[k], slice)]
    axis = kept[tag.axis + region.dim() - value.dim()]
    return tag.at(axis) if x.shape[axis] == value.shape[tag.axis] else Unknown("setitem")
