"""What a term belongs to: a trainable parameter, or a tensor computed from parameters alone."""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from sfumato.terms import Dense, Outer, Stack, Term, materialize


@dataclass(frozen=True, eq=False, slots=True)
class Param:
    """A trainable parameter, by its first name in ``named_parameters()``."""

    name: str
    tensor: Tensor


@dataclass(frozen=True, eq=False, slots=True)
class Derived:
    """A tensor computed from parameters and constants only (W.T, a slice, W + BA, a position embedding).

    Autograd holds the graph from the parameters to ``tensor``; per-sample gradients are pulled back through it.
    ``base`` and ``swapped`` mark a plain transpose or reshape of ``base``, through which factors pass as they are;
    ``copies`` are axes along which the tensor repeats ``base``.
    """

    tensor: Tensor
    names: tuple[str, ...]
    base: "Target | None" = None
    swapped: bool = False
    reshaped: bool = False
    copies: tuple[int, ...] = field(default=())
    index: Tensor | None = None  # the tensor is base[index], a lookup by a constant
    part: tuple[int, int] | None = None  # the tensor is base[start : start + rows], perhaps without the axis

    @property
    def passes(self) -> bool:
        """Terms pass through to the base as they are."""
        return self.swapped or self.reshaped or self.part is not None


Target = Param | Derived


def shape_of(target: Target) -> torch.Size:
    """Shape of the target's own tensor, and so of its per-sample gradients."""
    return target.tensor.shape


def settle(target: Target, term: Term) -> tuple[Target, Term]:
    """Move a term of a transposed or reshaped parameter onto the parameter itself."""
    while isinstance(target, Derived) and target.base is not None and target.passes:
        base = target.base
        if (part := target.part) is not None:
            target, term = base, Stack({part: (term,)}, shape_of(base))
            continue
        if isinstance(term, Outer) and target.swapped and term.factors != tuple(shape_of(target)):
            term = Dense(materialize(term))  # the factors belong to a reshape of the transpose
        match term:
            case Stack(parts) if target.swapped and len(shape_of(target)) > 2:
                turned = {k: tuple(_turned(t, k[1], shape_of(base)) for t in ts) for k, ts in parts.items()}
                term = Stack(turned, shape_of(base))
            case Stack():
                dense = materialize(term)
                term = Dense(dense.mT if target.swapped else dense.reshape(-1, *shape_of(base)))
            case Outer(left, right) if target.swapped:
                term = Outer(right, left, shape_of(base))
            case Outer(left, right):
                term = Outer(left, right, shape_of(base))
            case Dense(value) if target.swapped:
                term = Dense(value.mT)
            case Dense(value):
                term = Dense(value.reshape(value.shape[0], *shape_of(base)))
            case _:
                break
        target = base
    return target, term


def _turned(term: Term, rows: int, shape: torch.Size) -> Term:
    """The term of a slice of a transposed stack of matrices as one of the stack itself."""
    if rows == 1 and isinstance(term, Outer) and term.factors == (shape[2], shape[1]):
        return Outer(term.right, term.left, torch.Size((1, *shape[1:])))
    dense = materialize(term)
    return Dense(dense.reshape(-1, rows, *shape[:0:-1]).mT)


def _swapped(tensor: Tensor, source: Tensor) -> bool:
    turned = source.mT
    return tensor.shape == turned.shape and tensor.stride() == turned.stride() and not tensor.is_conj()


def _slice_of(tensor: Tensor, source: Tensor) -> tuple[int, int] | None:
    """(start, rows) if the tensor is source[start : start + rows] or source[start], told by where it lies."""
    tail = tensor.shape[1:] if tensor.dim() == source.dim() else tensor.shape
    strides = tensor.stride()[1:] if tensor.dim() == source.dim() else tensor.stride()
    if tensor.untyped_storage().data_ptr() != source.untyped_storage().data_ptr():
        return None  # a copy
    if source.dim() - len(tail) != 1 or tail != source.shape[1:] or strides != source.stride()[1:]:
        return None
    rows = tensor.shape[0] if tensor.dim() == source.dim() else 1
    start, rest = divmod(int(tensor.storage_offset() - source.storage_offset()), max(1, source.stride(0)))
    consecutive = tensor.dim() < source.dim() or rows < 2 or tensor.stride(0) == source.stride(0)
    return (start, rows) if rest == 0 and consecutive and 0 < rows < source.shape[0] else None


_SLICES = {"getitem", "select", "chunk", "split", "narrow", "unbind", "tensor_split", "split_with_sizes", "iter"}
SWAPS = {"t", "T", "mT", "transpose", "swapaxes", "swapdims", "adjoint", "H", "mH", "permute"}
RESHAPES = {"view", "reshape", "unsqueeze", "squeeze", "flatten", "unflatten", "contiguous", "ravel", "view_as"}
_COPIES = {"expand", "expand_as", "broadcast_to", "repeat", "tile", "repeat_interleave"}


def derive_from(
    tensor: Tensor, name: str, targets: list[Target], args: tuple[object, ...], kwargs: dict[str, object]
) -> Derived:
    """What ``name(*args) -> tensor`` makes of parameters: with the shortcut past autograd, where there is one."""
    source = targets[0] if len(targets) == 1 else None
    names = tuple(dict.fromkeys(n for t in targets for n in ((t.name,) if isinstance(t, Param) else t.names)))
    if source is None:
        return Derived(tensor, names)
    options = (*args[2:], *(kwargs.get(k) for k in ("padding_idx", "max_norm", "scale_grad_by_freq")))
    if (
        name == "embedding"
        and isinstance(source, Param)
        and len(args) == 2
        and not any(o is not None and o is not False for o in options)
    ):
        return Derived(tensor, names, source, index=args[0])  # type: ignore[arg-type]
    shape = source.tensor.shape
    if name in _SLICES and (part := _slice_of(tensor, source.tensor)) is not None:
        return Derived(tensor, names, source, part=part)
    if name in SWAPS and tensor.dim() in (2, 3) and tensor.dim() == len(shape) and _swapped(tensor, source.tensor):
        return Derived(tensor, names, source, swapped=True)
    if name in RESHAPES and tensor.numel() == source.tensor.numel():
        return Derived(tensor, names, source, reshaped=True)
    if name in _COPIES:
        lead = tensor.dim() - len(shape)
        copies = tuple(k for k in range(tensor.dim()) if k < lead or shape[k - lead] == 1)
        if all(tensor.shape[k] == shape[k - lead] for k in range(tensor.dim()) if k not in copies):
            return Derived(tensor, names, source, copies=copies)
    return Derived(tensor, names)
