"""From the value of ``--model`` to a module that is known to return one score per class."""

from __future__ import annotations

import importlib
import inspect
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType

import torch
from torch import nn

from ..errors import ConfigurationError
from .cnn import cnn
from .dense import linear, mlp
from .energy import energy
from .scattering import scattering
from .tanh_cnn import papernot, tramer_boneh

Shape = tuple[int, ...]
Factory = Callable[[Shape, int], nn.Module]

BUILT_IN: Mapping[str, Factory] = MappingProxyType(
    {
        "linear": linear,
        "mlp": mlp,
        "cnn": cnn,
        "tramer_boneh": tramer_boneh,
        "papernot": papernot,
        "scattering": scattering,
        "energy": energy,
    }
)


def build(spec: str, input_shape: Shape, classes: int) -> nn.Module:
    """The model ``spec`` names, on the CPU, checked on two blank records.

    ``spec`` is a built-in name or ``package.module:factory``; the factory receives those of ``input_shape`` (tuple of
    int, without the batch axis) and ``classes`` (int) that its signature names. Raises
    :class:`ConfigurationError` for an unknown model, a failing factory, or an output that is not (batch, classes).
    """
    known = BUILT_IN.get(spec.replace("-", "_"))
    model = known(input_shape, classes) if known else _custom(spec, input_shape, classes)
    _check_output(model, spec, input_shape, classes)
    return model


def _custom(spec: str, input_shape: Shape, classes: int) -> nn.Module:
    module_name, colon, attribute = spec.partition(":")
    if not (module_name and colon and attribute):
        raise ConfigurationError(
            f"unknown model {spec!r}; built in: {', '.join(BUILT_IN)}; your own: package.module:factory"
        )
    if (here := str(Path.cwd())) not in sys.path:
        sys.path.insert(0, here)  # a console script does not have the working directory on its path
    try:
        factory = getattr(importlib.import_module(module_name), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigurationError(f"--model {spec}: {error}") from None
    if not callable(factory):
        raise ConfigurationError(f"--model {spec}: {attribute} is not callable")
    try:
        model = factory(**_arguments(factory, spec, input_shape, classes))
    except ConfigurationError:
        raise
    except Exception as error:  # the user's own code: any failure is theirs to read, in one line
        raise ConfigurationError(f"--model {spec} failed: {type(error).__name__}: {error}") from error
    if not isinstance(model, nn.Module):
        raise ConfigurationError(f"--model {spec} returned {type(model).__name__}, not a torch.nn.Module")
    return model


def _arguments(factory: Callable[..., object], spec: str, input_shape: Shape, classes: int) -> dict[str, object]:
    offered: dict[str, object] = {"input_shape": input_shape, "classes": classes}
    try:
        parameters = inspect.signature(factory).parameters.values()
    except (TypeError, ValueError):
        return {}
    named = [p for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    needed = [p.name for p in named if p.default is p.empty and p.name not in offered]
    if needed:
        raise ConfigurationError(
            f"--model {spec} needs {', '.join(needed)}; a factory may take input_shape and classes, nothing else"
        )
    return {p.name: offered[p.name] for p in named if p.name in offered}


def _check_output(model: nn.Module, spec: str, input_shape: Shape, classes: int) -> None:
    """Blank records, not the user's: nothing about the data may reach an error message."""
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            output = model(torch.zeros(2, *input_shape))
    except Exception as error:
        raise ConfigurationError(
            f"model {spec} fails on records of shape {input_shape}: {type(error).__name__}: {error}"
        ) from error
    finally:
        model.train(training)
    found = tuple(output.shape) if isinstance(output, torch.Tensor) else type(output).__name__
    if found != (2, classes):
        raise ConfigurationError(
            f"model {spec} returns {found} for two records; a tensor of shape (2, {classes}), "
            f"one score per class, is needed"
        )
