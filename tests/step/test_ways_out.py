"""Ways by which one record could reach another past the operations that the capture sees: each is refused."""

from collections.abc import Callable

import pytest
import torch
from tests.step.harness import data, loss, world
from torch import Tensor, nn
from torch.nn import functional as F

import sfumato as sf


class _Net(nn.Module):
    def __init__(self, body: Callable[["_Net", Tensor], Tensor]) -> None:
        super().__init__()
        self.a, self.b, self.pair = nn.Linear(5, 5), nn.Linear(5, 3), nn.Bilinear(5, 5, 3)
        self.w = nn.Parameter(torch.randn(5, 3))
        self.aux: Tensor | None = None
        self.body = body

    def forward(self, x: Tensor) -> Tensor:
        return self.body(self, x)


class _Reads(nn.Module):
    """Needs the vmap tier, and reads a value that its parent left on it."""

    def __init__(self) -> None:
        super().__init__()
        self.u, self.v = nn.Parameter(torch.randn(5, 5)), nn.Parameter(torch.randn(5, 5))
        self.context: Tensor | None = None

    def forward(self, h: Tensor) -> Tensor:
        return torch.linalg.multi_dot([h, self.u, self.v]) * self.context


def _first(h: Tensor) -> Tensor:
    return h - h[0]


FORWARDS: dict[str, Callable[[_Net, Tensor], Tensor]] = {
    "einsum beside an unknown": lambda m, x: torch.einsum("bd,bd,dk->bk", m.a(x), _first(m.a(x)), m.w),
    "einsum beside an unknown without gradient": lambda m, x: torch.einsum("bd,bd,dk->bk", m.a(x), _first(x), m.w),
    "whole numbers in a list": lambda m, x: m.b(m.a(x) * torch.tensor(x.argmax(1).tolist()).float().mean()),
    "bilinear with an unknown": lambda m, x: m.pair(m.a(x), _first(m.a(x))),
    "branch on the batch": lambda m, x: m.b(m.a(x) * 2 if m.a(x).abs().max() > 1e-3 and len(x) > 1 else m.a(x)),
    "integers of the batch": lambda m, x: m.b(m.a(x) * int((x > 0).sum())),
}


@pytest.mark.parametrize("name", FORWARDS)
def test_forward_is_refused(name: str) -> None:
    x, y = data(6)
    model = _Net(FORWARDS[name])
    with sf.record(model), pytest.raises(sf.SfumatoError):
        F.cross_entropy(model(x), y).backward()


def test_mixture_left_in_an_attribute_cannot_reach_the_loss() -> None:
    def body(m: _Net, x: Tensor) -> Tensor:
        h = m.a(x)
        m.aux = (h.mean(0) * h.square().mean(0)).sum()
        return m.b(h)

    x, y = data(6)
    model = _Net(body)
    with sf.record(model):
        out = model(x)
        assert model.aux is not None
        with pytest.raises(sf.errors.CoupledRecords):
            (F.cross_entropy(out, y) + model.aux).backward()


def test_value_caught_by_a_module_on_a_lower_tier() -> None:
    class Parent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.reads, self.b = nn.Linear(5, 5), _Reads(), nn.Linear(5, 3)

        def forward(self, x: Tensor) -> Tensor:
            h = self.a(x)
            self.reads.context = h.abs().mean()
            return self.b(self.reads(h))

    x, y = data(6)
    model = Parent()
    with sf.record(model), pytest.raises(sf.SfumatoError):
        F.cross_entropy(model(x), y).backward()


def test_second_input_of_an_inner_door_carries_records() -> None:
    class Head(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.out = nn.Linear(5, 3)

        def forward(self, h: Tensor, z: Tensor) -> Tensor:
            return self.out(h * (z - z.mean(0)))

    x, y = data(6)
    model = nn.ModuleDict({"body": nn.Linear(5, 5), "head": Head()})
    with sf.record(model), pytest.raises(sf.SfumatoError):
        F.cross_entropy(model["head"](model["body"](x), x.clone()), y).backward()


def test_activation_changed_outside_a_forward_is_refused() -> None:
    x, y = data(6)
    model = _Net(lambda m, v: m.b(m.a(v)))
    with sf.record(model):
        h = model.a(x)
        with pytest.raises(sf.errors.UnknownBatchAxis):
            F.cross_entropy(model.b(h - h.mean(0)), y).backward()


def test_submodules_called_in_a_row_are_exact() -> None:
    x, y = data(6)
    model = _Net(lambda m, v: m.b(m.a(v)))
    with sf.record(model) as want:
        F.cross_entropy(model(x), y).backward()
    with sf.record(model) as got:
        F.cross_entropy(model.b(model.a(x)), y).backward()
    torch.testing.assert_close(got.sq_norms(), want.sq_norms())


def test_backward_hook_on_a_module_is_refused() -> None:
    x, y = data(6)
    model = _Net(lambda m, v: m.b(m.a(v)))
    model.a.register_full_backward_hook(lambda m, inner, outer: None)
    with sf.record(model), pytest.raises(sf.errors.UnsupportedError):
        F.cross_entropy(model(x), y).backward()


def test_padding_row_of_a_constant_lookup_has_no_gradient() -> None:
    class Positions(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.out = nn.Embedding(4, 5, padding_idx=1), nn.Linear(5, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.out(x.unsqueeze(1) + self.table(torch.arange(4))).mean(1)

    x, y = data(6)
    model = Positions()
    with sf.record(model) as tape:
        F.cross_entropy(model(x), y).backward()
    gradient = tape.per_sample("table.weight")
    assert not bool(gradient[:, 1].any())
    assert bool(gradient[:, 0].any())


@pytest.mark.parametrize("skip", ["first", "last"])
@pytest.mark.parametrize("look", ["forward", "no forward"])
def test_skipping_a_microbatch_releases_nothing(skip: str, look: str) -> None:
    w = world(everybody=True, tensors=data(8), max_physical_batch_size=4, noise_multiplier=0.0, max_grad_norm=1e-3)

    def loop() -> None:
        for i, (x, y) in enumerate(w.loader):
            value = loss(w.model, x, y) if look == "forward" else None
            if (i == 0) == (skip == "first"):
                continue
            (loss(w.model, x, y) if value is None else value).backward()

    with pytest.raises(sf.errors.TokenError):
        loop()
    assert w.charges == 0
    assert not w.grads


def test_closure_with_a_foreign_parameter_is_refused() -> None:
    w, foreign = world(everybody=True), nn.Parameter(torch.zeros(3))
    w.optimizer.add_param_group({"params": [foreign]})

    def loop() -> None:
        for x, y in w.loader:

            def closure(x: Tensor = x, y: Tensor = y) -> Tensor:
                value = F.cross_entropy(w.model(x) + foreign, y)
                value.backward()
                return value

            w.optimizer.step(closure)

    with pytest.raises(sf.SfumatoError):
        loop()
    assert not bool(foreign.any())
