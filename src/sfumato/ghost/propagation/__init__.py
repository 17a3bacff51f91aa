"""Where the records are after an operation that touches no parameter.

About twenty shape and index rules, a few reductions and contractions, and one pointwise default. An operation that
is not in a table gives ``Unknown``: harmless until it reaches a parameter, where it sends the model down the
fallback ladder instead of being guessed.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from sfumato.ghost import indexing
from sfumato.ghost.propagation import batched, contractions, packing, recurrent, reductions, routing, shapes
from sfumato.ghost.propagation.names import (
    ELEMENTWISE_LOSS,
    LIKE,
    SCALES_EITHER,
    SCALINGS,
    SUMMING,
    Args,
    Kwargs,
    Lookup,
    Rule,
    clean,
    is_pointwise,
)
from sfumato.ghost.propagation.reductions import pointwise
from sfumato.ghost.rows import Coupled, Histogram, Order, Pointer, Reduced, Rows, Tag, Unknown, Verdict, Whole

__all__ = ["clean", "is_pointwise", "propagate"]


def propagate(
    name: str, tag_of: Lookup, records: int, args: Args, kwargs: Kwargs, out: Any
) -> list[tuple[Tensor, Tag]]:
    """Tags of the output tensors of ``name(*args, **kwargs) -> out``."""
    if not isinstance(out, (Tensor, tuple, list)):
        return []
    base = clean(name)
    tensors = list(indexing.tensors(args, kwargs))
    tags = [(t, tag) for t in tensors if (tag := tag_of(t)) is not None]
    if any(isinstance(tag, Order) for _, tag in tags) and all(isinstance(tag, (Rows, Order)) for _, tag in tags):
        follow = packing.TABLE.get(base) or (recurrent.frozen if _RULES.get(base) is recurrent.frozen else None)
        return _assign(out, follow(base, tag_of, records, args, kwargs, out) if follow else Coupled(base))
    if base in LIKE:  # new values of a known shape, unless a record says which
        filled = any(t is not tensors[0] for t, _ in tags)
        return _assign(out, Coupled(base)) if filled else []
    if not tags:
        return []
    if any(isinstance(tag, (Pointer, Histogram)) for _, tag in tags):
        return _assign(out, routing.follow(base, tag_of, records, args, kwargs, out))
    blurred = [tag for _, tag in tags if not isinstance(tag, Rows)]
    if blurred:
        result: Any = _blur(base, tags, args, kwargs, out)
    elif packing.sorts_lengths(base, *tags[0]):
        result = packing.sort(base, tag_of, records, args, kwargs, out)
    elif routing.creates(base, args, *tags[0]) and len(tags) == 1:
        x, rows = tags[0]
        return _assign(out, routing.create(base, x, rows, records, out))  # type: ignore[arg-type]
    elif base in _RULES:
        result = _RULES[base](base, tag_of, records, args, kwargs, out)
    elif is_pointwise(base):
        result = pointwise(base, tags, records, out)
    else:
        result = Unknown(base)
    if records != 1 and _RULES.get(base) not in _ARRANGING:
        for x, tag in tags:
            if isinstance(tag, Rows) and tag.arranged:
                constants = [t for t in tensors if tag_of(t) is None and t.dim() > 0]
                if base == "getitem":
                    constants = routing.indices(tag_of, args[0], args[1])
                result = _kept(base, packing.kept(result, tag), constants, x, tag, out)
                break
    return _assign(out, result)


def _kept(name: str, result: Any, constants: Sequence[Tensor], x: Tensor, rows: Rows, out: Any) -> Any:
    """``result`` on rows of x that the batch arranged, unless a constant tells one place among them from another."""
    if name in _UNALIGNED or isinstance(result, (Coupled, Unknown)):
        return result
    if isinstance(result, Rows) and (name in _ALIGNED or is_pointwise(name)):
        alike = all(routing.steady(t, result, out.dim()) for t in constants)
    else:
        alike = all(routing.indifferent(t, x.shape[rows.axis]) for t in constants)
    return result if alike else Coupled(name)


def _assign(out: Any, result: Any) -> list[tuple[Tensor, Tag]]:
    if isinstance(out, Tensor):
        return [(out, result)] if result is not None else []
    if isinstance(out, (tuple, list)):
        if isinstance(result, list):
            pairs = zip(out, result, strict=False)
        else:
            pairs = ((o, result) for o in out)  # type: ignore[assignment]
        return [(o, r) for o, r in pairs if isinstance(o, Tensor) and r is not None]
    return []


def _blur(name: str, tags: Sequence[tuple[Tensor, Tag]], args: Args, kwargs: Kwargs, out: Any) -> Tag:
    """A value that has lost its record axis: a sum of sums is one, and so is its multiple; all else is a mixture."""
    for kind in (Coupled, Unknown):
        for _, tag in tags:
            if isinstance(tag, kind):
                return tag
    verdicts = [tag for _, tag in tags if isinstance(tag, Verdict)]
    if verdicts:
        combine = _LOGIC.get(name) if len(verdicts) == len(tags) == len(args) else None
        return Verdict(name, combine(*(v.each for v in verdicts))) if combine else Coupled(name)
    if name in _COMPARE and len(args) == 2 and isinstance(tags[0][1], Reduced):
        return _counted(name, tags[0][1], args)
    if not all(isinstance(tag, Reduced) for _, tag in tags):
        return Coupled(name)
    scaled = len(tags) == 1 and name in SCALINGS and (name in SCALES_EITHER or args[0] is tags[0][0])
    exact = (
        not kwargs.get("rounding_mode") and isinstance(out, Tensor) and (out.is_floating_point() or out.is_complex())
    )
    return tags[0][1] if exact and (name in SUMMING or scaled) else Coupled(name)


def _counted(name: str, count: Reduced, args: Args) -> Tag:
    """``mask.sum() == mask.numel()`` and ``mask.sum() > 0`` are decisions that each record can take alone."""
    bound = args[1]
    whole = isinstance(bound, Whole) and bound == count.size
    if count.each is None or not (whole or (type(bound) is int and bound == 0)):
        return Coupled(name)
    return Verdict(name, _COMPARE[name](count.each, bound // max(1, count.each.numel())))


_ARRANGING = (packing.pack, packing.pad, recurrent.frozen, recurrent.frozen_cell)  # who look themselves
_COMPARE: dict[str, Callable[..., Tensor]] = {n: getattr(torch, n) for n in ("eq", "ne", "lt", "le", "gt", "ge")}
# Constants among their operands are weights: never aligned with the rows.
_UNALIGNED = set("linear layer_norm rms_norm group_norm instance_norm embedding conv1d conv2d conv3d".split())
_UNALIGNED |= {"broadcast_tensors", "index_select", "view_as", "reshape_as", "expand_as"}
# Broadcast from the right against the result.
_ALIGNED = set("gather take_along_dim scatter matmul rmatmul bmm mm mv addmm baddbmm max min diff cat concat".split())
_ALIGNED |= {"concatenate", "scaled_dot_product_attention"}
_LOGIC: dict[str, Callable[..., Tensor]] = {
    "logical_not": torch.logical_not,
    "invert": torch.logical_not,
    "bitwise_not": torch.logical_not,
    "logical_and": torch.logical_and,
    "and": torch.logical_and,
    "bitwise_and": torch.logical_and,
    "logical_or": torch.logical_or,
    "or": torch.logical_or,
    "bitwise_or": torch.logical_or,
}


def _table(rule: Rule, names: str) -> dict[str, Rule]:
    return dict.fromkeys(names.split(), rule)


_RULES: dict[str, Rule] = {
    **_table(shapes.view, "view reshape flatten unflatten squeeze unsqueeze ravel view_as reshape_as"),
    **_table(shapes.view, "expand expand_as broadcast_to"),
    **_table(shapes.permute, "permute transpose swapaxes swapdims t T mT H mH movedim moveaxis adjoint"),
    **_table(
        reductions.reduce,
        "sum mean nansum prod amax amin max min var std norm vector_norm logsumexp all any argmax argmin",
    ),
    **_table(reductions.reduce, "median count_nonzero var_mean std_mean nanmean linalg_vector_norm linalg_norm"),
    **_table(
        reductions.along, "softmax log_softmax softmin cumsum cumprod sort argsort topk flip roll normalize glu renorm"
    ),
    **_table(reductions.along, "gumbel_softmax logcumsumexp cummax"),
    **_table(reductions.cosine, "cosine_similarity"),
    **_table(
        contractions.leading,
        "max_pool1d max_pool2d max_pool3d avg_pool1d avg_pool2d avg_pool3d interpolate upsample unfold",
    ),
    **_table(
        contractions.leading, "adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d adaptive_max_pool1d fold"
    ),
    **_table(contractions.leading, "adaptive_max_pool2d adaptive_max_pool3d boolean_dispatch fn lp_pool2d"),
    **_table(
        contractions.leading, "conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d pixel_shuffle"
    ),
    **_table(contractions.leading, "max_pool2d_with_indices pixel_unshuffle local_response_norm channel_shuffle"),
    **batched.TABLE,
    **_table(reductions.diff, "diff"),
    **_table(shapes.pad, "pad"),
    **_table(shapes.pieces, "split chunk unbind narrow select tensor_split split_with_sizes"),
    **_table(shapes.cat, "cat concat concatenate stack hstack vstack dstack"),
    **_table(shapes.repeat, "repeat tile repeat_interleave"),
    **_table(contractions.matmul, "matmul rmatmul bmm mm mv"),
    **_table(contractions.added, "addmm baddbmm addmv"),
    **_table(contractions.einsum, "einsum"),
    **_table(reductions.loss, "cross_entropy nll_loss " + " ".join(ELEMENTWISE_LOSS)),
    **_table(reductions.norm_layer, "layer_norm rms_norm group_norm instance_norm batch_norm"),
    **_table(contractions.frozen_linear, "linear"),
    **_table(contractions.attention, "scaled_dot_product_attention"),
    **_table(contractions.embedding, "embedding one_hot"),
    **_table(shapes.getitem, "getitem"),
    **_table(shapes.gather, "gather take_along_dim index_select"),
    **_table(shapes.triangle, "tril triu"),
    **_table(packing.pack, "pack_padded_sequence"),
    **_table(packing.pad, "pad_packed_sequence"),
    **_table(recurrent.frozen, "lstm gru rnn_tanh rnn_relu"),
    **_table(recurrent.frozen_cell, "lstm_cell gru_cell rnn_tanh_cell rnn_relu_cell"),
}
