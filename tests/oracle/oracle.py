"""The oracle: per-sample gradients by a plain autograd loop over microbatches of one, in float64.

It shares nothing with the engine: no capture, no terms, no rules. A ``Case`` is a model, its inputs and the lowest
tier it may be computed on; ``check`` compares everything that ``sf.record`` hands out with the loop.
"""

import copy
import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

import sfumato as sf

B = 4
TIERS = ("rule", "vmap", "microbatch")
R = torch.randn
Loss = Callable[[Any], Tensor]


@dataclass(frozen=True)
class Shared:
    """An input without a batch axis."""

    value: Tensor


class Net(nn.Module):
    """A model written as one function of itself and its inputs; tuples become parameters of that shape."""

    def __init__(self, forward: Callable[..., Any], **members: Any):
        super().__init__()
        self.body = forward
        for name, value in members.items():
            setattr(self, name, nn.Parameter(torch.randn(value)) if isinstance(value, tuple) else value)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.body(self, *args, **kwargs)


def leaves(out: Any) -> list[Tensor]:
    if isinstance(out, Tensor):
        return [out]
    if dataclasses.is_dataclass(out):
        out = [getattr(out, f.name) for f in dataclasses.fields(out)]
    if not isinstance(out, (dict, list, tuple)):
        return []  # no output, a cache
    items = out.values() if isinstance(out, dict) else out
    return [leaf for item in items for leaf in leaves(item)]


def per_record(out: Any) -> Tensor:
    """One loss a record, (B,): every element has a weight of its own, so that no transposition goes unseen."""
    total: Any = 0
    for leaf in leaves(out):
        if leaf.is_floating_point():
            x = leaf if leaf.dim() > 1 else leaf.unsqueeze(1)
            slope = torch.linspace(0.5, 1.5, x[0].numel() if len(x) else 1, dtype=x.dtype).reshape(
                x.shape[1:] if len(x) else ()
            )
            total = total + ((x.square() + x) * slope).sum(tuple(range(1, x.dim())))
    return total


@dataclass(frozen=True)
class Case:
    build: Callable[[], nn.Module]
    inputs: Callable[[], Any]  # a tuple of arguments, or a dict of keyword arguments
    tier: str = "rule"
    loss: Loss = per_record
    reduction: str = "mean"
    tol32: float = 1e-5
    train: bool = True
    same_forward: bool = True
    batch_dim: int = 0


def case(name: str, build: Callable[[], nn.Module], inputs: Callable[[], Any], tier: str = "rule", **more: Any) -> Any:
    return pytest.param(Case(build, inputs, tier, **more), id=name)


def matrix(cases: list[Any]) -> Callable[..., Any]:
    """Every case in float64 and in float32."""

    def decorate(fn: Callable[..., Any]) -> Callable[..., Any]:
        for torch_says in ("There is a performance drop", "Using padding='same'"):
            fn = pytest.mark.filterwarnings(f"ignore:{torch_says}")(fn)
        fn = pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["f64", "f32"])(fn)
        return pytest.mark.parametrize("case", cases)(fn)

    return decorate


def to(tree: Any, dtype: torch.dtype) -> Any:
    def one(value: Any) -> Any:
        if isinstance(value, Shared):
            return Shared(one(value.value))
        if not isinstance(value, Tensor) or not value.is_floating_point():
            return value
        return value.detach().to(dtype).requires_grad_(value.requires_grad)

    return tree_map(one, tree)


def whole(tree: Any) -> Any:
    return tree_map(lambda v: v.value if isinstance(v, Shared) else v, tree)


def record_of(tree: Any, b: int, dim: int = 0) -> Any:
    def one(value: Any) -> Any:
        if isinstance(value, Shared):
            return value.value
        return value.narrow(dim, b, 1) if isinstance(value, Tensor) else value

    return tree_map(one, tree)


def call(model: nn.Module, inputs: Any) -> Any:
    return model(**inputs) if isinstance(inputs, dict) else model(*inputs)


def size(inputs: Any, dim: int = 0) -> int:
    values = inputs.values() if isinstance(inputs, dict) else inputs
    for value in values:
        if isinstance(value, Tensor):
            return value.shape[dim]
        if isinstance(value, (dict, tuple, list)):
            return size(value, dim)
    raise AssertionError("no input")


