"""Where the records are after an operation that touches no parameter.

About twenty shape and index rules, a few reductions and contractions, and one pointwise default. An operation that
is not in a table gives ``Unknown``: harmless until it reaches a parameter, where it sends the model down the
fallback ladder instead of being guessed.
"""

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from sfumato.ghost import indexing
from sfumato.ghost.rows import Coupled, Reduced, Rows, Tag, Unknown, from_owner, owners, through_reshape

Lookup = Callable[[object], Tag | None]
Args = tuple[Any, ...]
Kwargs = dict[str, Any]
Rule = Callable[[str, Lookup, int, Args, Kwargs, Any], Any]

_LIKE = {"zeros_like", "ones_like", "empty_like", "full_like", "rand_like", "randn_like", "randint_like"}
_LIKE |= {"new_zeros", "new_ones", "new_empty", "new_full", "new_tensor"}
_POINTWISE = set(
    "dropout alpha_dropout relu relu6 gelu silu elu leaky_relu hardtanh mish softplus hardswish hardsigmoid logsigmoid "
    "celu selu rrelu softsign tanhshrink threshold softshrink hardshrink to type type_as float double half bfloat16 long int bool "
    "contiguous clone detach data real cpu cuda masked_fill where nan_to_num requires_grad_ bernoulli positive rsub "
    "float_power fill zero copy div truediv floordiv floor_divide mod remainder iadd isub imul itruediv ne eq lt gt le ge "
    "and or xor invert neg abs pow rpow rtruediv radd rmul clip multinomial_ normal_ uniform_ feature_alpha_dropout "
    "dropout1d dropout2d dropout3d".split()
)
_ELEMENTWISE_LOSS = set(
    "mse_loss l1_loss smooth_l1_loss huber_loss binary_cross_entropy binary_cross_entropy_with_logits kl_div "
    "poisson_nll_loss gaussian_nll_loss soft_margin_loss".split()
)
_LINEAR_POINTWISE = {"add", "sub", "rsub", "mul", "div", "truediv", "neg", "radd", "rmul", "iadd", "isub", "imul", "to"}
_LINEAR_POINTWISE |= {"float", "double", "clone", "detach", "contiguous", "itruediv", "where", "data"}


def clean(name: str) -> str:
    """``add_``, ``__radd__`` and ``add`` are one operation."""
    return name.strip("_")


@lru_cache(maxsize=None)
def is_pointwise(name: str) -> bool:
    """One output element depends on the aligned input elements only."""
    if name in _POINTWISE:
        return True
    packet = getattr(torch.ops.aten, name, None)
    if packet is None or not hasattr(packet, "overloads"):
        return False
    return any(torch.Tag.pointwise in getattr(packet, o).tags for o in packet.overloads())


def propagate(name: str, tag_of: Lookup, records: int, args: Args, kwargs: Kwargs, out: Any) -> list[tuple[Tensor, Tag]]:
    """Tags of the output tensors of ``name(*args, **kwargs) -> out``."""
    base = clean(name)
    tensors = list(indexing.tensors(args, kwargs))
    tags = [(t, tag) for t in tensors if (tag := tag_of(t)) is not None]
    if not tags or base in _LIKE:
        return []
    blurred = [tag for _, tag in tags if not isinstance(tag, Rows)]
    if blurred:
        result: Any = _blur(base, [tag for _, tag in tags])
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


def _blur(name: str, tags: Sequence[Tag]) -> Tag:
    """A value that has lost its record axis: sums of sums stay sums, anything else is a mixture."""
    for kind in (Coupled, Unknown):
        for tag in tags:
            if isinstance(tag, kind):
                return tag
    if all(isinstance(tag, Reduced) for tag in tags):
        return tags[0] if name in _LINEAR_POINTWISE or name in ("sum", "stack", "view", "reshape") else Coupled(name)
    return Coupled(name)


