"""A federation over Flower's messages is the federation in one process: same model, same ledgers."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

pytest.importorskip("flwr.app")

from flwr.app import Context
from tests.flower.in_process import InProcessGrid

from sfumato.accounting import Ledger
from sfumato.federated import (
    Client,
    ClientLevel,
    FederatedTrainer,
    LocalLevel,
    LocalTraining,
    PoissonCohort,
    Prune,
    Quantize,
    Result,
    SampleLevel,
    TopK,
    Validation,
    Worker,
)
from sfumato.integrations.flower import GridTransport, client_app

NAMES = [f"clinic-{number}" for number in range(6)]


def data(seed: int, count: int = 40) -> TensorDataset:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, 5, generator=generator)
    return TensorDataset(x, (x[:, 0] + 0.5 * x[:, 1] > 0).long())


def model() -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 2))


def clients(folder: Path) -> dict[str, Client]:
    folder.mkdir(parents=True)
    return {
        name: Client(name, data(number), ledger=folder / f"{name}.db", validation=data(100 + number, 10))
        for number, name in enumerate(NAMES)
    }


def both(tmp_path: Path, **settings: Any) -> tuple[Result, Result, Mapping[str, Client], Mapping[str, Client]]:
    settings = {
        "rounds": 3,
        "local": LocalTraining(steps=3, batch_size=10, lr=0.2),
        "noise": "research",
        "seed": 11,
        **settings,
    }
    here, there = clients(tmp_path / "here"), clients(tmp_path / "there")
    trainer = FederatedTrainer(model=model(), clients=here, **settings)
    one = trainer.fit()
    worker: Worker = trainer.worker(model(), len(NAMES))

    def make(context: Context) -> tuple[Worker, Client]:
        return worker, there[str(context.node_config["client"])]

    # Another order, and one node more than once as slow as the others: neither must matter.
    grid = InProcessGrid(client_app(make), NAMES[::-1])
    grid.late[NAMES[0]] = 0.3
    transport = GridTransport(grid, clients=NAMES, wait=0)
    other = FederatedTrainer(model=model(), transport=transport, deadline=30.0, **settings).fit()
    return one, other, here, there


def charged(ledger: Ledger) -> list[Any]:
    return sorted(
        str(
            [entry[name] for name in ("step", "event", "dataset", "records", "group", "note", "count") if name in entry]
        )
        for entry in ledger.entries()
    )


def same(one: Result, other: Result) -> None:
    theirs = other.model.state_dict()
    moved = 0.0
    for name, mine in one.model.state_dict().items():
        torch.testing.assert_close(theirs[name], mine, rtol=0, atol=1e-6)
        moved += float((mine - Tensor(model().state_dict()[name])).norm())
    assert moved > 1e-3
    assert one.stopped == other.stopped
    assert one.epsilon == other.epsilon
    assert one.client_epsilons == other.client_epsilons
    assert one.noise_multiplier == other.noise_multiplier or one.noise_multiplier != one.noise_multiplier
    assert [(r.cohort, r.accepted, r.rejected, r.epsilon, r.measure) for r in one.rounds] == [
        (r.cohort, r.accepted, r.rejected, r.epsilon, r.measure) for r in other.rounds
    ]
    assert [(r.bytes_up, r.bytes_down) for r in one.rounds] == [(r.bytes_up, r.bytes_down) for r in other.rounds]


@pytest.mark.parametrize(
    "settings",
    [
        {"cohort": PoissonCohort(0.6)},
        {"compression": Quantize(bits=8)},
        {"compression": Prune(0.5), "validation": Validation(noise_multiplier=2.0)},
        {"train": TopK(count=2, by="private")},
        {"train": TopK(fraction=0.3, by="public", granularity="coordinate"), "public": data(77)},
    ],
    ids=["poisson", "quantized", "pruned", "scored", "coordinates"],
)
def test_whole_clients(tmp_path: Path, settings: dict[str, Any]) -> None:
    unit = ClientLevel(epsilon=20.0, delta=1e-3, max_update_norm=0.5)
    one, other, _, _ = both(tmp_path, privacy=unit, **settings)
    same(one, other)
    assert one.ledger is not None
    assert other.ledger is not None
    assert charged(one.ledger) == charged(other.ledger) != []
    assert one.epsilon <= 20.0


@pytest.mark.parametrize(
    "unit",
    [SampleLevel(epsilon=8.0, delta=1e-3, max_grad_norm=1.0), LocalLevel(epsilon=30.0, delta=1e-3)],
    ids=["records", "local"],
)
def test_clients_with_their_own_ledgers(tmp_path: Path, unit: Any) -> None:
    one, other, here, there = both(tmp_path, privacy=unit)
    same(one, other)
    assert one.ledger is other.ledger is None
    for name in NAMES:
        assert charged(here[name].ledger) == charged(there[name].ledger) != []


def test_another_seed_is_another_model(tmp_path: Path) -> None:
    """So that the comparison can fail."""
    unit = ClientLevel(epsilon=20.0, delta=1e-3, max_update_norm=0.5)
    one, _, _, _ = both(tmp_path, privacy=unit)
    two, _, _, _ = both(tmp_path / "again", privacy=unit, seed=12)
    with pytest.raises(AssertionError):
        same(one, two)


def test_a_client_that_never_answers_costs_utility_alone(tmp_path: Path) -> None:
    there = clients(tmp_path / "there")
    settings: dict[str, Any] = {
        "privacy": ClientLevel(epsilon=20.0, delta=1e-3, max_update_norm=0.5),
        "rounds": 2,
        "noise": "research",
        "seed": 1,
        "local": LocalTraining(steps=1, lr=0.2),
    }
    worker = FederatedTrainer(model=model(), clients=there, **settings).worker(model(), len(NAMES))
    grid = InProcessGrid(client_app(lambda c: (worker, there[str(c.node_config["client"])])), NAMES)
    grid.gone.add(NAMES[2])
    result = FederatedTrainer(
        model=model(), transport=GridTransport(grid, clients=NAMES, wait=0), deadline=0.7, **settings
    ).fit()
    assert [(r.cohort, r.accepted) for r in result.rounds] == [(6, 5), (6, 5)]
    assert len({r.noise_std for r in result.rounds}) == 1
    assert set(result.client_epsilons) == set(NAMES)
    assert result.client_epsilons[NAMES[2]] == result.client_epsilons[NAMES[0]] > 0
