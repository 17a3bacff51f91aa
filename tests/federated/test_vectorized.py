"""Clients that are trained together come to what they come to one by one."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import Dataset, Subset, TensorDataset

from sfumato.clipping import Flat, weights
from sfumato.errors import ConfigurationError
from sfumato.federated import (
    All,
    Client,
    ClientLevel,
    FederatedTrainer,
    LastLayers,
    LocalLevel,
    LocalTraining,
    PoissonCohort,
    Quantize,
    SampleLevel,
    Stream,
    Worker,
)
from sfumato.federated.client.local import LARGE
from sfumato.federated.client.stacked import Records, train
from sfumato.federated.contributions import _flat
from sfumato.federated.transport import InProcess
from sfumato.federated.units import Unit
from sfumato.federated.vectorized import Vectorized
from sfumato.federated.wire.messages import Reply, Task
from sfumato.federated.wire.narrowing import narrowed
from sfumato.federated.wire.schema import digest

SIZES = (37, 8, 20, 1, 52, 16, 16, 33)
Clients = dict[str, Client]


def net(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 9), nn.LayerNorm(9), nn.Linear(9, 4))


def records(n: int, seed: int) -> TensorDataset:
    generator = torch.Generator().manual_seed(seed)
    return TensorDataset(torch.randn(n, 6, generator=generator), torch.randint(0, 4, (n,), generator=generator))


def people(sizes: tuple[int, ...] = SIZES) -> Clients:
    return {f"c{k}": Client(f"c{k}", records(n, k)) for k, n in enumerate(sizes)}


def worker(local: LocalTraining, model: nn.Module | None = None, unit: Unit | None = None, **more: Any) -> Worker:
    given: dict[str, Any] = {
        "train": All(),
        "loss": F.cross_entropy,
        "rounds": 3,
        "noise": "research",
        "seed": 5,
    } | more
    return Worker(
        net() if model is None else model, unit=unit or ClientLevel(noise_multiplier=1.0), local=local, **given
    )


def task(of: Worker, index: Tensor | None = None, round: int = 1, settings: Mapping[str, float] | None = None) -> Task:
    vector = of.live.base.clone()
    schema = narrowed(of.live.trained.schema, index)
    return Task(
        run="r",
        round=round,
        nonce="n",
        kind="train",
        base=digest(vector, of.live.frozen),
        schema=schema.digest,
        vector=vector.numpy(),
        index=None if index is None else index.numpy(),
        settings=settings or {},
    )


def replies(transport: InProcess | Vectorized, question: Task, deadline: float | None = None) -> dict[str, Reply]:
    found = list(transport.ask(question, list(transport.clients()), deadline=deadline))
    assert len({reply.client for reply in found}) == len(found)
    return {reply.client: reply for reply in found}


def together(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many clients were trained at once, call by call."""
    sizes: list[int] = []

    def counted(live: Any, clients: Any, local: Any, loss: Any) -> Tensor:
        sizes.append(len(clients))
        return train(live, clients, local, loss)

    monkeypatch.setattr("sfumato.federated.vectorized.train", counted)
    return sizes


def same(one: dict[str, Reply], other: dict[str, Reply]) -> float:
    """The largest difference, relative to the largest number of each update."""
    assert set(one) == set(other)
    worst = 0.0
    for name, reply in one.items():
        assert reply.error is None, (name, reply.error)
        assert (reply.schema, reply.base, reply.round) == (other[name].schema, other[name].base, other[name].round)
        a, b = reply.arrays["values"], other[name].arrays["values"]
        assert a.dtype == b.dtype
        assert abs(a).max() > 1e-4
        worst = max(worst, float(abs(a - b).max() / abs(a).max()))
    return worst


LOCALS = {
    "one epoch": LocalTraining(batch_size=8, lr=0.2),
    "epochs": LocalTraining(epochs=3, batch_size=8, lr=0.2),
    "steps, some of them in a second epoch": LocalTraining(steps=4, batch_size=16, lr=0.2),
    "momentum": LocalTraining(epochs=2, batch_size=8, lr=0.1, momentum=0.9),
    "FedProx": LocalTraining(epochs=2, batch_size=8, lr=0.1, proximal=1.0),
    "both": LocalTraining(steps=5, batch_size=7, lr=0.1, momentum=0.5, proximal=0.3),
    "a batch holds everything": LocalTraining(epochs=2, batch_size=100, lr=0.2),
}


