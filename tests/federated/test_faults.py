"""What clients and servers may do to each other, what a record may do to its client, and what is shown of a run."""

from __future__ import annotations

import copy
import math
from dataclasses import fields, replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from sfumato.accounting import Event, Ledger
from sfumato.errors import ConfigurationError, SfumatoError
from sfumato.federated import (
    Adaptive,
    Client,
    ClientLevel,
    Distributed,
    FederatedTrainer,
    FixedCohort,
    LocalLevel,
    LocalTraining,
    PoissonCohort,
    Prune,
    Quantize,
    Round,
    SampleLevel,
    Stream,
    Validation,
)
from sfumato.federated.transport import InProcess
from sfumato.federated.units import Unit
from sfumato.federated.validation import MEASURE
from sfumato.federated.wire.messages import Task
from sfumato.federated.wire.schema import digest

D = 8  # numbers of the small model


def trainer_of(fed: Any, unit: Unit, **changes: Any) -> FederatedTrainer:
    settings: dict[str, Any] = {
        "model": fed.linear(),
        "clients": fed.federation(),
        "local": LocalTraining(steps=3, batch_size=5),
        "rounds": 3,
        "seed": 3,
        "noise": "research",
    }
    return FederatedTrainer(**{**settings, "privacy": unit, **changes})


def worker_of(fed: Any, unit: Unit, **changes: Any) -> Any:
    return trainer_of(fed, unit, **changes).worker(fed.linear(), 4)


def task_for(worker: Any, number: int = 1, kind: Any = "train", **settings: Any) -> Task:
    vector = worker.live.flat.clone()
    schema = MEASURE if kind == "measure" else worker._schema
    return Task(
        run="run",
        round=number,
        nonce=f"nonce {number}",
        kind=kind,
        base=digest(vector, worker.live.frozen),
        schema=schema.digest,
        vector=vector.numpy(),
        settings=settings,
    )


# -- a record and its client --------------------------------------------------------------------------------------


HOSTILE = {
    "far": torch.tensor([-1e6, 1e6, -1e6]),
    "huge": torch.tensor([1e30, 1e30, 1e30]),
    "tiny": torch.tensor([1e-38, 1e-45, 0.0]),
    "nan": torch.tensor([math.nan, 0.0, 0.0]),
    "inf": torch.tensor([math.inf, 0.0, -math.inf]),
    "usual": torch.tensor([1.0, 2.0, -1.0]),
}


@pytest.mark.parametrize("name", HOSTILE)
@pytest.mark.parametrize("clip", [0.1, 1.0])
def test_a_record_moves_one_step_by_at_most_c(fed: Any, name: str, clip: float) -> None:
    """Under frozen noise: a record that counts for nothing against one that is hostile."""
    x, y = fed.records(30).tensors
    moved = []
    for record in (torch.zeros(3), HOSTILE[name]):
        changed = x.clone()
        changed[7] = record
        model = nn.Linear(3, 2, bias=False)  # a record of zeros has no gradient
        with torch.no_grad():
            model.weight.copy_(torch.arange(6).reshape(2, 3) / 10)
        unit = SampleLevel(noise_multiplier=2.0, max_grad_norm=clip)
        local = LocalTraining(steps=1, batch_size=30, lr=0.5)
        worker = trainer_of(fed, unit, model=model, local=local).worker(model, 4)
        reply = worker.answer(task_for(worker), Client("a", TensorDataset(changed, y)))
        assert reply.error is None
        moved.append(torch.from_numpy(reply.arrays["values"]).double())
    assert bool(moved[1].isfinite().all())
    distance = float((moved[1] - moved[0]).norm()) * 30 / 0.5
    assert distance <= clip * (1 + 1e-5)
    if name in ("far", "usual"):
        assert distance > 0.3 * clip  # or the record did not take part


