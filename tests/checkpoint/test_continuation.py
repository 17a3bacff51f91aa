"""A training that goes on from a checkpoint ends where the uninterrupted one does, bit for bit."""

from __future__ import annotations

import copy
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.checkpoint.training import Build, Net, bits, everything, net, save, train
from torch import nn
from torch.optim import lr_scheduler

from sfumato.session import checkpoint

O = torch.optim  # noqa: E741


class Wide(O.Optimizer):
    """State that ``load_state_dict`` would cast or rebuild: float64 sums of float32 weights, text, tuples, lists."""

    def __init__(self, params: Any, lr: float) -> None:
        super().__init__(params, {"lr": lr, "name": "wide", "betas": (0.9, 0.99), "clip": None})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    state["sum"] = torch.zeros_like(p, dtype=torch.float64)
                    state["mode"], state["seen"] = "first", (0, [1, None])
                    state["both"] = [state["sum"], state["sum"]]  # one memory under three names
                state["both"][1].add_(p.grad.double() / 3)
                state["mode"], state["seen"] = "later", (state["seen"][0] + 1, [True, None])
                p.sub_((group["lr"] * state["sum"]).to(p.dtype))


def gan() -> tuple[nn.Module, list[O.Optimizer]]:
    model = Net()
    first = list(model.first.parameters())
    rest = [p for p in model.parameters() if not any(p is q for q in first)]
    return model, [O.Adam(first, lr=torch.tensor(0.01)), O.RMSprop(rest, lr=0.01, momentum=0.5, centered=True)]


def square() -> tuple[nn.Module, list[O.Optimizer]]:
    model = nn.Sequential(nn.Linear(6, 4, bias=False), nn.Tanh(), nn.Linear(4, 6, bias=False))
    return model, [O.Muon(model.parameters(), lr=0.01)]


CASES: dict[str, Build] = {
    "sgd": net(O.SGD),
    "momentum": net(O.SGD, momentum=0.9, nesterov=True),
    "adam": net(O.Adam),
    "amsgrad": net(O.Adam, amsgrad=True, foreach=True),
    "adamw fused": net(O.AdamW, fused=True),
    "adagrad": net(O.Adagrad),
    "rmsprop": net(O.RMSprop, momentum=0.9, centered=True),
    "adadelta": net(O.Adadelta),
    "adamax": net(O.Adamax),
    "nadam": net(O.NAdam),
    "nadam in bfloat16": net(O.NAdam, torch.bfloat16),  # its float32 product would be rounded to bfloat16
    "radam in float64": net(O.RAdam, torch.float64),
    "asgd": net(O.ASGD, t0=1),
    "rprop": net(O.Rprop),
    "adafactor": net(O.Adafactor),
    "wide": net(Wide),
    "wide in float16": net(Wide, torch.float16),
    "two optimizers": gan,
    "muon": square,
}


@pytest.mark.parametrize("build", CASES.values(), ids=CASES.keys())
def test_goes_on_bit_for_bit(build: Build, tmp_path: Path) -> None:
    model, optimizers = build()
    train(model, optimizers, range(3))
    path = save(tmp_path / "run.ckpt", model, optimizers)
    at_save = everything(model, optimizers)
    train(model, optimizers, range(3, 7))

    other, theirs = build()
    assert bits(dict(other.state_dict())) != at_save[0]
    train(other, theirs, range(50, 52))  # a state of its own, which must go
    checkpoint.apply(checkpoint.load(path), other, theirs)
    assert everything(other, theirs) == at_save
    assert all(p.grad is None for p in other.parameters())
    train(other, theirs, range(3, 7))
    assert everything(other, theirs) == everything(model, optimizers)


def test_a_checkpoint_can_be_applied_again(tmp_path: Path) -> None:
    """Training after it writes into memory of its own, not into the checkpoint's."""
    model, optimizers = net(O.SGD, momentum=0.9)()
    train(model, optimizers, range(3))
    stored = checkpoint.load(save(tmp_path / "run.ckpt", model, optimizers))
    at_save = everything(model, optimizers)
    for _ in range(2):
        checkpoint.apply(stored, model, optimizers)
        assert everything(model, optimizers) == at_save
        train(model, optimizers, range(3, 5))


SCHEDULES = {
    "step": lambda o: lr_scheduler.StepLR(o, 2),
    "multi-step": lambda o: lr_scheduler.MultiStepLR(o, [1, 4, 5]),
    "exponential": lambda o: lr_scheduler.ExponentialLR(o, 0.9),
    "cosine": lambda o: lr_scheduler.CosineAnnealingLR(o, 8),
    "restarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 3),
    "one cycle": lambda o: lr_scheduler.OneCycleLR(o, 0.1, total_steps=20),
    "cyclic": lambda o: lr_scheduler.CyclicLR(o, 0.01, 0.1, cycle_momentum=False),
    "lambda": lambda o: lr_scheduler.LambdaLR(o, lambda t: 1 / (1 + t)),
    "polynomial": lambda o: lr_scheduler.PolynomialLR(o, 9),
    "plateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=0, threshold=1e9),
    "sequence": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.ConstantLR(o, 0.1), lr_scheduler.MultiStepLR(o, [1, 2])], [2]
    ),
}


