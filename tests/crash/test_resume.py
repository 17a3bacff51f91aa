"""A killed training goes on from an older checkpoint: it spends again, draws anew, and nothing is forgotten."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

# Every gradient is zero, so that what is released is the noise alone.
PROGRAM = """
import json, os, signal, sys
import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
import sfumato as sf

folder, life, ledger = sys.argv[1], sys.argv[2], sys.argv[3]
torch.set_num_threads(1)
torch.manual_seed(7)  # the same in every life: no seed may reach the noise
model = nn.Linear(40, 25)
optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 2, gamma=0.5)
loader = DataLoader(TensorDataset(torch.randn(200, 40)), batch_size=40)
engine = sf.PrivacyEngine(ledger=ledger)
model, optimizer, loader = engine.make_private(
    module=model, optimizer=optimizer, data_loader=loader, noise_multiplier=1.0, max_grad_norm=1.0
)
path, journal = os.path.join(folder, "run.ckpt"), []
if life != "first":
    try:
        extra = engine.load_checkpoint(path)
    except sf.SfumatoError as error:
        print(json.dumps({"error": type(error).__name__, "message": str(error)}))
        sys.exit(3)
    scheduler.load_state_dict(extra["scheduler"])
facts = {"start": engine.steps, "lr": scheduler.get_last_lr()[0], "weights": model.weight.sum(dim=1).tolist()}

def run(until):
    while True:
        for (x,) in loader:
            optimizer.zero_grad()
            (model(x) * 0).mean().backward()
            journal.append(model.weight.grad.flatten().tolist())
            optimizer.step()
            scheduler.step()
            if engine.steps >= until:
                return

if life == "first":
    run(3)
    engine.save_checkpoint(path, extra={"scheduler": scheduler.state_dict()})
    facts = {"lr": scheduler.get_last_lr()[0], "weights": model.weight.sum(dim=1).tolist()}
run(9)
facts["steps"], facts["epsilon"] = engine.steps, float(engine.get_epsilon(1e-5))
with open(os.path.join(folder, life), "w") as file:
    json.dump(facts | {"noise": journal}, file)
    file.flush()
    os.fsync(file.fileno())
if life == "first":
    os.kill(os.getpid(), signal.SIGKILL)
"""


def live(folder: Path, life: str, ledger: Path) -> tuple[subprocess.CompletedProcess[str], Any]:
    command = [sys.executable, "-c", PROGRAM, str(folder), life, str(ledger)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100)
    written = folder / life
    return done, json.loads(written.read_text()) if written.exists() else None


def releases(ledger: Path) -> int:
    from sfumato import Ledger

    with Ledger(ledger) as opened:
        opened.verify()
        return sum(opened.events().values())


@pytest.fixture(scope="module")
def lives(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A first life of nine steps that saved after three and was killed, and a second that resumed."""
    folder = tmp_path_factory.mktemp("lives")
    done, first = live(folder, "first", folder / "ledger.db")
    assert done.returncode == -signal.SIGKILL, done.stderr
    spent = releases(folder / "ledger.db")
    done, second = live(folder, "second", folder / "ledger.db")
    assert done.returncode == 0, done.stderr
    return folder, first, second, spent


def test_every_release_of_both_lives_is_spent(lives: Any) -> None:
    from sfumato.accounting import epsilon

    folder, first, second, spent = lives
    assert (first["steps"], second["start"], second["steps"]) == (9, 3, 9)
    assert (spent, releases(folder / "ledger.db")) == (9, 9 + 6)
    expected = epsilon(noise_multiplier=1.0, sample_rate=0.2, steps=15, delta=1e-5)
    assert second["epsilon"] == pytest.approx(float(expected), rel=1e-9)
    assert second["epsilon"] > first["epsilon"]


def test_the_second_life_starts_where_the_checkpoint_was_taken(lives: Any) -> None:
    _, first, second, _ = lives
    assert second["weights"] == first["weights"]
    assert second["lr"] == first["lr"] == 0.05


def test_the_noise_of_replayed_steps_is_new(lives: Any) -> None:
    """What was released in the first life says nothing of the second, at no shift of the steps."""
    _, first, second, _ = lives
    before, after = np.array(first["noise"]), np.array(second["noise"])
    assert before.shape == (9, 1000)
    assert after.shape == (6, 1000)
    for one in before:
        for other in after:
            # 7 standard deviations: 2.6e-12 for independent Gaussians, 1.4e-10 for all 54 pairs.
            assert abs(np.corrcoef(one, other)[0, 1]) < 7 / np.sqrt(1000)


def test_without_its_ledger_it_does_not_resume(lives: Any) -> None:
    folder, *_ = lives
    done, written = live(folder, "third", folder / "another.db")
    assert (done.returncode, written) == (3, None), done.stderr
    assert json.loads(done.stdout)["error"] == "LedgerError"
    assert "resume without its ledger" in json.loads(done.stdout)["message"]
