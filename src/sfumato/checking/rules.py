"""The contract test of a rule that users register: is it the gradient of each record alone?"""

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from sfumato.errors import ConfigurationError, GradientMismatch
from sfumato.ghost import record
from sfumato.ghost.rules import user


class _Only(nn.Module):
    """A model that is one operation; some of its arguments are parameters."""

    def __init__(self, op: Any, arguments: dict[str, Any], parameters: Sequence[str]):
        super().__init__()
        self.op, self.names = getattr(op, "apply", op), list(arguments)
        for name in parameters:
            self.register_parameter(name, nn.Parameter(arguments[name].detach().clone()))

    def forward(self, *inputs: Any) -> Tensor:
        rest = iter(inputs)
        out: Tensor = self.op(*(getattr(self, n) if n in self._parameters else next(rest) for n in self.names))
        return out


def check_rule(op: Any, *args: Any, parameters: Sequence[str], tolerance: float | None = None) -> None:
    """Prove the rule of ``op`` on one example: its forward and all its gradients against autograd, record by record.

    ``args`` are arguments of one call with B >= 2 records on axis 0, ``parameters`` the names (in the rule's signature)
    of those that are parameters. Each record is run alone through ``op`` and its own backward. ``tolerance`` is
    relative; None: 1e-7 for float64 and 1e-3 below. Use float64 if the operation has it, and sizes that all differ.

    Raises:
        GradientMismatch: the operation mixes records, or a gradient of the rule is not that of the record alone.
        ConfigurationError: ``op`` has no rule, or the example cannot show anything.
    """
    model, arguments = _model(op, args, parameters)
    inputs = [v.detach().clone() if isinstance(v, Tensor) else v for n, v in arguments.items() if n not in parameters]
    carriers = [i for i, v in enumerate(inputs) if isinstance(v, Tensor) and v.dim()]
    sizes = {inputs[i].shape[0] for i in carriers}
    if len(sizes) != 1 or (records := sizes.pop()) < 2:
        raise ConfigurationError(
            "The example must have the same number of records, two or more, on axis 0 of every input.",
            found=[tuple(inputs[i].shape) for i in carriers],
            fix="pass at least two records.",
        )
    floating = [i for i in carriers if inputs[i].is_floating_point()]
    for i in floating:
        inputs[i].requires_grad_()
    with record(model, loss_reduction="sum") as tape:
        out = model(*inputs)
        slope = torch.linspace(0.5, 1.5, out[0].numel(), dtype=out.dtype, device=out.device).reshape(out.shape[1:])
        ((out.square() + out) * slope).sum().backward()
    eps = tolerance if tolerance is not None else 1e-7 if out.dtype == torch.float64 else 1e-3
    for b in range(records):
        alone = [
            v[b : b + 1].detach().requires_grad_(v.requires_grad) if i in carriers else v for i, v in enumerate(inputs)
        ]
        single = model(*alone)
        _same(f"the output of record {b}", out[b : b + 1], single, eps, "the operation mixes records: refuse it")
        wanted = [*model.parameters(), *(alone[i] for i in floating)]
        grads = torch.autograd.grad(((single.square() + single) * slope).sum(), wanted, allow_unused=True)
        for (name, p), want in zip(model.named_parameters(), grads, strict=False):
            _same(f"the gradient of record {b} for {name}", tape.per_sample(name)[b], _or_zero(want, p), eps, _FIX)
        for i, want in zip(floating, grads[len(list(model.parameters())) :], strict=True):
            got = _or_zero(inputs[i].grad, inputs[i])[b : b + 1]
            _same(f"the gradient of record {b} for input {i}", got, _or_zero(want, alone[i]), eps, _FIX)


_FIX = "compare the rule with the backward of the operation for one record"


def _model(op: Any, args: tuple[Any, ...], parameters: Sequence[str]) -> tuple[_Only, dict[str, Any]]:
    gradients = user.find(getattr(op, "apply", getattr(op, "_opoverload", op)))
    if gradients is None:
        raise ConfigurationError(f"{op!r} has no rule.", found=op, fix="register one with sf.rule first.")
    arguments = dict(list(inspect.signature(gradients).bind(None, *args).arguments.items())[1:])
    missing = [n for n in parameters if not isinstance(arguments.get(n), Tensor)]
    if missing or not parameters:
        raise ConfigurationError(
            f"parameters={list(parameters)!r} must name tensors among {list(arguments)}.",
            found=missing,
            fix="name them.",
        )
    return _Only(op, arguments, parameters), arguments


def _or_zero(gradient: Tensor | None, like: Tensor) -> Tensor:
    return torch.zeros_like(like) if gradient is None else gradient


def _same(what: str, got: Tensor, want: Tensor, eps: float, fix: str) -> None:
    got, want = got.detach().double(), want.detach().double()
    error = float((got - want).abs().max()) if want.numel() else 0.0
    scale = float(want.abs().max()) if want.numel() else 0.0
    if not error <= eps * max(scale, 1e-30) + eps * 1e-6:
        raise GradientMismatch(
            f"{what[0].upper()}{what[1:]} is off by {error:.3g} (it is of size {scale:.3g}).",
            found=error,
            fix=f"{fix}.",
        )