@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES.keys())
def test_schedulers_fit_into_extra(schedule: Any, tmp_path: Path) -> None:
    model, optimizers = net(O.SGD, momentum=0.9)()
    scheduler = schedule(optimizers[0])
    train(model, optimizers, range(3), [scheduler])
    kept = copy.deepcopy(scheduler.state_dict())
    path = save(tmp_path / "run.ckpt", model, optimizers, extra={"scheduler": scheduler.state_dict()})
    train(model, optimizers, range(3, 9), [scheduler])

    other, theirs = net(O.SGD, momentum=0.9)()
    again = schedule(theirs[0])
    stored = checkpoint.load(path)
    checkpoint.apply(stored, other, theirs)
    assert bits(stored.extra["scheduler"]) == bits(kept)
    again.load_state_dict(stored.extra["scheduler"])
    train(other, theirs, range(3, 9), [again])
    assert everything(other, theirs) == everything(model, optimizers)


def test_extra_is_returned_as_it_was(tmp_path: Path) -> None:
    model, optimizers = net(O.SGD)()
    shared, turned = torch.randn(3), torch.tensor([1 + 2j])
    scaler = torch.amp.GradScaler("cpu", enabled=True)
    extra = {
        "scaler": scaler.state_dict(),
        "numbers": [0, -7, 10**40, True, None, 0.1, -0.0, 5e-324, float("inf"), float("-inf"), float("nan")],
        "text": 'ε \x00 "sha256":"' + "0" * 64 + '"',
        "keys": {1: "a", "1": "b", (None): 2, 2.5: [], "dict": {}, "tensor": "x", "float": "nan"},
        "tensors": (shared, shared, shared[1:], shared.t(), torch.eye(3)[:, 1], torch.tensor(2, dtype=torch.int8)),
        "kinds": [torch.ones(2).to(d) for d in (torch.bool, torch.uint8, torch.int64, torch.bfloat16, torch.complex64)],
        "weights": dict(model.state_dict()),
        "conjugate": (turned, turned.conj(), turned.conj().imag),
        "empty": [torch.zeros(0), torch.zeros(0), torch.zeros(2, 0)],
        "deep": [[[[[[()]]]]]],
    }
    found = checkpoint.load(save(tmp_path / "run.ckpt", model, optimizers, extra=extra)).extra
    assert bits(found) == bits(extra)
    assert found["tensors"][0] is found["tensors"][1]
    found["weights"]["out.weight"].zero_()
    assert bool(model.out.weight.any())


def test_other_tools_can_read_the_weights(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    model, optimizers = net(O.Adam)()
    train(model, optimizers, range(1))
    found = load_file(save(tmp_path / "run.ckpt", model, optimizers))
    assert bits(found["module.first.weight"]) == bits(model.first.weight)
    tied = [name for name in found if name in ("module.out.weight", "module.again.weight")]
    assert tied == ["module.out.weight"], "tied tensors are stored once"


def test_models_with_views_and_extra_state(tmp_path: Path) -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            flat = torch.randn(10)
            self.w = nn.Parameter(torch.randn(4, 3).t())  # not contiguous
            self.register_buffer("left", flat[:6])
            self.register_buffer("right", flat[4:])
            self.note: Any = {"seen": 0}

        def get_extra_state(self) -> Any:
            return self.note

        def set_extra_state(self, state: Any) -> None:
            self.note = state

    model = Odd()
    model.note = {"seen": 3, "sum": torch.ones(2)}
    stored = checkpoint.load(save(tmp_path / "run.ckpt", model, []))
    other = Odd()
    checkpoint.apply(stored, other, [])
    assert bits(dict(other.state_dict())) == bits(dict(model.state_dict()))


def test_classes_that_tell_old_layouts_by_their_version(tmp_path: Path) -> None:
    class Changed(nn.Linear):
        """Its first version stored the weight with the other sign."""

        _version = 2

        def _load_from_state_dict(self, state: Any, prefix: str, local: Any, *rest: Any) -> None:
            if local.get("version", 1) < 2:
                state[f"{prefix}weight"] = -state[f"{prefix}weight"]
            super()._load_from_state_dict(state, prefix, local, *rest)

    def build() -> nn.Module:
        return nn.Sequential(Changed(4, 4), nn.utils.spectral_norm(nn.Linear(4, 4)), nn.BatchNorm1d(4))

    model, other = build(), build()
    model(torch.randn(3, 4))
    checkpoint.apply(checkpoint.load(save(tmp_path / "run.ckpt", model, [])), other, [])
    assert bits(dict(other.state_dict())) == bits(dict(model.state_dict()))


def test_the_file_replaces_an_earlier_one_and_is_private(tmp_path: Path) -> None:
    model, optimizers = net(O.Adam)()
    path = tmp_path / "run.ckpt"
    path.write_bytes(b"earlier")
    path.chmod(0o644)
    save(path, model, optimizers, steps=3)
    assert path.stat().st_mode & 0o777 == 0o600
    save(path, model, optimizers, steps=4)
    assert checkpoint.load(str(path)).position == {"steps": 4, "max_grad_norm": 1.25}
    assert os.listdir(tmp_path) == ["run.ckpt"]


def test_nothing_but_public_state_is_written(tmp_path: Path) -> None:
    """Gradients, which hold a batch before its release, are not in the file, and no generator is."""
    import json

    from safetensors import safe_open

    model, optimizers = net(O.Adam)()
    train(model, optimizers, range(2))
    assert model.first.weight.grad is not None
    path = save(tmp_path / "run.ckpt", model, optimizers)
    with safe_open(path, "pt") as file:
        document = json.loads(file.metadata()["document"])
        kept = [file.get_tensor(name) for name in file.keys()]  # noqa: SIM118
    parts = {"ledger_head", "position", "plan", "torch", "module", "versions", "optimizers", "extra"}
    assert set(document) == parts
    gradients = [bits(p.grad) for p in model.parameters() if p.grad is not None and p.numel() > 1]
    assert not any(bits(tensor) in gradients for tensor in kept)