def pointwise(name: str, tags: Sequence[tuple[Tensor, Tag]], records: int, out: Any) -> Tag:
    """Operands are aligned from the right; their record axes must coincide."""
    shape = out.shape if isinstance(out, Tensor) else out[0].shape
    found: Rows | None = None
    for tensor, tag in tags:
        if not isinstance(tag, Rows):
            return Unknown(name)
        moved = tag.at(tag.axis + len(shape) - tensor.dim())
        if found is None:
            found = moved
        elif found.axis != moved.axis or not found.same_owners(moved):
            if records == 1:
                continue
            return Coupled(name)
    return found if found is not None else Unknown(name)


def _view(name: str, tag_of: Lookup, records: int, args: Args, kwargs: Kwargs, out: Any) -> Tag | None:
    x = args[0]
    rows = tag_of(x)
    if not isinstance(rows, Rows):  # view_as(const, tagged)
        return None
    if name in ("squeeze", "unsqueeze", "flatten", "unflatten", "view", "reshape", "ravel", "view_as", "reshape_as"):
        if x.shape == out.shape:
            return rows
        if name == "unsqueeze":
            dim = args[1] if len(args) > 1 else kwargs["dim"]
            dim = dim % out.dim()
            return rows.at(rows.axis + (dim <= rows.axis))
        if name == "squeeze" and x.shape[rows.axis] == 1:
            dims = indexing.dims_of(args[1:], kwargs, x.dim())
            gone = [d for d in range(x.dim()) if x.shape[d] == 1 and (dims is None or d in dims)]
            if rows.axis in gone:
                return Unknown(name)
            return rows.at(rows.axis - sum(d < rows.axis for d in gone))
        return through_reshape(rows, x.shape, out.shape, records)
    if name in ("expand", "expand_as", "broadcast_to"):
        return rows.at(rows.axis + out.dim() - x.dim())
    raise AssertionError(name)


def _permute(name: str, tag_of: Lookup, records: int, args: Args, kwargs: Kwargs, out: Any) -> Tag:
    """Permutations are read off a tensor that carries its own axis numbers."""
    x = args[0]
    rows = tag_of(x)
    if not isinstance(rows, Rows):
        return Unknown(name)
    order = indexing.permutation(name, x.dim(), args[1:], kwargs)
    return rows.at(order.index(rows.axis))


def _reduce(name: str, tag_of: Lookup, records: int, args: Args, kwargs: Kwargs, out: Any) -> Tag:
    x = args[0] if args else kwargs["input"]
    if len(args) > 1 and isinstance(args[1], Tensor):
        return pointwise(name, [(t, tag) for t in args[:2] if (tag := tag_of(t)) is not None], records, out)
    rows = tag_of(x)
    if not isinstance(rows, Rows):
        return Unknown(name)
    rest = args[2:] if name in ("norm", "vector_norm") else args[1:]
    dims = indexing.dims_of(rest, kwargs, x.dim())
    if dims is None or rows.axis in dims:
        return Reduced(name) if name in ("sum", "mean", "nansum") else Coupled(name)
    first = out if isinstance(out, Tensor) else out[0]
    if first.dim() == x.dim():
        return rows
    return rows.at(rows.axis - sum(d < rows.axis for d in dims))


def _along(name: str, tag_of: Lookup, records: int, args: Args, kwargs: Kwargs, out: Any) -> Tag:
    """Operations that keep the shape and work along one dim (softmax, cumsum, sort, flip)."""
    x = args[0] if args else kwargs["input"]
    rows = tag_of(x)
    if not isinstance(rows, Rows):
        return Unknown(name)
    default = {"sort": -1, "argsort": -1, "topk": -1, "glu": -1, "normalize": 1, "cosine_similarity": 1}.get(name)
    rest = args[2:] if name in ("topk", "normalize", "cosine_similarity", "gumbel_softmax", "roll", "renorm") else args[1:]
    dims = indexing.dims_of(rest, kwargs, x.dim())
    if dims is None and default is not None:
        dims = (default % x.dim(),)
    if dims is None or rows.axis in dims:
        return Coupled(name)
    return rows.at(rows.axis - (dims[0] < rows.axis)) if name == "cosine_similarity" else rows


