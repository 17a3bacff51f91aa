"""Dependences that stay out of sight unless they are looked for: behind NaN, random numbers, zeros, names, rounding."""

from __future__ import annotations

import random
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from tests.checking.cases import CE, B, Case, Hidden, Layer, around, sequences, vectors
from torch import Tensor, nn
from torch.nn import functional as F

import sfumato as sf


def contrast(out: Tensor, y: Tensor) -> Tensor:
    z = F.normalize(out, dim=1)
    return F.cross_entropy(z @ z.T / 0.1, torch.arange(len(out)).roll(1))


def with_a_hole() -> tuple[Tensor, Tensor]:
    x, y = vectors()
    return x.index_fill(0, torch.tensor([3]), float("nan")), y


def all_holes() -> tuple[Tensor, Tensor]:
    return vectors()[0] * float("nan"), vectors()[1]


class StochasticDepthBlock(nn.Module):
    """A residual block that is named after what it does."""

    def forward(self, x: Tensor) -> Tensor:
        return x - x.mean(0) if self.training else x


class HardDropout(nn.Dropout):
    """A mask from the values of the whole batch."""

    def forward(self, x: Tensor) -> Tensor:
        return x * (x.abs() < 2 * x.abs().mean(0)) if self.training else x


def pull(out: Tensor, y: Tensor) -> Tensor:
    same = (y[:, None] == y[None]) & ~torch.eye(len(y), dtype=torch.bool)
    return F.cross_entropy(out, y) + (torch.cdist(out, out).square() * same).sum() / same.sum().clamp(min=1)


def many_labels() -> tuple[Tensor, Tensor]:
    return torch.randn(32, 5), torch.arange(32) % 10


