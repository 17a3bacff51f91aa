"""What cannot be saved or restored exactly is refused by name, and then nothing has changed."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.checkpoint.training import HEAD, PLAN, Net, everything, net, save, split, train
from torch import nn

from sfumato.accounting import Event, Ledger
from sfumato.errors import ConfigurationError, DataError, LedgerError, UnsupportedError
from sfumato.session import checkpoint

O = torch.optim  # noqa: E741


@pytest.fixture
def kept(tmp_path: Path) -> checkpoint.Stored:
    model, optimizers = net(O.Adam)()
    train(model, optimizers, range(3))
    return checkpoint.load(save(tmp_path / "run.ckpt", model, optimizers))


def refused(stored: checkpoint.Stored, model: nn.Module, optimizers: list[O.Optimizer], match: str) -> None:
    """``apply`` refuses with a message like ``match`` and leaves every bit as it was."""
    before = everything(model, optimizers)
    gradients = [p.grad for p in model.parameters()]
    with pytest.raises(ConfigurationError, match=match):
        checkpoint.apply(stored, model, optimizers)
    assert everything(model, optimizers) == before
    assert all(p.grad is g for p, g in zip(model.parameters(), gradients, strict=True))


# ---------------------------------------------------------------------------------------------- another model


def other_shape(model: Net) -> None:
    model.again.bias = nn.Parameter(torch.zeros(4))


def other_name(model: Net) -> None:
    model.third, model.first = model.first, nn.Identity()  # type: ignore[assignment]


def one_more(model: Net) -> None:
    model.more = nn.Parameter(torch.zeros(1))


def untied(model: Net) -> None:
    model.again.weight = nn.Parameter(model.out.weight.detach().clone())


def tied(model: Net) -> None:
    model.second.weight = model.first.weight


def wider(model: Net) -> None:
    model.double()


def other_buffer(model: Net) -> None:
    model.mask = model.mask.to(torch.uint8)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (other_shape, "again.bias"),
        (other_name, "first.bias is missing here"),
        (one_more, "more is present here"),
        (untied, "again.weight|out.weight"),
        (tied, "first.weight|second.weight"),
        (wider, "float64"),
        (other_buffer, "mask is uint8"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_another_model(kept: checkpoint.Stored, change: Callable[[Net], None], match: str) -> None:
    model = Net()
    change(model)
    optimizers = [O.Adam(split(model), lr=0.05)]
    train_if_possible(model, optimizers)
    refused(kept, model, optimizers, match)


@pytest.mark.parametrize("change", [untied, tied])
def test_ties_are_compared_without_an_optimizer_too(change: Callable[[Net], None], tmp_path: Path) -> None:
    """Loading would succeed, and from then on another model would be trained."""
    stored = checkpoint.load(save(tmp_path / "run.ckpt", Net(), []))
    model = Net()
    change(model)
    refused(stored, model, [], "one tensor with")


def train_if_possible(model: nn.Module, optimizers: list[O.Optimizer]) -> None:
    """A state and gradients that a half-done load would disturb."""
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    for optimizer in optimizers:
        optimizer.step()


# ------------------------------------------------------------------------------------------ another optimizer


def reordered(model: Net) -> list[O.Optimizer]:
    groups = split(model)
    groups[1]["params"] = groups[1]["params"][::-1]
    return [O.Adam(groups, lr=0.05)]


def one_group(model: Net) -> list[O.Optimizer]:
    return [O.Adam(model.parameters(), lr=0.05)]


def swapped(model: Net) -> list[O.Optimizer]:
    """The same shapes everywhere: only the names tell."""
    groups = split(model)
    whole = groups[1]["params"]
    groups[1]["params"] = [*whole[2:4], *whole[:2], *whole[4:]]
    assert [p.shape for p in groups[1]["params"]] == [p.shape for p in whole]
    return [O.Adam(groups, lr=0.05)]


OPTIMIZERS: dict[str, tuple[Callable[[Net], list[O.Optimizer]], str]] = {
    "another class": (lambda m: [O.AdamW(split(m), lr=0.05)], "AdamW"),
    "none": (lambda m: [], "number of optimizers is 0"),
    "two": (lambda m: [O.Adam(split(m)), O.Adam(split(m))], "number of optimizers is 2"),
    "one group": (one_group, "groups"),
    "reordered": (reordered, "groups"),
    "swapped": (swapped, "groups"),
}


@pytest.mark.parametrize(("build", "match"), OPTIMIZERS.values(), ids=OPTIMIZERS.keys())
def test_another_optimizer(kept: checkpoint.Stored, build: Any, match: str) -> None:
    model = Net()
    optimizers = build(model)
    train_if_possible(model, optimizers)
    refused(kept, model, optimizers, match)


@pytest.mark.parametrize("failing", ["model", "optimizer", "second optimizer", "late"])
def test_a_load_that_fails_half_way_is_undone(tmp_path: Path, failing: str) -> None:
    class Noted(Net):
        note = 0

        def get_extra_state(self) -> Any:
            return self.note

        def set_extra_state(self, state: Any) -> None:
            self.note = state
            if failing == "late" and state == 1:
                raise RuntimeError("no")

    def build(note: int) -> tuple[nn.Module, list[O.Optimizer]]:
        model = Noted()
        model.note = note
        return model, [O.Adam(model.first.parameters()), O.SGD(model.second.parameters(), lr=0.1, momentum=0.9)]

    model, optimizers = build(1)
    train(model, optimizers, range(2))
    stored = checkpoint.load(save(tmp_path / "run.ckpt", model, optimizers))
    model, optimizers = build(0)
    train_if_possible(model, optimizers)

    def fail(*_: Any) -> None:
        raise RuntimeError("no")

    if failing == "model":
        model.out.register_load_state_dict_pre_hook(fail)
    elif failing != "late":
        optimizers["optimizer second".split().index(failing.split()[0])].register_load_state_dict_post_hook(fail)
    refused(stored, model, optimizers, "nothing was changed")


# -------------------------------------------------------------------------------------------- what cannot be saved


class Exotic(O.SGD):
    """Plain descent that keeps ``thing`` as its state."""

    thing: Any = None

    def step(self, closure: Any = None) -> None:
        super().step(closure)
        for group in self.param_groups:
            for p in group["params"]:
                self.state[p]["thing"] = self.thing


def endless() -> list[Any]:
    whole: list[Any] = []
    whole.append(whole)
    return whole


@pytest.mark.parametrize(
    "thing",
    [
        torch.Generator(),
        object(),
        b"bytes",
        {1, 2},
        len,
        torch.float32,
        torch.eye(2).to_sparse(),
        torch.ones(2, device="meta"),
        {(1, 2): 3},
        {float("nan"): 1},
        1j,
        torch.ones(2, dtype=torch.complex128),
        endless(),
        10**5000,
        defaultdict(int),
        torch.nn.parameter.UninitializedParameter(),
    ],
    ids=lambda thing: type(thing).__name__,
)
def test_exotic_state_is_refused_by_name(thing: Any, tmp_path: Path) -> None:
    model = Net()
    optimizer = Exotic(model.parameters(), lr=0.1)
    optimizer.thing = thing
    train(model, [optimizer], range(1))
    path = tmp_path / "run.ckpt"
    path.write_bytes(b"earlier")
    with pytest.raises(UnsupportedError, match=r"optimizers\[0\]\.Exotic\['state'\]\[\d\]\['thing'\]"):
        save(path, model, [optimizer])
    with pytest.raises(UnsupportedError):
        save(path, model, [], extra=[thing])
    assert path.read_bytes() == b"earlier"
    assert os.listdir(tmp_path) == ["run.ckpt"]


def test_lazy_models_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match="UninitializedParameter"):
        save(tmp_path / "run.ckpt", nn.LazyLinear(3), [])


def test_an_optimizer_over_other_tensors_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match="no parameter of the module"):
        save(tmp_path / "run.ckpt", Net(), [O.SGD([nn.Parameter(torch.zeros(2))], lr=0.1)])


@pytest.mark.parametrize(
    "wrong",
    [
        {"position": {"steps": 1, "max_grad_norm": float("nan")}},
        {"position": {"steps": 1, "deep": [{"c": float("inf")}]}},
        {"position": {"steps": -1}},
        {"position": {"steps": True}},
        {"position": {"steps": 1.0}},
        {"position": {}},
        {"position": {"steps": 1, "state": torch.ones(1)}},
        {"plan": {1: 2}},
        {"plan": {"x": object()}},
        {"ledger_head": ""},
        {"ledger_head": "A" * 64},
        {"ledger_head": None},
    ],
)
def test_bad_arguments(wrong: dict[str, Any], tmp_path: Path) -> None:
    fine: dict[str, Any] = {"position": {"steps": 1}, "plan": PLAN, "ledger_head": HEAD}
    with pytest.raises(ConfigurationError):
        checkpoint.save(tmp_path / "x", module=Net(), optimizers=[], **(fine | wrong))
    assert os.listdir(tmp_path) == []


def test_releases_that_no_ledger_holds(tmp_path: Path) -> None:
    with pytest.raises(LedgerError, match="after 3 releases"):
        checkpoint.save(
            tmp_path / "x", module=Net(), optimizers=[], position={"steps": 3}, plan={}, ledger_head="0" * 64
        )


@pytest.mark.parametrize("path", ["missing/x", "folder", "a\0b", "x" * 300])
def test_places_that_cannot_be_written(path: str, tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    with pytest.raises(DataError, match="cannot be written"):
        save(Path(f"{tmp_path}/{path}"), Net(), [])
    with pytest.raises(DataError):
        checkpoint.load(f"{tmp_path}/{path}")
    assert os.listdir(tmp_path) == ["folder"]


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_failing_disk_leaves_the_earlier_file(call: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = save(tmp_path / "run.ckpt", Net(), [], steps=1)
    before = path.read_bytes()

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, call, full)
    with pytest.raises(DataError, match="No space left"):
        save(path, Net(), [], steps=2)
    monkeypatch.undo()
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["run.ckpt"]


def test_a_pipe_does_not_block(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(DataError, match="not a regular file"):
        checkpoint.load(tmp_path / "pipe")


# ------------------------------------------------------------------------------------- ledger and plan at a resume

EVENT = Event("poisson-gaussian", 1.0, 0.1, "add-remove", "record", sampler="poisson")


def spend(ledger: Ledger, steps: range) -> None:
    for step in steps:
        ledger.append(EVENT, run="r", step=step)


def at(head: str, path: Path, steps: int = 3) -> checkpoint.Stored:
    position = {"steps": steps}
    checkpoint.save(path, module=Net(), optimizers=[], position=position, plan=PLAN, ledger_head=head)
    return checkpoint.load(path)


def test_the_ledger_must_hold_the_head(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with Ledger(tmp_path / "ledger.db") as ledger:
        spend(ledger, range(2))
        older = tmp_path / "older.db"
        subprocess.run([sys.executable, "-c", COPY, tmp_path / "ledger.db", older], check=True)
        spend(ledger, range(2, 3))
        stored = at(ledger.head, tmp_path / "run.ckpt")
        assert checkpoint.admit(stored, ledger, PLAN) == 0
        spend(ledger, range(3, 7))
        with caplog.at_level(logging.INFO, logger="sfumato"):
            assert checkpoint.admit(stored, ledger, PLAN) == 4
        assert "4 younger ledger entries stay spent" in caplog.text
    for other in (Ledger(), Ledger(tmp_path / "new.db"), Ledger(older)):
        with other, pytest.raises(LedgerError, match="resume without its ledger"):
            checkpoint.admit(stored, other, PLAN)


# SQLite's own backup: a copy with the committed entries that are still in the write-ahead log.
COPY = "import sqlite3, sys; sqlite3.connect(sys.argv[1]).backup(sqlite3.connect(sys.argv[2]))"


def test_a_checkpoint_before_the_first_release_fits_any_ledger(tmp_path: Path) -> None:
    stored = at("0" * 64, tmp_path / "run.ckpt", steps=0)
    with Ledger() as ledger:
        assert checkpoint.admit(stored, ledger, PLAN) == 0
        spend(ledger, range(2))
        assert checkpoint.admit(stored, ledger, PLAN) == 2


@pytest.mark.parametrize(
    "change", [{"unit": "user"}, {"dataset_size": 101}, {"sampler": {"kind": "shuffle"}}, {"adjacency": "replace-one"}]
)
def test_another_plan(change: dict[str, Any], tmp_path: Path) -> None:
    with Ledger() as ledger:
        spend(ledger, range(3))
        stored = at(ledger.head, tmp_path / "run.ckpt")
        with pytest.raises(ConfigurationError, match=next(iter(change))):
            checkpoint.admit(stored, ledger, PLAN | change)
        # Noise is charged as it is used: resuming with more of it is another σ, not another training.
        assert checkpoint.admit(stored, ledger, PLAN | {"noise_multiplier": 7.0}) == 0


# ------------------------------------------------------------------------------------------------ without the extra


def test_safetensors_is_named_when_it_is_missing(tmp_path: Path) -> None:
    program = f"""
import sys
import sfumato
import sfumato.session.checkpoint as checkpoint
assert "safetensors" not in sys.modules, "the core needs no extras"
sys.modules["safetensors"] = None
from torch import nn
for call in (
    lambda: checkpoint.load({str(tmp_path / "x")!r}),
    lambda: checkpoint.save({str(tmp_path / "x")!r}, module=nn.Linear(1, 1), optimizers=[], position={{"steps": 1}},
                            plan={{}}, ledger_head="a" * 64),
):
    try:
        call()
    except sfumato.SfumatoError as error:
        print(error)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.count("pip install safetensors") == 2, done
    assert os.listdir(tmp_path) == []