def _leading(name: str, tag_of: Lookup, records: int, args: Args, kwargs: Kwargs, out: Any) -> Tag:
    """Image operations: the leading axis is untouched."""
    rows = tag_of(args[0] if args else kwargs["input"])
    others = [t for t in indexing.tensors(args[1:], kwargs) if tag_of(t) is not None]
    if isinstance(rows, Rows) and rows.axis == 0 and not others:
        return rows
    return Unknown(name)


def _pad(name: str, tag_of: Lookup, records: int, args: Args, kwargs: Kwargs, out: Any) -> Tag:
    x = args[0]
    rows = tag_of(x)
    amounts = args[1] if len(args) > 1 else kwargs["pad"]
    if isinstance(rows, Rows) and rows.axis < x.dim() - len(amounts) // 2:
        return rows
    return Unknown(name)


def _pieces(name: str, tag_of: Lookup, records: int, args: Args, kwargs: Kwargs, out: Any) -> Any:
    """split, chunk, unbind, narrow, select: pieces along the record axis get the owners of their rows."""
    x = args[0]
    rows = tag_of(x)
    if not isinstance(rows, Rows):
        return Unknown(name)
    if name in ("narrow", "select"):
        dim = (args[1] if len(args) > 1 else kwargs["dim"]) % x.dim()
    elif name == "unbind":
        dim = (args[1] if len(args) > 1 else kwargs.get("dim", 0)) % x.dim()
    else:
        dim = (args[2] if len(args) > 2 else kwargs.get("dim", 0)) % x.dim()
    if dim != rows.axis:
        return rows.at(rows.axis - (dim < rows.axis)) if name in ("unbind", "select") else rows
    if name in ("unbind", "select"):
        return Unknown(name)
    owner = owners(rows, records, x.device)
    if name == "narrow":
        start = args[2] if len(args) > 2 else kwargs["start"]
        return from_owner(dim, owner[int(start) : int(start) + out.shape[dim]], records)
    result, start = [], 0
    for piece in out:
        result.append(from_owner(dim, owner[start : start + piece.shape[dim]], records))
        start += piece.shape[dim]
    return result


def _cat(name: str, tag_of: Lookup, records: int, args: Args, kwargs: Kwargs, out: Any) -> Tag:
    parts = list(args[0] if args else kwargs.get("tensors", kwargs.get("input")))
    dim = args[1] if len(args) > 1 else kwargs.get("dim", kwargs.get("axis", 0))
    if name in ("hstack", "vstack", "dstack"):
        return Unknown(name)
    dim = dim % out.dim()
    tags = [tag_of(p) for p in parts]
    rows = [t for t in tags if isinstance(t, Rows)]
    if name == "stack":
        moved = {r.axis for r in rows}
        if len(moved) != 1 or any(not rows[0].same_owners(r) for r in rows):
            return Coupled(name) if records != 1 else rows[0]
        return rows[0].at(rows[0].axis + (dim <= rows[0].axis))
    if dim != rows[0].axis:
        if any(r.axis != rows[0].axis or not r.same_owners(rows[0]) for r in rows) and records != 1:
            return Coupled(name)
        return rows[0]
    if len(rows) != len(parts) or any(r.axis != dim for r in rows):
        return Unknown(name)  # rows that belong to nobody
    if all(r.plain for r in rows):
        return Rows(dim, outer=len(rows))
    return from_owner(dim, torch.cat([owners(r, records, out.device) for r in rows]), records)


def _repeat(name: str, tag_of: Lookup, records: int, args: Args, kwargs: Kwargs, out: Any) -> Tag:
    x = args[0]
    rows = tag_of(x)
    if not isinstance(rows, Rows):
        return Unknown(name)
    if name == "repeat_interleave":
        dim = args[2] if len(args) > 2 else kwargs.get("dim")
        times = args[1] if len(args) > 1 else kwargs["repeats"]
        if dim is None or not isinstance(times, int):
            return Unknown(name)
        if dim % x.dim() != rows.axis:
            return rows
        return Rows(rows.axis, rows.outer, rows.inner * times) if rows.owner is None else Unknown(name)
    axis = rows.axis + out.dim() - x.dim()
    times = out.shape[axis] // max(1, x.shape[rows.axis])
    if times == 1:
        return rows.at(axis)
    return Rows(axis, rows.outer * times, rows.inner) if rows.owner is None else Unknown(name)


