"""Checkpoints of a private training: what they hold in the middle of a batch, and what a resumed engine may spend."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tests.checkpoint.training import bits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import sfumato as sf
from sfumato.errors import ConfigurationError, LedgerError, TokenError
from sfumato.session import checkpoint

DATA = TensorDataset(torch.randn(200, 6, generator=torch.Generator().manual_seed(3)), torch.arange(200) % 3)
SIGMA = 2.0


def private(ledger: Any = None, **settings: Any) -> tuple[sf.PrivacyEngine, Any, Any, Any]:
    engine = sf.PrivacyEngine(ledger=ledger)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
    settings = {"noise_multiplier": SIGMA, "max_grad_norm": 1.0, "data_loader": DataLoader(DATA, 40)} | settings
    return engine, *engine.make_private(module=model, optimizer=optimizer, **settings)


def run(engine: sf.PrivacyEngine, model: Any, optimizer: Any, loader: Any, until: int) -> None:
    while engine.steps < until and not engine.stopped:
        for x, y in loader:
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x), y).backward()
            optimizer.step()
            if engine.steps >= until:
                return


def state(model: Any, optimizer: Any) -> Any:
    return bits([dict(model.state_dict()), optimizer.state_dict()])


def test_another_engine_goes_on(tmp_path: Path) -> None:
    path, ledger = tmp_path / "run.ckpt", sf.Ledger()
    engine, *parts = private(ledger)
    run(engine, *parts, until=3)
    engine.save_checkpoint(path, extra={"epoch": 1})
    at_save = state(parts[0], parts[1])
    run(engine, *parts, until=5)
    engine.detach()
    again, *others = private(ledger)
    assert again.load_checkpoint(path) == {"epoch": 1}
    assert again.steps == 3
    assert state(others[0], others[1]) == at_save
    run(again, *others, until=7)
    assert sum(ledger.events().values()) == 5 + 4


def test_saved_between_microbatches_it_holds_the_last_release(tmp_path: Path) -> None:
    """The partial sum of an unfinished batch is not noised, so no file may hold it."""
    path = tmp_path / "run.ckpt"
    engine, model, optimizer, loader = private(max_physical_batch_size=2)
    microbatches = iter(loader)
    while engine.steps < 2:
        optimizer.zero_grad()
        x, y = next(microbatches)
        nn.functional.cross_entropy(model(x), y).backward()
        if engine.steps:
            optimizer.step()
    at_release = state(model, optimizer)
    x, y = next(microbatches)  # the next logical batch, which has more than these two records
    nn.functional.cross_entropy(model(x), y).backward()
    assert engine.steps == 2
    head = engine.ledger.head
    engine.save_checkpoint(path)
    stored = checkpoint.load(path)
    assert (stored.position["steps"], stored.ledger_head) == (2, head)
    names = {name.split("[")[0].split(".")[0] for name in stored.tensors}
    assert names == {"module", "optimizers"}
    engine.load_checkpoint(path)
    assert state(model, optimizer) == at_release
    with pytest.raises(TokenError):  # what was drawn belongs to the model before it was restored
        nn.functional.cross_entropy(model(x), y).backward()


def test_steps_run_again_count_against_the_budget(tmp_path: Path) -> None:
    from sfumato.accounting import epsilon

    limit = float(epsilon(noise_multiplier=SIGMA, sample_rate=0.2, steps=8, delta=1e-5)) * (1 + 1e-6)
    budget, path, ledger = sf.Budget(epsilon=limit, delta=1e-5), tmp_path / "run.ckpt", sf.Ledger()
    engine, *parts = private(ledger, budget=budget)
    run(engine, *parts, until=2)
    engine.save_checkpoint(path)
    run(engine, *parts, until=5)
    engine.detach()
    again, *others = private(ledger, budget=budget)
    again.load_checkpoint(path)
    run(again, *others, until=100)
    assert again.stopped
    assert again.steps == 2 + 3, "five of eight were spent before"
    assert sum(ledger.events().values()) == 8


def test_what_would_be_untrue_is_refused_before_anything_changes(tmp_path: Path) -> None:
    path, ledger = tmp_path / "run.ckpt", sf.Ledger(tmp_path / "ledger.db")
    engine, *parts = private(ledger)
    run(engine, *parts, until=2)
    engine.save_checkpoint(path)
    engine.detach()
    half = torch.utils.data.Subset(DATA, range(100))
    for settings, error in [
        ({"ledger": sf.Ledger()}, LedgerError),
        ({"ledger": ledger, "data_loader": DataLoader(half, 40)}, ConfigurationError),
        ({"ledger": ledger, "loss_reduction": "sum"}, ConfigurationError),
    ]:
        other, model, optimizer, _ = private(**settings)
        before = state(model, optimizer)
        with pytest.raises(error):
            other.load_checkpoint(path)
        assert state(model, optimizer) == before
        assert other.steps == 0
        other.detach()
    ledger.close()


def test_numbers_chosen_on_the_way_go_on_being_so(tmp_path: Path) -> None:
    engine, model, optimizer, loader = private(noise_multiplier=3.0)
    run(engine, model, optimizer, loader, 4)
    engine.change(noise_multiplier=0.7)
    engine.save_checkpoint(tmp_path / "file")
    again, *_ = private(engine.ledger, noise_multiplier=3.0)
    again.load_checkpoint(tmp_path / "file")
    assert again.plan.noise_multiplier == 0.7
    assert again.plan.adaptive


@pytest.mark.parametrize(
    "position",
    [
        {"steps": 2**80},
        {"epoch_step": -1},
        {"bound": 0.0},
        {"changed": [50.0, 1.0]},  # more noise than the count of quantile clipping can spare
        {"changed": [10**400, 1.0]},
        {"changed": [1.0]},
        {"changed": [1.0, float(-1)]},
    ],
    ids=str,
)
def test_a_position_that_cannot_be_gone_on_from_changes_nothing(position: dict[str, Any], tmp_path: Path) -> None:
    quantile = {"clip_schedule": sf.clipping.Quantile(count_noise=5.0)}
    engine, model, optimizer, loader = private(**quantile)
    run(engine, model, optimizer, loader, 4)
    session = engine._session
    checkpoint.save(
        tmp_path / "file",
        module=model,
        optimizers=[optimizer],
        position={"steps": 4, "epoch_step": 4, "bound": 1.0, "changed": None} | position,
        plan=session.plan.described(),
        ledger_head=engine.ledger.head,
    )
    again, other, *_ = private(engine.ledger, **quantile)
    before = bits(dict(other.state_dict()))
    with pytest.raises(ConfigurationError):
        again.load_checkpoint(tmp_path / "file")
    assert bits(dict(other.state_dict())) == before
    assert again.steps == 0
