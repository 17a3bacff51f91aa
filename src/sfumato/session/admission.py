"""Which models and optimizers can be made private at all."""

from collections.abc import Sequence

import torch
from torch import nn

from sfumato.errors import ConfigurationError, UnsupportedError
from sfumato.ghost import refuse_batch_statistics

_REFUSED_OPTIMIZERS: dict[type[torch.optim.Optimizer], tuple[str, str]] = {
    torch.optim.LBFGS: (
        "evaluates the loss several times on one draw, and each evaluation would be a release of its own",
        "use SGD, Adam or another optimizer that evaluates once a step.",
    ),
    torch.optim.SparseAdam: (
        "takes sparse gradients, and a private gradient is dense: every row gets noise",
        "use torch.optim.Adam.",
    ),
}


def check_model(module: nn.Module, optimizers: Sequence[torch.optim.Optimizer]) -> None:
    """A module that can be made private, and optimizers that train nothing else."""
    if not isinstance(module, nn.Module):
        raise ConfigurationError(
            f"module is a {type(module).__name__}, not a torch.nn.Module.", found=type(module).__name__
        )
    if not optimizers:
        raise ConfigurationError("optimizer is an empty sequence.", found=optimizers, where="optimizer")
    known = {id(p): n for n, p in module.named_parameters()}
    trained: set[int] = set()
    for optimizer in optimizers:
        _check_optimizer(optimizer, known)
        own = {id(p) for g in optimizer.param_groups for p in g["params"]}
        if twice := own & trained:
            raise ConfigurationError(
                f"{known[next(iter(twice))]} belongs to two optimizers.",
                found=known[next(iter(twice))],
                where="optimizer",
                fix="give every parameter to one optimizer.",
            )
        trained |= own
    refuse_module(module)


def _check_optimizer(optimizer: torch.optim.Optimizer, known: dict[int, str]) -> None:
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise ConfigurationError(
            f"optimizer is a {type(optimizer).__name__}, not a torch.optim.Optimizer.", found=type(optimizer).__name__
        )
    for kind, (why, fix) in _REFUSED_OPTIMIZERS.items():
        if isinstance(optimizer, kind):
            raise UnsupportedError(f"{kind.__name__} {why}.", found=kind.__name__, where="optimizer", fix=fix)
    foreign = [tuple(p.shape) for g in optimizer.param_groups for p in g["params"] if id(p) not in known]
    if foreign:
        raise UnsupportedError(
            f"The optimizer trains {len(foreign)} tensors that are not parameters of the module (shapes "
            f"{foreign[:3]}), so their gradients would be neither clipped nor noised.",
            found=foreign,
            where="optimizer",
            fix="build the optimizer from module.parameters().",
        )


def refuse_module(module: nn.Module) -> None:
    """A model that cannot be made private, whatever its inputs are."""
    wrappers = (nn.DataParallel, nn.parallel.DistributedDataParallel)
    compiled = hasattr(module, "_orig_mod") and hasattr(module, "dynamo_ctx")
    if isinstance(module, wrappers) or compiled or isinstance(module, torch.jit.ScriptModule):
        raise UnsupportedError(
            f"{type(module).__name__} runs the model where its operations cannot be seen, so they cannot be clipped.",
            found=type(module).__name__,
            where="module",
            fix="make the plain module private, in one process and not compiled.",
        )
    if not any(p.requires_grad for p in module.parameters()):
        raise ConfigurationError(
            "The module has no trainable parameter.",
            where="module",
            fix="call requires_grad_(True) on what is to be trained.",
        )
    refuse_batch_statistics(module, "")


__all__ = ["check_model", "refuse_module"]
