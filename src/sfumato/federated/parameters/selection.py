"""What is trained: a public choice of parameters, as one flat vector that is read from a model and written into it."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import get_args

import torch
from torch import Tensor, nn

from sfumato.errors import ConfigurationError, UnsupportedError

from ..wire.schema import Schema, Shape
from . import lora
from .choices import All, LastLayers, LoRA, Named, TopK, Train
from .scores import client_score, scores_from_public, scores_from_released

__all__ = [
    "All",
    "LastLayers",
    "LoRA",
    "Named",
    "TopK",
    "Train",
    "Trained",
    "choose",
    "client_score",
    "prepare",
    "scores_from_public",
    "scores_from_released",
]


@dataclass(frozen=True, eq=False)
class Trained:
    """Where the numbers of a flat vector lie in a model.

    schema: of the vector. names: parameters, in its order; a tied one goes by its first name.
    index: None, or (d,) int64 sorted: the trained positions among all numbers of ``names``. The schema then has an
        entry for each tensor that has some; unless it has all of them, its name ends with a hash of the positions.
    rest: all numbers of ``names`` when coordinates were chosen. The positions that are not trained keep these values:
        local training may move them, :meth:`read` leaves them out and :meth:`write` puts them back.
    """

    schema: Schema
    names: tuple[str, ...]
    index: Tensor | None = None
    rest: Tensor | None = None

    def read(self, model: nn.Module) -> Tensor:
        """(d,) float32, a copy on the device of the model."""
        flat = torch.cat([p.detach().reshape(-1).float() for p in self.parameters(model)])
        return flat if self.index is None else flat[self.index.to(flat.device)]

    def write(self, model: nn.Module, vector: Tensor) -> None:
        """Overwrite the parameters in place; they stay the same objects. Raises ``ConfigurationError`` for a vector
        that is not (d,)."""
        if tuple(vector.shape) != (self.schema.size,):
            raise ConfigurationError(
                f"a vector of shape {tuple(vector.shape)} does not hold the {self.schema.size} trained numbers.",
                found=tuple(vector.shape),
                where="vector",
            )
        parameters = self.parameters(model)
        flat = vector.detach().to(parameters[0].device, torch.float32)
        if self.index is not None and self.rest is not None:
            flat = self.rest.to(flat.device).index_copy(0, self.index.to(flat.device), flat)
        with torch.no_grad():
            for p, piece in zip(parameters, flat.split([p.numel() for p in parameters]), strict=True):
                p.copy_(piece.view_as(p))

    def parameters(self, model: nn.Module) -> list[nn.Parameter]:
        """The tensors of ``names``."""
        return [model.get_parameter(name) for name in self.names]


def prepare(model: nn.Module, train: Train) -> Trained:
    """Make exactly the chosen parameters trainable, in place, and say where they lie; LoRA adds its adapters.

    Under :class:`TopK` these are all candidates; :func:`choose` narrows them once there are scores. Calling it again
    with the same arguments, also on a copy of the model, gives the same schema.

    Raises ``ConfigurationError`` if nothing is chosen or a name matches nothing, and ``UnsupportedError`` for layers
    that keep running statistics: they are moved by private data, are not part of the update and would never be noised.
    """
    _check_state(model)
    match train:
        case All() | TopK():
            names = [name for name, p in model.named_parameters() if p.requires_grad]
        case LastLayers(count):
            names = _last(model, count)
        case Named(patterns):
            names = _named(model, patterns)
        case LoRA():
            names = _low_rank(model, train)
        case _:
            kinds = ", ".join(kind.__name__ for kind in get_args(Train))
            raise ConfigurationError(f"train={train!r} is no choice.", found=train, where="train", fix=f"use {kinds}.")
    return _only(model, names)


def choose(train: TopK, scores: Tensor, prepared: Trained, model: nn.Module) -> Trained:
    """The ``prepared`` candidates with the highest scores; makes exactly them trainable, in place.

    ``scores``: one for each entry of ``prepared.schema`` (tensors) or each number (coordinates); they must be free or
    paid for, as :class:`TopK` says, which cannot be checked here. Of equal scores the first ones win. With
    coordinates, ``model`` holds the values at which all others stay.
    Raises ``ConfigurationError`` for scores of another shape or that are not finite.
    """
    candidates = prepared.schema.size if train.granularity == "coordinate" else len(prepared.names)
    if tuple(scores.shape) != (candidates,) or not bool(torch.isfinite(scores).all()) or prepared.index is not None:
        raise ConfigurationError(
            f"scores of shape {tuple(scores.shape)} are not one finite number for each of {candidates} candidates.",
            found=tuple(scores.shape),
            where="scores",
            fix="score what prepare() returned, with the same granularity.",
        )
    wanted = train.count if train.count is not None else math.ceil((train.fraction or 1.0) * candidates)
    order = torch.sort(scores.detach().cpu().double(), descending=True, stable=True).indices
    best = order[: min(wanted, candidates)].sort().values
    if train.granularity == "tensor":
        return _only(model, [prepared.names[k] for k in best.tolist()])
    return _coordinates(model, prepared, best)


def _coordinates(model: nn.Module, prepared: Trained, index: Tensor) -> Trained:
    entries: list[tuple[str, Shape]] = []
    names: list[str] = []
    kept: list[Tensor] = []
    start = before = 0  # of the tensor among all candidates, and among the numbers of `names`
    for (name, shape), parameter in zip(prepared.schema.entries, prepared.names, strict=True):
        size = math.prod(shape)
        local = index[(index >= start) & (index < start + size)] - start
        start += size
        if len(local):
            mark = hashlib.sha256(local.numpy().astype("<i8").tobytes()).hexdigest()[:16]
            entries.append((name, shape) if len(local) == size else (f"{name}#{mark}", (len(local),)))
            names.append(parameter)
            kept.append(local + before)
            before += size
    whole = _only(model, names)
    return Trained(Schema(tuple(entries)), tuple(names), torch.cat(kept), whole.read(model))


def _only(model: nn.Module, names: Iterable[str]) -> Trained:
    """Check the choice, then set ``requires_grad`` of every parameter."""
    chosen = set(names)
    parameters = [(name, p) for name, p in model.named_parameters() if name in chosen]
    if not parameters:
        raise ConfigurationError(
            "nothing is trained: no parameter was chosen, or none of them has requires_grad.",
            where="train",
            fix="name parameters with Named, or set requires_grad before.",
        )
    _check_memory(model, parameters)
    schema = Schema.of(parameters)
    for name, p in model.named_parameters():
        p.requires_grad_(name in chosen)
    return Trained(schema, tuple(name for name, _ in parameters))


def _check_memory(model: nn.Module, parameters: Sequence[tuple[str, nn.Parameter]]) -> None:
    for name, p in parameters:
        if isinstance(p, nn.UninitializedParameter) or p.is_meta or p.layout != torch.strided:
            raise UnsupportedError(
                f"{name} has no values in memory yet, or is sparse.",
                where=name,
                fix="run the model once on public data, so that lazy layers know their shapes.",
            )
    homes: dict[tuple[str, int], str] = {}
    wanted = {name for name, _ in parameters}
    for name, p in model.named_parameters():
        if isinstance(p, nn.UninitializedParameter) or p.is_meta or p.numel() == 0:
            continue
        first = homes.setdefault((str(p.device), p.data_ptr()), name)
        if first != name and {first, name} & wanted:
            raise UnsupportedError(
                f"{name} and {first} are different parameters in the same memory.",
                where=name,
                fix="tie them as one nn.Parameter, which is trained once.",
            )


def _check_state(model: nn.Module) -> None:
    """Refuse running statistics that training would move; constant ones (``train()`` does not undo them) are fine."""
    for name, module in model.named_modules():
        if module._buffers.get("running_mean") is None and module._buffers.get("running_var") is None:
            continue
        before = {id(m): m.training for m in module.modules()}
        moved = module.train(True).training
        for m in module.modules():
            m.training = before[id(m)]
        if moved:
            raise UnsupportedError(
                f"{name or 'the model'} ({type(module).__name__}) keeps running statistics: training moves them by "
                "private data, they are no part of the update, and so would never be clipped or noised.",
                found=type(module).__name__,
                where=name,
                fix="sf.fix(model) replaces it with GroupNorm; sf.fix(model, batch_norm='frozen') makes statistics of "
                "public data constants.",
            )


def _last(model: nn.Module, count: int) -> list[str]:
    first = {id(p): name for name, p in model.named_parameters()}
    layers = [module for module in model.modules() if any(p is not None for p in module._parameters.values())]
    if count > len(layers):
        raise ConfigurationError(
            f"count={count}: the model has {len(layers)} modules with parameters.", found=count, where="count"
        )
    return [first[id(p)] for module in layers[-count:] for p in module._parameters.values() if p is not None]


def _named(model: nn.Module, patterns: Sequence[str]) -> list[str]:
    first = {id(p): name for name, p in model.named_parameters()}
    found = []
    for pattern in patterns:
        hits = [
            first[id(p)]
            for name, p in model.named_parameters(remove_duplicate=False)
            if name == pattern or name.startswith(f"{pattern}.") or fnmatchcase(name, pattern)
        ]
        if not hits:
            raise ConfigurationError(
                f"{pattern!r} matches no parameter.",
                found=pattern,
                where="patterns",
                fix="take names from model.named_parameters(), or those of modules.",
            )
        found += hits
    return found


def _low_rank(model: nn.Module, train: LoRA) -> list[str]:
    whole = _named(model, train.also) if train.also else []
    lora.inject(
        model,
        rank=train.rank,
        alpha=train.alpha,
        targets=train.targets,
        freeze_a=train.freeze_a,
        seed=train.seed,
        whole=frozenset(whole),
    )
    return [*whole, *lora.adapters(model)]