@pytest.mark.parametrize("kind", LOCALS)
def test_equals_the_loop(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    clients, sizes = people(), together(monkeypatch)
    one, other = worker(LOCALS[kind]), worker(LOCALS[kind])
    assert same(replies(InProcess(one, clients), task(one)), replies(Vectorized(other, clients), task(other))) < 1e-5
    assert sizes == [len(SIZES)]


def test_the_comparison_would_notice_another_order() -> None:
    clients = people()
    one, other = worker(LOCALS["one epoch"]), worker(LOCALS["one epoch"], seed=6)
    assert same(replies(InProcess(one, clients), task(one)), replies(Vectorized(other, clients), task(other))) > 1e-2


@pytest.mark.parametrize("kind", ["one epoch", "both"])
@pytest.mark.parametrize("where", ["tensors", "numbers"])
def test_positions(kind: str, where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    clients, sizes = people(), together(monkeypatch)
    one, other = worker(LOCALS[kind]), worker(LOCALS[kind])
    every = torch.arange(len(one.live.flat))
    index = every[84:201] if where == "tensors" else every[::3]
    a = replies(InProcess(one, clients), task(one, index))
    assert same(a, replies(Vectorized(other, clients), task(other, index))) < 1e-5
    assert len(a["c0"].arrays["values"]) == len(index)
    assert sizes == [len(SIZES)]


def test_a_frozen_body_and_large_matrices() -> None:
    """Large tensors are laid out otherwise while training."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 90), nn.ReLU(), nn.Linear(90, 80), nn.ReLU(), nn.Linear(80, 4))
    for train_ in (All(), LastLayers(2)):
        one = worker(LOCALS["both"], copy.deepcopy(model), train=train_)
        other = worker(LOCALS["both"], copy.deepcopy(model), train=train_)
        clients = people()
        assert (
            same(replies(InProcess(one, clients), task(one)), replies(Vectorized(other, clients), task(other))) < 1e-5
        )


def test_the_memory_bounds_how_many_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    clients, sizes = people((20,) * 30), together(monkeypatch)
    one, other = worker(LOCALS["one epoch"]), worker(LOCALS["one epoch"])
    vectorized = Vectorized(other, clients, memory=200_000)
    assert same(replies(InProcess(one, clients), task(one)), replies(vectorized, task(other))) < 1e-5
    assert sum(sizes) in (29, 30)
    assert 2 <= max(sizes) <= 20


def test_streams_and_subsets(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes, drawn = together(monkeypatch), []

    def draw(round: int) -> Dataset[Any]:
        drawn.append(round)
        return records(19, round)

    clients = people((12, 30)) | {
        "stream": Client("stream", Stream(draw)),
        "subset": Client("subset", Subset(records(40, 9), list(range(3, 36, 2)))),
    }
    one, other = worker(LOCALS["one epoch"]), worker(LOCALS["one epoch"])
    a = replies(InProcess(one, clients), task(one, round=2))
    drawn.clear()
    assert same(a, replies(Vectorized(other, clients), task(other, round=2))) < 1e-5
    assert drawn == [2]
    assert sizes == [4]


class Pairs(Dataset[Any]):
    """Records that are not held as tensors."""

    def __init__(self, held: TensorDataset):
        self.held = held

    def __len__(self) -> int:
        return len(self.held)

    def __getitem__(self, at: int) -> Any:
        return self.held[at]


def test_clients_that_cannot_be_stacked_are_trained_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    clients, sizes = people() | {"pairs": Client("pairs", Pairs(records(11, 3)))}, together(monkeypatch)
    one, other = worker(LOCALS["one epoch"]), worker(LOCALS["one epoch"])
    assert same(replies(InProcess(one, clients), task(one)), replies(Vectorized(other, clients), task(other))) < 1e-5
    assert sizes == [len(SIZES)]


def weighted(output: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(output, y, weight=torch.tensor([1.0, 5.0, 0.2, 1.0]))


def total(output: Tensor, y: Tensor) -> Tensor:
    return 0.02 * F.cross_entropy(output, y, reduction="sum")


class Centred(nn.Module):
    """A record's output depends on who else is in the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = net()

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x - x.mean(0))


class Branching(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = net()

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x) if float(x.sum()) > 0 else self.inner(2 * x)


def dropped() -> nn.Module:
    return nn.Sequential(net(), nn.Dropout(0.3))


@pytest.mark.parametrize(
    ("make", "loss"),
    [
        (net, weighted),
        (net, total),
        (Centred, F.cross_entropy),
        (Branching, F.cross_entropy),
        (dropped, F.cross_entropy),
    ],
    ids=["weighted", "sum", "coupled", "branching", "dropout"],
)
def test_what_cannot_be_vectorized_is_noticed(
    make: Callable[[], nn.Module],
    loss: Callable[[Tensor, Tensor], Tensor],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    clients, sizes = people(), together(monkeypatch)
    one, other = worker(LOCALS["one epoch"], make(), loss=loss), worker(LOCALS["one epoch"], make(), loss=loss)
    question = task(one)
    with caplog.at_level(logging.WARNING, "sfumato"):
        vectorized = Vectorized(other, clients)
        found = replies(vectorized, question)
        replies(vectorized, question)
    assert same(replies(InProcess(one, clients), question), found) == 0.0
    assert sizes == []
    assert len([r for r in caplog.records if "one by one" in r.getMessage()]) == 1


def test_a_mean_over_outputs_of_a_record_is_a_mean_over_records() -> None:
    generator = torch.Generator().manual_seed(0)
    clients = {
        f"c{k}": Client(f"c{k}", TensorDataset(torch.randn(n, 6, generator=generator), torch.randn(n, 4)))
        for k, n in enumerate(SIZES)
    }
    one, other = worker(LOCALS["both"], loss=F.mse_loss), worker(LOCALS["both"], loss=F.mse_loss)
    assert same(replies(InProcess(one, clients), task(one)), replies(Vectorized(other, clients), task(other))) < 1e-5


def test_one_broken_client_spoils_nothing() -> None:
    clients = people()
    broken = records(20, 3)
    broken.tensors[1][7] = 99
    diverging = records(20, 4)
    diverging.tensors[0][3] = float("nan")
    one, other = worker(LOCALS["one epoch"]), worker(LOCALS["one epoch"])
    clients |= {"nan": Client("nan", diverging)}
    for also in ({}, {"class": Client("class", broken)}):
        clients |= also
        a, b = replies(InProcess(one, clients), task(one)), replies(Vectorized(other, clients), task(other))
        assert {name: r.error for name, r in a.items()} == {name: r.error for name, r in b.items()}
        assert {name for name, r in b.items() if r.error} == {"nan", *also}
        fine = [name for name in a if not a[name].error]
        assert same({n: a[n] for n in fine}, {n: b[n] for n in fine}) < 1e-5


def test_local_noise_and_ledgers_are_those_of_the_loop() -> None:
    unit = LocalLevel(epsilon=8.0, delta=1e-5, max_update_norm=0.1)
    alice, bob = people(), people()
    one, other = worker(LOCALS["one epoch"], unit=unit, rounds=2), worker(LOCALS["one epoch"], unit=unit, rounds=2)
    loop, vectorized = InProcess(one, alice), Vectorized(other, bob)
    for round in (1, 2):
        a, b = replies(loop, task(one, round=round)), replies(vectorized, task(other, round=round))
        assert same(a, b) < 1e-5
        assert {n: r.epsilon for n, r in a.items()} == {n: r.epsilon for n, r in b.items()}
    for name in alice:
        assert alice[name].ledger.events() == bob[name].ledger.events()
    third = replies(vectorized, task(other, round=3))
    assert {r.error for r in third.values()} == {"budget"}
    assert all(r.done and not r.arrays for r in third.values())


def test_compression() -> None:
    clients = people()
    codec = Quantize(bits=8)
    one = worker(LOCALS["one epoch"], compression=codec)
    other = worker(LOCALS["one epoch"], compression=codec)
    a, b = replies(InProcess(one, clients), task(one)), replies(Vectorized(other, clients), task(other))
    for name in a:
        codes, others = a[name].arrays["codes"].astype(int), b[name].arrays["codes"].astype(int)
        assert abs(codes - others).max() <= 1
        assert (codes != others).mean() < 0.02


def test_record_level_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="vectorize=True is for plain local training"):
        Vectorized(worker(LOCALS["one epoch"], unit=SampleLevel(noise_multiplier=1.0)), people())
    with pytest.raises(ConfigurationError, match="vectorize=True is for plain local training"):
        FederatedTrainer(
            model=net(), clients={"a": records(9, 0)}, privacy=SampleLevel(noise_multiplier=1.0), vectorize=True
        )


def test_an_update_from_elsewhere_never_passes_for_dp_sgd() -> None:
    under = worker(LOCALS["one epoch"], unit=SampleLevel(noise_multiplier=1.0))
    with pytest.raises(ConfigurationError, match="update"):
        under.answer(task(under), people()["c0"], torch.zeros(len(under.live.flat)))


def test_who_is_trained_together_is_never_late() -> None:
    """Otherwise one client's records would decide whether the others are heard."""
    clients = people() | {"pairs": Client("pairs", Pairs(records(11, 3)))}
    under = worker(LOCALS["one epoch"])
    assert set(replies(Vectorized(under, clients), task(under), deadline=1e-9)) == set(clients) - {"pairs"}
    assert set(replies(Vectorized(under, clients), task(under), deadline=60.0)) == set(clients)


def test_large_models_are_trained_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    def wide() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(6, 400), nn.ReLU(), nn.Linear(400, 400), nn.ReLU(), nn.Linear(400, 4))

    clients, sizes = people(), together(monkeypatch)
    one, other = worker(LOCALS["one epoch"], wide()), worker(LOCALS["one epoch"], wide())
    assert same(replies(InProcess(one, clients), task(one)), replies(Vectorized(other, clients), task(other))) == 0.0
    assert sizes == []