def test_steps_at_the_client_are_charged_before_they_are_released(fed: Any) -> None:
    """Every step in the client's ledger, with the noise and the rate that were used."""
    worker = worker_of(fed, SampleLevel(noise_multiplier=1.5))
    client = Client("a", fed.records(20))
    for k in (1, 2):
        reply = worker.answer(task_for(worker, k), client)
        entries = client.ledger.entries()
        assert sum(e["count"] for e in entries) == 3 * k
        assert {Event.from_json(e["event"]) for e in entries} == {
            Event("poisson-gaussian", 1.5, 0.25, "add-remove", "record")
        }
        assert reply.epsilon == float(client.ledger.epsilon(delta=1e-5))


def test_a_client_with_no_budget_left_says_nothing_else(fed: Any) -> None:
    worker = worker_of(fed, SampleLevel(epsilon=1.0, noise_multiplier=1.0))
    client = Client("a", fed.records(20))
    replies = [worker.answer(task_for(worker, k), client) for k in range(1, 5)]
    assert replies[-1].done
    assert not any(array.any() for array in replies[-1].arrays.values())  # no step was taken
    assert float(client.ledger.epsilon(delta=1e-5)) <= 1.0


def test_a_stream_of_new_records_goes_on(fed: Any) -> None:
    """Its budget is for each round's records: the end of one group is not the end of the client."""
    clients = {"a": Stream(lambda k: fed.records(20, seed=k)), "b": fed.records(20, seed=99)}
    result = trainer_of(fed, SampleLevel(epsilon=2.0), clients=clients, rounds=5).fit()
    assert result.stopped == "rounds"
    assert [r.accepted for r in result.rounds] == [2] * 5
    groups = {e["group"] for e in result.client_ledgers["a"].entries()}
    assert len(groups) == 5
    assert result.epsilon <= 2.0


def test_a_spent_validation_set_does_not_end_training(fed: Any) -> None:
    """Validation records are a group apart; when nothing more may be measured on them, training goes on."""
    clients = {n: Client(n, d, validation=fed.records(30, seed=7)) for n, d in fed.federation().items()}
    result = trainer_of(
        fed,
        SampleLevel(epsilon=2.0),
        clients=clients,
        validation=Validation(noise_multiplier=3.0, patience=None),
        rounds=6,
    ).fit()
    assert result.stopped == "rounds"
    assert [r.accepted for r in result.rounds] == [4] * 6
    assert result.rounds[0].measure is not None
    assert result.epsilon <= 2.0


# -- a client and everybody else ----------------------------------------------------------------------------------


def test_local_reports_are_clipped_and_noised_at_the_client(fed: Any) -> None:
    """Two clients with opposite data, frozen noise: 2C apart at most; and the noise is z·C on every number."""
    unit = LocalLevel(noise_multiplier=2.0, max_update_norm=0.25)
    x, y = fed.records().tensors
    found = []
    for data in (TensorDataset(x * 100, y), TensorDataset(x * 100, 1 - y), TensorDataset(x * math.nan, y)):
        worker = worker_of(fed, unit, local=LocalTraining(steps=5, batch_size=10, lr=1.0))
        reply = worker.answer(task_for(worker), Client("a", data))
        assert reply.error is None
        found.append(torch.from_numpy(reply.arrays["values"]).double())
    assert 0.3 < float((found[0] - found[1]).norm()) <= 0.5 * (1 + 1e-6)
    assert float((found[0] - found[2]).norm()) <= 0.25 * (1 + 1e-6)


def test_noise_of_local_reports(fed: Any) -> None:
    """Within 1 % of z·C over 10⁶ numbers, for each client another."""
    model = nn.Linear(1000, 1000, bias=False)
    nn.init.zeros_(model.weight)
    unit = LocalLevel(noise_multiplier=3.0, max_update_norm=0.5)
    data = TensorDataset(torch.zeros(4, 1000), torch.zeros(4, dtype=torch.int64))
    for noise in ("secure", "research"):
        worker = trainer_of(fed, unit, model=model, noise=noise, clients={"a": data}).worker(copy.deepcopy(model), 1)
        task = task_for(worker)
        one, other = (
            torch.from_numpy(worker.answer(task, Client(name, data)).arrays["values"]).double() for name in ("a", "b")
        )
        assert abs(float(one.square().mean().sqrt()) / 1.5 - 1) < 6.2 / math.sqrt(2e6)
        assert abs(float((one * other).mean())) / 2.25 < 6.2e-3