def _matmul(name: str, tag_of: Lookup, records: int, args: Args, kwargs: Kwargs, out: Any) -> Tag:
    a, b = args[0], args[1] if len(args) > 1 else kwargs.get("other", kwargs.get("mat2"))
    if name == "rmatmul":
        a, b = b, a
    return contraction(name, a, tag_of(a), b, tag_of(b), records, out)


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


def _einsum(name: str, tag_of: Lookup, records: int, args: Args, kwargs: Kwargs, out: Any) -> Tag:
    parsed = indexing.einsum_letters(args)
    if parsed is None:
        return Unknown(name)
    inputs, output, operands = parsed
    letters: dict[str, Rows] = {}
    for spec, x in zip(inputs, operands, strict=True):
        rows = tag_of(x)
        if isinstance(rows, Rows):
            letters[spec[rows.axis]] = rows
    if len(letters) != 1 and records != 1:
        return Coupled(name)
    letter, rows = next(iter(letters.items()))
    return rows.at(output.index(letter)) if letter in output else Reduced(name)


def _loss(name: str, tag_of: Lookup, records: int, args: Args, kwargs: Kwargs, out: Any) -> Tag:
    """A mean over a number of terms that the data decide (class weights, ignored targets) couples records."""
    x = args[0]
    rows = tag_of(x)
    if not isinstance(rows, Rows):
        return Unknown(name)
    if out.dim() == 0 and kwargs.get("reduction", "mean") != "none":
        if name in ("cross_entropy", "nll_loss") and kwargs.get("reduction", "mean") == "mean":
            target = args[1] if len(args) > 1 else kwargs["target"]
            weight = args[2] if len(args) > 2 else kwargs.get("weight")
            ignored = kwargs.get("ignore_index", -100)
            if weight is not None or (not target.is_floating_point() and bool((target == ignored).any())):
                return Coupled(name)
        return Reduced(name)
    if name in ("cross_entropy", "nll_loss"):
        return rows if rows.axis == 0 else rows.at(rows.axis - 1)
    return pointwise(name, [(t, tag) for t in args[:2] if (tag := tag_of(t)) is not None], records, out)


def _norm_layer(name: str, tag_of: Lookup, records: int, args: Args, kwargs: Kwargs, out: Any) -> Tag:
    x = args[0] if args else kwargs["input"]
    rows = tag_of(x)
    if not isinstance(rows, Rows):
        return Unknown(name)
    if name in ("layer_norm", "rms_norm"):
        normalized = args[1] if len(args) > 1 else kwargs["normalized_shape"]
        return rows if rows.axis < x.dim() - len(normalized) else Coupled(name)
    return rows if rows.axis == 0 else Coupled(name)


def _frozen_linear(name: str, tag_of: Lookup, records: int, args: Args, kwargs: Kwargs, out: Any) -> Tag:
    """linear with a constant weight."""
    x = args[0]
    rows = tag_of(x)
    if isinstance(rows, Rows) and rows.axis < x.dim() - 1 and len([t for t in args if tag_of(t) is not None]) == 1:
        return rows
    return Coupled(name)


def _attention(name: str, tag_of: Lookup, records: int, args: Args, kwargs: Kwargs, out: Any) -> Tag:
    operands = [*args[:4], kwargs.get("attn_mask")]
    tags = [(t, tag) for t in operands if isinstance(t, Tensor) and (tag := tag_of(t)) is not None]
    found = pointwise(name, [(t, tag) for t, tag in tags], records, out)
    return found if isinstance(found, Rows) and found.axis < out.dim() - 2 else Coupled(name)