def test_the_loop_for_large_models_is_the_one_for_small_models() -> None:
    """Above :data:`LARGE` numbers gradients are not gathered in one tensor; a tiny FedProx term makes them be."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 400), nn.ReLU(), nn.Linear(400, 400), nn.ReLU(), nn.Linear(400, 4))
    clients = people()
    one = worker(LocalTraining(epochs=2, batch_size=8, lr=0.1), copy.deepcopy(model))
    other = worker(LocalTraining(epochs=2, batch_size=8, lr=0.1, proximal=1e-9), copy.deepcopy(model))
    assert len(one.live.flat) > LARGE
    assert same(replies(InProcess(one, clients), task(one)), replies(InProcess(other, clients), task(other))) < 1e-5


def test_flat_clipping_of_one_vector_is_that_of_many() -> None:
    lengths = [0.0, 1e-300, 1e-8, 0.999, 1.0, 1.0 + 1e-15, 3.7, 1e20, 1e160, float("inf"), float("nan")]
    for length in lengths:
        for bound in (1e-3, 1.0, 50.0):
            square = torch.tensor([[length]], dtype=torch.float64) ** 2
            wanted = float(weights(Flat(), square, bound, torch.float64))
            found = _flat(float(square), bound)
            assert found == pytest.approx(wanted, rel=1e-15, abs=0.0), (length, bound)
            assert found == 0.0 or found * length <= bound


def test_the_worker_is_left_as_it_was() -> None:
    under = worker(LOCALS["both"])
    before = under.live.flat.clone()
    held = [Records(*records(n, n).tensors, n) for n in (5, 9)]
    updates = train(under.live, held, LOCALS["both"], F.cross_entropy)
    assert updates.shape == (2, len(before))
    assert torch.equal(under.live.flat, before)
    assert all(p.grad is None for p in under.live.model.parameters())


@pytest.mark.parametrize("cohort", [PoissonCohort(), PoissonCohort(0.4)])
def test_a_federation_comes_to_the_same_model(cohort: PoissonCohort) -> None:
    def run(vectorize: bool) -> Any:
        return FederatedTrainer(
            model=net(),
            clients={f"c{k}": records(n, k) for k, n in enumerate(SIZES)},
            privacy=ClientLevel(noise_multiplier=0.5, max_update_norm=0.3),
            local=LOCALS["one epoch"],
            cohort=cohort,
            rounds=4,
            noise="research",
            seed=3,
            vectorize=vectorize,
        ).fit()

    one, other = run(False), run(True)
    assert [(r.cohort, r.accepted, r.epsilon) for r in one.rounds] == [
        (r.cohort, r.accepted, r.epsilon) for r in other.rounds
    ]
    assert one.client_epsilons == other.client_epsilons
    for p, q in zip(one.model.parameters(), other.model.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-5)
