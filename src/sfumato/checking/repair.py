"""sf.fix: replaces the layers that make records depend on each other, and keeps every learned weight."""

from dataclasses import dataclass
from typing import Literal

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.utils.parametrize import is_parametrized

from sfumato import _validate
from sfumato.errors import ConfigurationError, UnsupportedError

# As in Wu and He 2018, at most 32 groups. Where there is no position to average over, (B, C) or an image of 1 x 1, a
# group of one channel is always zero and one of two always ±1; 16 channels, their other choice, keep the signal.
_MOST_GROUPS = 32
_LEAST_CHANNELS, _LEAST_CHANNELS_FLAT = 4, 16
_INSTANCE: dict[type[_BatchNorm], type[_InstanceNorm]] = {
    nn.BatchNorm1d: nn.InstanceNorm1d,
    nn.BatchNorm2d: nn.InstanceNorm2d,
    nn.BatchNorm3d: nn.InstanceNorm3d,
}
_MEMBERS = {"weight", "bias", "running_mean", "running_var", "num_batches_tracked"}
_HOOKS = (
    "_forward_hooks",
    "_forward_pre_hooks",
    "_backward_hooks",
    "_backward_pre_hooks",
    "_state_dict_hooks",
    "_state_dict_pre_hooks",
    "_load_state_dict_pre_hooks",
    "_load_state_dict_post_hooks",
)
_BY_HAND = "replace it yourself by nn.GroupNorm and what it adds, or freeze it and keep it in eval() mode."


@dataclass(frozen=True, slots=True)
class Change:
    """One layer that ``sf.fix`` replaced: where (every path that leads there), what it was, is, and has lost."""

    paths: tuple[str, ...]
    found: str
    became: str
    lost: str

    def __str__(self) -> str:
        return f"{', '.join(p or 'the model itself' for p in self.paths)}: {self.found} -> {self.became}; {self.lost}"


class FrozenBatchNorm(_BatchNorm):
    """BatchNorm with constant statistics: in eval mode whatever ``model.train()`` says; the affine part may train.

    Its ``state_dict`` is that of the BatchNorm it stands for.
    """

    def train(self, mode: bool = True) -> "FrozenBatchNorm":
        """Stay in eval mode."""
        return super().train(False)

    def _check_input_dim(self, input: Tensor) -> None:
        if input.dim() < 2:
            raise ValueError(f"expected an input (B, C, ...), got {input.dim()} axes")


def fix(
    model: nn.Module,
    *,
    batch_norm: Literal["group", "instance", "frozen"] = "group",
    num_groups: int | None = None,
    changes: list[Change] | None = None,
) -> nn.Module:
    """The model, with the layers replaced that cannot be trained privately; learned weights are kept.

    Works in place and returns the same module (a new one only if ``model`` itself is a BatchNorm), with the very same
    ``Parameter`` objects: ``requires_grad``, dtype, device and an optimizer built before stay right. A layer used in
    two places stays shared. Either everything is replaced or, on an error, nothing.

    - BatchNorm and SyncBatchNorm normalise a record by its batch. By default they become GroupNorm with the same
      weight, bias and eps. Its running statistics are dropped, and as it normalises otherwise, a pretrained model
      needs some training to recover.
    - InstanceNorm that tracks running statistics, which would be published un-noised, stops tracking them.
    - Layers in ``eval()`` mode with nothing trainable are constants already and are left alone; keep them in ``eval()``
      during training, or use ``batch_norm="frozen"``.
    - Attention, recurrent layers and in-place activations need no replacement and are not touched.

    Args:
        batch_norm: what a BatchNorm becomes. ``"group"``; ``"instance"``: InstanceNorm, for inputs (B, C, ...) of
            more than one position; ``"frozen"``: its running statistics become constants, which ``model.train()`` does
            not undo. They are published with the model, so they must come from public data.
        num_groups: groups of every GroupNorm. By default, for each layer, the largest divisor of its channels up to
            32 that leaves 4 channels in a group (16 for BatchNorm1d and SyncBatchNorm, whose inputs may be (B, C)); 1
            if there is none.
        changes: a list that takes one ``Change`` for each layer replaced. A list of yours rather than a second return
            value, so that ``model = sf.fix(model)`` is right, and rather than an attribute, so that the model holds
            nothing of ours.

    Raises:
        UnsupportedError: a BatchNorm that does more than normalise (a subclass with a forward of its own, hooks,
            parametrizations), or that is not initialised yet. Nothing has been changed.
    """
    if not isinstance(model, nn.Module):
        raise ConfigurationError(f"model is a {type(model).__name__}, not a torch.nn.Module.", where="model")
    _validate.one_of("batch_norm", batch_norm, ("group", "instance", "frozen"))
    if num_groups is not None:
        _validate.count("num_groups", num_groups)
        if batch_norm != "group":
            raise ConfigurationError(
                f"num_groups={num_groups} has no meaning with batch_norm={batch_norm!r}.",
                found=num_groups,
                where="num_groups",
            )
    new, made = _planned(model, batch_norm, num_groups)
    for parent in list(model.modules()):
        for name, child in parent._modules.items():
            if child in new:
                parent._modules[name] = new[child]
    if changes is not None:
        changes.extend(made)
    return new.get(model, model)


