"""``sf.rule``: operations that the capture cannot look into, with a per-sample gradient of the user's own."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from tests.oracle.oracle import B, Case, Net, R, agree, check, microbatch_of_one, per_record, recorded
from torch import Tensor, nn
from torch.autograd import Function

import sfumato as sf
from sfumato.ghost.rules import user

D = 3


class Gate(Function):
    """x · w + max(w, 0), by code that torch cannot see into."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, power: int) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.power = power
        return x.pow(power) * weight

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight = ctx.saved_tensors
        slope = ctx.power * x.pow(ctx.power - 1) * weight
        return grad * slope, (grad * x.pow(ctx.power)).flatten(0, -2).sum(0), None


@torch.library.custom_op("sfumato_tests::scale", mutates_args=())
def scale(x: Tensor, weight: Tensor) -> Tensor:
    return x * weight


def _save(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _scale_backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
    x, weight = ctx.saved_tensors
    return grad * weight, (grad * x).flatten(0, -2).sum(0)


scale.register_autograd(_scale_backward, setup_context=_save)


def gate_gradients(grad: Tensor, x: Tensor, weight: Tensor, power: int) -> dict[str, Tensor]:
    own = grad * x.pow(power)
    return {
        "x": grad * power * x.pow(power - 1) * weight,
        "weight": own.reshape(len(own), -1, own.shape[-1]).sum(1),
    }


def scale_gradients(grad: Tensor, x: Tensor, weight: Tensor) -> dict[str, Tensor]:
    own = grad * x
    return {"x": grad * weight, "weight": own.reshape(len(own), -1, own.shape[-1]).sum(1)}


@pytest.fixture(autouse=True)
def _forget() -> Iterator[None]:
    """Rules are for the whole process: each test starts without any."""
    own = Gate.apply
    yield
    Gate.apply = own  # type: ignore[method-assign]
    user._FUNCTIONS.clear()
    user._OPERATORS.clear()


def gated() -> nn.Module:
    return Net(lambda s, x: s.o(Gate.apply(s.l(x), s.w, 2)), l=nn.Linear(D, D), o=nn.Linear(D, 2), w=(D,))


def scaled() -> nn.Module:
    return Net(lambda s, x: s.o(scale(s.l(x), s.w)), l=nn.Linear(D, D), o=nn.Linear(D, 2), w=(D,))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["f64", "f32"])
