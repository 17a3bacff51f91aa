"""How a batch is put through a model and a criterion."""

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from sfumato.checking.batches import TARGETS
from sfumato.errors import ConfigurationError

Criterion = Callable[..., Any] | None


def output_and_loss(model: nn.Module, criterion: Criterion, batch: Any, withhold: bool = False) -> tuple[Any, Tensor]:
    """(what the model returned, the loss as one number). ``withhold``: the model itself does not get the target."""
    given = {k: v for k, v in batch.items() if k not in TARGETS} if withhold and isinstance(batch, Mapping) else batch
    output = forward(model, criterion, given)
    return output, loss_of(criterion, output, batch)


def forward(model: nn.Module, criterion: Criterion, batch: Any) -> Any:
    """The model called as its signature wants it."""
    if isinstance(batch, Mapping):
        return model(**_accepted(model, batch))
    if isinstance(batch, (tuple, list)) and (len(batch) > 1 or _positional(model) < 1):
        inputs = tuple(batch) if criterion is None else tuple(batch[:-1])
    else:
        inputs = tuple(batch) if isinstance(batch, (tuple, list)) else (batch,)
    if len(inputs) != 1:
        return model(*inputs)
    (only,) = inputs
    if isinstance(only, Mapping) and not _names_one_mapping(model, only):
        return model(**_accepted(model, only))
    if isinstance(only, (tuple, list)) and _positional(model) >= max(2, len(only)):
        return model(*only)
    return model(only)


def loss_of(criterion: Criterion, output: Any, batch: Any) -> Tensor:
    """The criterion applied as its kind wants it; refuses anything but one number."""
    if criterion is None:
        loss = own_loss(output)
    elif isinstance(batch, Mapping) and not isinstance(criterion, nn.modules.loss._Loss):
        loss = criterion(output, batch)
    else:
        if isinstance(criterion, nn.modules.loss._Loss) and not isinstance(output, Tensor):
            output = _member(output, "logits", output)
        loss = criterion(output, target_of(batch))
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        shape = tuple(loss.shape) if isinstance(loss, Tensor) else type(loss).__name__
        raise ConfigurationError(
            f"The loss is {shape}, not one number.",
            found=shape,
            where="criterion",
            fix="reduce it over the batch, e.g. loss.mean(), and say so with loss_reduction=.",
        )
    return loss.reshape(())


def own_loss(output: Any) -> Any:
    """The loss that a model returns itself."""
    if isinstance(output, Tensor):
        return output
    loss = _member(output, "loss", None)
    if loss is None and isinstance(output, (tuple, list)) and output:
        loss = output[0]
    if loss is None:
        raise ConfigurationError(
            f"criterion is None, but the model returned a {type(output).__name__} without a loss.",
            found=type(output).__name__,
            where="criterion",
            fix="pass a criterion, or a batch with labels.",
        )
    return loss


def target_of(batch: Any) -> Any:
    """The last member, or the one that is named like a target."""
    if isinstance(batch, Mapping):
        for name in TARGETS:
            if name in batch:
                return batch[name]
        raise ConfigurationError(
            f"The batch has none of the keys {', '.join(TARGETS)} that a torch.nn loss could be applied to.",
            found=list(batch),
            where="batch",
            fix="pass criterion=lambda output, batch: ...",
        )
    return batch[-1] if isinstance(batch, (tuple, list)) and len(batch) > 1 else batch


def _member(output: Any, name: str, default: Any) -> Any:
    if isinstance(output, Mapping):
        return output.get(name, default)
    return getattr(output, name, default)


def _parameters(model: nn.Module) -> list[inspect.Parameter]:
    try:
        return list(inspect.signature(model.forward).parameters.values())
    except (TypeError, ValueError):
        return [inspect.Parameter("args", inspect.Parameter.VAR_POSITIONAL)]


def _accepted(model: nn.Module, batch: Mapping[str, Any]) -> dict[str, Any]:
    """The members that forward has a name for; all of them where it takes any."""
    parameters = _parameters(model)
    if any(p.kind is p.VAR_KEYWORD for p in parameters):
        return dict(batch)
    names = {p.name for p in parameters if p.kind is not p.POSITIONAL_ONLY}
    return {k: v for k, v in batch.items() if k in names}


def _names_one_mapping(model: nn.Module, value: Mapping[str, Any]) -> bool:
    """forward(self, batch): one argument, and none of the mapping's keys is its name."""
    parameters = _parameters(model)
    wide = any(p.kind is p.VAR_KEYWORD for p in parameters)
    return not wide and not any(p.name in value for p in parameters)


def _positional(model: nn.Module) -> int:
    """How many positional arguments forward takes."""
    parameters = _parameters(model)
    if any(p.kind is p.VAR_POSITIONAL for p in parameters):
        return 1 if isinstance(model, nn.Sequential) else torch.iinfo(torch.int32).max
    return sum(p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD) for p in parameters)
