"""Checkpoints: the public state of a training at its last release, in one file, restored whole or not at all."""

import logging
import math
import os
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from sfumato.accounting import Ledger
from sfumato.accounting.ledger_file import GENESIS
from sfumato.errors import ConfigurationError, DataError, LedgerError
from sfumato.session import stored
from sfumato.session.matching import check_module, check_optimizer, groups_of, kind_of, names_of, restore, unfit
from sfumato.session.tree import Json, Reader, Writer, mentioned

_LOG = logging.getLogger("sfumato")

# What a position and an optimizer's state mean: under another value the continuation would be another training.
BINDING = (
    *("unit", "adjacency", "sampler", "dataset_size", "expected_batch_size", "loss_reduction"),
    *("clipping", "clip_schedule", "noise_schedule"),
)


@dataclass(frozen=True)
class Stored:
    """A checkpoint that was read and found intact; nothing has been applied yet."""

    path: str
    ledger_head: str
    position: dict[str, Any]
    plan: dict[str, Any]
    extra: Any
    module: dict[str, Json]  # state_dict name: node
    versions: Json  # of the module's classes, by which load_state_dict tells old layouts
    optimizers: list[dict[str, Json]]  # kind, names of the parameters of every group, state node
    tensors: dict[str, Tensor]


def save(
    path: str | os.PathLike[str],
    *,
    module: nn.Module,
    optimizers: Sequence[torch.optim.Optimizer],
    position: Mapping[str, Any],
    plan: Mapping[str, Any],
    ledger_head: str,
    extra: Any = None,
) -> None:
    """Write the state of the last release to one file, atomically, durably, with mode 0600.

    Guarantee: nothing but what was released, what follows from it and public settings is written. No key, no
    generator, no record, no partial sum and no gradient: saved in the middle of a logical batch, the file holds the
    state of the last release, and the unfinished batch is not in it. Needs memory for two copies of all tensors.

    Args:
        position: where the training is: JSON values, all numbers finite; ``steps`` counts the releases.
        plan: the public settings, as JSON.
        ledger_head: hash of the ledger's last entry; :func:`admit` refuses to go on with a ledger that lacks it.
        extra: the caller's nested lists, tuples and dicts of numbers, strings and tensors, such as a scheduler's
            ``state_dict()``. What is put here is published with the file.

    Raises:
        UnsupportedError: a value that could not be restored exactly, named by its place; nothing was written.
        DataError: the file cannot be written; one that was there before is unchanged.
    """
    writer = Writer()
    document: dict[str, Any] = {
        "ledger_head": _checked_head(ledger_head, _steps(position)),
        "position": _public("position", position),
        "plan": _public("plan", plan),
        "torch": torch.__version__,
    }
    names = names_of(module)
    state = module.state_dict()
    document["module"] = [[name, writer.write(value, f"module.{name}")] for name, value in state.items()]
    document["versions"] = writer.write(getattr(state, "_metadata", {}), "module versions")
    document["optimizers"] = []
    for i, optimizer in enumerate(optimizers):
        where = f"optimizers[{i}].{type(optimizer).__qualname__}"
        document["optimizers"].append(
            {
                "kind": kind_of(optimizer),
                "names": groups_of(optimizer, names, where),
                "state": writer.write(optimizer.state_dict(), where),
            }
        )
    document["extra"] = writer.write(extra, "extra")
    stored.write(path, document, writer.tensors)


def load(path: str | os.PathLike[str]) -> Stored:
    """Read and check a checkpoint; runs nothing of it and changes nothing.

    Raises ``DataError`` for a file that is damaged, truncated, foreign, of a newer version or contradicts itself.
    """
    document, tensors = stored.read(path)
    where = str(path)
    try:
        optimizers = [
            {"kind": o["kind"], "names": o["names"], "state": o["state"]} for o in _of(list, document["optimizers"])
        ]
        named = {_of(str, name): node for name, node in _of(list, document["module"])}
        extra, position, plan = document["extra"], _of(dict, document["position"]), _of(dict, document["plan"])
        head = _checked_head(document["ledger_head"], _steps(position))
        _public("position", position)
        _public("plan", plan)
        if mentioned([*named.values(), extra, [o["state"] for o in optimizers]]) != tensors.keys():
            raise DataError("its tensors are not those that its document names.")
        reader = Reader(tensors, copies=False)
        versions = document["versions"]
        for node in [*named.values(), versions, *(o["state"] for o in optimizers)]:
            reader.read(node)
        found = Reader(tensors).read(extra)
    except (KeyError, TypeError, ValueError, RecursionError, LedgerError) as error:
        raise DataError(
            f"{where} contradicts itself: {error}", where=where, fix="load another checkpoint of this run."
        ) from error
    return Stored(where, head, position, plan, found, named, versions, optimizers, tensors)


