"""Comparable runs: dropout off, every other random number from one seed, the precision that was really used."""

import inspect
import random
import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

_DROPOUTS = {
    F.dropout, F.dropout1d, F.dropout2d, F.dropout3d, F.alpha_dropout, F.feature_alpha_dropout, torch.dropout,
    torch.dropout_, torch.feature_dropout, torch.feature_dropout_, torch.alpha_dropout, torch.alpha_dropout_,
    torch.feature_alpha_dropout, torch.feature_alpha_dropout_,
}  # fmt: skip
# Functions that drop inside themselves, and where the probability is among their positional arguments.
_WITH_DROPOUT: dict[Callable[..., Any], tuple[str, int]] = {
    F.scaled_dot_product_attention: ("dropout_p", 4),
    F.multi_head_attention_forward: (
        "dropout_p",
        list(inspect.signature(F.multi_head_attention_forward).parameters).index("dropout_p"),
    ),
}
_DROPPING_LAYER = re.compile(r"\w{0,12}?(Drop_?Path|StochasticDepth)\d?d?", re.IGNORECASE)
_DROPOUT_LAYERS = {
    nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout,
}  # fmt: skip


class _NoDropout(TorchFunctionMode):
    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in _DROPOUTS:
            x = args[0] if args else kwargs["input"]
            return x if kwargs.get("inplace") else x.clone()
        if func in _WITH_DROPOUT:
            name, at = _WITH_DROPOUT[func]
            if len(args) > at:
                args = (*args[:at], 0.0, *args[at + 1 :])
            else:
                kwargs = {**kwargs, name: 0.0}
        return func(*args, **kwargs)


def _drops_paths(m: nn.Module) -> bool:
    """By name, and with nothing inside: a block that is named after what it does is judged as it is."""
    empty = not (m._modules or m._parameters or m._buffers)
    return empty and _DROPPING_LAYER.fullmatch(type(m).__name__) is not None


@contextmanager
def without_dropout(model: nn.Module) -> Iterator[None]:
    """Dropout is drawn anew for each shape of batch, and harmless: it must not stand in the way of a comparison."""
    flags, rates = [], []
    for m in model.modules():
        if type(m) in _DROPOUT_LAYERS or _drops_paths(m):
            flags.append((m, m.training))
        elif isinstance(m, (nn.RNNBase, nn.MultiheadAttention)):
            rates.append((m, m.dropout))
    try:
        for m, _ in flags:
            m.training = False
        for m, _ in rates:
            m.dropout = 0.0
        with _NoDropout():
            yield
    finally:
        for m, flag in flags:
            m.training = flag
        for m, rate in rates:
            m.dropout = rate


class Constant(TorchDispatchMode):
    """Random numbers that are the same for every element: another one at each call, whatever the shape.

    So a model that draws noise can be compared between batches of different sizes.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.calls = 0

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name, overload = func._schema.name.removeprefix("aten::"), func._schema.overload_name  # type: ignore[attr-defined]
        if name.startswith("rrelu_with_noise") and not name.endswith("backward"):
            x, noise, lower, upper = (*args[:2], *(*args[2:4], 1 / 8, 1 / 3)[:2])
            noise.data.copy_(torch.where(x <= 0, (lower + upper) / 2, 1.0))
            return x.mul_(noise) if name.endswith("_") else x * noise
        out = func(*args, **(kwargs or {}))
        if name not in _DRAWS or not isinstance(out, Tensor):
            return out
        if name == "randperm":
            return torch.arange(len(out), out=out)
        self.calls += 1
        with torch.no_grad():
            return out.copy_(_drawn(name, overload, args, (0.5 + 0.618 * self.calls) % 1, out))


_UNIFORM, _NORMAL = {"rand", "rand_like", "uniform_"}, {"randn", "randn_like", "normal_", "normal", "cauchy_"}
_COIN, _POSITIVE = {"bernoulli", "bernoulli_"}, {"exponential_", "log_normal_", "geometric_"}
_WHOLE = {"randint", "randint_like", "random_"}
_DRAWS = _UNIFORM | _NORMAL | _COIN | _POSITIVE | _WHOLE | {"randperm"}


def _drawn(name: str, overload: str, args: tuple[Any, ...], value: float, out: Tensor) -> Tensor:
    """A number that could have been drawn; a tensor where the distribution is another one for each element."""
    if name in _COIN:
        share = args[0] if name == "bernoulli" and len(args) < 2 else args[1] if len(args) > 1 else 0.5
        return (torch.as_tensor(share) > value).to(out).expand_as(out)
    number: Any = value - 0.5 if name in _NORMAL else value
    if name == "normal":
        number = args[0] + number * (args[1] if len(args) > 1 else 1.0)
    elif name in _POSITIVE:
        number = 1.0 if name == "geometric_" else value + 0.2
    elif name == "uniform_" and len(args) > 2:
        number = args[1] + (args[2] - args[1]) * value
    elif name in _WHOLE:
        bounds = [a for a in args if isinstance(a, int)]
        low, high = (bounds[0], bounds[1]) if len(bounds) > 1 else (0, bounds[0] if bounds else 1)
        number = low + int(value * (high - low))
    return torch.as_tensor(number).to(out).expand_as(out)


_NUMPY = ("rand", "randn", "random", "random_sample", "standard_normal", "normal", "uniform")


@contextmanager
def constant_numpy() -> Iterator[None]:
    """The same for numpy's global generator."""

    def shaped(name: str) -> Callable[..., Any]:
        def draw(*args: Any, size: Any = None, **_: Any) -> Any:
            if name in ("rand", "randn"):
                size = args
            elif size is None and args:
                size = args[2] if len(args) > 2 else args[0] if len(args) == 1 else None
            return 0.37 if size is None or size == () else np.full(size, 0.37)

        return draw

    with ExitStack() as stack:
        for name in _NUMPY:
            stack.enter_context(patch.object(np.random, name, shaped(name)))
        yield


def seed_everything(seed: int) -> None:
    """Torch on every device, numpy and Python."""
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002


@contextmanager
def default_dtype(dtype: torch.dtype | None) -> Iterator[None]:
    """Tensors that a forward makes itself (a first hidden state) take the precision of the copy."""
    before = torch.get_default_dtype()
    if dtype is not None:
        torch.set_default_dtype(dtype)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        torch.set_default_dtype(before)


class Narrowest(TorchDispatchMode):
    """Fewest bits of any floating-point result: a model in double precision may still compute parts in float32."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.bits = 64

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        for t in tree_leaves(out):
            if isinstance(t, Tensor) and t.is_floating_point():
                self.bits = min(self.bits, torch.finfo(t.dtype).bits)
        return out
