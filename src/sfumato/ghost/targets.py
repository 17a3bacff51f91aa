"""What a term belongs to: a trainable parameter, or a tensor computed from parameters alone."""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from sfumato.terms import Dense, Outer, Term, materialize


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


Target = Param | Derived


def shape_of(target: Target) -> torch.Size:
    """Shape of the target's own tensor, and so of its per-sample gradients."""
    return target.tensor.shape


def settle(target: Target, term: Term) -> tuple[Target, Term]:
    """Move a term of a transposed or reshaped parameter onto the parameter itself."""
    while isinstance(target, Derived) and target.base is not None and (target.swapped or target.reshaped):
        base = target.base
        if isinstance(term, Outer) and target.swapped and term.factors != tuple(shape_of(target)):
            term = Dense(materialize(term))  # the factors belong to a reshape of the transpose
        match term:
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
    if (
        name in SWAPS
        and len(shape) == 2
        and tensor.shape == shape[::-1]
        and tensor.stride() == source.tensor.stride()[::-1]
    ):
        return Derived(tensor, names, source, swapped=True)
    if name in RESHAPES and tensor.numel() == source.tensor.numel():
        return Derived(tensor, names, source, reshaped=True)
    if name in _COPIES:
        lead = tensor.dim() - len(shape)
        copies = tuple(k for k in range(tensor.dim()) if k < lead or shape[k - lead] == 1)
        if all(tensor.shape[k] == shape[k - lead] for k in range(tensor.dim()) if k not in copies):
            return Derived(tensor, names, source, copies=copies)
    return Derived(tensor, names)
