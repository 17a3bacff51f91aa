"""The outputs of several runs of one forward, leaf by leaf and in whatever objects they come."""

import copy
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from sfumato.errors import UnsupportedError

_DEPTH = 6


def deep_leaves(out: Any, depth: int = _DEPTH) -> Iterator[Tensor]:
    """Every tensor of an output, also inside objects (a dataclass, a cache of keys and values)."""
    for leaf in tree_flatten(out)[0]:
        if isinstance(leaf, Tensor):
            yield leaf
        elif depth and _opaque(leaf):
            yield from deep_leaves(vars(leaf), depth - 1)


def merged(outs: Sequence[Any], join: Callable[[tuple[Tensor, ...]], Tensor], where: str, depth: int = _DEPTH) -> Any:
    """One output, in the shape of the first, whose tensors are ``join`` of the tensors in the same place."""
    flat = [tree_flatten(o) for o in outs]
    if any(spec != flat[0][1] for _, spec in flat):
        _refuse("have outputs of different structure", where)
    leaves = []
    for values in zip(*(leaves for leaves, _ in flat), strict=True):
        first = values[0]
        if any(type(v) is not type(first) for v in values):
            _refuse("have outputs of different kinds", where)
        if isinstance(first, Tensor):
            leaves.append(join(values))
        elif depth and _opaque(first) and any(True for _ in deep_leaves(first)):
            whole = copy.copy(first)
            vars(whole).update(merged([vars(v) for v in values], join, where, depth - 1))
            leaves.append(whole)
        else:
            if not _equal(values):
                _refuse("have different values of no tensor among their outputs", where)
            leaves.append(first)
    return tree_unflatten(leaves, flat[0][1])


def alike(values: tuple[Tensor, ...], where: str) -> Tensor:
    """A constant output, which every run must have computed the same."""
    first = values[0]
    if any(v.shape != first.shape or not torch.equal(v, first) for v in values[1:]):
        _refuse("have different constants among their outputs", where)
    return first


def _opaque(value: Any) -> bool:
    return hasattr(value, "__dict__") and not callable(value) and not isinstance(value, (type, Tensor))


def _equal(values: tuple[Any, ...]) -> bool:
    first = values[0]
    plain = isinstance(first, (bool, int, float, str, bytes, type(None)))
    return not plain or all(v == first for v in values[1:])


def _refuse(what: str, where: str) -> None:
    raise UnsupportedError(
        f"Records of this batch are run apart and {what}, so there is no one output of the batch.",
        where=where,
        fix="return tensors with a row for each record, in the same containers whatever the records are.",
    )