def _planned(
    model: nn.Module, batch_norm: str, num_groups: int | None
) -> tuple[dict[nn.Module | None, nn.Module], list[Change]]:
    """{layer: its replacement} and what to say of it; the model is not touched."""
    paths: dict[nn.Module, list[str]] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        paths.setdefault(module, []).append(path)
    new: dict[nn.Module | None, nn.Module] = {}
    made = []
    for module, where in paths.items():
        if not isinstance(module, (_BatchNorm, _InstanceNorm)) or not _must_change(module, batch_norm):
            continue
        _refuse_unusual(module, where[0])
        if isinstance(module, _InstanceNorm):
            new[module] = _norm(type(module), module)
        elif batch_norm == "group":
            new[module] = _group(module, where[0], num_groups)
        else:
            new[module] = (_frozen if batch_norm == "frozen" else _instance)(module, where[0])
        kept = isinstance(new[module], FrozenBatchNorm) or module.running_mean is None
        lost = "nothing lost" if kept else "running statistics dropped"
        made.append(Change(tuple(where), repr(module), repr(new[module]), lost))
    _refuse_aliases(model, new)
    return new, made


def _must_change(module: _BatchNorm | _InstanceNorm, batch_norm: str) -> bool:
    if isinstance(module, FrozenBatchNorm) or (isinstance(module, _InstanceNorm) and not module.track_running_stats):
        return False
    if batch_norm == "frozen" and isinstance(module, _BatchNorm):
        return True
    trainable = any(p.requires_grad for p in module.parameters())
    return module.training or module.running_mean is None or trainable


def _refuse_unusual(module: _BatchNorm | _InstanceNorm, path: str) -> None:
    """What a replacement would drop without a word."""
    own = type(module).forward not in (_BatchNorm.forward, nn.SyncBatchNorm.forward, _InstanceNorm.forward)
    uninitialised = isinstance(module, LazyModuleMixin) and module.has_uninitialized_params()
    extra = {*module._parameters, *module._buffers, *module._modules} - _MEMBERS
    found, remedy = next(
        (
            reason
            for applies, *reason in (
                (uninitialised, "is not initialised yet", "run one forward on made-up inputs first."),
                (is_parametrized(module), "has parametrizations", "remove them first (parametrize.remove_...)."),
                (own, "has a forward of its own, which may do more than normalise", _BY_HAND),
                (
                    "forward" in vars(module),
                    "has its forward overridden",
                    "call engine.detach() or remove the wrapper.",
                ),
                (any(getattr(module, h) for h in _HOOKS), "has hooks", "remove them, and put them on again after."),
                (bool(extra), f"holds more than a normalisation does ({', '.join(sorted(extra))})", _BY_HAND),
            )
            if applies
        ),
        ("", ""),
    )
    if found:
        kind = type(module).__name__
        raise UnsupportedError(
            f"{path or 'The model'} is a {kind} that {found}, so it cannot be replaced without loss.",
            found=kind,
            where=path or kind,
            fix=remedy,
        )


