"""Whole federations: budgets, stopping, what is trained, going on from a checkpoint, and that clients do not mix."""

from __future__ import annotations

import copy
import math
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from sfumato.accounting import Event, Ledger, compose
from sfumato.clipping import Quantile
from sfumato.errors import ConfigurationError, UnsupportedError
from sfumato.federated import (
    Adam,
    Adaptive,
    All,
    Client,
    ClientLevel,
    Distributed,
    FederatedTrainer,
    FixedCohort,
    LastLayers,
    LocalLevel,
    LocalTraining,
    LoRA,
    MinSeparation,
    Momentum,
    Named,
    PoissonCohort,
    Quantize,
    SampleLevel,
    TopK,
    Validation,
)
from sfumato.federated.accounts import DATASET
from sfumato.federated.cohorts import number_of
from sfumato.federated.units import Unit
from sfumato.federated.wire.messages import Task
from sfumato.federated.wire.schema import digest
from sfumato.schedules import Cosine

STEPS = LocalTraining(steps=3, batch_size=5)
UNITS: tuple[Unit, ...] = (SampleLevel(epsilon=3.0), ClientLevel(epsilon=3.0), LocalLevel(epsilon=3.0))
by_unit = pytest.mark.parametrize("unit", UNITS, ids=lambda u: type(u).__name__)


def trainer_of(fed: Any, unit: Unit, **changes: Any) -> FederatedTrainer:
    settings: dict[str, Any] = {
        "model": fed.linear(),
        "clients": fed.federation(),
        "local": STEPS,
        "rounds": 4,
        "seed": 3,
        "noise": "research",
    }
    return FederatedTrainer(**{**settings, "privacy": unit, **changes})


def parameters(model: nn.Module) -> Tensor:
    return torch.cat([p.detach().reshape(-1) for p in model.parameters()])


# -- budgets ------------------------------------------------------------------------------------------------------


@by_unit
def test_the_budget_is_used_and_never_exceeded(fed: Any, unit: Unit) -> None:
    result = trainer_of(fed, unit).fit()
    assert result.stopped == "rounds"
    assert 0.97 * 3.0 < result.epsilon <= 3.0
    assert result.epsilon == max(result.client_epsilons.values())
    assert [r.epsilon for r in result.rounds] == sorted(r.epsilon for r in result.rounds)
    if result.ledger is not None:
        assert result.epsilon == pytest.approx(float(result.ledger.epsilon(delta=1e-5)))
    for name, ledger in result.client_ledgers.items():
        assert result.client_epsilons[name] == pytest.approx(float(ledger.epsilon(delta=1e-5)))


@by_unit
def test_a_spent_federation_returns_its_model(fed: Any, unit: Unit) -> None:
    """More rounds than given noise allows: it ends, with what was learned, within the budget."""
    given = type(unit)(epsilon=3.0, noise_multiplier=4.0)  # type: ignore[call-arg]
    result = trainer_of(fed, given, rounds=60, local=LocalTraining(steps=3, batch_size=20)).fit()
    assert result.stopped == "budget"
    assert 0 < len(result.rounds) < 60
    assert 0.8 * 3.0 < result.epsilon <= 3.0
    assert not torch.equal(parameters(result.model), parameters(fed.linear()))
    spent = result.ledger or result.client_ledgers["c0"]
    more = {e: n + 1 for e, n in spent.events().items()}
    assert compose(more, delta=1e-5) > 3.0


@pytest.mark.parametrize("personal", ["rate", "noise"])
def test_personal_budgets_of_a_server(fed: Any, personal: Any) -> None:
    """Everybody's ε is within its own budget, and near it: by being drawn less often, or by a smaller bound."""
    limits = {f"c{i}": e for i, e in enumerate([0.5, 1.0, 2.0, 4.0])}
    unit = ClientLevel(epsilon=limits, personal=personal)
    result = trainer_of(fed, unit, rounds=20, cohort=PoissonCohort(0.5)).fit()
    assert result.stopped == "rounds"
    assert result.ledger is not None
    for name, limit in limits.items():
        spent = float(result.ledger.epsilon(delta=1e-5, dataset=DATASET, records=[number_of(name)]))
        assert spent == pytest.approx(result.client_epsilons[name])
        assert 0.95 * limit < spent <= limit