@pytest.mark.parametrize("kind", ["measure", "count"])
def test_noise_of_counts_of_records(fed: Any, kind: str) -> None:
    """z·√2 on (right, records), to which a record adds up to √2; z on records by class. 30 % less would be found."""
    worker = worker_of(
        fed,
        SampleLevel(noise_multiplier=2.0),
        validation=Validation(noise_multiplier=3.0),
        allocation=Adaptive(clients=True, count_noise=3.0),
        classes=2,
    )
    client = Client("a", fed.records(), validation=fed.records(30, seed=4))
    found = []
    for k in range(1, 301):
        reply = worker.answer(task_for(worker, k, kind, classes=2), client)
        found.append(reply.arrays["values"])
    drawn = np.array(found, dtype=float)
    std = 3.0 * (math.sqrt(2) if kind == "measure" else 1.0)
    assert abs((drawn - drawn.mean(0)).std() / std - 1) < 6.2 / math.sqrt(2 * drawn.size)
    events = {Event.from_json(e["event"]): e["count"] for e in client.ledger.entries()}
    assert set(events) == {Event("gaussian", 3.0, 1.0, "add-remove", "record")}
    assert len(client.ledger.entries()) == 300


def test_a_measure_of_a_client_is_one_vote(fed: Any) -> None:
    """However many validation records it has."""
    unit = LocalLevel(noise_multiplier=2.0)
    worker = worker_of(fed, unit, validation=Validation(noise_multiplier=1e-6))
    large = Client("a", fed.records(), validation=fed.records(5000))
    reply = worker.answer(task_for(worker, kind="measure"), large)
    assert np.linalg.norm(reply.arrays["values"]) <= 1 + 1e-4


@pytest.mark.parametrize("unit", [SampleLevel(noise_multiplier=2.0), LocalLevel(noise_multiplier=2.0)], ids=str)
@pytest.mark.parametrize("factor", [0.5, 1e-9, 0.0, -1.0, math.nan, "1", None])
def test_a_server_cannot_ask_for_less_noise(fed: Any, unit: Unit, factor: Any) -> None:
    """Without a limit on ε nothing else would stop it; what is agreed on is the worker's own."""
    worker = worker_of(fed, unit)
    client = Client("a", fed.records())
    with pytest.raises(ConfigurationError):
        worker.answer(task_for(worker, noise_factor=factor), client)
    assert client.ledger.entries() == []


@pytest.mark.parametrize("unit", [SampleLevel(noise_multiplier=2.0), LocalLevel(noise_multiplier=2.0)], ids=str)
@pytest.mark.parametrize("base", [1e19, 3e38, math.nan, math.inf])
@pytest.mark.filterwarnings("ignore")
def test_a_crafted_model_gets_no_answer_that_depends_on_the_records(fed: Any, unit: Unit, base: float) -> None:
    """Whether a client fails is not noised: it must not fail for some records and answer for others."""
    x, y = fed.records().tensors
    outcomes = set()
    for data in (TensorDataset(x, y), TensorDataset(x * 1e10, y), TensorDataset(x * 0, y * 0), TensorDataset(x, 1 - y)):
        worker = worker_of(fed, unit)
        task = task_for(worker)
        vector = np.full_like(task.vector, base)
        task = replace(task, vector=vector, base=digest(torch.from_numpy(vector), worker.live.frozen))
        reply = worker.answer(task, Client("a", data))
        outcomes.add((reply.error, tuple(sorted(reply.arrays)), reply.done, reply.epsilon))
    assert len(outcomes) == 1


