"""Attention: torch's own steps, each run under the capture, so that the rules of linear maps do the work."""

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional as F

from sfumato.errors import CoupledRecords
from sfumato.ghost import copies, indexing
from sfumato.ghost.rows import Rows
from sfumato.ghost.rules.elementwise import broadcast
from sfumato.ghost.rules.table import NoRule, rule

if TYPE_CHECKING:
    from sfumato.ghost.capture import Capture


@rule("scaled_dot_product_attention")
def scaled_dot_product_attention(c: "Capture", *args: Any, **kwargs: Any) -> Tensor:
    """Parameters among queries, keys, values and mask get one copy for each record."""
    operands = list(indexing.tensors(args, kwargs))
    ndim = max(t.dim() for t in operands)
    if any(isinstance(r := c.tag(t), Rows) and r.axis + ndim - t.dim() >= ndim - 2 for t in operands):
        raise CoupledRecords("attention among the records of the batch mixes them.", where=c.where())
    out: Tensor = broadcast(c, "scaled_dot_product_attention", F.scaled_dot_product_attention, args, kwargs)
    return out


@rule("multi_head_attention_forward")
def multi_head_attention_forward(
    c: "Capture",
    query: Tensor,
    key: Tensor,
    value: Tensor,
    embed_dim_to_check: int,
    num_heads: int,
    in_proj_weight: Tensor | None,
    in_proj_bias: Tensor | None,
    bias_k: Tensor | None,
    bias_v: Tensor | None,
    add_zero_attn: bool,
    dropout_p: float,
    out_proj_weight: Tensor,
    out_proj_bias: Tensor | None,
    training: bool = True,
    key_padding_mask: Tensor | None = None,
    need_weights: bool = True,
    attn_mask: Tensor | None = None,
    use_separate_proj_weight: bool = False,
    q_proj_weight: Tensor | None = None,
    k_proj_weight: Tensor | None = None,
    v_proj_weight: Tensor | None = None,
    static_k: Tensor | None = None,
    static_v: Tensor | None = None,
    average_attn_weights: bool = True,
    is_causal: bool = False,
) -> tuple[Tensor, Tensor | None]:
    query, key, value = _aligned(c, query, key, value)
    if static_k is not None or static_v is not None:
        raise NoRule("multi_head_attention_forward", "static_k or static_v")
    if is_causal and attn_mask is None:
        raise RuntimeError("Need attn_mask if specifying the is_causal hint.")
    hint = is_causal and key_padding_mask is None and not need_weights
    if hint:
        attn_mask = None
    separate = (q_proj_weight, k_proj_weight, v_proj_weight) if use_separate_proj_weight else None
    q, k, v = _projected(c, (query, key, value), in_proj_weight, in_proj_bias, separate)
    batch = max(q.shape[0], k.shape[0])
    k, v = _with_bias(c, k, bias_k, batch), _with_bias(c, v, bias_v, batch)
    q, k, v = (_heads(c, t, num_heads) for t in (q, k, v))
    if add_zero_attn:
        k, v = (c.call(F.pad, t, (0, 0, 0, 1)) for t in (k, v))
    grown = (bias_k is not None) + add_zero_attn
    mask = _merged_mask(c, attn_mask, key_padding_mask, q.dtype, batch, num_heads, grown)
    drop = dropout_p if training else 0.0
    weights = None
    if need_weights:
        weights = _weights(c, q, k, mask)
        weights = c.call(F.dropout, weights, drop) if drop > 0 else weights
        heard = c.call(torch.matmul, weights, v)
        weights = c.call(torch.mean, weights, 1) if average_attn_weights else weights
    else:
        heard = c.call(F.scaled_dot_product_attention, q, k, v, mask, drop, hint)
    joined = c.call(Tensor.flatten, c.call(Tensor.transpose, heard, 1, 2), 2)
    out = c.call(F.linear, joined, out_proj_weight, out_proj_bias)
    # In memory as torch lays it out, so that a dropout that follows draws the same masks from the same seed.
    return c.call(Tensor.contiguous, c.call(Tensor.transpose, out, 0, 1)), weights


