"""Where records first meet: the module whose inputs still hold each record by itself and whose outputs do not."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sfumato.checking import rows
from sfumato.checking.independence import Movement
from sfumato.checking.subject import Subject
from sfumato.ghost.indexing import named_tensors


@dataclass
class _Call:
    name: str
    inputs: list[Tensor]
    outputs: list[Tensor]


def _calls(s: Subject, members: list[int]) -> list[_Call]:
    """Every call of a module, in the order in which they end."""
    done: list[_Call] = []
    handles = []

    def kept(value: Any) -> list[Tensor]:
        return [t.detach().clone() for _, t in named_tensors(value) if t.is_floating_point()]

    def watch(name: str, module: nn.Module) -> None:
        stack: list[list[Tensor]] = []

        def enter(_: nn.Module, args: Any, kwargs: Any) -> None:
            stack.append(kept((args, kwargs)))

        def leave(_: nn.Module, args: Any, kwargs: Any, out: Any) -> None:
            done.append(_Call(name, stack.pop() if stack else [], kept(out)))

        handles.append(module.register_forward_pre_hook(enter, with_kwargs=True))
        handles.append(module.register_forward_hook(leave, with_kwargs=True))

    try:
        for name, module in s.model.named_modules():
            if not isinstance(module, torch.jit.ScriptModule):
                watch(name, module)
        s.run(members)
    finally:
        for h in handles:
            h.remove()
    return done


def first_mixing(s: Subject, m: Movement) -> str | None:
    """Path of the module, "" for the model itself; None if it cannot be told."""
    if not m.second:
        return None
    try:
        before, after = _calls(s, m.first), _calls(s, m.second)
    except Exception:  # noqa: BLE001  (only the place is at stake)
        return None
    if [c.name for c in before] != [c.name for c in after]:
        return None

    def moved(a: list[Tensor], b: list[Tensor]) -> bool:
        sizes = len(m.first), len(m.second)
        return len(a) == len(b) and any(_moved(x, y, sizes, m, s.tolerance) for x, y in zip(a, b, strict=True))

    for a, b in zip(before, after, strict=True):
        if moved(a.outputs, b.outputs) and not moved(a.inputs, b.inputs):
            return a.name
    return None


def _moved(a: Tensor, b: Tensor, sizes: tuple[int, int], m: Movement, tol: float) -> bool:
    if a.dim() != b.dim():
        return False
    fits = [
        k
        for k in range(a.dim())
        if a.shape[k] and a.shape[k] % sizes[0] == 0 and b.shape[k] * sizes[0] == a.shape[k] * sizes[1]
    ]
    fits = [k for k in fits if k == 0 or a.shape[k] == sizes[0]]
    return bool(fits) and not any(rows.stays(a, b, k, sizes, m.pairs, tol) for k in fits)


def criterion_mixes(s: Subject, m: Movement, axes: dict[str, int]) -> bool:
    """Whether the loss itself joins records: the gradient that it sends into a record's outputs depends on others.

    Called when the outputs do not move; what else could be at fault is a backward that mixes.
    """
    if s.criterion is None:
        return True  # it is part of the model, and not all that it uses is returned
    try:
        together = _output_gradients(s, m.first)
        return any(_differs(s, m, k, together, axes) for k in range(len(m.first)))
    except Exception:  # noqa: BLE001
        return True


def _differs(s: Subject, m: Movement, k: int, together: dict[str, Tensor], axes: dict[str, int]) -> bool:
    alone = _output_gradients(s, m.first[k : k + 1])
    for path, g in together.items():
        if (
            path in alone
            and path in axes
            and not rows.stays(g, alone[path], axes[path], (len(m.first), 1), [(k, 0)], s.tolerance)
        ):
            return True
    return not any(path in axes for path in together)


def _output_gradients(s: Subject, members: list[int]) -> dict[str, Tensor]:
    with s.quiet():
        output, loss = s.call(s.pool.take(members))
        named = {p: t for p, t in named_tensors(output) if t.requires_grad and t is not loss}
        found = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
    factor = len(members) if s.reduction == "mean" else 1
    return {p: g * factor for p, g in zip(named, found, strict=True) if g is not None}
