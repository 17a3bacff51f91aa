"""Looking up, joining and writing: embedding, indexing, cat, stack, assignment."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sfumato.errors import CoupledRecords, UnsupportedError
from sfumato.ghost.functions import EmbeddingFn
from sfumato.ghost.rows import Rows
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


SCREENS["embedding_bag"] = _screen_embedding_bag


@rule("getitem")
def getitem(c: "Capture", input: Tensor, index: Any) -> Tensor:
    if isinstance(index, Tensor) and index.dtype == torch.long and input.dim() == 2 and c.tag(input) is None:
        return embedding(c, index, input)
    raise NoRule("getitem", "a parameter indexed by records")


@rule("setitem")
def setitem(c: "Capture", input: Tensor, index: Any, value: Tensor) -> None:
    if c.target(input) is not None:
        raise NoRule("setitem", "records written into a parameter")
    region = c.call(Tensor.__getitem__, input, index)
    rows = c.tag(region)
    if not isinstance(rows, Rows):
        raise NoRule("setitem", "the region written to carries no record axis")
    Tensor.__setitem__(input, index, c.align(value, rows, region.dim()))


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
    joined = [c.as_rows(p, rows[0]) if c.target(p) is not None else p for p in parts]
    out: Tensor = c.call(op, joined, dim)
    return out