def test_personal_rates_are_those_that_are_charged(fed: Any) -> None:
    """The draw and the events: a client with half the rate is drawn half as often."""
    limits = {f"c{i}": (1.0 if i % 2 else 4.0) for i in range(40)}
    transport = fed.Scripted({c: fed.constant(np.zeros(8)) for c in limits})
    trainer = trainer_of(
        fed, ClientLevel(epsilon=limits), clients=None, transport=transport, rounds=80, cohort=PoissonCohort(0.4)
    )
    result = trainer.fit()
    drawn = {c: sum(c in ids for ids in transport.asked) for c in limits}
    assert result.ledger is not None
    rates = {
        c: {e.sample_rate for e in result.ledger.events(dataset=DATASET, records=[number_of(c)])} for c in ("c0", "c1")
    }
    (low,), (high,) = rates["c1"], rates["c0"]
    assert high == 0.4
    assert low < 0.3
    for first, q in ((0, high), (1, low)):
        total = sum(n for c, n in drawn.items() if int(c[1:]) % 2 == first)
        assert abs(total - 20 * 80 * q) < 6.2 * math.sqrt(20 * 80 * q * (1 - q))


def test_personal_noise_clips_shorter(fed: Any) -> None:
    """Without noise to speak of: who has the smaller ε moves the model by less, in the ratio of the multipliers."""
    limits = {"c0": 4.0, "c1": 0.5}
    unit = ClientLevel(epsilon=limits, personal="noise")
    moved = {}
    for who in limits:
        says = {c: fed.constant(np.eye(8)[0] * 100 * (c == who)) for c in limits}
        trainer = trainer_of(fed, unit, clients=None, transport=fed.Scripted(says), rounds=1)
        quiet = trainer_of(
            fed, unit, clients=None, transport=fed.Scripted({c: fed.constant(np.zeros(8)) for c in limits}), rounds=1
        )
        moved[who] = float((parameters(trainer.fit().model) - parameters(quiet.fit().model)).norm()) * 2
        multipliers = {
            c: [e.noise_multiplier for e in trainer.ledger.events(dataset=DATASET, records=[number_of(c)])]  # type: ignore[union-attr]
            for c in limits
        }
    assert moved["c0"] == pytest.approx(1.0, rel=1e-4)
    assert moved["c1"] == pytest.approx(multipliers["c0"][0] / multipliers["c1"][0], rel=1e-4)


@by_unit
@pytest.mark.parametrize("of_federation", [8.0, None])
def test_a_client_has_a_limit_of_its_own(fed: Any, unit: Unit, of_federation: float | None) -> None:
    """Below the federation's, or where that has none: it is kept, by every unit."""
    clients = {n: Client(n, d, epsilon=1.0 if n == "c1" else None) for n, d in fed.federation().items()}
    z = None if of_federation else {"SampleLevel": 2.0, "ClientLevel": 8.0, "LocalLevel": 12.0}[type(unit).__name__]
    own = type(unit)(epsilon=of_federation, noise_multiplier=z)  # type: ignore[call-arg]
    result = trainer_of(fed, own, clients=clients, rounds=12).fit()
    assert 0.3 < result.client_epsilons["c1"] <= 1.0
    assert result.client_epsilons["c0"] > 1.0


def test_a_client_of_a_second_federation_starts_anew(fed: Any) -> None:
    """But for what is in its ledger: that its budget in another one was spent is forgotten."""
    client = Client("a", fed.records())
    clients = {"a": client, "b": fed.records(seed=1)}
    first = trainer_of(fed, LocalLevel(epsilon=1.0, noise_multiplier=10.0), clients=clients).fit()
    assert first.stopped == "budget"
    second = trainer_of(fed, LocalLevel(epsilon=8.0, noise_multiplier=10.0), clients=clients).fit()
    assert [r.accepted for r in second.rounds] == [2] * 4
    assert second.client_epsilons["a"] > second.client_epsilons["b"] > first.epsilon


def test_without_noise_epsilon_is_infinite(fed: Any) -> None:
    assert trainer_of(fed, ClientLevel(noise_multiplier=0.0), rounds=1).fit().epsilon == math.inf


