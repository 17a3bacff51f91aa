"""What a forward may change besides its outputs: random generators, parameters, buffers, attributes of modules.

``State`` can put all of it back, and names every value so that two states can be compared.
"""

import random
import types
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

_SCALARS = (bool, int, float, complex, str, bytes, type(None))
_INTERNAL = {"_parameters", "_buffers", "_modules"}
_HOOKS = {
    "_backward_pre_hooks", "_backward_hooks", "_forward_hooks", "_forward_hooks_with_kwargs", "forward",
    "_forward_hooks_always_called", "_forward_pre_hooks", "_forward_pre_hooks_with_kwargs", "_is_full_backward_hook",
    "_state_dict_hooks", "_state_dict_pre_hooks", "_load_state_dict_pre_hooks", "_load_state_dict_post_hooks",
    "_non_persistent_buffers_set",
}  # fmt: skip
_DEPTH, _ENTRIES = 40, 20_000
_LARGE = 1 << 16  # parameters of this size are compared by two sums of theirs


def randomness() -> tuple[Any, ...]:
    """The state of every global random generator."""
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
    return torch.get_rng_state(), cuda, random.getstate(), np.random.get_state()  # noqa: NPY002


def restore_randomness(state: tuple[Any, ...]) -> None:
    """Back to a state that ``randomness`` returned."""
    cpu, cuda, python, numpy = state
    torch.set_rng_state(cpu)
    if cuda:
        torch.cuda.set_rng_state_all(cuda)
    random.setstate(python)
    np.random.set_state(numpy)  # noqa: NPY002


def same_randomness(a: tuple[Any, ...], b: tuple[Any, ...]) -> bool:
    """Whether two runs drew equally many random numbers."""
    numpy = all(np.array_equal(x, y) for x, y in zip(a[3], b[3], strict=True))
    tensors = all(torch.equal(x, y) for x, y in zip((a[0], *a[1]), (b[0], *b[1]), strict=True))
    return tensors and a[2] == b[2] and numpy


@contextmanager
def kept_randomness() -> Iterator[None]:
    """Whatever is drawn inside was never drawn."""
    before = randomness()
    try:
        yield
    finally:
        restore_randomness(before)


@dataclass
class State:
    """A moment of a model (and of whatever else computes the loss)."""

    leaves: dict[str, Any] = field(default_factory=dict)
    keep: bool = True  # whether it can be put back
    _undo: list[Callable[[], None]] = field(default_factory=list)
    _large: list[Callable[[bool], None]] = field(default_factory=list)
    _seen: dict[int, object] = field(default_factory=dict)

    @classmethod
    def of(cls, *roots: object, parameters: bool = True, undo: bool = True) -> "State":
        state = cls(keep=undo)
        for root in roots:
            state._visit(root, "", _DEPTH, parameters)
        state._seen.clear()
        return state

    def restore(self, thorough: bool = True) -> None:
        """Put everything back. Not thorough: large parameters only where their version counter moved."""
        with torch.no_grad():
            for undo in self._undo:
                undo()
            for undo_large in self._large:
                undo_large(thorough)

    def _visit(self, value: Any, path: str, depth: int, parameters: bool) -> None:
        if isinstance(value, _SCALARS):
            self.leaves[path] = value
            return
        if id(value) in self._seen or depth == 0 or isinstance(value, type):
            return
        self._seen[id(value)] = value
        if isinstance(value, Tensor):
            if parameters or not isinstance(value, nn.Parameter):
                self._tensor(value, path)
        elif isinstance(value, np.ndarray):
            self._array(value, path)
        elif isinstance(value, torch.Generator):
            self.leaves[path] = before = value.get_state()
            self._undo.append(lambda: _discard(value.set_state(before)))
        else:
            for key, item in self._members(value):
                below = path if key in _INTERNAL else f"{path}.{key}" if path else str(key)
                self._visit(item, below, depth - 1, parameters)

    def _members(self, value: Any) -> list[tuple[str, Any]]:
        """What is inside a container or object; arranges for the container itself to be put back."""
        if isinstance(value, (types.FunctionType, types.MethodType)):
            return self._closure(value)
        if isinstance(value, (tuple, frozenset, set)):
            if isinstance(value, set):
                self._undo.append(_reset(value, set(value)))
            return [(str(k), v) for k, v in enumerate(value)] if len(value) <= _ENTRIES else []
        if isinstance(value, (list, deque)):
            self._undo.append(_refill(value, list(value)))
            return [(str(k), v) for k, v in enumerate(value)] if len(value) <= _ENTRIES else []
        if isinstance(value, dict):
            self._undo.append(_redict(value, dict(value)))
            return [(str(k), v) for k, v in value.items()] if len(value) <= _ENTRIES else []
        if not isinstance(value, nn.Module) and (callable(value) or type(value).__module__.startswith("torch")):
            return [(k, v) for k, v in vars(value).items()] if hasattr(value, "func") and hasattr(value, "args") else []
        try:
            names = vars(value)
        except TypeError:
            return []
        self._undo.append(_redict(names, dict(names)))
        for hooks in (v for k, v in names.items() if k in _HOOKS and isinstance(v, dict)):  # some are set lazily
            self._undo.append(_redict(hooks, dict(hooks)))
        return [(k, v) for k, v in names.items() if k not in _HOOKS]

    def _closure(self, value: Any) -> list[tuple[str, Any]]:
        if isinstance(value, types.MethodType):
            return [("", value.__self__)] if isinstance(value.__self__, nn.Module) else []
        found = []
        for name, cell in zip(value.__code__.co_freevars, value.__closure__ or (), strict=True):
            try:
                inside = cell.cell_contents
            except ValueError:  # not filled yet
                continue
            # Not into arbitrary objects: a closure may hold a data set.
            if isinstance(inside, (*_SCALARS, Tensor, nn.Module, list, dict, deque)):
                self._undo.append(_recell(cell, inside))
                found.append((name, inside))
        return found

    def _tensor(self, value: Tensor, path: str) -> None:
        if value.layout != torch.strided or value.is_meta or value.is_nested or type(value) not in _PLAIN:
            return
        alias = value.data  # the same memory, whatever is assigned to value.data later
        if value.numel() < _LARGE or not isinstance(value, nn.Parameter):
            self.leaves[path] = kept = alias.clone()
            self._undo.append(lambda: _put_back(value, alias, kept))
            return
        self.leaves[path] = torch.stack([alias.sum(), torch.linalg.vector_norm(alias)])
        if self.keep:
            self._large.append(_undo_large(value, alias, alias.clone()))

    def _array(self, value: np.ndarray, path: str) -> None:
        if value.dtype != object:
            self.leaves[path] = kept = value.copy()
            self._undo.append(lambda: np.copyto(value, kept))


