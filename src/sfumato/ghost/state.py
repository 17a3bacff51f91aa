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
_RUN_HOOKS = {
    "_backward_pre_hooks", "_backward_hooks", "_forward_hooks", "_forward_pre_hooks",
}  # fmt: skip
_DEPTH, _ENTRIES = 40, 20_000
_FAR_DEPTH, _FAR_ENTRIES, _FAR_NUMEL = 5, 1_000, 1 << 18  # in what a function only refers to, which may be a data set
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
    far: bool = False  # also what functions reach through their closures and global names
    generators: list[Any] = field(default_factory=list)
    _undo: list[Callable[[], None]] = field(default_factory=list)
    _large: list[Callable[[bool], None]] = field(default_factory=list)
    _seen: dict[int, object] = field(default_factory=dict)

    @classmethod
    def of(cls, *roots: object, parameters: bool = True, undo: bool = True, far: bool = False) -> "State":
        state = cls(keep=undo, far=far)
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

    def reseed(self, seed: int) -> None:
        """Other random numbers from every generator that the model holds itself."""
        for k, generator in enumerate(self.generators):
            _reseed(generator, seed + 1000 * k)

    def drawn(self) -> list[str]:
        """Where those generators are now."""
        return [_position(g) for g in self.generators]

    def _visit(self, value: Any, path: str, depth: int, parameters: bool) -> None:
        if isinstance(value, _SCALARS):
            self.leaves[path] = value
            return
        if id(value) in self._seen or depth == 0 or isinstance(value, type):
            return
        self._seen[id(value)] = value
        if self.far and isinstance(value, types.FunctionType):
            depth = min(depth, _FAR_DEPTH)
        if isinstance(value, Tensor):
            if parameters or not isinstance(value, nn.Parameter):
                self._tensor(value, path)
        elif isinstance(value, np.ndarray):
            self._array(value, path)
        elif isinstance(value, _GENERATORS) and not isinstance(value, random.SystemRandom):
            self.leaves[path] = _position(value)
            self.generators.append(value)
            self._undo.append(_rewind(value))
        else:
            for key, item in self._members(value):
                below = path if key in _INTERNAL else f"{path}.{key}" if path else str(key)
                self._visit(item, below, depth - 1, parameters)

    @property
    def _most(self) -> int:
        return _FAR_ENTRIES if self.far else _ENTRIES

    def _members(self, value: Any) -> list[tuple[str, Any]]:
        """What is inside a container or object; arranges for the container itself to be put back."""
        if isinstance(value, (types.FunctionType, types.MethodType)):
            return self._closure(value)
        if isinstance(value, (tuple, frozenset, set)):
            if isinstance(value, set):
                self._undo.append(_reset(value, set(value)))
            return [(str(k), v) for k, v in enumerate(value)] if len(value) <= self._most else []
        if isinstance(value, (list, deque)):
            self._undo.append(_refill(value, list(value)))
            return [(str(k), v) for k, v in enumerate(value)] if len(value) <= self._most else []
        if isinstance(value, dict):
            self._undo.append(_redict(value, dict(value)))
            return [(str(k), v) for k, v in value.items()] if len(value) <= self._most else []
        if not isinstance(value, nn.Module) and not _users(value):
            return [(k, v) for k, v in vars(value).items()] if hasattr(value, "func") and hasattr(value, "args") else []
        return [*self._attributes(value), *self._slots(value), *self._of_class(value)]

    def _attributes(self, value: Any) -> list[tuple[str, Any]]:
        try:
            names = vars(value)
        except TypeError:
            return []
        self._undo.append(_redict(names, dict(names)))
        found = [(k, v) for k, v in names.items() if k not in _HOOKS]
        for key, hooks in names.items():  # some are set lazily
            if key in _HOOKS and isinstance(hooks, dict):
                self._undo.append(_redict(hooks, dict(hooks)))
                if key in _RUN_HOOKS:
                    inside = [v for hook in hooks.values() for v in self._hook(hook)]
                    found += [(f"{key.strip('_')}.{k}", v) for k, v in enumerate(inside)]
        return found

    def _hook(self, hook: Any) -> list[Any]:
        """What a hook of the user's writes to: itself if it is an object, what it refers to if it is a function."""
        if str(getattr(hook, "__module__", "")).split(".")[0] in ("torch", "sfumato"):
            return []
        if not isinstance(hook, types.FunctionType):
            return [hook.__self__] if isinstance(hook, types.MethodType) else [hook]
        return [v for _, v in (*self._closure(hook, far=True), *_referred(hook)) if not isinstance(v, _SCALARS)]

    def _slots(self, value: Any) -> list[tuple[str, Any]]:
        found = []
        for kind in type(value).__mro__:
            slots = vars(kind).get("__slots__", ())
            for name in (slots,) if isinstance(slots, str) else tuple(slots):
                if name not in ("__dict__", "__weakref__") and hasattr(value, name):
                    kept = getattr(value, name)
                    self._undo.append(_reattribute(value, name, kept))
                    found.append((name, kept))
        return found

    def _of_class(self, value: Any) -> list[tuple[str, Any]]:
        """Values that the classes of an object hold for all its instances."""
        found = []
        for kind in type(value).__mro__:
            if id(kind) in self._seen or not _of_users(kind):
                continue
            self._seen[id(kind)] = kind
            for name, kept in vars(kind).items():
                if not name.startswith("__") and isinstance(kept, _VALUES) and not isinstance(kept, str):
                    self._undo.append(_reattribute(kind, name, kept))
                    found.append((f"{kind.__name__}.{name}", kept))
        return found

    def _closure(self, value: Any, far: bool = False) -> list[tuple[str, Any]]:
        if isinstance(value, types.MethodType):
            return [("", value.__self__)] if isinstance(value.__self__, nn.Module) or self.far else []
        found = _referred(value) if self.far else []
        for name, cell in zip(value.__code__.co_freevars, value.__closure__ or (), strict=True):
            try:
                inside = cell.cell_contents
            except ValueError:  # not filled yet
                continue
            # Into arbitrary objects only to put them back: a closure may hold a data set, or a meter for the losses.
            if self.far or far or isinstance(inside, (*_SCALARS, Tensor, nn.Module, list, dict, deque, *_GENERATORS)):
                self._undo.append(_recell(cell, inside))
                found.append((name, inside))
        return found

    def _tensor(self, value: Tensor, path: str) -> None:
        if self.far and value.numel() > _FAR_NUMEL:
            return
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
        if value.dtype != object and not (self.far and value.size > _FAR_NUMEL):
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


