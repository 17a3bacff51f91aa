"""Looking up, joining and writing: embedding, indexing, cat, stack, assignment."""

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from torch import Tensor
from torch.nn import functional as F

from sfumato.errors import CoupledRecords, UnsupportedError
from sfumato.ghost import copies
from sfumato.ghost.functions import EmbeddingFn
from sfumato.ghost.rows import Rows, Unknown, owners
from sfumato.ghost.rules.table import SCREENS, NoRule, rule

if TYPE_CHECKING:
    from sfumato.ghost.capture import Capture


@rule("embedding")
def embedding(
    c: "Capture",
    input: Tensor,
    weight: Tensor,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Tensor:
    if max_norm is not None:
        raise UnsupportedError(
            f"Embedding with max_norm={max_norm} rewrites rows that the records use, without noise.",
            where=c.where(),
            fix="drop max_norm.",
        )
    if scale_grad_by_freq:
        raise CoupledRecords(
            "Embedding with scale_grad_by_freq=True scales one record's gradient by how often others use the word.",
            where=c.where(),
            fix="drop scale_grad_by_freq.",
        )
    rows = c.tag(input)
    if not isinstance(rows, Rows) or c.target(weight) is None:
        raise NoRule("embedding", "the index carries no record axis")
    pad = None if padding_idx is None or padding_idx < -weight.shape[0] else padding_idx % weight.shape[0]
    use = c.use(rows, weight, None)
    out: Tensor = EmbeddingFn.apply(input, weight.detach(), c.tape.anchor, pad, use)  # type: ignore[no-untyped-call]
    return c.tagged(out, rows)


def _screen_embedding_bag(
    c: "Capture",
    input: Tensor,
    weight: Tensor,
    offsets: Tensor | None = None,
    max_norm: float | None = None,
    norm_type: float = 2,
    scale_grad_by_freq: bool = False,
    *rest: Any,
    **named: Any,
) -> None:
    if max_norm is not None or scale_grad_by_freq:
        raise CoupledRecords(
            "EmbeddingBag with max_norm or scale_grad_by_freq lets the records of a batch act on each other's rows.",
            where=c.where(),
            fix="drop max_norm and scale_grad_by_freq.",
        )
    if offsets is not None and any(isinstance(c.tag(t), Unknown) for t in (input, offsets)):
        _refuse_flat_bags(c, input)


def _refuse_flat_bags(c: "Capture", input: Tensor) -> NoReturn:
    raise UnsupportedError(
        f"EmbeddingBag got {tuple(input.shape)} words of all records in one row with offsets, so it cannot be proven "
        "whose word each is.",
        found=tuple(input.shape),
        where=c.where(),
        fix="pass a 2-D input, one padded row for each record, and padding_idx=.",
    )


SCREENS["embedding_bag"] = _screen_embedding_bag


@rule("embedding_bag")
def embedding_bag(
    c: "Capture",
    input: Tensor,
    weight: Tensor,
    offsets: Tensor | None = None,
    max_norm: float | None = None,
    norm_type: float = 2,
    scale_grad_by_freq: bool = False,
    mode: str = "mean",
    sparse: bool = False,
    per_sample_weights: Tensor | None = None,
    include_last_offset: bool = False,
    padding_idx: int | None = None,
) -> Tensor:
    if per_sample_weights is not None and mode != "sum":
        raise NotImplementedError(f"per_sample_weights is only supported for mode='sum' (got mode='{mode}').")
    real = None
    if offsets is not None:
        place, real = _padded_bags(c, input, offsets, include_last_offset)
        input, per_sample_weights = _in_bags(c, input, place, real), _in_bags(c, per_sample_weights, place, real)
    if padding_idx is not None:
        word = c.call(torch.ne, input, padding_idx % weight.shape[0])
        real = word if real is None else c.call(torch.logical_and, word, real)
    words = c.call(F.embedding, input, weight)
    if per_sample_weights is not None:
        words = c.call(torch.mul, words, c.call(Tensor.unsqueeze, per_sample_weights, -1))
    return _bagged(c, words, mode, None if real is None else c.call(Tensor.unsqueeze, real, -1))


def _bagged(c: "Capture", words: Tensor, mode: str, real: Tensor | None) -> Tensor:
    """(B, T, d) to (B, d) over the words that are ``real``; zero where there is none."""
    if words.shape[1] == 0:
        return c.call(torch.sum, words, 1)
    empty = words.new_tensor(-math.inf if mode == "max" else 0)
    kept = words if real is None else c.call(torch.where, real, words, empty)
    out: Tensor = c.call(torch.max, kept, 1)[0] if mode == "max" else c.call(torch.sum, kept, 1)
    if mode == "mean":
        count = words.shape[1] if real is None else c.call(Tensor.clamp_min, c.call(torch.sum, real, 1), 1)
        out = c.call(torch.div, out, count)
    if mode == "max" and real is not None:
        out = c.call(torch.where, c.call(torch.any, real, 1), out, words.new_tensor(0))
    return out


def _padded_bags(c: "Capture", input: Tensor, offsets: Tensor, last: bool) -> tuple[Tensor, Tensor]:
    """Where the words of each bag are, (B, longest), and which of these places are real. Bag b is record b's."""
    ends = torch.cat([offsets[1:], offsets.new_tensor([] if last else [input.numel()])])
    starts, rows = offsets[: ends.numel()], c.tag(offsets)
    if ends.numel() != c.records or not (rows is None or (isinstance(rows, Rows) and rows.plain)):
        _refuse_flat_bags(c, input)
    lengths = (ends - starts)[:, None]
    steps = torch.arange(int(lengths.max()) if lengths.numel() else 0, device=input.device)
    real = steps < lengths
    return torch.where(real, starts[:, None] + steps, 0), real


def _in_bags(c: "Capture", flat: Any, place: Tensor, real: Tensor) -> Any:
    """Values of flat words bag by bag: of nobody in particular, or each of the record that its bag belongs to."""
    if flat is None:
        return None
    rows = c.tag(flat)
    if rows is None and c.target(flat) is not None:
        raise NoRule("embedding_bag", "learned weights of flat words")
    if rows is not None:
        owner = owners(rows, c.records, flat.device) if isinstance(rows, Rows) else None
        mine = torch.arange(c.records, device=flat.device)[:, None]
        if owner is None or not bool((~real | (owner[place] == mine)).all()):
            _refuse_flat_bags(c, flat)
    return c.tagged(flat[place] if flat.numel() else flat.new_zeros(place.shape), Rows(0))


@rule("getitem")
def getitem(c: "Capture", input: Tensor, index: Any) -> Tensor:
    """Entries of a parameter that the records choose: consecutive index tensors are one lookup."""
    items = index if isinstance(index, tuple) else (index,)
    picks = [k for k, i in enumerate(items) if isinstance(i, Tensor)]
    rest = [i for k, i in enumerate(items) if k not in picks]
    chosen = [items[k] for k in picks]
    plain = all(isinstance(i, slice) and i == slice(None) for i in rest) and picks == list(
        range(picks[0], picks[0] + len(picks))
    )
    whole = all(t.dtype in (torch.long, torch.int32) and c.target(t) is None for t in chosen)
    if not plain or not whole or c.target(input) is None or c.tag(input) is not None:
        raise NoRule("getitem", "a parameter indexed by records")
    first, count = picks[0], len(picks)
    source, front = tuple(picks), tuple(range(count))
    table = input if first == 0 else c.derive("movedim", input, source, front)
    sizes = table.shape[:count]
    flat = _counted_from_zero(c, chosen[0], sizes[0])
    for pick, size in zip(chosen[1:], sizes[1:], strict=True):
        flat = c.call(torch.add, c.call(torch.mul, flat, size), _counted_from_zero(c, pick, size))
    rows = table if table.dim() == 2 and count == 1 else c.derive("reshape", table, math.prod(sizes), -1)
    out: Tensor = embedding(c, flat, rows)
    if rows is not table:
        out = c.call(Tensor.reshape, out, (*flat.shape, *table.shape[count:]))
    width = flat.dim()
    moved = tuple(range(first, first + width))
    return out if first == 0 else c.call(Tensor.movedim, out, tuple(range(width)), moved)


def _counted_from_zero(c: "Capture", index: Tensor, size: int) -> Tensor:
    if index.numel() and int(index.min()) < 0:
        index = c.call(torch.where, c.call(torch.lt, index, 0), c.call(torch.add, index, size), index)
    return index


@rule("gather", "take_along_dim")
def gather(c: "Capture", input: Tensor, dim: int, index: Tensor, **options: Any) -> Tensor:
    rows = c.tag(index)
    if c.target(input) is None or not isinstance(rows, Rows) or input.dim() != index.dim() or dim is None:
        raise NoRule("gather", "the records choose in no axis of their own")
    if input.shape[rows.axis] != index.shape[rows.axis] or dim % input.dim() == rows.axis:
        raise NoRule("gather", "the records choose in no axis of their own")
    out: Tensor = c.call(torch.gather, copies.as_rows(c, input, rows), dim, index)
    return out


@rule("setitem")
def setitem(c: "Capture", input: Tensor, index: Any, value: Tensor) -> None:
    if c.target(input) is not None:
        raise NoRule("setitem", "records written into a parameter")
    region = c.call(Tensor.__getitem__, input, index)
    rows = c.tag(region)
    if not isinstance(rows, Rows):
        raise NoRule("setitem", "the region written to carries no record axis")
    Tensor.__setitem__(input, index, copies.align(c, value, rows, region.dim()))


@rule("cat", "concat", "concatenate")
def cat(c: "Capture", tensors: Sequence[Tensor], dim: int = 0, *, axis: int | None = None) -> Tensor:
    return _joined(c, torch.cat, tensors, dim if axis is None else axis)


@rule("stack")
def stack(c: "Capture", tensors: Sequence[Tensor], dim: int = 0) -> Tensor:
    return _joined(c, torch.stack, tensors, dim)


def _joined(c: "Capture", op: Callable[..., Tensor], parts: Sequence[Tensor], dim: int) -> Tensor:
    rows = [r for p in parts if isinstance(r := c.tag(p), Rows)]
    if not rows or any(r.axis != rows[0].axis or not r.same_owners(rows[0]) for r in rows):
        raise NoRule("cat", "records on no axis or on different ones")
    if op is torch.cat and dim % parts[0].dim() == rows[0].axis:
        raise NoRule("cat", "a parameter would become a record of its own")
    joined = [copies.as_rows(c, p, rows[0]) if c.target(p) is not None else p for p in parts]
    out: Tensor = c.call(op, joined, dim)
    return out