@pytest.mark.parametrize(
    "settings",
    [{"share of a": 100.0}, {"share of a": 1.0, "noise_multiplier": 0.0, "max_grad_norm": 1e9, "delta": 1.0}],
)
def test_settings_of_a_server_raise_no_budget(fed: Any, settings: dict[str, Any]) -> None:
    worker = worker_of(fed, SampleLevel(epsilon=1.0))
    client = Client("a", fed.records())
    for k in range(1, 6):
        worker.answer(task_for(worker, k, **settings), client)
    assert 0.5 < float(client.ledger.epsilon(delta=1e-5)) <= 1.0


def test_a_server_cannot_get_un_noised_answers_by_asking_another_question(fed: Any) -> None:
    for unit, kind in (
        (SampleLevel(epsilon=1.0), "score"),
        (LocalLevel(epsilon=1.0), "count"),
        (LocalLevel(epsilon=1.0), "x"),
    ):
        worker = worker_of(fed, unit)
        client = Client("a", fed.records())
        with pytest.raises(SfumatoError):
            worker.answer(task_for(worker, kind=kind, classes=2), client)
        assert client.ledger.entries() == []


def test_a_server_cannot_choose_the_budget_by_many_questions(fed: Any) -> None:
    """Measures are counted against the validation records' budget, whoever asks, however often."""
    worker = worker_of(fed, SampleLevel(epsilon=1.0), validation=Validation(noise_multiplier=4.0))
    client = Client("a", fed.records(), validation=fed.records(50, seed=3))
    replies = [worker.answer(task_for(worker, k, "measure"), client) for k in range(1, 9)]
    assert replies[0].error is None
    assert replies[-1].error == "budget"
    assert float(client.ledger.epsilon(delta=1e-5)) <= 1.0


def test_an_error_says_its_kind_only(fed: Any) -> None:
    """Messages of exceptions quote records."""

    class Secretive(TensorDataset):
        def __getitem__(self, index: Any) -> Any:
            raise ValueError("record 7 is 12345")

    worker = worker_of(fed, ClientLevel(noise_multiplier=1.0))
    reply = worker.answer(task_for(worker), Client("a", Secretive(*fed.records().tensors)))
    if reply.error is not None:  # tensors may be read without asking for items
        assert reply.error == "ValueError"
    assert "12345" not in repr(reply)


def test_in_process_clients_answer_under_their_own_names(fed: Any) -> None:
    """Who answers is what the transport knows: the guarantee of one C a client rests on it."""
    worker = worker_of(fed, ClientLevel(noise_multiplier=1.0))
    clients = {n: Client(n, d) for n, d in fed.federation().items()}
    transport = InProcess(worker, clients)
    assert [r.client for r in transport.ask(task_for(worker), ("c2", "c0"), deadline=None)] == ["c2", "c0"]
    with pytest.raises(ConfigurationError):
        InProcess(worker, {"a": clients["c0"]})


@pytest.mark.parametrize("codec", [Quantize(8), Quantize(4), Quantize(1), Prune(0.5), Prune(0.5, "own")], ids=str)
def test_compression_happens_after_the_noise_of_local_reports(fed: Any, codec: Any) -> None:
    """So that it costs nothing: the charge is the same, and the reply can be decoded from what was noised."""
    plain, packed = (worker_of(fed, LocalLevel(noise_multiplier=2.0), compression=c) for c in (None, codec))
    one, other = Client("a", fed.records()), Client("a", fed.records())
    whole = plain.answer(task_for(plain), one).arrays["values"]
    sent = packed.answer(task_for(packed), other).arrays
    from sfumato.federated.wire.compression import decode

    decoded = decode(codec, sent, D, 1).numpy()
    assert one.ledger.epsilon(delta=1e-5) == other.ledger.epsilon(delta=1e-5)
    kept = decoded != 0
    if isinstance(codec, Prune):
        assert np.array_equal(decoded[kept], whole[kept])
    else:
        levels = {8: 127, 4: 7, 1: 0.5}[codec.bits]
        assert np.abs(decoded - whole).max() <= np.abs(whole).max() / levels * (1 + 1e-5)