def test_a_limit_of_distributed_clients(fed: Any) -> None:
    clients = {n: Client(n, d, epsilon=1.0 if n == "c1" else None) for n, d in fed.federation().items()}
    result = trainer_of(fed, Distributed(noise_multiplier=3.0), clients=clients, rounds=6).fit()
    assert result.client_epsilons["c1"] <= 1.0
    assert result.client_epsilons["c0"] > 1.0


# -- stopping and adapting ----------------------------------------------------------------------------------------


@by_unit
def test_private_validation_ends_a_run_that_does_not_improve(fed: Any, unit: Unit) -> None:
    """The measures are charged, and the ε of a run that ended early is below its budget."""
    clients = {n: Client(n, d, validation=fed.records(50, seed=9)) for n, d in fed.federation().items()}
    noise = 80.0 if isinstance(unit, LocalLevel) else 8.0
    validation = Validation(noise_multiplier=noise, patience=2, min_delta=1.0)
    result = trainer_of(fed, unit, clients=clients, rounds=12, validation=validation).fit()
    assert result.stopped == "converged"
    assert len(result.rounds) == 3
    assert all(r.measure is not None and 0.0 <= r.measure <= 1.0 for r in result.rounds)
    assert result.epsilon < 3.0
    ledger = result.ledger or result.client_ledgers["c0"]
    measures = [e for e in ledger.entries() if Event.from_json(e["event"]).noise_multiplier == noise]
    assert len(measures) == 3
    if isinstance(unit, SampleLevel):
        assert {e["group"] for e in measures} == {"validation"}


def test_public_validation_is_free(fed: Any) -> None:
    validation = Validation(public=fed.records(100, seed=8), patience=None)
    with_ = trainer_of(fed, UNITS[1], validation=validation).fit()
    without = trainer_of(fed, UNITS[1]).fit()
    assert with_.epsilon == without.epsilon
    assert torch.equal(parameters(with_.model), parameters(without.model))
    assert all(r.measure is not None for r in with_.rounds)


@by_unit
def test_adaptive_noise_is_charged_as_adaptive(fed: Any, unit: Unit) -> None:
    """Every event of training carries the mark, noise falls, and the budget holds."""
    clients = {n: Client(n, d, validation=fed.records(50, seed=9)) for n, d in fed.federation().items()}
    result = trainer_of(
        fed,
        unit,
        clients=clients,
        rounds=8,
        allocation=Adaptive(patience=1, min_delta=1.0, factor=0.7),
        validation=Validation(noise_multiplier=90.0, patience=None),
    ).fit()
    assert result.epsilon <= 3.0
    ledger = result.ledger or result.client_ledgers["c0"]
    events = [Event.from_json(e["event"]) for e in ledger.entries() if e["group"] != "validation"]
    trained = [e for e in events if e.noise_multiplier != 90.0]
    assert len({e.noise_multiplier for e in trained}) >= 2
    assert all(e.adaptive for e in trained)


def test_shares_of_adaptive_clients(fed: Any) -> None:
    """Counts are charged before, and nobody gets more than the budget for them."""
    result = trainer_of(
        fed,
        UNITS[0],
        clients={"few": Client("few", fed.records(10)), "many": Client("many", fed.records(200, seed=1))},
        allocation=Adaptive(clients=True, count_noise=30.0),
        validation=Validation(noise_multiplier=9.0, patience=None),
        classes=2,
    ).fit()
    assert all(e <= 3.0 for e in result.client_epsilons.values())
    for ledger in result.client_ledgers.values():
        assert Event.from_json(ledger.entries()[0]["event"]).noise_multiplier == 30.0


def test_a_schedule_of_noise(fed: Any) -> None:
    """Known in advance: charged exactly, within the budget, and used up."""
    result = trainer_of(fed, UNITS[1], allocation=Cosine(4, 0.5)).fit()
    stds = [r.noise_std for r in result.rounds]
    assert stds == sorted(stds, reverse=True)  # type: ignore[type-var]
    assert stds[0] == pytest.approx(result.noise_multiplier, rel=1e-6)  # type: ignore[operator]
    assert 0.97 * 3.0 < result.epsilon <= 3.0


