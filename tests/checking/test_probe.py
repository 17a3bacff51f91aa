"""The first batch of a real training: models that mix records are refused before anything is charged."""

from __future__ import annotations

import copy
import random
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tests.checking.cases import Hidden
from tests.step.harness import World, released, world
from torch import Tensor, nn
from torch.nn import functional as F

import sfumato as sf
from sfumato.ghost import probe

N = 8


class Hides(nn.Module):
    """Mixes records where operations on them are not followed."""

    def __init__(self, mix: Callable[[Tensor], Tensor]):
        super().__init__()
        self.encode, self.decode, self.mix = nn.Linear(5, 6), nn.Linear(6, 3), mix

    def forward(self, x: Tensor) -> Tensor:
        return self.decode(self.mix(self.encode(x)))


def scripted() -> Callable[[Tensor], Tensor]:
    def centre(x: Tensor) -> Tensor:
        return x - x.mean(0)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.jit.script(centre)


def through_memory(h: Tensor) -> Tensor:
    """A view of the same memory that torch does not know to be one."""
    return h - torch.from_dlpack(h.detach()).mean(0)


MIXES: dict[str, Callable[[], Callable[[Tensor], Tensor]]] = {
    "mean": lambda: lambda h: h - h.mean(0),
    "scripted mean": scripted,
    "through dlpack": lambda: through_memory,
    "maximum": lambda: lambda h: h / h.abs().max(),
    "a branch on the batch": lambda: lambda h: 2 * h if bool(h.abs().max() > 30) else h,
    "shuffled": lambda: lambda h: h + h[torch.randperm(len(h))],
}


def training(model: nn.Module, **options: Any) -> World:
    torch.manual_seed(1)
    return world(model, (torch.randn(N, 5), torch.arange(N) % 3), everybody=True, batch_size=N, **options)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", MIXES)
def test_a_mixing_model_is_refused_before_a_charge(name: str) -> None:
    w = training(Hides(MIXES[name]()))
    before = copy.deepcopy(w.model.state_dict())
    with pytest.raises(sf.SfumatoError):
        released(w)
    assert w.engine.steps == w.charges == 0
    assert not w.grads
    for n, value in w.model.state_dict().items():
        assert torch.equal(value, before[n])


@pytest.mark.filterwarnings("ignore")
def test_it_sees_what_the_capture_is_blind_to() -> None:
    """The batch's size, and what Python reads off it, are not followed."""

    def blind(h: Tensor) -> Tensor:
        with torch._C.DisableTorchFunction():  # as inside code that is not Python
            shift = h.detach().mean(0)
        return h - shift

    with pytest.raises(sf.errors.CoupledRecords) as refused:
        released(training(Hides(blind)))
    assert "sf.check" in (refused.value.fix or "")
    assert released(training(Hides(blind), check_first_batch=False))


class Gated(Hides):
    """What mixes is multiplied by zeros before training."""

    def __init__(self, mix: Callable[[Tensor], Tensor]):
        super().__init__(mix)
        self.gate = nn.Linear(6, 6)
        nn.init.zeros_(self.gate.weight)
        nn.init.zeros_(self.gate.bias)

    def forward(self, x: Tensor) -> Tensor:
        h = self.encode(x)
        return self.decode(h + self.gate(h) * self.mix(h))


def test_zeros_do_not_hide_a_mixing_branch() -> None:
    def blind(h: Tensor) -> Tensor:
        with torch._C.DisableTorchFunction():
            shift = h.detach().mean(0)
        return h - shift

    with pytest.raises(sf.errors.CoupledRecords):
        released(training(Gated(blind)))
    w = training(Gated(lambda h: h))
    with torch.no_grad():
        w.model.gate.weight[0, 0] = -0.0
    before = copy.deepcopy(w.model.state_dict())
    versions = [p._version for p in w.model.parameters()]
    for x, y in w.loader:
        F.cross_entropy(w.model(x), y)
        break
    assert [p._version for p in w.model.parameters()] == versions
    for n, value in w.model.state_dict().items():
        assert torch.equal(value.view(torch.int32), before[n].view(torch.int32))


