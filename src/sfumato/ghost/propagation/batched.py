"""Operations on the last axes, or along one, that leave the others alone: transforms, distances, sampling, algebra."""

from typing import Any

import torch
from torch import Tensor

from sfumato.ghost import indexing
from sfumato.ghost.propagation.names import Args, Kwargs, Lookup, Rule
from sfumato.ghost.propagation.reductions import pointwise
from sfumato.ghost.rows import Coupled, Reduced, Rows, Tag, Unknown

# How many of the last axes of each operand are worked on; all before them are batch, broadcast from the right.
_WORKED = {
    "view_as_real": 0,
    **dict.fromkeys("view_as_complex diag_embed pairwise_distance multinomial stft".split(), 1),
    **dict.fromkeys("cdist istft matrix_exp matrix_power inverse pinverse cholesky det logdet slogdet".split(), 2),
    **dict.fromkeys(
        "linalg_inv linalg_pinv linalg_cholesky linalg_matrix_exp linalg_matrix_power linalg_det linalg_slogdet "
        "linalg_qr linalg_svd linalg_svdvals linalg_eigh linalg_eigvalsh linalg_eig linalg_matrix_norm "
        "linalg_solve linalg_solve_triangular".split(),
        2,
    ),
}
_FIRST = "grid_sample affine_grid max_unpool1d max_unpool2d max_unpool3d lp_pool1d lp_pool3d"
_ALONG = "diff cummin kthvalue mode quantile nanquantile trapezoid trapz cumulative_trapezoid msort cross linalg_cross"
_ALONG += " linalg_vecdot"
_BROADCAST = ("cross", "linalg_cross", "linalg_vecdot")
_FFT = {f"fft_{i}{r}fft{n}" for i in ("", "i") for r in ("", "r", "h") for n in ("", "2", "n")}


def _operands(args: Args, kwargs: Kwargs) -> list[Tensor]:
    return list(indexing.tensors(args, kwargs))


def last(name: str, tag_of: Lookup, records: int, args: Args, kwargs: Kwargs, out: Any) -> Tag:
    """Records have to lie on a batch axis, the same one for every operand."""
    worked = _WORKED[name]
    operands = _operands(args, kwargs)
    extra = name in ("diag_embed", "linalg_matrix_norm") and len(args) > 1
    vectors = name == "linalg_solve" and len({t.dim() for t in operands}) > 1
    if extra or vectors or any(k in kwargs for k in ("dim", "dim1", "dim2", "offset")):
        return Unknown(name)
    width = max(t.dim() for t in operands) - worked
    found: list[Rows] = []
    for t in operands:
        tag = tag_of(t)
        if isinstance(tag, Rows):
            if tag.axis >= t.dim() - worked:
                return _one_sided(name, tag, t, operands, tag_of, out)
            found.append(tag.at(tag.axis + width - (t.dim() - worked)))
    if any(r.axis != found[0].axis or not r.same_owners(found[0]) for r in found) and records != 1:
        return Coupled(name)
    return found[0]


def _one_sided(name: str, tag: Rows, t: Tensor, operands: list[Tensor], tag_of: Lookup, out: Any) -> Tag:
    """Distances of records from fixed points: rows or columns of the matrix."""
    if name != "cdist" or tag.axis != t.dim() - 2 or sum(tag_of(o) is not None for o in operands) != 1:
        return Coupled(name)
    return tag.at(out.dim() - (2 if t is operands[0] else 1))


def first(name: str, tag_of: Lookup, records: int, args: Args, kwargs: Kwargs, out: Any) -> Tag:
    """Image operations whose operands all have the records first."""
    tags = [tag for t in _operands(args, kwargs) if (tag := tag_of(t)) is not None]
    fits = all(
        isinstance(t, Rows) and t.axis == 0 and isinstance(tags[0], Rows) and t.same_owners(tags[0]) for t in tags
    )
    return tags[0] if fits else Coupled(name)


def along(name: str, tag_of: Lookup, records: int, args: Args, kwargs: Kwargs, out: Any) -> Any:
    """Along one dim, which may vanish; operands before it are broadcast."""
    operands = _operands(args, kwargs)
    if name not in _BROADCAST and len(operands) > 1:
        return Unknown(name)  # a list of quantiles becomes an axis of its own
    shape = torch.broadcast_shapes(*[t.shape for t in operands])
    tags = [(t, tag) for t in operands if (tag := tag_of(t)) is not None]
    rows = pointwise(name, tags, records, torch.empty(shape, device="meta"))
    if not isinstance(rows, Rows):
        return rows
    dim = _dim(name, args, kwargs, operands)
    if dim is None or dim % len(shape) == rows.axis:
        return Unknown(name) if dim is None else Coupled(name)
    result = out if isinstance(out, Tensor) else out[0]
    return rows.at(rows.axis - (result.dim() < len(shape) and dim % len(shape) < rows.axis))


# Where ``dim`` stands among the positional arguments, and what it is when it is not given.
_DIM: dict[str, tuple[int, int | None]] = {
    "cummin": (1, None), "kthvalue": (2, -1), "mode": (1, -1), "quantile": (2, None),
    "nanquantile": (2, None), "msort": (9, 0), "cross": (2, None), "linalg_cross": (2, -1), "linalg_vecdot": (2, -1),
    "trapezoid": (9, -1), "trapz": (9, -1), "cumulative_trapezoid": (9, -1),
}  # fmt: skip