def microbatch_of_one(model: nn.Module, inputs: Any, loss: Loss, dim: int = 0) -> dict[str, Tensor]:
    """{name: (B, *shape)} in float64. A fresh copy for each record: forwards that change state stay comparable."""
    rows = []
    records = size(inputs, dim)
    for b in range(records):
        one = copy.deepcopy(model)
        named = {n: p for n, p in one.named_parameters() if p.requires_grad}
        value = loss(call(one, record_of(inputs, b, dim))).sum()
        grads = torch.autograd.grad(value, list(named.values()), allow_unused=True)
        rows.append(
            [torch.zeros_like(p) if g is None else g.to_dense() for p, g in zip(named.values(), grads, strict=True)]
        )
    names = {n: p for n, p in model.named_parameters() if p.requires_grad}
    return {
        n: torch.stack([row[k] for row in rows]) if rows else p.detach().new_zeros(0, *p.shape)
        for k, (n, p) in enumerate(names.items())
    }


def recorded(model: nn.Module, inputs: Any, loss: Loss = per_record, reduction: str = "mean", dim: int = 0) -> Any:
    """(tape, output) of one forward and backward under ``sf.record``."""
    with sf.record(model, loss_reduction=reduction, batch_dim=dim) as tape:
        out = call(model, whole(inputs))
        losses = loss(out)
        (losses.mean() if reduction == "mean" else losses.sum()).backward()
    return tape, out


def sq_norms(grads: dict[str, Tensor]) -> Tensor:
    return torch.stack(
        [g.double().reshape(len(g), math.prod(g.shape[1:])).square().sum(1) for g in grads.values()]
    ).sum(0)


def clipped_sums(grads: dict[str, Tensor], bound: float) -> dict[str, Tensor]:
    weights = (bound / sq_norms(grads).sqrt().clamp_min(1e-300)).clamp_max(1)
    return {n: torch.tensordot(weights, g.double(), 1) for n, g in grads.items()}


def agree(tape: Any, want: dict[str, Tensor], tol: float) -> None:
    """Norms, clipped sums at two bounds and per-sample gradients agree with the oracle."""
    sq = sq_norms(want)
    got = tape.sq_norms().double()
    assert got.shape == sq.shape
    assert not got.requires_grad
    torch.testing.assert_close(got, sq, rtol=2 * tol, atol=1e-28)
    norms = sq.sqrt()
    everything = float(norms.max()) if len(norms) else 1.0
    for bound in (float(norms.median()) if len(norms) else 1.0, 0.1 * everything):
        sums, expected = tape.clipped_sum(bound or 1.0), clipped_sums(want, bound or 1.0)
        assert sums.keys() == expected.keys()
        scale = max(bound, 1e-28)
        for name, total in expected.items():
            assert sums[name].shape == total.shape
            assert float((sums[name].double() - total).norm()) <= 2 * tol * len(sq) * scale, f"clipped_sum of {name}"
    for name, gradient in want.items():
        mine = tape.per_sample(name).double()
        assert mine.shape == gradient.shape
        error = (mine - gradient).abs().max() if gradient.numel() else torch.zeros(())
        assert float(error) <= tol * (float(gradient.abs().max()) + everything if gradient.numel() else 1), name


def check(case: Case, dtype: torch.dtype) -> Any:
    """Compare ``sf.record`` with the oracle; also the forward, the tier, and that nothing is left behind."""
    torch.manual_seed(1)
    model = case.build().train(case.train)
    inputs = case.inputs()
    exact = copy.deepcopy(model).double()
    want = microbatch_of_one(exact, to(inputs, torch.float64), case.loss, case.batch_dim)
    model, inputs = model.to(dtype), to(inputs, dtype)
    twin = copy.deepcopy(model)
    tape, out = recorded(model, inputs, case.loss, case.reduction, case.batch_dim)
    tol = 1e-9 if dtype == torch.float64 else case.tol32
    agree(tape, want, tol)
    worst = max((TIERS.index(t) for t in tape.tiers.values()), default=0)
    assert worst <= TIERS.index(case.tier), tape.tiers
    assert all(p.grad is None for p in model.parameters())
    if case.same_forward:
        for mine, native in zip(leaves(out), leaves(call(twin, whole(inputs))), strict=True):
            assert mine.shape == native.shape, "forward changed shape"
            if mine.is_floating_point():
                torch.testing.assert_close(mine, native, rtol=1e3 * tol, atol=1e3 * tol, msg="forward changed")
    return tape