def test_a_second_try_is_refused_as_well() -> None:
    def blind(h: Tensor) -> Tensor:
        with torch._C.DisableTorchFunction():
            shift = h.detach().mean(0)
        return h - shift

    w = training(Hides(blind))
    for _ in range(2):
        with pytest.raises(sf.errors.CoupledRecords):
            released(w)
    assert w.charges == 0


class Stateful(nn.Module):
    """Draws random numbers, counts, and keeps a buffer that no record enters."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.drop, self.calls = nn.Linear(5, 3), nn.Dropout(0.5), 0
        self.log: list[int] = []
        self.register_buffer("steps", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.log.append(self.calls)
        self.steps += 1
        return self.drop(self.linear(x)) * (1 + 0.1 * torch.rand(()))


def test_nothing_of_it_remains() -> None:
    found = []
    for probing in (True, False):
        model = Stateful()
        with torch.no_grad():
            model.linear.weight.fill_(0.1)
            model.linear.bias.fill_(0.1)
        w = training(model, check_first_batch=probing, noise_multiplier=0.0)
        torch.manual_seed(7)
        random.seed(7)
        sums = released(w)
        found.append((sums, model.calls, model.log, float(model.steps), torch.rand(3), random.random()))
    (sums, *rest), (other, *others) = found
    for n in sums:
        assert torch.equal(sums[n], other[n])
    assert rest[:3] == others[:3] == [1, [1], 1.0]
    assert torch.equal(rest[3], others[3])
    assert rest[4] == others[4]


def test_it_runs_once(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    class Counting(Hidden):
        def forward(self, x: Tensor) -> Tensor:
            calls.append(len(x))
            return super().forward(x)

    w = training(Counting())
    for expected in (None, 1):
        calls.clear()
        for x, y in w.loader:
            F.cross_entropy(w.model(x), y).backward()
        if expected:
            assert len(calls) == expected
        else:
            assert 3 <= len(calls) <= 8


class Unseeded(nn.Module):
    """Random beyond every seed."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) * random.SystemRandom().random()


class Summary(nn.Module):
    """Returns a number for each class besides, which is no record's."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.linear(x), x.mean(0)


class DataDependentDraws(nn.Module):
    """How many random numbers are drawn depends on the records."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        with torch._C.DisableTorchFunction():
            torch.randn(int((x.detach() > 0).sum()))
        return self.linear(x) + torch.randn(len(x), 1)


@pytest.mark.parametrize("build", [Unseeded, DataDependentDraws])
def test_it_is_silent_where_nothing_can_be_told(build: Callable[[], nn.Module]) -> None:
    assert released(training(build()))


def test_outputs_without_records_may_move() -> None:
    assert released(training(Summary()), lambda m, x, y: F.cross_entropy(m(x)[0], y))


def test_square_inputs_and_a_batch_of_one() -> None:
    torch.manual_seed(0)
    w = world(nn.Linear(N, N), (torch.randn(N, N), torch.arange(N)), everybody=True, batch_size=N)
    assert released(w)
    lonely = world(nn.Linear(5, 3), (torch.randn(N, 5), torch.arange(N) % 3), indices=[2], batch_size=N)
    assert released(lonely)


def test_submodules_called_from_the_loop_are_judged_each() -> None:
    class Parts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encode, self.decode = nn.Linear(5, 6), Hides(lambda h: h)
            self.decode.encode = nn.Linear(6, 6)

    def by_hand(m: Any, x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(m.decode(m.encode(x)), y)

    assert released(training(Parts()), by_hand)


def test_the_probe_has_power(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without its comparison the tests above would fail."""
    monkeypatch.setattr(probe, "_moved", lambda *_: None)
    with pytest.raises(pytest.fail.Exception):
        test_it_sees_what_the_capture_is_blind_to()