def _refuse_aliases(model: nn.Module, new: dict[nn.Module | None, nn.Module]) -> None:
    """A layer that a module also holds in a plain attribute would go on being used there."""
    for path, parent in model.named_modules():
        for name, value in vars(parent).items():
            held = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else [value]
            if name != "_modules" and any(isinstance(v, nn.Module) and v in new for v in held):
                where = ".".join(p for p in (path, name) if p)
                raise UnsupportedError(
                    f"{where} holds a normalisation layer where nn.Module does not see it, so it cannot be replaced.",
                    where=where,
                    fix="hold it as a submodule, in an nn.ModuleList or an nn.ModuleDict.",
                )


def _groups(module: _BatchNorm, path: str, wanted: int | None) -> int:
    channels = module.num_features
    flat = isinstance(module, nn.BatchNorm1d)
    if wanted is not None and channels % wanted:
        raise ConfigurationError(
            f"num_groups={wanted} does not divide the {channels} channels of {path or 'the model'}.",
            found=wanted,
            where="num_groups",
            fix="choose a divisor, or leave num_groups away.",
        )
    if flat and channels == (wanted or 1):
        raise UnsupportedError(
            f"{path or 'The model'} would become a GroupNorm with one channel in a group, which turns inputs (B, C) "
            "into zeros.",
            found=channels,
            where=path or type(module).__name__,
            fix='fewer groups, batch_norm="frozen", or batch_norm="instance" if its inputs are (B, C, L).',
        )
    if wanted is not None:
        return wanted
    least = _LEAST_CHANNELS if isinstance(module, (nn.BatchNorm2d, nn.BatchNorm3d)) else _LEAST_CHANNELS_FLAT
    divisors = (g for g in range(min(_MOST_GROUPS, channels // least), 0, -1) if channels % g == 0)
    return next(divisors, 1)


def _group(module: _BatchNorm, path: str, num_groups: int | None) -> nn.Module:
    groups = _groups(module, path, num_groups)
    new = nn.GroupNorm(groups, module.num_features, eps=module.eps, affine=False)
    return _with_weights(new, module)


def _instance(module: _BatchNorm, path: str) -> nn.Module:
    kind = next((k for b, k in _INSTANCE.items() if isinstance(module, b)), None)
    if kind is None:
        raise UnsupportedError(
            f"{path or 'The model'} is a {type(module).__name__}, which does not say how many axes its inputs have, "
            "and each InstanceNorm is for one number.",
            found=type(module).__name__,
            where=path or type(module).__name__,
            fix='batch_norm="group".',
        )
    return _norm(kind, module)


def _norm(kind: type[_InstanceNorm], module: _BatchNorm | _InstanceNorm) -> nn.Module:
    return _with_weights(kind(module.num_features, eps=module.eps, affine=False), module)


def _frozen(module: _BatchNorm, path: str) -> nn.Module:
    if module.running_mean is None:
        raise UnsupportedError(
            f"{path or 'The model'} keeps no running statistics that could be frozen.",
            found=type(module).__name__,
            where=path or type(module).__name__,
            fix='batch_norm="group".',
        )
    new = FrozenBatchNorm(module.num_features, eps=module.eps, affine=False, track_running_stats=False)
    new.track_running_stats = True
    for name, buffer in module._buffers.items():
        new.register_buffer(name, buffer)
    return _with_weights(new, module)


def _with_weights(new: nn.GroupNorm | _InstanceNorm | _BatchNorm, old: _BatchNorm | _InstanceNorm) -> nn.Module:
    """The same Parameter objects, so that whatever refers to them stays right."""
    new.affine = old.affine
    new.register_parameter("weight", old.weight)
    new.register_parameter("bias", old.bias)
    return new.train(old.training)
