"""Where the records are after an operation that touches no parameter.

About twenty shape and index rules, a few reductions and contractions, and one pointwise default. An operation that
is not in a table gives ``Unknown``: harmless until it reaches a parameter, where it sends the model down the
fallback ladder instead of being guessed.
"""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from sfumato.ghost import indexing
from sfumato.ghost.propagation import contractions, reductions, shapes
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
from sfumato.ghost.rows import Coupled, Reduced, Rows, Tag, Unknown

__all__ = ["clean", "is_pointwise", "propagate"]


def propagate(
    name: str, tag_of: Lookup, records: int, args: Args, kwargs: Kwargs, out: Any
) -> list[tuple[Tensor, Tag]]:
    """Tags of the output tensors of ``name(*args, **kwargs) -> out``."""
    base = clean(name)
    tensors = list(indexing.tensors(args, kwargs))
    tags = [(t, tag) for t in tensors if (tag := tag_of(t)) is not None]
    if base in LIKE:  # new values of a known shape, unless a record says which
        filled = any(t is not tensors[0] for t, _ in tags)
        return _assign(out, Coupled(base)) if filled else []
    if not tags:
        return []
    blurred = [tag for _, tag in tags if not isinstance(tag, Rows)]
    if blurred:
        result: Any = _blur(base, tags, args)
    elif base in _RULES:
        result = _RULES[base](base, tag_of, records, args, kwargs, out)
    elif is_pointwise(base):
        result = pointwise(base, tags, records, out)
    else:
        result = Unknown(base)
    return _assign(out, result)


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


def _blur(name: str, tags: Sequence[tuple[Tensor, Tag]], args: Args) -> Tag:
    """A value that has lost its record axis: a sum of sums is one, and so is its multiple; all else is a mixture."""
    for kind in (Coupled, Unknown):
        for _, tag in tags:
            if isinstance(tag, kind):
                return tag
    if not all(isinstance(tag, Reduced) for _, tag in tags):
        return Coupled(name)
    scaled = len(tags) == 1 and name in SCALINGS and (name in SCALES_EITHER or args[0] is tags[0][0])
    return tags[0][1] if name in SUMMING or scaled else Coupled(name)


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
    **_table(reductions.reduce, "median count_nonzero var_mean std_mean"),
    **_table(
        reductions.along, "softmax log_softmax softmin cumsum cumprod sort argsort topk flip roll normalize glu renorm"
    ),
    **_table(reductions.along, "cosine_similarity gumbel_softmax logcumsumexp cummax"),
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
    **_table(shapes.pad, "pad"),
    **_table(shapes.pieces, "split chunk unbind narrow select tensor_split split_with_sizes"),
    **_table(shapes.cat, "cat concat concatenate stack hstack vstack dstack"),
    **_table(shapes.repeat, "repeat tile repeat_interleave"),
    **_table(contractions.matmul, "matmul rmatmul bmm mm mv"),
    **_table(contractions.einsum, "einsum"),
    **_table(reductions.loss, "cross_entropy nll_loss " + " ".join(ELEMENTWISE_LOSS)),
    **_table(reductions.norm_layer, "layer_norm rms_norm group_norm instance_norm batch_norm"),
    **_table(contractions.frozen_linear, "linear"),
    **_table(contractions.attention, "scaled_dot_product_attention"),
    **_table(contractions.embedding, "embedding one_hot"),
    **_table(shapes.getitem, "getitem"),
    **_table(shapes.gather, "gather take_along_dim index_select"),
    **_table(shapes.triangle, "tril triu"),
}
