"""Low-rank adapters: the only trained parameters are two small matrices for each adapted layer.

W is frozen and the layer computes W·x + (alpha/rank)·B·A·x (Hu et al. 2021). With A frozen at public random numbers
(FFA-LoRA, Sun et al. 2024) the layer is linear in what is trained: the mean of the clients' layers is the layer of the
mean, and noise on B stays noise of the same size times A.
"""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Collection, Iterator
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sfumato import _validate
from sfumato.errors import ConfigurationError, UnsupportedError


class Adapted(nn.Module):
    """A frozen linear layer with an adapter: ``base(x) + (alpha/rank)·lora_b(lora_a(x))``.

    Args:
        base: ``nn.Linear``, or transformers' ``Conv1D``, whose weight is transposed.
        lora_a: (rank, inputs), uniform with variance 1/inputs, from ``seed`` and ``name`` alone: the same numbers
            on every machine, so that they need not be sent.
        lora_b: (outputs, rank), zero: a new adapter changes nothing.
    """

    def __init__(self, base: nn.Module, name: str, *, rank: int, alpha: float, freeze_a: bool, seed: int):
        super().__init__()
        weight = _weight(base)
        outputs, inputs = reversed(weight.shape) if _transposed(base) else weight.shape
        self.base = base
        self.made = (name, rank, alpha, freeze_a, seed)
        self.scale = alpha / rank
        self.lora_a = nn.Parameter(_public(seed, name, rank, inputs).to(weight), requires_grad=not freeze_a)
        self.lora_b = nn.Parameter(weight.new_zeros(outputs, rank))

    def forward(self, x: Tensor) -> Any:
        """(..., inputs) to (..., outputs)."""
        return self.base(x) + F.linear(F.linear(x, self.lora_a) * self.scale, self.lora_b)

    @property
    def weight(self) -> Tensor:
        """The weight of the plain layer that computes the same, in the layout of ``base``."""
        delta = self.scale * (self.lora_b @ self.lora_a)
        return _weight(self.base) + (delta.T if _transposed(self.base) else delta)

    @property
    def bias(self) -> Tensor | None:
        """That of ``base``."""
        bias = self.base.bias
        return bias if isinstance(bias, Tensor) else None


def inject(
    model: nn.Module,
    *,
    rank: int = 4,
    alpha: float = 8.0,
    targets: tuple[str, ...] | None = None,
    freeze_a: bool = True,
    seed: int = 0,
    whole: Collection[str] = (),
) -> tuple[str, ...]:
    """Put an adapter on every target, in place; return the names of the adapted modules.

    Nothing but the replaced modules changes; what is trained is for the caller to say (:func:`adapters` lists the
    matrices). Repeating the call with the same arguments changes nothing, so a copy of a prepared model can be
    prepared again.

    targets: names of linear layers, ends of names (``"query"``) or patterns (``"encoder.*.query"``). None: all linear
        layers within an attention module, or all in the model if it has no such layer; layers whose weight is shared
        with another module, or read by ``nn.MultiheadAttention`` behind their back, are left out.
    whole: names of parameters that are trained themselves; their layers get no adapter.

    Raises ``ConfigurationError`` for a target that matches nothing and for a model with other adapters already,
    ``UnsupportedError`` for a target that cannot have one.
    """
    rank = _validate.count("rank", rank)
    alpha = _validate.positive("alpha", alpha)
    if present := dict(_adapted(model)):
        _check_same(present, targets, (rank, alpha, freeze_a, seed))
        return tuple(present)
    chosen = _targets(model, targets, whole)
    for name in chosen:
        old = model.get_submodule(name)
        new = Adapted(old, name, rank=rank, alpha=alpha, freeze_a=freeze_a, seed=seed)
        new.train(old.training)
        _replace(model, old, new)
    return chosen


def merge(model: nn.Module) -> nn.Module:
    """Add every adapter to its frozen weight and take it out, in place; returns the same, now plain, model.

    Weights keep their identity and their ``requires_grad`` (False, where training was prepared by :func:`inject`'s
    caller). A model without adapters comes back unchanged.
    """
    for _, module in list(_adapted(model)):
        with torch.no_grad():
            _weight(module.base).copy_(module.weight)
        _replace(model, module, module.base)
    return model


def adapters(model: nn.Module) -> tuple[str, ...]:
    """Names of the matrices of all adapters that are trained."""
    return tuple(
        f"{name}.{part}"
        for name, m in _adapted(model)
        for part in ("lora_a", "lora_b")
        if getattr(m, part).requires_grad
    )