# -- everybody at once --------------------------------------------------------------------------------------------


def sum_of(fed: Any, data: dict[str, Any], vectorize: bool, unit: ClientLevel) -> Tensor:
    """What is released in one round, times the constant denominator, with noise that is the same every time."""
    everybody = [f"c{i}" for i in range(12)]
    clients = {n: data.get(n, TensorDataset(torch.zeros(8, 3), torch.zeros(8, dtype=torch.int64))) for n in everybody}
    model = fed.linear()
    before = torch.cat([p.detach().reshape(-1) for p in model.parameters()])
    result = trainer_of(fed, unit, model=model, clients=clients, rounds=1, vectorize=vectorize).fit()
    after = torch.cat([p.detach().reshape(-1) for p in result.model.parameters()])
    return (after - before).double() * len(everybody)


@pytest.mark.parametrize("vectorize", [False, True])
@pytest.mark.parametrize("how", ["usual", "large", "nan", "shape", "classes", "long", "short"])
@pytest.mark.filterwarnings("ignore")
def test_one_client_moves_the_model_by_its_own_part(fed: Any, vectorize: bool, how: str) -> None:
    """End to end, whatever its records are, trained one by one or together: others are not moved by it.

    Together, batches of other sizes round otherwise: 1e-4 of C is allowed for that.
    """
    x, y = fed.records(8).tensors
    others = {f"c{i}": fed.records(8, seed=i) for i in range(11)}
    victim = {
        "usual": fed.records(8, seed=50),
        "large": TensorDataset(x * 1e6, y),
        "nan": TensorDataset(x * math.nan, y),
        "shape": TensorDataset(x[:, :2], y),
        "classes": TensorDataset(x, y + 5),
        "long": fed.records(300, seed=3),
        "short": fed.records(1, seed=3),
    }[how]
    unit = ClientLevel(noise_multiplier=1e-3, max_update_norm=0.05)
    gone = FederatedTrainer(
        model=fed.linear(),
        clients=others,
        privacy=unit,
        local=LocalTraining(steps=3, batch_size=5),
        rounds=1,
        seed=3,
        noise="research",
        vectorize=vectorize,
    ).fit()
    before = torch.cat([p.detach().reshape(-1) for p in fed.linear().parameters()])
    without = (torch.cat([p.detach().reshape(-1) for p in gone.model.parameters()]) - before).double() * 11
    with_ = sum_of(fed, {**others, "c11": victim}, vectorize, unit)
    assert float((with_ - without).norm()) <= 0.05 * (1 + (1e-4 if vectorize else 1e-5))


def test_public_outputs_and_those_for_the_server_alone(fed: Any) -> None:
    """What a Round shows of un-noised data, as a list: the rest is the same whatever one client does."""
    private = {"cohort", "accepted", "rejected", "bytes_up", "bytes_down", "seconds"}
    x, y = fed.records().tensors
    runs = []
    for odd in (fed.records(seed=3), TensorDataset(x * math.nan, y)):
        clients = {**fed.federation(3), "odd": odd}
        unit = ClientLevel(epsilon=3.0)
        runs.append(trainer_of(fed, unit, clients=clients, cohort=PoissonCohort(0.6), rounds=5).fit())
    for one, other in zip(*(r.rounds for r in runs), strict=True):
        for field in fields(Round):
            if field.name not in private:
                assert getattr(one, field.name) == getattr(other, field.name), field.name
    assert any(a.accepted != b.accepted for a, b in zip(*(r.rounds for r in runs), strict=True))  # so it is private
    assert Round.__doc__ is not None
    named = Round.__doc__.split("The others")[0]
    assert not any(f"``{name}``" in named for name in private - {"bytes_down"})
    assert runs[0].client_epsilons == runs[1].client_epsilons


