"""Comparable runs: dropout off, every other random number from one seed, the precision that was really used."""

import inspect
import random
import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

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
_DROPPING_LAYER = re.compile("droppath|drop_path|stochasticdepth", re.IGNORECASE)


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


@contextmanager
def without_dropout(model: nn.Module) -> Iterator[None]:
    """Dropout is drawn anew for each shape of batch, and harmless: it must not stand in the way of a comparison."""
    flags, rates = [], []
    for m in model.modules():
        if isinstance(m, nn.modules.dropout._DropoutNd) or _DROPPING_LAYER.search(type(m).__name__):
            flags += [(c, c.training) for c in m.modules()]
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


class Constant(TorchFunctionMode):
    """Random numbers that are the same for every element: another one at each call, whatever the shape.

    So a model that draws noise can be compared between batches of different sizes.
    """

    _UNIFORM = frozenset({torch.rand, torch.rand_like, Tensor.uniform_})
    _NORMAL = frozenset({torch.randn, torch.randn_like, Tensor.normal_})
    _COIN = frozenset({torch.bernoulli, Tensor.bernoulli, Tensor.bernoulli_})

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        if not isinstance(out, Tensor) or func not in self._UNIFORM | self._NORMAL | self._COIN:
            return out
        self.calls += 1
        value = (0.5 + 0.618 * self.calls) % 1
        with torch.no_grad():
            if func in self._UNIFORM:
                spread = func is Tensor.uniform_ and len(args) > 2
                return out.fill_(args[1] + (args[2] - args[1]) * value if spread else value)
            if func in self._NORMAL:
                return out.fill_(value - 0.5)
            share = args[0] if func is not Tensor.bernoulli_ else (args[1] if len(args) > 1 else 0.5)
            return out.copy_((torch.as_tensor(share) > value).to(out).expand_as(out))


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