class ZeroGate(nn.Module):
    """Nothing of the branch comes out before the gate is trained."""

    def __init__(self, mix: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.gate, self.branch, self.mix = nn.Linear(6, 6), nn.Linear(6, 6), mix
        nn.init.zeros_(self.gate.weight)
        nn.init.zeros_(self.gate.bias)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.gate(x) * self.branch(self.mix(x))


def script(function: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.jit.script(function)


def centre(v: Tensor) -> Tensor:
    return v - v.mean(0)


def zero_gate() -> nn.Module:
    model = around(ZeroGate(script(centre)))
    nn.init.zeros_(model[2].weight)
    nn.init.zeros_(model[2].bias)
    return model


def zero_head() -> nn.Module:
    model = Hidden()
    nn.init.zeros_(model.decode.weight)
    nn.init.zeros_(model.decode.bias)
    return model


def decorrelation(out: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(out, y) + 0.1 * (out.T @ out / len(out)).square().sum()


class Tracker:
    """A moving average in an object that is called."""

    def __init__(self) -> None:
        self.mean = torch.zeros(6)

    def __call__(self, h: Tensor) -> None:
        self.mean = 0.9 * self.mean + 0.1 * h.detach().mean(0)


class Slotted:
    __slots__ = ("mean",)

    def __init__(self) -> None:
        self.mean = torch.zeros(6)

    def update(self, h: Tensor) -> None:
        self.mean = h.detach().mean(0)


def tracked(_: nn.Module, h: Tensor) -> Tensor:
    _.tracker(h)
    return h


def slotted(_: nn.Module, h: Tensor) -> Tensor:
    _.kept.update(h)
    return h


class OfClass(nn.Module):
    last: Tensor | None = None

    def forward(self, h: Tensor) -> Tensor:
        type(self).last = h.detach().mean(0)
        return h


def hooked() -> nn.Module:
    tracker = Tracker()
    model = Hidden()
    model.encode.register_forward_hook(lambda m, i, out: tracker(out))
    return model


class WritesInBackward(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("slope", torch.zeros(6))

    def forward(self, h: Tensor) -> Tensor:
        kept = self.slope

        class Fn(torch.autograd.Function):
            @staticmethod
            def forward(ctx: Any, v: Tensor) -> Tensor:
                return v.clone()

            @staticmethod
            def backward(ctx: Any, g: Tensor) -> Tensor:
                kept.copy_(g.mean(0))
                return g

        return Fn.apply(h)


def narrow(h: Tensor) -> Tensor:
    return h.bfloat16().to(h.dtype)


def weak(out: Tensor, y: Tensor) -> Tensor:
    z = F.normalize(out, dim=1)
    return out.square().mean() + 0.02 * F.cross_entropy(z @ z.T, torch.arange(len(out)))


def numpy_noise(h: Tensor) -> Tensor:
    return h + torch.as_tensor(np.random.randn(*h.shape), dtype=h.dtype)  # noqa: NPY002


def exponential(h: Tensor) -> Tensor:
    return h * torch.empty_like(h).exponential_()


SUMMED = nn.CrossEntropyLoss(reduction="sum")

FOUND: dict[str, Case] = {
    "one record is not finite": Case(Hidden, contrast, with_a_hole, where="criterion"),
    "no record is finite": Case(Hidden, contrast, all_holes, where="model", fix="finite"),
    "RReLU, contrast": Case(lambda: around(nn.RReLU()), contrast, where="criterion"),
    "RReLU, class weights": Case(
        lambda: around(nn.RReLU()), nn.CrossEntropyLoss(weight=torch.tensor([0.1, 1.0, 5.0])), where="criterion"
    ),
    "a block named like a dropout": Case(lambda: around(StochasticDepthBlock()), where="1"),
    "a dropout of the user's": Case(lambda: around(HardDropout()), where="1"),
    "pairs of one label": Case(lambda: nn.Linear(5, 10), pull, many_labels, where="criterion"),
    "behind a gate of zeros": Case(zero_gate, where="1"),
    "behind a head of zeros": Case(zero_head, decorrelation, where="criterion"),
    "state in an object that is called": Case(lambda: around(Layer(tracked, tracker=Tracker())), where="1.tracker"),
    "state in slots": Case(lambda: around(Layer(slotted, kept=Slotted())), where="1.kept"),
    "state in a class": Case(lambda: around(OfClass()), where="1.OfClass.last"),
    "state in a hook": Case(hooked, where="encode.forward_hooks"),
    "state written in backward": Case(lambda: around(WritesInBackward()), where="1.slope"),
    "gumbel noise, a sum declared a mean": Case(
        lambda: Hidden(lambda h: F.gumbel_softmax(h, dim=1)), SUMMED, where="loss_reduction"
    ),
    "exponential noise, a sum declared a mean": Case(lambda: Hidden(exponential), SUMMED, where="loss_reduction"),
    "numpy noise, a sum declared a mean": Case(lambda: Hidden(numpy_noise), SUMMED, where="loss_reduction"),
    "noise in the criterion, a sum declared a mean": Case(
        Hidden, lambda out, y: SUMMED(F.gumbel_softmax(out, dim=1), y), where="loss_reduction"
    ),
    "a weak loss on bfloat16 rows": Case(lambda: Hidden(narrow), weak, where="criterion"),
}


@pytest.mark.parametrize("name", FOUND)
def test_what_hides_is_found(name: str) -> None:
    case = FOUND[name]
    report = sf.check(case.model(), case.criterion, case.batch())
    assert not report.ok, name
    assert case.where in report.problems[0].where, report
    assert case.fix in report.problems[0].fix, report


class Warmup:
    """A criterion that is an object and counts its calls."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, out: Tensor, y: Tensor) -> Tensor:
        self.calls += 1
        return F.cross_entropy(out, y) * min(1.0, self.calls / 1000)


class Drawing(nn.Module):
    """Noise from a generator of its own."""

    def __init__(self, draw: Any, generator: Any) -> None:
        super().__init__()
        self.draw, self.generator = draw, generator

    def forward(self, h: Tensor) -> Tensor:
        return h + 0.1 * torch.as_tensor(self.draw(self.generator, h.shape), dtype=h.dtype)


def of_torch(g: torch.Generator, shape: Any) -> Tensor:
    return torch.randn(shape, generator=g)


def of_numpy(g: np.random.Generator, shape: Any) -> Any:
    return g.normal(size=tuple(shape))


def of_python(g: random.Random, shape: Any) -> Any:
    return [[g.random() for _ in range(shape[1])] for _ in range(shape[0])]


class NearCodes(nn.Module):
    """Two codes that rounding alone tells apart."""

    def __init__(self) -> None:
        super().__init__()
        self.encode, self.codes = nn.Linear(5, 6), nn.Embedding(32, 6)
        self.codes.weight.data[16:] = self.codes.weight.data[:16] + 1e-7

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        z = self.encode(x)
        q = self.codes(torch.cdist(z.float(), self.codes.weight.float()).argmin(1))
        return z + (q - z).detach(), z.detach() - q


def commitment(out: tuple[Tensor, Tensor], y: Tensor) -> Tensor:
    return out[0].square().mean() + out[1].square().mean()


SOUND: dict[str, Case] = {
    "a warm-up in the criterion": Case(Hidden, Warmup()),
    "noise of a torch generator": Case(lambda: around(Drawing(of_torch, torch.Generator().manual_seed(3)))),
    "noise of a numpy generator": Case(lambda: around(Drawing(of_numpy, np.random.default_rng(0)))),
    "noise of a python generator": Case(lambda: around(Drawing(of_python, random.Random(0)))),
    "inputs that require a gradient": Case(Hidden, batch=lambda: (vectors()[0].requires_grad_(), vectors()[1])),
    "RReLU": Case(lambda: around(nn.RReLU())),
    "gumbel noise": Case(lambda: Hidden(lambda h: F.gumbel_softmax(h, dim=1))),
    "codes at a rounding error's distance": Case(NearCodes, commitment),
    "a gate of zeros": Case(lambda: around(ZeroGate(torch.tanh))),
}


@pytest.mark.parametrize("name", SOUND)
def test_nothing_is_found_where_nothing_is_wrong(name: str) -> None:
    case = SOUND[name]
    report = sf.check(case.model(), case.criterion, case.batch())
    assert report.ok, str(report)


def test_records_that_are_not_finite_are_left_out_and_counted() -> None:
    report = sf.check(Hidden(), CE, with_a_hole())
    assert report.ok
    assert any("1 of 8 records" in r.what for r in report.remarks)


def test_random_numbers_out_of_control_are_named() -> None:
    """Sizes were not compared, and the report says so."""
    model = around(Drawing(of_python, random.Random(0)))
    assert any("sizes" in r.what for r in sf.check(model, CE, vectors()).remarks)


class Shifted(nn.Module):
    """A number for each step, which is an input."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(5, 3)

    def forward(self, x: Tensor, shift: Tensor) -> Tensor:
        return self.head(x + shift[:, None]).mean(1)


def test_a_constant_of_the_batchs_length_is_no_movement_of_records() -> None:
    x, y = sequences(steps=B)
    report = sf.check(Shifted(), CE, (x, torch.randn(B), y))
    assert any(r.where == "1" and "same for all records" in r.what for r in report.remarks), str(report)
    assert not any("other records" in p.what for p in report.problems)


def test_objects_behind_functions_are_put_back() -> None:
    losses = Tracker()
    losses.values = []  # type: ignore[attr-defined]

    def criterion(out: Tensor, y: Tensor) -> Tensor:
        loss = F.cross_entropy(out, y)
        losses.values.append(loss.item())  # type: ignore[attr-defined]
        return loss

    assert sf.check(Hidden(), criterion, vectors()).ok
    assert losses.values == []  # type: ignore[attr-defined]


def test_in_inference_mode() -> None:
    with torch.inference_mode():
        assert sf.check(Hidden(), CE, vectors()).ok


def test_a_layer_is_named_once() -> None:
    norm = nn.InstanceNorm1d(4, track_running_stats=True)
    model = nn.Sequential(norm, nn.Flatten(), nn.Linear(20, 3))
    assert len(sf.check(model, CE, sequences()).problems) == 1


def test_gradient_hooks_get_a_remark() -> None:
    model = Hidden()
    model.encode.weight.register_hook(lambda g: g)
    assert any("hooks" in r.what for r in sf.check(model, CE, vectors()).remarks)