def _embedding(name: str, tag_of: Lookup, records: int, args: Args, kwargs: Kwargs, out: Any) -> Tag:
    """Rows of a constant table; also one_hot."""
    index = args[0] if args else kwargs["input"]
    rows = tag_of(index)
    return rows if isinstance(rows, Rows) else Unknown(name)


def _getitem(name: str, tag_of: Lookup, records: int, args: Args, kwargs: Kwargs, out: Any) -> Tag | None:
    return indexing.after_getitem(tag_of, records, args[0], args[1], out)


def _gather(name: str, tag_of: Lookup, records: int, args: Args, kwargs: Kwargs, out: Any) -> Tag:
    """gather / take_along_dim / index_select along an axis that is not the record axis."""
    x, dim = args[0], args[1] if len(args) > 1 else kwargs["dim"]
    index = args[2] if len(args) > 2 else kwargs["index"]
    rows, picks = tag_of(x), tag_of(index)
    dim = dim % x.dim()
    if name == "index_select":
        if not isinstance(rows, Rows):
            return picks.at(dim) if isinstance(picks, Rows) else Unknown(name)
        if dim != rows.axis:
            return rows if picks is None else Coupled(name)
        return from_owner(dim, owners(rows, records, x.device)[index], records)
    if isinstance(rows, Rows) and dim != rows.axis:
        if isinstance(picks, Rows) and (picks.axis != rows.axis or not picks.same_owners(rows)) and records != 1:
            return Coupled(name)
        return rows
    return Unknown(name)


def _triangle(name: str, tag_of: Lookup, records: int, args: Args, kwargs: Kwargs, out: Any) -> Tag:
    x = args[0]
    rows = tag_of(x)
    return rows if isinstance(rows, Rows) and rows.axis < x.dim() - 2 else Unknown(name)


def _table(rule: Rule, names: str) -> dict[str, Rule]:
    return dict.fromkeys(names.split(), rule)


_RULES: dict[str, Rule] = {
    **_table(_view, "view reshape flatten unflatten squeeze unsqueeze ravel view_as reshape_as"),
    **_table(_view, "expand expand_as broadcast_to"),
    **_table(_permute, "permute transpose swapaxes swapdims t T mT H mH movedim moveaxis adjoint"),
    **_table(_reduce, "sum mean nansum prod amax amin max min var std norm vector_norm logsumexp all any argmax argmin"),
    **_table(_reduce, "median count_nonzero var_mean std_mean"),
    **_table(_along, "softmax log_softmax softmin cumsum cumprod sort argsort topk flip roll normalize glu renorm"),
    **_table(_along, "cosine_similarity gumbel_softmax logcumsumexp cummax"),
    **_table(_leading, "max_pool1d max_pool2d max_pool3d avg_pool1d avg_pool2d avg_pool3d interpolate upsample unfold"),
    **_table(_leading, "adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d adaptive_max_pool1d fold"),
    **_table(_leading, "adaptive_max_pool2d adaptive_max_pool3d boolean_dispatch fn lp_pool2d"),
    **_table(_leading, "conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d pixel_shuffle"),
    **_table(_leading, "max_pool2d_with_indices pixel_unshuffle local_response_norm channel_shuffle"),
    **_table(_pad, "pad"),
    **_table(_pieces, "split chunk unbind narrow select tensor_split split_with_sizes"),
    **_table(_cat, "cat concat concatenate stack hstack vstack dstack"),
    **_table(_repeat, "repeat tile repeat_interleave"),
    **_table(_matmul, "matmul rmatmul bmm mm mv"),
    **_table(_einsum, "einsum"),
    **_table(_loss, "cross_entropy nll_loss " + " ".join(_ELEMENTWISE_LOSS)),
    **_table(_norm_layer, "layer_norm rms_norm group_norm instance_norm batch_norm"),
    **_table(_frozen_linear, "linear"),
    **_table(_attention, "scaled_dot_product_attention"),
    **_table(_embedding, "embedding one_hot"),
    **_table(_getitem, "getitem"),
    **_table(_gather, "gather take_along_dim index_select"),
    **_table(_triangle, "tril triu"),
}