_PLAIN = (Tensor, nn.Parameter, nn.Buffer)


def _put_back(value: Tensor, alias: Tensor, kept: Tensor) -> None:
    moved = value.data_ptr() != alias.data_ptr() or value.shape != alias.shape or value.stride() != alias.stride()
    if moved or value.dtype != alias.dtype:
        value.data = alias
    if not torch.equal(alias, kept):
        alias.copy_(kept)


def _undo_large(value: Tensor, alias: Tensor, kept: Tensor) -> Callable[[bool], None]:
    version = value._version

    def undo(thorough: bool) -> None:
        nonlocal version
        if thorough or value._version != version or value.data_ptr() != alias.data_ptr():
            _put_back(value, alias, kept)
            version = value._version

    return undo


def _discard(_: object) -> None: ...


def _reset(value: set[Any], kept: set[Any]) -> Callable[[], None]:
    def undo() -> None:
        value.clear()
        value.update(kept)

    return undo


def _recell(cell: Any, kept: object) -> Callable[[], None]:
    return lambda: setattr(cell, "cell_contents", kept)


def _refill(value: Any, kept: list[Any]) -> Callable[[], None]:
    def undo() -> None:
        if len(value) != len(kept) or any(a is not b for a, b in zip(value, kept, strict=True)):
            value.clear()
            value.extend(kept)

    return undo


def _redict(value: dict[Any, Any], kept: dict[Any, Any]) -> Callable[[], None]:
    def undo() -> None:
        if len(value) != len(kept) or any(k not in kept or kept[k] is not v for k, v in value.items()):
            value.clear()
            value.update(kept)

    return undo


def differences(a: State, b: State, tolerance: float) -> list[str]:
    """Paths of the values that are not the same in both."""
    names = dict.fromkeys([*a.leaves, *b.leaves])
    missing = object()
    return [n for n in names if not _alike(a.leaves.get(n, missing), b.leaves.get(n, missing), tolerance)]


def _alike(a: Any, b: Any, tolerance: float) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.shape == b.shape and a.dtype == b.dtype and close(a, b, tolerance)
    if isinstance(a, np.ndarray) and isinstance(b, np.ndarray):
        return np.array_equal(a, b)
    if isinstance(a, float) and isinstance(b, float):
        return a == b or (a != a and b != b) or abs(a - b) <= tolerance * max(abs(a), abs(b))
    return type(a) is type(b) and bool(a == b) if not isinstance(a, (Tensor, np.ndarray)) else False


def close(a: Tensor, b: Tensor, tolerance: float) -> bool:
    """Equal up to rounding relative to the largest value; infinities and NaN must be in the same places."""
    if not a.is_floating_point() and not a.is_complex():
        return torch.equal(a, b)
    if a.numel() == 0 or torch.equal(a, b):
        return True
    finite = a.isfinite()
    scale = float(torch.where(finite, a, 0).abs().max())
    return bool(torch.allclose(a, b, rtol=tolerance, atol=tolerance * scale, equal_nan=True))