def admit(checkpoint: Stored, ledger: Ledger, plan: Mapping[str, Any], same: Sequence[str] = BINDING) -> int:
    """Number of ledger entries younger than the checkpoint, once the training may go on from it; changes nothing.

    What was released after the checkpoint stays spent, and its steps, run again, are new releases with fresh noise.

    Raises:
        LedgerError: the ledger lacks the checkpoint's last entry: it is another one, or an older copy.
        ConfigurationError: the plan differs from the checkpoint's in one of ``same``.
    """
    younger = _younger(checkpoint, ledger)
    public = _public("plan", plan)
    for name in same:
        ours, theirs = public.get(name), checkpoint.plan.get(name)
        if ours != theirs:
            raise ConfigurationError(
                f"{name} is {ours!r} here and {theirs!r} in {checkpoint.path}: its position and optimizer state belong "
                "to another training.",
                found=ours,
                where=name,
                fix="call make_private with the arguments of the run that wrote it.",
            )
    _LOG.info(
        "resuming from %s at step %d; %d younger ledger entries stay spent, and steps run again are new releases",
        checkpoint.path,
        checkpoint.position["steps"],
        younger,
    )
    return younger


def apply(checkpoint: Stored, module: nn.Module, optimizers: Sequence[torch.optim.Optimizer]) -> None:
    """Restore the model and its optimizers, bit for bit, and drop pending gradients: all of it or nothing.

    Raises ``ConfigurationError``, with nothing changed, for other names, shapes, dtypes or ties of tensors, another
    kind or number of optimizers, or other parameter groups.
    """
    path, names = checkpoint.path, names_of(module)
    reader = Reader(checkpoint.tensors)
    weights = OrderedDict((name, reader.read(node)) for name, node in checkpoint.module.items())
    weights._metadata = reader.read(checkpoint.versions)  # type: ignore[attr-defined]
    check_module(module, weights, checkpoint.module, path)
    if len(optimizers) != len(checkpoint.optimizers):
        raise unfit(path, "the number of optimizers", len(optimizers), len(checkpoint.optimizers))
    states = []
    for i, (optimizer, kept) in enumerate(zip(optimizers, checkpoint.optimizers, strict=True)):
        states.append(Reader(checkpoint.tensors).read(kept["state"]))
        check_optimizer(optimizer, kept, states[-1], names, f"optimizers[{i}]", path)
    undo = _Undo(module, optimizers)
    try:
        for optimizer, state in zip(optimizers, states, strict=True):
            restore(optimizer, state)
        module.load_state_dict(weights)
    except BaseException as error:
        undo()
        if not isinstance(error, Exception):
            raise
        raise ConfigurationError(
            f"{path} fits by names and shapes, but could not be loaded: {error}; nothing was changed.",
            found=str(error),
            where=path,
        ) from error
    for p in module.parameters():
        p.grad = None


class _Undo:
    """Puts back what a failed ``load_state_dict``, which stops half way, has changed."""

    def __init__(self, module: nn.Module, optimizers: Sequence[torch.optim.Optimizer]):
        self.values = [(t, t.detach().clone()) for t in chain(module.parameters(), module.buffers())]
        own = [m for m in module.modules() if type(m).get_extra_state is not nn.Module.get_extra_state]
        self.extra = [(m, m.get_extra_state()) for m in own]
        # An optimizer's load_state_dict replaces both of these and changes neither.
        self.held = [(o, o.state, o.param_groups) for o in optimizers]

    def __call__(self) -> None:
        with torch.no_grad():
            for value, before in self.values:
                if not torch.equal(value, before):
                    value.copy_(before)
        for module, before in self.extra:
            module.set_extra_state(before)
        for optimizer, state, groups in self.held:
            optimizer.state, optimizer.param_groups = state, groups


# -- the ledger and the position ----------------------------------------------------------------------------------


def _younger(checkpoint: Stored, ledger: Ledger) -> int:
    if not ledger.contains(checkpoint.ledger_head):
        raise LedgerError(
            f"The ledger does not hold the last entry that {checkpoint.path} knows of, so the training would resume "
            "without its ledger and what it spent would be forgotten.",
            found=checkpoint.ledger_head,
            where=str(ledger.path or "ledger in memory"),
            fix="open the ledger that the run wrote, not an older copy; a ledger in memory ends with its process.",
        )
    hashes = [GENESIS, *(entry["hash"] for entry in ledger.entries())]
    return len(hashes) - 1 - hashes.index(checkpoint.ledger_head)


def _steps(position: Mapping[str, Any]) -> int:
    steps = position.get("steps")
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 0:
        raise ConfigurationError(f"position has steps={steps!r}, not a count.", found=steps, where="position")
    return steps


def _checked_head(head: object, steps: int) -> str:
    if not isinstance(head, str) or len(head) != 64 or not set(head) <= set("0123456789abcdef"):
        raise ConfigurationError(f"ledger_head={head!r} is not a SHA-256 hash.", found=head, where="ledger_head")
    if head == GENESIS and steps:
        raise LedgerError(
            f"The ledger is empty after {steps} releases: what they spent is not recorded.", found=steps, where="ledger"
        )
    return head


def _public(where: str, value: Any) -> Json:
    """Settings and positions: JSON values only, finite, so that they mean the same in every reader."""
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, float) and math.isfinite(value):
        return value
    if isinstance(value, (list, tuple)):
        return [_public(f"{where}[{i}]", v) for i, v in enumerate(value)]
    if isinstance(value, Mapping) and all(isinstance(k, str) for k in value):
        return {k: _public(f"{where}.{k}", v) for k, v in value.items()}
    raise ConfigurationError(f"{where} is {value!r}, not a finite JSON value.", found=value, where=where)


def _of(kind: type[Any], value: Any) -> Any:
    if not isinstance(value, kind):
        raise TypeError(f"{type(value).__name__} where {kind.__name__} is due")
    return value