def _dim(name: str, args: Args, kwargs: Kwargs, operands: list[Tensor]) -> int | None:
    place, default = _DIM[name]
    dim = kwargs.get("dim", args[place] if len(args) > place else default)
    if isinstance(dim, (tuple, list)) and len(dim) == 1:
        dim = dim[0]
    return dim if isinstance(dim, int) else None


def fourier(name: str, tag_of: Lookup, records: int, args: Args, kwargs: Kwargs, out: Any) -> Tag:
    """Transforms along one dim, the last two, or those given."""
    x = args[0] if args else kwargs["input"]
    rows = tag_of(x)
    shift = name.endswith("shift")
    given = kwargs.get("dim", args[1 if shift else 2] if len(args) > (1 if shift else 2) else None)
    if given is None and not shift and not name.endswith("n"):
        given = (-2, -1) if name.endswith("2") else -1
    size = kwargs.get("s", args[1] if len(args) > 1 and not shift else None)
    if given is None and size is not None:
        given = tuple(range(-len(size), 0))
    dims = (given,) if isinstance(given, int) else given
    if not isinstance(rows, Rows) or dims is None:
        return Unknown(name)
    return Coupled(name) if any(d % x.dim() == rows.axis for d in dims) else rows


def search(name: str, tag_of: Lookup, records: int, args: Args, kwargs: Kwargs, out: Any) -> Tag:
    """searchsorted(sequence, values) and bucketize(values, boundaries)."""
    operands = _operands(args, kwargs)[:2]
    if len(operands) < 2:
        return Unknown(name)
    sequence, values = operands if name == "searchsorted" else operands[::-1]
    tags = [(t, tag) for t in (sequence, values) if (tag := tag_of(t)) is not None]
    if len(tags) != len([t for t in _operands(args, kwargs) if tag_of(t) is not None]):
        return Unknown(name)
    if sequence.dim() == 1:
        return tags[0][1] if tags and tags[0][0] is values and len(tags) == 1 else Coupled(name)
    found = pointwise(name, tags, records, out)
    return found if isinstance(found, Rows) and found.axis < out.dim() - 1 else Coupled(name)


def diagonal(name: str, tag_of: Lookup, records: int, args: Args, kwargs: Kwargs, out: Any) -> Tag:
    x = args[0] if args else kwargs["input"]
    rows = tag_of(x)
    one, two = (kwargs.get(k, args[i] if len(args) > i else i - 2) % x.dim() for i, k in ((2, "dim1"), (3, "dim2")))
    if not isinstance(rows, Rows) or rows.axis in (one, two):
        return Coupled(name)
    return rows.at(rows.axis - (one < rows.axis) - (two < rows.axis))


def scatter(name: str, tag_of: Lookup, records: int, args: Args, kwargs: Kwargs, out: Any) -> Tag:
    """Written along an axis without records, by every record into its own rows."""
    dim = (args[1] if len(args) > 1 else kwargs["dim"]) % out.dim()
    index = args[2] if len(args) > 2 else kwargs["index"]
    tags = [tag for t in _operands(args, kwargs) if (tag := tag_of(t)) is not None]
    rows = tags[0]
    if not isinstance(rows, Rows) or rows.axis == dim or index.shape[rows.axis] != out.shape[rows.axis]:
        return Unknown(name)
    fits = all(isinstance(t, Rows) and t.axis == rows.axis and t.same_owners(rows) for t in tags)
    return rows if fits or records == 1 else Coupled(name)


def copies(name: str, tag_of: Lookup, records: int, args: Args, kwargs: Kwargs, out: Any) -> Any:
    """broadcast_tensors: every tensor on its own."""
    tensors = args[0] if len(args) == 1 and isinstance(args[0], (list, tuple)) else args
    tags = [tag_of(t) for t in tensors]
    return [
        t.at(t.axis + o.dim() - x.dim()) if isinstance(t, Rows) else t
        for t, x, o in zip(tags, tensors, out, strict=True)
    ]


def ctc(name: str, tag_of: Lookup, records: int, args: Args, kwargs: Kwargs, out: Any) -> Tag:
    """(T, B, classes) against (B, S); flat targets have no axis of records."""
    given = [*args[:4], *(kwargs[k] for k in ("log_probs", "targets", "input_lengths", "target_lengths")[len(args) :])]
    tags = [tag_of(t) for t in given]
    places = zip(tags, (1, 0, 0, 0), strict=True)
    rows = tags[0]
    fits = all(t is None or (isinstance(t, Rows) and t.axis == k and t.plain) for t, k in places)
    if not fits or not isinstance(rows, Rows) or not isinstance(given[1], Tensor) or given[1].dim() != 2:
        return Coupled(name)
    return rows.at(0) if out.dim() == 1 else Reduced(name)


TABLE: dict[str, Rule] = {
    **dict.fromkeys(_WORKED, last),
    **dict.fromkeys(_FIRST.split(), first),
    **dict.fromkeys(_ALONG.split(), along),
    **dict.fromkeys([*_FFT, "fft_fftshift", "fft_ifftshift"], fourier),
    **dict.fromkeys(("searchsorted", "bucketize"), search),
    **dict.fromkeys(("diagonal",), diagonal),
    "broadcast_tensors": copies,
    "ctc_loss": ctc,
    "scatter": scatter,
}
