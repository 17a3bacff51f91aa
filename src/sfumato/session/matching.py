"""Whether a stored model and optimizer are those at hand, judged before either is changed, and how they are restored.

Every function raises ``ConfigurationError`` with nothing changed.
"""

from typing import Any

import torch
from torch import Tensor, nn

from sfumato.errors import ConfigurationError, UnsupportedError
from sfumato.session.tree import Json, memory


def names_of(module: nn.Module) -> dict[int, str]:
    """{id of a parameter: its first name}."""
    return {id(p): name for name, p in module.named_parameters()}


def kind_of(optimizer: torch.optim.Optimizer) -> str:
    """Where the optimizer's class is defined, and its name."""
    return f"{type(optimizer).__module__}.{type(optimizer).__qualname__}"


def groups_of(optimizer: torch.optim.Optimizer, names: dict[int, str], where: str) -> list[list[str]]:
    """Names of the parameters of every group: two of one shape in another order would swap their state unseen."""
    missing = [tuple(p.shape) for g in optimizer.param_groups for p in g["params"] if id(p) not in names]
    if missing:
        raise UnsupportedError(
            f"{where} trains a {missing[0]} tensor that is no parameter of the module, so it would not be stored.",
            found=missing,
            where=where,
            fix="register it in the module.",
        )
    return [[names[id(p)] for p in g["params"]] for g in optimizer.param_groups]


def check_module(module: nn.Module, kept: dict[str, Any], nodes: dict[str, Json], path: str) -> None:
    """The same names, shapes, dtypes and ties. ``kept`` are the stored values, ``nodes`` say which share memory."""
    state = module.state_dict()
    for name in sorted(state.keys() ^ kept.keys()):
        raise unfit(path, name, *(("present", "missing") if name in state else ("missing", "present")))
    for name, value in state.items():
        if _looks(value) != _looks(kept[name]):
            raise unfit(path, name, _looks(value), _looks(kept[name]))
    tensors = [name for name, value in state.items() if isinstance(value, Tensor)]
    # Tied here and apart there, or the reverse: loading would succeed, and another model would be trained.
    here = {memory(state[name]): name for name in tensors}
    there = {nodes[name]["tensor"]: name for name in tensors}
    for name in tensors:
        ours, theirs = here[memory(state[name])], there[nodes[name]["tensor"]]
        if ours != theirs:
            raise unfit(path, name, f"one tensor with {ours}", f"one with {theirs}")


def _looks(value: object) -> str:
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')} {tuple(value.shape)}"
    return "extra state"


def check_optimizer(
    optimizer: torch.optim.Optimizer, kept: dict[str, Json], state: Any, names: dict[int, str], where: str, path: str
) -> None:
    """The same class over the same parameters in the same groups, and a state that can belong to them."""
    groups = groups_of(optimizer, names, where)
    if kind_of(optimizer) != kept["kind"]:
        raise unfit(path, where, kind_of(optimizer), kept["kind"])
    if groups != kept["names"]:
        raise unfit(path, where, f"over the groups {groups}", kept["names"])
    try:
        for ours, theirs in zip(optimizer.state_dict()["param_groups"], state["param_groups"], strict=True):
            if ours["params"] != theirs["params"]:
                raise ValueError("a group lists other parameters than it names")
            for name in (ours.keys() & theirs.keys()) - {"params"}:
                if not _alike(ours[name], theirs[name]):
                    raise ValueError(f"{name} is {theirs[name]!r}, and here {ours[name]!r}")
        parameters = _by_index(optimizer, state)
        for index, entry in state["state"].items():
            for key, value in entry.items():
                if not _fits(optimizer, value, parameters[index]):
                    raise ValueError(f"{key} of {names[id(parameters[index])]} has shape {tuple(value.shape)}")
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ConfigurationError(
            f"{where} of {path} does not fit {kind_of(optimizer)}: {error}; nothing was changed.",
            found=str(error),
            where=where,
            fix="build the optimizer as in the run that wrote it.",
        ) from error


def restore(optimizer: torch.optim.Optimizer, state: Any) -> None:
    """``load_state_dict`` without its casts.

    It gives every floating state tensor the dtype of its parameter, which loses bits of a wider one, and rebuilds
    strings as iterables.
    """
    optimizer.load_state_dict(state)
    for index, parameter in _by_index(optimizer, state).items():
        if index in state["state"]:
            optimizer.state[parameter] = _exactly(optimizer.state[parameter], state["state"][index])


def _exactly(cast: Any, kept: Any) -> Any:
    """The stored value, on the device that ``load_state_dict`` chose for it."""
    if isinstance(kept, Tensor):
        return cast if cast.dtype == kept.dtype else kept.to(cast.device)
    if isinstance(kept, dict):
        return {k: _exactly(cast[k], v) for k, v in kept.items()}
    if isinstance(kept, (list, tuple)):
        return type(kept)(_exactly(c, v) for c, v in zip(cast, kept, strict=True))
    return kept


def _alike(ours: object, theirs: object) -> bool:
    """Two values of one hyperparameter: any two numbers (an ``lr`` may be a tensor), else two of one kind."""

    def sort(value: object) -> str:
        number = isinstance(value, (int, float, Tensor)) and not isinstance(value, bool)
        return "number" if number else "row" if isinstance(value, (list, tuple)) else type(value).__name__

    return ours is None or theirs is None or sort(ours) == sort(theirs)


def _fits(optimizer: torch.optim.Optimizer, value: object, parameter: Tensor) -> bool:
    """Whether a state tensor of an optimizer of PyTorch has the parameter's shape, or one that factors it."""
    if not isinstance(value, Tensor) or value.numel() == 1 or not type(optimizer).__module__.startswith("torch."):
        return True
    return value.dim() == parameter.dim() and all(
        a in (1, b) for a, b in zip(value.shape, parameter.shape, strict=True)
    )


def _by_index(optimizer: torch.optim.Optimizer, state: Any) -> dict[Any, Tensor]:
    indices = [i for group in state["param_groups"] for i in group["params"]]
    return dict(zip(indices, (p for group in optimizer.param_groups for p in group["params"]), strict=True))


def unfit(path: str, where: str, ours: object, theirs: object) -> ConfigurationError:
    """The error for a model or an optimizer other than the stored one."""
    return ConfigurationError(
        f"{where} is {ours} here and {theirs} in {path}; nothing was changed.",
        found=ours,
        where=where,
        fix="build the model and the optimizers as in the run that wrote it.",
    )
