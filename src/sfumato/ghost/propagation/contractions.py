"""Matrix products, einsum, attention, and layers with constant weights."""

from typing import Any

from torch import Tensor

from sfumato.ghost import indexing
from sfumato.ghost.propagation import routing
from sfumato.ghost.propagation.names import Args, Kwargs, Lookup
from sfumato.ghost.propagation.reductions import pointwise
from sfumato.ghost.rows import Coupled, Reduced, Rows, Tag, Unknown


def matmul(name: str, tag_of: Lookup, records: int, args: Args, kwargs: Kwargs, out: Any) -> Tag:
    a: Any = args[0]
    b: Any = args[1] if len(args) > 1 else next((kwargs[k] for k in ("other", "mat2", "vec") if k in kwargs), None)
    if name == "rmatmul":
        a, b = b, a
    return contraction(name, a, tag_of(a), b, tag_of(b), records, out)


def added(
    name: str,
    tag_of: Lookup,
    records: int,
    args: Args,
    kwargs: Kwargs,
    out: Any,
) -> Tag:
    """addmm and its like: a product, then a sum."""
    named = [kwargs.get(k) for k in ("input", "mat1", "batch1", "vec", "mat2", "batch2")]
    operands = [t for t in (*args, *named) if isinstance(t, Tensor)]
    if len(operands) != 3 or (name == "addmv" and "vec" in kwargs):
        return Unknown(name)
    addend, a, b = operands
    own = tag_of(addend)
    if tag_of(a) is None and tag_of(b) is None:
        return pointwise(name, [(addend, own)], records, out) if own is not None else Unknown(name)
    product = contraction(name, a, tag_of(a), b, tag_of(b), records, out)
    return product if own is None else pointwise(name, [(addend, own), (out, product)], records, out)


def contraction(name: str, a: Tensor, ta: Tag | None, b: Tensor, tb: Tag | None, records: int, out: Tensor) -> Tag:
    """The record axis of a @ b."""
    places: list[Rows] = []
    if isinstance(ta, Rows):
        if ta.axis == a.dim() - 1:
            return Coupled(name)
        lost = 1 if b.dim() == 1 else 0
        places.append(ta.at(out.dim() + lost - (a.dim() - ta.axis)))
    if isinstance(tb, Rows):
        if tb.axis == max(b.dim() - 2, 0):
            return Coupled(name)
        lost = 1 if a.dim() == 1 else 0
        from_right = b.dim() - tb.axis
        places.append(tb.at(out.dim() - from_right + (lost if from_right > 1 else 0)))
    if len(places) == 2 and (places[0].axis != places[1].axis or not places[0].same_owners(places[1])):
        return Coupled(name) if records != 1 else places[0]
    return places[0]


def einsum(name: str, tag_of: Lookup, records: int, args: Args, kwargs: Kwargs, out: Any) -> Tag:
    parsed = indexing.einsum_letters(args)
    if parsed is None:
        return Unknown(name)
    inputs, output, operands = parsed
    found = [(spec[r.axis], r) for spec, x in zip(inputs, operands, strict=True) if isinstance(r := tag_of(x), Rows)]
    letter, rows = found[0]
    if rows.arranged and any(spec.count(letter) > 1 for spec in inputs):
        return Coupled(name)  # a diagonal: the place of a row among others
    if records != 1 and any(other != letter or not r.same_owners(rows) for other, r in found):
        return Coupled(name)
    return rows.at(output.index(letter)) if letter in output else Reduced(name)


def frozen_linear(name: str, tag_of: Lookup, records: int, args: Args, kwargs: Kwargs, out: Any) -> Tag:
    """linear with a constant weight."""
    x = args[0] if args else kwargs["input"]
    rows = tag_of(x)
    tagged = [t for t in indexing.tensors(args, kwargs) if tag_of(t) is not None]
    bias = args[2] if len(args) > 2 else kwargs.get("bias")
    if isinstance(rows, Rows) and rows.axis < x.dim() - 1 and len(tagged) == 1:
        by_place = rows.arranged and bias is not None and not routing.steady(bias, rows, out.dim())
        return Coupled(name) if by_place else rows
    return Coupled(name)


def attention(name: str, tag_of: Lookup, records: int, args: Args, kwargs: Kwargs, out: Any) -> Tag:
    operands = [*args[:4], *(kwargs.get(k) for k in ("query", "key", "value", "attn_mask"))]
    tags = [(t, tag) for t in operands if isinstance(t, Tensor) and (tag := tag_of(t)) is not None]
    found = pointwise(name, [(t, tag) for t, tag in tags], records, out)
    return found if isinstance(found, Rows) and found.axis < out.dim() - 2 else Coupled(name)


def leading(name: str, tag_of: Lookup, records: int, args: Args, kwargs: Kwargs, out: Any) -> Tag:
    """Image operations: the leading axis is untouched."""
    x = args[0] if args else kwargs["input"]
    rows = tag_of(x)
    if name == "unfold" and out.dim() == x.dim() + 1:  # Tensor.unfold: windows along one dim
        dim = (args[1] if len(args) > 1 else kwargs["dimension"]) % x.dim()
        return rows if isinstance(rows, Rows) and dim != rows.axis else Coupled(name)
    batched = {"unfold": 4, "fold": 3, "pixel_shuffle": 4, "pixel_unshuffle": 4, "channel_shuffle": 4}.get(name, 0)
    if name.startswith("conv"):
        batched = (args[1] if len(args) > 1 else kwargs["weight"]).dim()
    if x.dim() < batched:  # an unbatched image: what looks like records are its channels
        return Coupled(name)
    others = [t for t in indexing.tensors(args[1:], kwargs) if tag_of(t) is not None]
    if isinstance(rows, Rows) and rows.axis == 0 and not others:
        return rows
    return Unknown(name)


def embedding(name: str, tag_of: Lookup, records: int, args: Args, kwargs: Kwargs, out: Any) -> Tag:
    """Rows of a constant table; also one_hot."""
    index = args[0] if args else kwargs["input"]
    rows = tag_of(index)
    if len(list(indexing.tensors(args, kwargs))) > 1 and any(
        tag_of(t) for t in indexing.tensors(args[1:], kwargs) if t is not index
    ):
        return Coupled(name)  # the table itself holds records
    return rows if isinstance(rows, Rows) else Unknown(name)