@pytest.mark.parametrize("build", [gated, scaled])
@pytest.mark.parametrize("shape", [(B, D), (B, 5, D)], ids=["rows", "sequences"])
def test_a_rule_is_used_and_exact(build: Any, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    sf.rule(Gate)(gate_gradients)
    sf.rule(scale)(scale_gradients)
    check(Case(build, lambda: (R(shape),)), dtype)


@pytest.mark.parametrize("build", [gated, scaled])
def test_without_a_rule_a_slower_tier_is_exact(build: Any) -> None:
    check(Case(build, lambda: (R(B, D),), "microbatch"), torch.float64)


def test_the_operator_by_its_name_in_torch_ops() -> None:
    sf.rule(torch.ops.sfumato_tests.scale)(scale_gradients)
    check(
        Case(lambda: Net(lambda s, x: torch.ops.sfumato_tests.scale(x, s.w), w=(D,)), lambda: (R(B, D),)), torch.float64
    )


def test_frozen_weights_and_plain_use() -> None:
    """The same operation outside of private training, or with nothing to train in it."""
    sf.rule(Gate)(gate_gradients)
    x, w = R(B, D, requires_grad=True), R(D, requires_grad=True)
    Gate.apply(x, w, 2).sum().backward()
    torch.testing.assert_close(w.grad, x.square().sum(0).detach())
    model = gated().double()
    model.w.requires_grad_(False)
    inputs = (R(B, D).double(),)
    want = microbatch_of_one(model, inputs, per_record)
    tape, _ = recorded(model, inputs)
    agree(tape, want, 1e-9)
    assert set(tape.tiers.values()) == {"rule"}


def test_the_contract_passes_right_rules() -> None:
    sf.rule(Gate)(gate_gradients)
    sf.rule(scale)(scale_gradients)
    sf.check_rule(Gate, R(4, 5, D).double(), R(D).double(), 2, parameters=["weight"])
    sf.check_rule(scale, R(4, 5, D), R(D), parameters=["weight"])


WRONG = {
    "half": lambda g, x, weight, power: {
        k: v * 0.5 if k == "weight" else v for k, v in gate_gradients(g, x, weight, power).items()
    },
    "of another record": lambda g, x, weight, power: {
        k: v.flip(0) if k == "weight" else v for k, v in gate_gradients(g, x, weight, power).items()
    },
    "wrong input": lambda g, x, weight, power: gate_gradients(g, x, weight, power) | {"x": g},
}


@pytest.mark.parametrize("name", WRONG)
def test_the_contract_finds_wrong_rules(name: str) -> None:
    sf.rule(Gate)(WRONG[name])
    with pytest.raises(sf.errors.GradientMismatch):
        sf.check_rule(Gate, R(4, D).double(), R(D).double(), 2, parameters=["weight"])


class Centred(Function):
    """Subtracts the mean over the records."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return (x - x.mean(0)) * weight

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        x, weight = ctx.saved_tensors
        return grad * weight, (grad * (x - x.mean(0))).sum(0)


def test_the_contract_finds_operations_that_mix_records() -> None:
    own = Centred.apply
    sf.rule(Centred)(lambda g, x, weight: {"x": g * weight, "weight": g * (x - x.mean(0))})
    with pytest.raises(sf.errors.GradientMismatch, match="mixes records"):
        sf.check_rule(Centred, R(4, D).double(), R(D).double(), parameters=["weight"])
    Centred.apply = own  # type: ignore[method-assign]


def test_wrong_registrations_are_refused() -> None:
    for wrong in (torch.nn.functional.linear, lambda x: x, nn.Linear):
        with pytest.raises(sf.errors.ConfigurationError):
            sf.rule(wrong)(gate_gradients)
    sf.rule(Gate)(gate_gradients)
    sf.rule(scale)(scale_gradients)
    for op in (Gate, scale):
        with pytest.raises(sf.errors.ConfigurationError, match="already"):
            sf.rule(op)(gate_gradients)
    with pytest.raises(sf.errors.ConfigurationError, match="no rule"):
        sf.check_rule(Centred, R(4, D), R(D), parameters=["weight"])
    with pytest.raises(sf.errors.ConfigurationError, match="two records"):
        sf.check_rule(Gate, R(1, D), R(D), 2, parameters=["weight"])
    with pytest.raises(sf.errors.ConfigurationError, match="name"):
        sf.check_rule(Gate, R(4, D), R(D), 2, parameters=["bias"])


def test_a_rule_that_forgets_a_gradient_is_an_error() -> None:
    sf.rule(Gate)(lambda grad, x, weight, power: {"x": grad})
    with pytest.raises(sf.errors.ConfigurationError, match="'weight'"):
        recorded(gated(), (R(B, D),))


def test_through_the_engine_records_are_clipped() -> None:
    sf.rule(Gate)(gate_gradients)
    model = gated()
    data = torch.utils.data.TensorDataset(100 * R(8, D))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with sf.PrivacyEngine() as engine:
        model, optimizer, loader = engine.make_private(
            module=model,
            optimizer=optimizer,
            data_loader=torch.utils.data.DataLoader(data, batch_size=8),
            noise_multiplier=0.0,
            max_grad_norm=0.5,
        )
        for (x,) in loader:
            model(x).square().sum(1).mean().backward()
            norm = sum(float(p.grad.square().sum()) for p in model.parameters()) ** 0.5
            assert 0 < norm <= 0.5 * (1 + 1e-6)
            break