_GENERATORS = (torch.Generator, random.Random, np.random.Generator, np.random.RandomState)
_VALUES = (*_SCALARS, Tensor, np.ndarray, list, dict, set, deque, *_GENERATORS)
_LIBRARIES = ("torch", "sfumato", "numpy", "builtins", "_thread", "threading", "functools", "typing", "collections")


def _of_users(kind: type) -> bool:
    return kind.__module__.split(".")[0] not in _LIBRARIES


def _users(value: Any) -> bool:
    """An object of the user's own class, with a call or without: not a library's, not a function, not a module."""
    plain = isinstance(value, (types.BuiltinFunctionType, types.ModuleType, types.CodeType, types.FrameType))
    return not plain and (_of_users(type(value)) or isinstance(value, types.SimpleNamespace))


def _referred(function: types.FunctionType) -> list[tuple[str, Any]]:
    """Objects that a function calls by a global name."""
    names = ((n, function.__globals__.get(n)) for n in function.__code__.co_names)
    return [(n, v) for n, v in names if isinstance(v, (list, dict, set, deque)) or (v is not None and _data(v))]


def _data(value: Any) -> bool:
    code = isinstance(value, (type, types.ModuleType, types.FunctionType, types.MethodType, *_SCALARS))
    return not code and (isinstance(value, (Tensor, *_GENERATORS)) or _users(value))


def _position(generator: Any) -> str:
    if isinstance(generator, torch.Generator):
        return str(generator.get_state().numpy().tobytes())
    if isinstance(generator, np.random.Generator):
        return str(generator.bit_generator.state)
    return str(generator.getstate() if isinstance(generator, random.Random) else generator.get_state(legacy=False))


def _rewind(generator: Any) -> Callable[[], None]:
    if isinstance(generator, np.random.Generator):
        state = generator.bit_generator.state
        return lambda: setattr(generator.bit_generator, "state", state)
    if isinstance(generator, random.Random):
        position = generator.getstate()
        return lambda: generator.setstate(position)
    before = generator.get_state()

    def undo() -> None:
        generator.set_state(before)

    return undo


def _reseed(generator: Any, seed: int) -> None:
    if isinstance(generator, torch.Generator):
        generator.manual_seed(seed)
    elif isinstance(generator, np.random.Generator):
        generator.bit_generator.state = type(generator.bit_generator)(seed).state
    else:
        generator.seed(seed)


def _reattribute(owner: Any, name: str, kept: Any) -> Callable[[], None]:
    def undo() -> None:
        if getattr(owner, name, None) is not kept:
            setattr(owner, name, kept)

    return undo


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