@pytest.mark.parametrize("start", [0.1, 10.0])
@pytest.mark.parametrize("target", [0.5, 0.8])
def test_the_bound_reaches_the_quantile(fed: Any, start: float, target: float) -> None:
    """Within 10 % after 60 rounds, from ten times off either way, with everything noised."""
    norms = np.exp(np.random.default_rng(5).normal(0.0, 0.5, 200))
    transport = fed.Scripted({f"c{i}": fed.constant(np.eye(8)[i % 8] * n) for i, n in enumerate(norms)})
    true = float(np.quantile(norms, target))
    unit = ClientLevel(noise_multiplier=1.0, max_update_norm=true * start, clip_schedule=Quantile(target))
    result = trainer_of(fed, unit, clients=None, transport=transport, rounds=60).fit()
    assert result.rounds[-1].max_update_norm == pytest.approx(true, rel=0.10)


def test_the_quantile_is_that_of_weighted_clients(fed: Any) -> None:
    """Small weights for all must not pull the bound to the median."""
    norms = np.exp(np.random.default_rng(5).normal(0.0, 0.5, 200))
    says = {f"c{i}": fed.constant(np.eye(8)[i % 8] * n) for i, n in enumerate(norms)}
    true = float(np.quantile(norms, 0.9))
    unit = ClientLevel(noise_multiplier=0.1, max_update_norm=1.0, clip_schedule=Quantile(0.9, count_noise=1.0))
    result = trainer_of(
        fed, unit, clients=None, transport=fed.Scripted(says), rounds=60, weights=dict.fromkeys(says, 0.2)
    ).fit()
    assert result.rounds[-1].max_update_norm == pytest.approx(true, rel=0.10)


def test_count_noise_that_leaves_nothing_is_refused_before_anything_is_charged(fed: Any) -> None:
    ledger = Ledger()
    with pytest.raises(ConfigurationError) as caught:
        trainer_of(fed, ClientLevel(noise_multiplier=2.0, clip_schedule=Quantile()), ledger=ledger)
    assert caught.value.where == "count_noise"
    assert ledger.entries() == []


# -- who is drawn -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cohort", [FixedCohort(2), MinSeparation(2, 2)], ids=str)
def test_only_the_drawn_pay(fed: Any, cohort: Any) -> None:
    transport = fed.Scripted({f"c{i}": fed.constant(np.zeros(8)) for i in range(7)})
    unit = ClientLevel(noise_multiplier=2.0)
    result = trainer_of(fed, unit, clients=None, transport=transport, cohort=cohort, rounds=9).fit()
    assert result.ledger is not None
    for c in transport.clients():
        times = sum(c in ids for ids in transport.asked)
        events = result.ledger.events(dataset=DATASET, records=[number_of(c)])
        assert sum(events.values()) == times
        assert result.client_epsilons[c] == pytest.approx(float(compose(events, delta=1e-5)) if events else 0.0)
    assert len(set(result.client_epsilons.values())) > 1


def test_fixed_cohorts_do_not_stop_before_they_have_to(fed: Any) -> None:
    """A hundred different cohorts in one ledger: each client is charged for its own rounds only."""
    transport = fed.Scripted({f"c{i}": fed.constant(np.zeros(8)) for i in range(30)})
    unit = ClientLevel(epsilon=4.0)
    result = trainer_of(
        fed, unit, clients=None, transport=transport, cohort=FixedCohort(3), rounds=100, noise="secure"
    ).fit()
    assert len(result.rounds) > 80
    assert result.epsilon <= 4.0


def test_a_federation_of_dropouts_releases_noise(fed: Any) -> None:
    transport = fed.Scripted({f"c{i}": lambda task, client: None for i in range(5)})
    result = trainer_of(fed, UNITS[1], clients=None, transport=transport).fit()
    assert [r.accepted for r in result.rounds] == [0] * 4
    assert all(r.noise_std == result.rounds[0].noise_std for r in result.rounds)
    assert 0.97 * 3.0 < result.epsilon <= 3.0
    assert not torch.equal(parameters(result.model), parameters(fed.linear()))


def test_dropouts_of_sample_level_clients_cost_them_nothing(fed: Any) -> None:
    transport = fed.Scripted({f"c{i}": lambda task, client: None for i in range(5)})
    result = trainer_of(fed, UNITS[0], clients=None, transport=transport).fit()
    assert result.epsilon == 0.0
    assert torch.equal(parameters(result.model), parameters(fed.linear()))


