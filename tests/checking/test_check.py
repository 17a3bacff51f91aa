"""The face of check: arguments, the report, what it leaves behind, and batches of every form."""

from __future__ import annotations

import copy
import random
from typing import Any

import numpy as np
import pytest
import torch
from tests.checking.cases import CE, B, Hidden, Layer, around, vectors
from torch import Tensor, nn
from torch.nn import functional as F

import sfumato as sf
from sfumato.ghost.state import State, differences


class Everything(nn.Module):
    """State of every kind, and randomness."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.norm, self.drop = nn.Linear(5, 6), nn.BatchNorm1d(6), nn.Dropout(0.5)
        self.head, self.calls, self.seen = nn.Linear(6, 3), 0, []
        self.last: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.seen.append(float(x.detach().sum()))
        h = self.drop(self.norm(self.linear(x)))
        self.last = h.detach()
        return self.head(h) + random.random() + float(np.random.rand()) + torch.rand(())  # noqa: NPY002


class Uncopyable(Everything):
    def __deepcopy__(self, memo: Any) -> Any:
        raise RuntimeError("no copies")


@pytest.mark.parametrize("kind", [Everything, Uncopyable])
@pytest.mark.parametrize("train", [True, False])
def test_nothing_is_left_behind(kind: type[nn.Module], train: bool) -> None:
    model = kind().train(train)
    x, y = vectors()
    CE(model(x), y).backward()
    model.norm.eval()
    handle = model.linear.register_forward_hook(lambda *_: None)
    before, grads = State.of(model), {n: p.grad.clone() for n, p in model.named_parameters()}
    modes = {n: m.training for n, m in model.named_modules()}
    state = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()  # noqa: NPY002
    batch = x.clone(), y.clone()
    sf.check(model, CE, (x, y))
    assert differences(before, State.of(model), 0.0) == []
    assert {n: m.training for n, m in model.named_modules()} == modes
    for n, p in model.named_parameters():
        assert torch.equal(p.grad, grads[n])
    assert torch.equal(torch.get_rng_state(), state[0])
    assert random.getstate() == state[1]
    assert np.array_equal(np.random.get_state()[1], state[2])  # noqa: NPY002
    assert torch.equal(x, batch[0])
    assert torch.equal(y, batch[1])
    assert list(model.linear._forward_hooks) == [handle.id]
    assert not model.linear._forward_pre_hooks
    assert "forward" not in vars(model.linear)
    assert torch.get_default_dtype() == torch.float32


@pytest.mark.parametrize("kind", [Hidden, Everything])
def test_verdicts_repeat(kind: type[nn.Module]) -> None:
    model, batch = kind(), vectors()
    first = sf.check(model, CE, batch).to_dict()
    torch.manual_seed(123)
    assert sf.check(model, CE, batch).to_dict() == first


@pytest.mark.parametrize(
    ("arguments", "where"),
    [
        ((Hidden(), CE, (torch.randn(1, 5), torch.zeros(1).long())), "batch"),
        ((Hidden(), CE, (torch.randn(0, 5), torch.zeros(0).long())), "batch"),
        ((Hidden(), CE, ("text", 3)), "batch"),
        ((Hidden(), CE, None), "batch"),
        ((lambda x: x, CE, vectors()), "model"),
        ((Hidden(), 3, vectors()), "criterion"),
    ],
)
def test_bad_arguments_are_refused(arguments: Any, where: str) -> None:
    with pytest.raises(sf.errors.ConfigurationError) as refused:
        sf.check(*arguments)
    assert refused.value.where == where


@pytest.mark.parametrize("options", [{"loss_reduction": "median"}, {"batch_dim": -1}, {"max_records": 0}])
def test_bad_options_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(sf.errors.ConfigurationError):
        sf.check(Hidden(), CE, vectors(), **options)
    with pytest.raises(TypeError):
        sf.check(Hidden(), CE, vectors(), reduction="mean")  # type: ignore[call-arg]


def test_a_slow_model_gets_a_remark_with_the_reason() -> None:
    class Loop(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(5, 3), nn.Linear(5, 3)

        def forward(self, x: Tensor) -> Tensor:
            return torch.stack([self.a(r) if float(r.mean()) > 0 else self.b(r) for r in x])

    report = sf.check(Loop(), CE, vectors())
    if report.ok and "microbatch" in report.coverage.values():
        assert "one record at a time" in str(report)
        assert "The reason" in str(report)
    else:
        assert not report.ok  # a number taken out of the forward is refused by the engine
        assert report.problems[0].fix


def test_parameters_without_a_gradient_are_called_unused() -> None:
    model = Hidden()
    model.spare = nn.Linear(2, 2)
    report = sf.check(model, CE, vectors())
    assert report.ok
    assert report.coverage["spare.weight"] == "unused"
    assert any("spare.weight" in r.where for r in report.remarks)


def test_a_few_records_of_a_large_batch_are_enough_and_are_named() -> None:
    report = sf.check(Hidden(), CE, vectors(64))
    assert (report.records, report.of_records) == (8, 64)
    assert "8 of the 64" in str(report)


def test_records_are_chosen_of_different_kinds() -> None:
    """The first eight have one label only, for which a class-weighted mean is a plain one."""
    y = torch.cat([torch.zeros(20), torch.ones(4)]).long()
    weighted = nn.CrossEntropyLoss(weight=torch.tensor([0.1, 1.0, 5.0]))
    assert not sf.check(Hidden(), weighted, (torch.randn(24, 5), y)).ok


def test_an_error_of_the_users_is_reported_as_such() -> None:
    report = sf.check(Layer(lambda m, x: m.head(x).foo(), head=nn.Linear(5, 3)), CE, vectors())
    assert [p.where for p in report.problems] == ["Layer"]
    assert "AttributeError" in report.problems[0].what


def test_a_private_model_can_be_checked() -> None:
    model = Hidden()
    data = torch.utils.data.TensorDataset(*vectors(16))
    with sf.PrivacyEngine() as engine:
        engine.make_private(
            module=model,
            optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
            data_loader=torch.utils.data.DataLoader(data, batch_size=4),
            noise_multiplier=1.0,
            max_grad_norm=1.0,
        )
        assert sf.check(model, CE, vectors()).ok
        assert engine.steps == 0


def test_the_engine_is_judged_not_believed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A rule with a wrong gradient is found although nothing in the model is wrong."""
    from sfumato.ghost import recording

    right = recording.record.per_sample
    monkeypatch.setattr(
        recording.record, "per_sample", lambda tape, name: right(tape, name) * (1.001 if name == "decode.bias" else 1)
    )
    report = sf.check(Hidden(), CE, vectors())
    assert [p.where for p in report.problems] == ["decode.bias"]
    assert "differs from plain autograd" in report.problems[0].what


def test_dropout_is_no_coupling_wherever_it_is() -> None:
    def body(m: Any, x: Tensor) -> Tensor:
        h = F.dropout(m.a(x), 0.5, m.training)[:, None]
        h = F.scaled_dot_product_attention(h, h, h, dropout_p=0.3)
        return m.b(F.alpha_dropout(h[:, 0], 0.2, m.training))

    model = Layer(body, a=nn.Linear(5, 6), b=nn.Linear(6, 3))
    assert sf.check(model, CE, vectors()).ok


def test_problems_of_several_places_are_all_named() -> None:
    model = nn.Sequential(around(nn.BatchNorm1d(6)), nn.Linear(3, 6), nn.BatchNorm1d(6), nn.Linear(6, 3))
    assert {p.where for p in sf.check(model, CE, vectors()).problems} == {"0.1", "2"}


def test_equal_copies_get_equal_reports() -> None:
    model, batch = around(nn.LayerNorm(6)), vectors()
    assert sf.check(model, CE, batch).to_dict() == sf.check(copy.deepcopy(model), CE, batch).to_dict()
    assert len(batch[0]) == B