def _aligned(c: "Capture", *inputs: Tensor) -> list[Tensor]:
    """(T, B, d), records on axis 1; learned tensors among them become rows of the records."""
    for x in inputs:
        if x.dim() != 3:
            raise NoRule("multi_head_attention_forward", "an input without a batch axis")
        if isinstance(rows := c.tag(x), Rows) and rows.axis != 1:
            raise CoupledRecords(
                f"Attention along axis {rows.axis} of a {tuple(x.shape)} input, which holds the records, mixes them.",
                where=c.where(),
                fix="pass batch_first=True, or transpose the input to (T, B, d).",
            )
    found = next((r for x in inputs if isinstance(r := c.tag(x), Rows)), None)
    if found is None:
        return list(inputs)
    ready = {
        id(x): copies.align(c, x, found, 3) for x in inputs
    }  # the same tensor stays the same: it is projected once
    return [ready[id(x)] for x in inputs]


def _projected(
    c: "Capture",
    inputs: tuple[Tensor, Tensor, Tensor],
    packed: Tensor | None,
    bias: Tensor | None,
    separate: tuple[Tensor | None, ...] | None,
) -> list[Tensor]:
    """Queries, keys and values, (B, T, d): one product for self-attention, no slice of the weight."""
    query, key, value = inputs
    x, y, z = (c.call(Tensor.transpose, t, 0, 1) for t in inputs)
    if separate is None and key is value and query is key:
        return list(c.call(Tensor.chunk, c.call(F.linear, x, packed, bias), 3, -1))
    if separate is None and key is value:
        width = query.shape[-1]
        weights = c.call(Tensor.split, packed, [width, 2 * width])
        biases = (None, None) if bias is None else c.call(Tensor.split, bias, [width, 2 * width])
        return [
            c.call(F.linear, x, weights[0], biases[0]),
            *c.call(Tensor.chunk, c.call(F.linear, y, weights[1], biases[1]), 2, -1),
        ]
    parts = c.call(Tensor.chunk, packed, 3) if separate is None else separate
    biases = (None,) * 3 if bias is None else c.call(Tensor.chunk, bias, 3)
    return [c.call(F.linear, t, w, b) for t, w, b in zip((x, y, z), parts, biases, strict=True)]


def _with_bias(c: "Capture", x: Tensor, extra: Tensor | None, batch: int) -> Tensor:
    """x with one more position, the same learned one for every record."""
    if extra is None:
        return x
    joined: Tensor = c.call(torch.cat, [x, c.call(Tensor.expand, extra, batch, 1, -1)], 1)
    return joined


def _heads(c: "Capture", x: Tensor, heads: int) -> Tensor:
    """(B, T, d) to (B, heads, T, d / heads)."""
    split = c.call(Tensor.unflatten, x, -1, (heads, x.shape[-1] // heads))
    out: Tensor = c.call(Tensor.transpose, split, 1, 2)
    return out


def _merged_mask(
    c: "Capture",
    attention: Tensor | None,
    padding: Tensor | None,
    dtype: torch.dtype,
    batch: int,
    heads: int,
    grown: int,
) -> Tensor | None:
    """Both masks as one that is added to the scores; learned and zero positions are open to everybody."""
    parts = []
    if attention is not None:
        mask = _additive(c, attention, dtype)
        parts.append(mask if mask.dim() == 2 else c.call(Tensor.reshape, mask, batch, heads, *mask.shape[1:]))
    if padding is not None:
        mask = _additive(c, padding, dtype)
        parts.append(c.call(Tensor.reshape, mask, mask.shape[0], 1, 1, mask.shape[1]))
    if not parts:
        return None
    merged: Tensor = parts[0] if len(parts) == 1 else c.call(torch.add, parts[0], parts[1])
    return c.call(F.pad, merged, (0, grown)) if grown else merged


def _additive(c: "Capture", mask: Tensor, dtype: torch.dtype) -> Tensor:
    if mask.dtype != torch.bool:
        return mask
    closed, opened = torch.tensor(-math.inf, dtype=dtype), torch.tensor(0, dtype=dtype)
    out: Tensor = c.call(torch.where, mask, closed.to(mask.device), opened.to(mask.device))
    return out


def _weights(c: "Capture", q: Tensor, k: Tensor, mask: Tensor | None) -> Tensor:
    scaled = c.call(torch.mul, q, math.sqrt(1.0 / q.shape[-1]))
    scores = c.call(torch.matmul, scaled, c.call(Tensor.transpose, k, -2, -1))
    out: Tensor = c.call(F.softmax, scores if mask is None else c.call(torch.add, scores, mask), -1)
    return out