# -- what is trained ----------------------------------------------------------------------------------------------


class Tied(nn.Module):
    """A weight that is used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False), nn.Linear(3, 2)
        self.second.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        """Logits."""
        return self.head(self.second(torch.tanh(self.first(x))))  # type: ignore[no-any-return]


def deep() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 4), nn.Tanh(), nn.Linear(4, 2))


@by_unit
@pytest.mark.parametrize(
    "train",
    [All(), LastLayers(1), Named("2"), LoRA(2, also=("4",)), TopK(fraction=0.5, by="released")],
    ids=lambda t: type(t).__name__,
)
def test_only_what_is_trained_moves(fed: Any, unit: Unit, train: Any) -> None:
    model = deep()
    before = copy.deepcopy(model.state_dict())
    result = trainer_of(fed, unit, model=model, train=train).fit()
    assert all(torch.equal(a, b) for a, b in zip(before.values(), model.state_dict().values(), strict=True))
    moved = {n for n, p in result.model.named_parameters() if not torch.equal(p, before[n])}
    expected = {
        "All": set(before),
        "LastLayers": {"4.weight", "4.bias"},
        "Named": {"2.weight", "2.bias"},
        "LoRA": {n for n in before if n.endswith("weight")} | {"4.bias"},
        "TopK": set(before),
    }[type(train).__name__]
    assert moved == expected
    assert type(result.model) is nn.Sequential
    assert result.epsilon <= 3.0


def test_frozen_layers_stay(fed: Any) -> None:
    model = deep()
    model[0].requires_grad_(False)
    result = trainer_of(fed, UNITS[1], model=model).fit()
    assert torch.equal(result.model[0].weight, model[0].weight)
    assert not torch.equal(result.model[2].weight, model[2].weight)


@by_unit
def test_tied_weights_are_one(fed: Any, unit: Unit) -> None:
    """Or are refused where one gradient a record cannot be had; never clipped as two."""
    try:
        result = trainer_of(fed, unit, model=Tied()).fit()
    except UnsupportedError:
        assert isinstance(unit, SampleLevel)
        return
    assert result.model.first.weight is result.model.second.weight  # type: ignore[union-attr]
    assert len(dict(result.model.named_parameters())) == 3


@by_unit
@pytest.mark.parametrize("evaluating", [False, True])
def test_batch_norm_is_refused(fed: Any, unit: Unit, evaluating: bool) -> None:
    """Also in evaluation mode, which training would end; before anything is charged."""
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)).train(not evaluating)
    with pytest.raises(UnsupportedError):
        trainer_of(fed, unit, model=model)


@by_unit
def test_half_precision_is_refused(fed: Any, unit: Unit) -> None:
    with pytest.raises(UnsupportedError):
        trainer_of(fed, unit, model=nn.Linear(3, 2).half())


@by_unit
@pytest.mark.parametrize(("server", "codec"), [(Momentum(0.5), None), (Adam(0.05), Quantize(8))], ids=str)
def test_post_processing_is_free(fed: Any, unit: Unit, server: Any, codec: Any) -> None:
    plain = trainer_of(fed, unit).fit()
    other = trainer_of(fed, unit, server=server, compression=codec).fit()
    assert plain.client_epsilons == other.client_epsilons


# -- one live model, many clients ---------------------------------------------------------------------------------


class Remembering(nn.Module):
    """Everything that a model may hold on to: buffers that forward moves, dropout, frozen parts."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.drop, self.head = nn.Linear(3, 4), nn.Dropout(0.3), nn.Linear(4, 2)
        self.register_buffer("seen", torch.zeros(()))
        self.register_buffer("hidden", torch.zeros(3), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Logits, which depend on everything seen before."""
        with torch.no_grad():
            self.seen += x.abs().sum()
            self.hidden = self.hidden + x.sum(0)
        return self.head(self.drop(torch.tanh(self.body(x)))) + self.seen + self.hidden.sum()  # type: ignore[no-any-return]


class Failing(TensorDataset):
    """Its last record cannot be read."""

    def __getitem__(self, index: Any) -> Any:
        if index == len(self) - 1:
            raise OSError("disk")
        return super().__getitem__(index)


def task_for(trainer: FederatedTrainer, worker: Any, number: int = 1, **settings: Any) -> Task:
    vector = worker.live.flat.clone()
    return Task(
        "run", number, f"nonce {number}", "train", digest(vector, worker.live.frozen), worker._schema.digest,
        vector.numpy(), None, settings,
    )  # fmt: skip


def disturbing(fed: Any) -> dict[str, Any]:
    """Clients that leave the live model in the worst state they can."""
    x, y = fed.records().tensors
    return {
        "large": TensorDataset(x * 1e6, y),
        "nan": TensorDataset(x * math.nan, y),
        "broken": TensorDataset(x[:, :2], y),
        "classes": TensorDataset(x, y + 7),
        "failing": Failing(x, y),
        "spent": Client("spent", fed.records(), epsilon=1e-6),
        "long": fed.records(400, seed=8),
    }


@by_unit
@pytest.mark.filterwarnings("ignore")
def test_nothing_of_one_client_is_in_the_answer_of_the_next(fed: Any, unit: Unit) -> None:
    """Bytes of b's answer, alone and after each client that disturbs; also with the layer's own state in buffers."""
    local = LocalTraining(steps=4, batch_size=5, momentum=0.9, proximal=0.1)
    for make in (Remembering, deep) if not isinstance(unit, SampleLevel) else (deep,):
        torch.manual_seed(0)
        model = make()
        trainer = trainer_of(fed, unit, model=model, local=local)

        def answer(*before: Client, trainer: Any = trainer, model: Any = model) -> Any:
            worker = trainer.worker(copy.deepcopy(model), 4)
            task = task_for(trainer, worker)
            for client in before:
                worker.answer(task, client)
                torch.rand(7)  # the global generator is not part of an answer
            return worker.answer(task, Client("b", fed.records(seed=5)))

        alone = answer()
        assert alone.error is None
        for name, data in disturbing(fed).items():
            other = answer(data if isinstance(data, Client) else Client(name, data))
            assert other.error is None, name
            assert other.done is alone.done is False
            assert other.epsilon == alone.epsilon
            assert {k: v.tobytes() for k, v in other.arrays.items()} == {
                k: v.tobytes() for k, v in alone.arrays.items()
            }, name


@by_unit
@pytest.mark.filterwarnings("ignore")
def test_a_client_that_fails_does_not_end_the_round(fed: Any, unit: Unit) -> None:
    """The error names its kind only; nothing of the message leaves."""
    x, y = fed.records().tensors
    clients = {**fed.federation(3), "broken": TensorDataset(x[:, :2], y), "nan": TensorDataset(x * math.nan, y)}
    result = trainer_of(fed, unit, clients=clients).fit()
    assert len(result.rounds) == 4
    assert bool(parameters(result.model).isfinite().all())
    assert result.rounds[0].rejected.get("client error", 0) >= 1


@pytest.mark.parametrize("unit", UNITS[:2], ids=lambda u: type(u).__name__)
def test_more_workers_change_nothing(fed: Any, unit: Unit) -> None:
    """Copies of a worker train the parameters that they send."""
    quiet: Any = type(unit)(noise_multiplier=1e-6)  # type: ignore[call-arg]
    local = LocalTraining(steps=3, batch_size=20)  # everybody: no random batches
    found = [
        parameters(
            trainer_of(fed, quiet, clients=fed.federation(7), local=local, noise="secure", workers=w).fit().model
        )
        for w in (1, 3)
    ]
    assert not torch.allclose(found[0], parameters(fed.linear()), atol=1e-3)
    assert torch.allclose(found[0], found[1], atol=1e-4)


class Slow(TensorDataset):
    """Takes its time."""

    seconds = 0.2

    def __getitem__(self, index: Any) -> Any:
        time.sleep(self.seconds)
        return super().__getitem__(index)


@pytest.mark.parametrize("workers", [1, 2])
def test_a_slow_client_decides_about_itself_only(fed: Any, workers: int) -> None:
    """With a deadline, the sum with and without it differs by its own part: the others are heard either way."""
    x, y = fed.records(4).tensors
    clients = {"c": fed.records(seed=1), "a": Slow(x, y), "b": fed.records(seed=2)}
    result = trainer_of(
        fed, UNITS[1], clients=clients, rounds=2, deadline=0.5, workers=workers, noise="secure", local=LocalTraining()
    ).fit()
    assert [r.accepted for r in result.rounds] == [2, 2]


def test_clients_that_train_together_are_never_late(fed: Any) -> None:
    """One with many records would decide whether the others are heard."""
    clients = {"long": fed.records(3000), **fed.federation(6)}
    result = trainer_of(
        fed, UNITS[1], clients=clients, rounds=2, deadline=1e-6, vectorize=True, local=LocalTraining(batch_size=10)
    ).fit()
    assert [r.accepted for r in result.rounds] == [7, 7]


# -- ledgers and checkpoints --------------------------------------------------------------------------------------


def test_ledgers_belong_to_names_and_not_to_places(fed: Any, tmp_path: Path) -> None:
    """A client enrolled in another order, or with others, has still spent what it has spent."""
    for order in (["c0", "c1", "c2"], ["c2", "c1"], ["c1"]):
        clients = {c: fed.federation()[c] for c in order}
        result = trainer_of(fed, UNITS[0], clients=clients, client_ledgers=tmp_path / "ledgers").fit()
        assert max(result.client_epsilons.values()) <= 3.0
        if order != ["c0", "c1", "c2"]:
            assert result.stopped == "budget"
            assert min(result.client_epsilons.values()) > 2.5
    assert len(list((tmp_path / "ledgers").glob("*.db"))) == 3


@by_unit
def test_a_run_goes_on_from_its_checkpoint(fed: Any, unit: Unit, tmp_path: Path) -> None:
    """Stopped after two rounds of four: the same model as without, the same ε, and no round twice."""
    books: dict[str, Any] = (
        {"ledger": tmp_path / "server.db"}
        if isinstance(unit, ClientLevel)
        else {"client_ledgers": tmp_path / "clients"}
    )

    class Stop(Exception):
        pass

    def stop(round: Any) -> None:
        if round.number == 2:
            raise Stop

    more = {"server": Momentum(0.5), "cohort": PoissonCohort(0.7), "checkpoint": tmp_path / "state", **books}
    with pytest.raises(Stop):
        trainer_of(fed, unit, on_round=stop, **more).fit()
    second = trainer_of(fed, unit, **more)
    result = second.fit()
    whole = trainer_of(fed, unit, server=Momentum(0.5), cohort=PoissonCohort(0.7)).fit()
    assert [r.number for r in result.rounds] == [1, 2, 3, 4]
    assert torch.equal(parameters(result.model), parameters(whole.model))
    assert result.client_epsilons == pytest.approx(whole.client_epsilons)
    if result.ledger is not None:
        steps = [e["step"] for e in result.ledger.entries()]
        assert len(steps) == len(set(steps)) == 4


@by_unit
def test_a_finished_run_that_is_asked_again_says_what_it_cost(fed: Any, unit: Unit, tmp_path: Path) -> None:
    books: dict[str, Any] = (
        {"ledger": tmp_path / "server.db"}
        if isinstance(unit, ClientLevel)
        else {"client_ledgers": tmp_path / "clients"}
    )
    first = trainer_of(fed, unit, checkpoint=tmp_path / "state", **books).fit()
    again = trainer_of(fed, unit, checkpoint=tmp_path / "state", **books).fit()
    assert again.epsilon == pytest.approx(first.epsilon)
    assert again.epsilon > 2.5
    assert again.client_epsilons == pytest.approx(first.client_epsilons)
    assert torch.equal(parameters(first.model), parameters(again.model))


def test_a_checkpoint_keeps_what_clients_said_they_spent(fed: Any, tmp_path: Path) -> None:
    """Clients behind a transport are not asked again, and their ε must not fall."""
    says = {f"c{i}": (lambda t, c: fed.reply(t, c, np.zeros(8), epsilon=1.5)) for i in range(3)}
    more: dict[str, Any] = {"clients": None, "checkpoint": tmp_path / "state"}
    first = trainer_of(fed, UNITS[0], transport=fed.Scripted(says), **more).fit()
    again = trainer_of(fed, UNITS[0], transport=fed.Scripted(says), **more).fit()
    assert first.epsilon == again.epsilon == 1.5


def test_who_was_drawn_is_not_kept_where_it_is_a_secret(fed: Any, tmp_path: Path) -> None:
    """A checkpoint is made of released numbers."""
    from sfumato.federated import checkpoint

    for cohort, kept in (
        (PoissonCohort(0.5), False),
        (FixedCohort(2, amplification=True), False),
        (MinSeparation(2, 2), True),
    ):
        path = tmp_path / type(cohort).__name__
        trainer_of(fed, ClientLevel(noise_multiplier=2.0), cohort=cohort, checkpoint=path).fit()
        state = checkpoint.load(path)
        assert state is not None
        assert bool(state.last_drawn) is kept


# -- refused ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes",
    [
        {"privacy": "client"},
        {"clients": None},
        {"clients": {}},
        {"rounds": 0},
        {"noise": "none"},
        {"deadline": 0.0},
        {"weights": {"c0": 2.0}},
        {"weights": {"c0": 1.0}},
        {"cohort": 0.5},
        {"server": "adam"},
        {"allocation": Adaptive()},
        {"allocation": "adaptive"},
        {"train": TopK(fraction=0.5, by="public")},
        {"privacy": SampleLevel(epsilon=1.0), "train": TopK(fraction=0.5, by="private")},
        {"privacy": SampleLevel(epsilon=1.0), "ledger": Ledger()},
        {"privacy": ClientLevel(epsilon={"c0": 1.0})},
        {"privacy": ClientLevel(epsilon={f"c{i}": 1.0 + i for i in range(4)}), "cohort": FixedCohort(2)},
        {"workers": 2},
        {"clients": {"a": Client("b", TensorDataset(torch.zeros(1, 3)))}},
    ],
    ids=lambda c: str(c)[:50],
)
def test_refused_before_anything_is_charged(fed: Any, changes: dict[str, Any]) -> None:
    unit = changes.pop("privacy", ClientLevel(epsilon=1.0))
    with pytest.raises(ConfigurationError) as caught:
        trainer_of(fed, unit, **changes)
    assert caught.value.where or changes == {"clients": {}}


@by_unit
def test_everything_is_written_before_it_is_released(fed: Any, unit: Unit) -> None:
    """Entries say round, kind of noise and who pays, and none is of an unknown unit."""
    result = trainer_of(fed, unit, noise="secure").fit()
    for ledger in [result.ledger] if result.ledger else result.client_ledgers.values():
        assert ledger is not None
        events = [Event.from_json(e["event"]) for e in ledger.entries()]
        assert {e.unit for e in events} == {"record" if isinstance(unit, SampleLevel) else "client"}
        adjacency = {"SampleLevel": "add-remove", "ClientLevel": "add-remove", "LocalLevel": "replace-one"}
        assert {e.adjacency for e in events} == {adjacency[type(unit).__name__]} == {result.adjacency}


def test_a_spent_client_does_not_answer_with_nothing(fed: Any) -> None:
    """An update of zeros would count, and pull the mean of the others towards where it was."""
    ledger = Ledger()
    clients = dict(fed.federation())
    spent = Client("c0", clients.pop("c0"), ledger=ledger)
    ledger.append(Event("gaussian", 0.5, 1.0, "add-remove", "record"), run="before", step=0)
    result = trainer_of(fed, SampleLevel(epsilon=2.0), clients={"c0": spent, **clients}, rounds=2).fit()
    assert result.rounds[0].rejected == {"budget": 1}
    assert result.rounds[0].accepted == len(clients)
    assert result.rounds[1].cohort == len(clients)


def test_physical_batches_do_not_change_what_is_trained(fed: Any) -> None:
    """One logical batch in parts: the same update, the same charges."""
    models, events = [], []
    for most in (None, 3):
        local = LocalTraining(steps=3, batch_size=12, lr=0.5, proximal=0.1, max_physical_batch_size=most)
        trainer = trainer_of(fed, SampleLevel(epsilon=4.0), rounds=2, local=local, noise="research", seed=5)
        result = trainer.fit()
        models.append(parameters(result.model))
        events.append([ledger.events() for ledger in result.client_ledgers.values()])
    assert torch.allclose(models[0], models[1], atol=1e-5)
    assert events[0] == events[1]