def test_the_epsilon_of_a_round_does_not_show_who_was_drawn(fed: Any) -> None:
    """Where the draw is a secret, everybody's ε grows alike."""
    for cohort in (PoissonCohort(0.5), FixedCohort(2, amplification=True)):
        result = trainer_of(fed, ClientLevel(noise_multiplier=2.0), cohort=cohort, rounds=6).fit()
        for r in result.rounds:
            assert len(set(r.client_epsilons.values())) == 1
        assert [r.epsilon for r in result.rounds] == sorted({r.epsilon for r in result.rounds})


# -- the secure sum ------------------------------------------------------------------------------------------------


def lossy(fed: Any, trainer: FederatedTrainer, lost: int) -> None:
    """Let ``lost`` clients of every cohort say nothing."""
    real = trainer.transport.ask

    def ask(task: Any, ids: Any, *, deadline: Any) -> Any:
        yield from list(real(task, ids, deadline=deadline))[lost:]

    trainer.transport.ask = ask  # type: ignore[method-assign]


@pytest.mark.parametrize("lost", range(5))
def test_secure_sums_with_dropouts(fed: Any, lost: int) -> None:
    """Up to the declared share the round is released with its noise; beyond it nothing is unmasked or spent."""
    unit = Distributed(noise_multiplier=2.0, max_dropout=0.5)
    trainer = trainer_of(fed, unit, rounds=2)
    lossy(fed, trainer, lost)
    result = trainer.fit()
    if lost <= 2:
        assert all(r.noise_std is not None and r.accepted == 4 - lost for r in result.rounds)
        least = 2.0 * unit.max_update_norm * math.sqrt((4 - lost) / 2)  # two shares make the noise promised
        assert all(r.noise_std == pytest.approx(least, rel=1e-3) for r in result.rounds)
        assert result.epsilon > 0
        return
    assert all(r.rejected.get("void") == 1 and r.noise_std is None for r in result.rounds)
    assert result.epsilon == 0.0
    before = torch.cat([p.detach().reshape(-1) for p in fed.linear().parameters()])
    assert torch.equal(before, torch.cat([p.detach().reshape(-1) for p in result.model.parameters()]))


def test_hostile_messages_of_a_secure_sum(fed: Any) -> None:
    """Wrong shapes, types and numbers are not added to the sum."""
    trainer = trainer_of(fed, Distributed(noise_multiplier=2.0, max_dropout=0.5), rounds=1)
    real = trainer.transport.ask

    def ask(task: Any, ids: Any, *, deadline: Any) -> Any:
        first, *rest = list(real(task, ids, deadline=deadline))
        message = first.arrays["message"]
        for arrays in (
            {},
            {"values": message},
            {"message": message[:-1]},
            {"message": message.astype(np.float32)},
            {"message": message.astype(np.int64)},
            {"message": message.reshape(-1, 1)},
            {"message": np.full_like(message, 2**32 - 1)},
            {"message": message, "more": message},
        ):
            yield replace(first, arrays=arrays)
        yield from rest

    trainer.transport.ask = ask  # type: ignore[method-assign]
    (only,) = trainer.fit().rounds
    assert only.accepted == 3
    assert only.rejected == {"malformed": 8}


def test_a_secure_sum_is_charged_while_it_is_asked_for(fed: Any) -> None:
    """A crash between task and release leaves it charged."""
    ledger = Ledger()
    trainer = trainer_of(fed, Distributed(noise_multiplier=2.0), rounds=1, ledger=ledger)

    def ask(task: Any, ids: Any, *, deadline: Any) -> Any:
        raise OSError("killed")
        yield

    trainer.transport.ask = ask  # type: ignore[method-assign]
    with pytest.raises(OSError, match="killed"):
        trainer.fit()
    assert float(ledger.epsilon(delta=1e-5)) > 0
