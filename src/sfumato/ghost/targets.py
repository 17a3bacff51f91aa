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