def matches(name: str, pattern: str) -> bool:
    """Whether a dotted name is, ends with, or fits the pattern."""
    return name == pattern or name.endswith(f".{pattern}") or fnmatchcase(name, pattern)


def _adapted(model: nn.Module) -> Iterator[tuple[str, Adapted]]:
    return ((name, module) for name, module in model.named_modules() if isinstance(module, Adapted))


def _weight(module: nn.Module) -> Tensor:
    weight = module.weight
    assert isinstance(weight, Tensor)
    return weight


def _transposed(module: nn.Module) -> bool:
    return not isinstance(module, nn.Linear)


def _linear(module: nn.Module) -> bool:
    """Whether ``module`` computes W·x + b and nothing else, with an ordinary parameter W."""
    if isinstance(module, nn.Linear):
        plain = type(module).forward is nn.Linear.forward
    else:
        plain = type(module).__name__ == "Conv1D" and type(module).__module__ == "transformers.pytorch_utils"
    weight = module._parameters.get("weight") if plain else None
    return weight is not None and weight.dim() == 2 and weight.dtype.is_floating_point


def _obstacles(model: nn.Module, names: list[str], whole: Collection[str]) -> dict[str, str]:
    """{linear layer: why it cannot have an adapter}, for those that cannot."""
    owners = Counter(id(p) for module in model.modules() for p in module._parameters.values())
    out: dict[str, str] = {}
    for name in names:
        if not name:
            out[name] = "it is the whole model"
        elif not {f"{name}.weight", f"{name}.bias"}.isdisjoint(whole):
            out[name] = "it is trained whole"
        elif isinstance(model.get_submodule(name.rpartition(".")[0]), nn.MultiheadAttention):
            out[name] = "nn.MultiheadAttention reads its weight without calling it"
        elif owners[id(model.get_submodule(name).weight)] > 1:
            out[name] = "another module shares its weight, which merging would change there too"
    return out


def _targets(model: nn.Module, patterns: tuple[str, ...] | None, whole: Collection[str]) -> tuple[str, ...]:
    linear = [name for name, module in model.named_modules() if _linear(module)]
    obstacles = _obstacles(model, linear, whole)
    if patterns is None:
        usable = [name for name in linear if name not in obstacles]
        chosen = [n for n in usable if any("attn" in part or "attention" in part for part in n.lower().split("."))]
        chosen = chosen or usable
    else:
        chosen = [name for name in linear if any(matches(name, pattern) for pattern in patterns)]
        for pattern in patterns:
            if not any(matches(name, pattern) for name in linear):
                raise ConfigurationError(
                    f"{pattern!r} matches no linear layer.",
                    found=pattern,
                    where="targets",
                    fix=f"the linear layers are {', '.join(linear[:12]) or 'none'}{', …' if len(linear) > 12 else ''}.",
                )
        for name in chosen:
            if name in obstacles:
                raise UnsupportedError(
                    f"{name or 'the model'} cannot have an adapter: {obstacles[name]}.", found=name, where=name
                )
    if not chosen:
        raise ConfigurationError(
            "there is no linear layer to put an adapter on.",
            where="model",
            fix="train other parameters instead (All, LastLayers, Named); a model that is one single nn.Linear goes "
            "into an nn.Sequential first.",
        )
    return tuple(chosen)


def _check_same(
    present: dict[str, Adapted], targets: tuple[str, ...] | None, made: tuple[int, float, bool, int]
) -> None:
    odd = [name for name, module in present.items() if module.made != (name, *made)]
    if targets is not None:
        odd += [name for name in present if not any(matches(name, pattern) for pattern in targets)]
        odd += [pattern for pattern in targets if not any(matches(name, pattern) for name in present)]
    if odd:
        raise ConfigurationError(
            f"the model has adapters already, and {odd[0]!r} does not fit the ones asked for.",
            found=odd[0],
            where="model",
            fix="merge(model) them first.",
        )


def _replace(model: nn.Module, old: nn.Module, new: nn.Module) -> None:
    """Everywhere: a layer used in two places stays shared."""
    for parent in list(model.modules()):
        if parent is not new and parent is not old:
            for name, child in list(parent._modules.items()):
                if child is old:
                    parent._modules[name] = new


def _public(seed: int, name: str, rank: int, inputs: int) -> Tensor:
    key = hashlib.sha256(f"sfumato lora\0{seed}\0{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(key[:8], "little"))
    # Uniform numbers are the raw bits of the generator; normal ones would differ in the last bit between machines.
    return (torch.rand(rank, inputs, generator=generator) * 2.0 - 1.0) * math.sqrt(3.0 / inputs)
