"""Private distillation: one vector of predictions per peer and round, bounded, charged and noised before it is used."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from sfumato.accounting import Event, compose
from sfumato.data.digits import load_digits
from sfumato.errors import ConfigurationError, UnsupportedError
from sfumato.federated import (
    ClientLevel,
    Distill,
    Distributed,
    FederatedDistillation,
    FixedCohort,
    LocalLevel,
    LocalTraining,
    Peer,
    PoissonCohort,
    SampleLevel,
    Stream,
)
from sfumato.federated.distillation.predictions import probabilities, scaled
from sfumato.federated.seeds import stream
from sfumato.federated.wire.messages import Reply, Task

ALPHA = 1e-9
CLASSES = 3
QUICK = LocalTraining(epochs=2, batch_size=8, lr=0.5)


def blobs(n: int, seed: int) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    y = torch.randint(CLASSES, (n,), generator=g)
    return torch.eye(CLASSES, 6)[y] * 2 + 0.5 * torch.randn(n, 6, generator=g), y


class Wide(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(6, 16), nn.Linear(16, CLASSES)
        self.norm = nn.LayerNorm(16)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.norm(self.body(x))))


def model(kind: int = 0, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return (
        nn.Linear(6, CLASSES)
        if kind == 0
        else Wide()
        if kind == 1
        else nn.Sequential(nn.Unflatten(1, (1, 6)), nn.Conv1d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(16, CLASSES))
    )


def peers(count: int = 6, records: int = 30, **own: Any) -> dict[str, Peer]:
    return {f"p{i}": Peer(model(i % 3, i), TensorDataset(*blobs(records, 100 + i)), **own) for i in range(count)}


PUBLIC, LABELS = blobs(60, 7)


def distillation(**given: Any) -> FederatedDistillation:
    settings: dict[str, Any] = {
        "model": model(1, 99),
        "peers": peers(),
        "public": PUBLIC,
        "privacy": ClientLevel(epsilon=4.0),
        "local": QUICK,
        "rounds": 2,
        "queries": 20,
        "noise": "research",
        "seed": 5,
    } | given
    return FederatedDistillation(**settings)


def accuracy(student: nn.Module) -> float:
    x, y = blobs(300, 1)
    return float((probabilities(student, x, 1.0).argmax(1) == y).float().mean())


class Tapped:
    """Passes everything on, keeps what crosses, and lets one peer say what it likes."""

    def __init__(self, inner: Any, liar: str | None = None, says: Any = None):
        self.inner, self.liar, self.says = inner, liar, says
        self.tasks: list[Task] = []
        self.replies: list[Reply] = []

    def clients(self) -> Sequence[str]:
        return self.inner.clients()

    def ask(self, task: Task, ids: Sequence[str], *, deadline: float | None) -> Iterator[Reply]:
        self.tasks.append(task)
        for reply in self.inner.ask(task, ids, deadline=deadline):
            if reply.client == self.liar:
                names = (reply.client, reply.run, reply.round, reply.nonce, reply.base, reply.schema)
                reply = Reply(*names, error="gone") if self.says is None else Reply(*names, self.says)
            self.replies.append(reply)
            yield reply

    def close(self) -> None:
        pass


def tapped(d: FederatedDistillation, liar: str | None = None, says: Any = None) -> Tapped:
    found = Tapped(d.transport, liar, says)
    d._exchange.transport = found
    return found


# -- the guarantee ------------------------------------------------------------------------------------------------

SIZE = 20 * CLASSES
HOSTILE: dict[str, Mapping[str, Any]] = {
    "huge": {"values": np.full(SIZE, 1e30, np.float32)},
    "largest": {"values": np.full(SIZE, np.finfo(np.float32).max, np.float32)},
    "opposite": {"values": -np.ones(SIZE, np.float32)},
    "nan": {"values": np.full(SIZE, np.nan, np.float32)},
    "inf": {"values": np.r_[np.float32(np.inf), np.zeros(SIZE - 1, np.float32)]},
    "long": {"values": np.ones(SIZE + 1, np.float32)},
    "double": {"values": np.ones(SIZE)},
    "other": {"labels": np.zeros(20, np.int64)},
}


def released(d: FederatedDistillation) -> Tensor:
    """The released sums of all rounds, back in the units of C."""
    return torch.stack([scaled(r) for r in d._released]).double() * 6.0


@pytest.mark.parametrize("name", HOSTILE)
@pytest.mark.parametrize("bound", [1.0, 0.25])
def test_one_peer_moves_the_sum_by_at_most_c_whatever_it_says(bound: float, name: str) -> None:
    sums = []
    for said in (None, HOSTILE[name]):
        d = distillation(privacy=ClientLevel(epsilon=4.0, max_update_norm=bound), rounds=1)
        tapped(d, "p2", said)
        d.fit()
        sums.append(released(d)[0])
    distance = float((sums[0] - sums[1]).norm())
    assert distance <= bound + 1e-5
    if name in ("huge", "opposite"):
        assert distance == pytest.approx(bound, abs=1e-5)  # so that the bound is what held it


@pytest.mark.parametrize("votes", ["soft", "hard"])
def test_an_honest_peer_moves_the_sum_by_at_most_c(votes: str) -> None:
    sums = []
    for liar in (None, "p1"):
        d = distillation(rounds=1, distill=Distill(votes=votes))
        tapped(d, liar)
        d.fit()
        sums.append(released(d)[0])
    distance = float((sums[0] - sums[1]).norm())
    assert 0.01 < distance <= 1.0 + 1e-5
    assert votes == "soft" or distance == pytest.approx(1.0, abs=1e-5)


def test_what_is_released_is_the_clipped_sum_and_frozen_noise() -> None:
    """The student and all that peers are sent are computed from it: nothing leaves without noise."""
    d = distillation(privacy=ClientLevel(epsilon=4.0, max_update_norm=0.5), feedback=True, rounds=3)
    tap = tapped(d)
    result = d.fit()
    std = float(result.noise_multiplier) * 0.5  # type: ignore[arg-type]
    for number in (1, 2, 3):
        vectors = [torch.from_numpy(r.arrays["values"]).double() for r in tap.replies if r.round == number]
        total = sum(v * min(1.0, 0.5 / float(v.norm())) for v in vectors)
        noise = stream("research", 5, "predict", number, "server").normal((SIZE,), std=std)
        assert len(vectors) == 6
        assert torch.allclose(released(d)[number - 1], total + noise, atol=1e-4)
        assert (released(d)[number - 1] - total).norm() > 0.5 * std * SIZE**0.5

    replayed = distillation(feedback=True, rounds=3)
    for number, task in enumerate(tap.tasks, 1):
        if number == 1:
            assert not task.vector.any()
        else:
            rows = d._asked[number - 2]
            want = probabilities(replayed._student, PUBLIC[rows], 1.0).reshape(-1).numpy()
            np.testing.assert_allclose(task.vector, want, atol=1e-6)
        replayed._asked, replayed._released = d._asked[:number], d._released[:number]
        replayed._distil(number)
    for mine, theirs in zip(replayed._student.parameters(), result.model.parameters(), strict=True):
        assert torch.equal(mine, theirs)


def pvalue(draws: Tensor, std: float) -> float:
    chi2, n = float((draws.double() / std).square().sum()), draws.numel()
    return float(2 * min(stats.chi2.cdf(chi2, n), stats.chi2.sf(chi2, n)))


def server_noise() -> tuple[Tensor, float]:
    """Released sums of a federation in which nobody answers, and the noise that was charged."""
    wide = torch.randn(800, 6, generator=torch.Generator().manual_seed(0))
    d = distillation(
        privacy=ClientLevel(noise_multiplier=1.5, max_update_norm=0.4),
        noise="secure",
        rounds=1,
        public=wide,
        queries=800,
        peers={f"p{i}": Peer(Broken(), TensorDataset(*blobs(5, i))) for i in range(6)},
    )
    result = d.fit()
    assert result.rounds[0].rejected == {"client error": 6}
    (event,) = result.ledger.events(dataset="clients")  # type: ignore[union-attr]
    return released(d)[0], event.noise_multiplier * 0.4


def local_noise() -> tuple[Tensor, float]:
    """What peers send that know nothing, and the noise that they charged."""
    wide = torch.randn(800, 6, generator=torch.Generator().manual_seed(0))
    ignorant = nn.Linear(6, CLASSES)
    nn.init.zeros_(ignorant.weight)
    nn.init.zeros_(ignorant.bias)
    d = distillation(
        privacy=LocalLevel(noise_multiplier=1.5, max_update_norm=0.4),
        noise="secure",
        rounds=1,
        public=wide,
        queries=800,
        local=LocalTraining(lr=1e-12),
        peers={"p0": Peer(ignorant, TensorDataset(*blobs(5, 0)))},
    )
    tap = tapped(d)
    result = d.fit()
    (event,) = result.client_ledgers["p0"].events()
    return torch.from_numpy(tap.replies[0].arrays["values"]), event.noise_multiplier * 0.4


class Broken(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            raise RuntimeError("broken")
        return self.layer(x)


@pytest.mark.parametrize("source", [server_noise, local_noise])
def test_noise_has_the_standard_deviation_that_was_charged(source: Any) -> None:
    draws, std = source()
    assert pvalue(draws, std) > ALPHA
    for wrong in (0.7, 1.3):
        assert pvalue(draws * wrong, std) < ALPHA


def test_a_local_report_is_the_clipped_vector_and_frozen_noise() -> None:
    d = distillation(privacy=LocalLevel(epsilon=4.0, max_update_norm=0.5), rounds=1)
    plainly = distillation(rounds=1)
    taps = tapped(d), tapped(plainly)
    noise = d.fit().noise_multiplier
    plainly.fit()
    for mine, raw in zip(taps[0].replies, taps[1].replies, strict=True):
        vector = torch.from_numpy(raw.arrays["values"])
        clipped = vector * min(1.0, 0.5 / float(vector.norm()))
        added = stream("research", 5, "predict", 1, mine.client).normal((SIZE,), std=noise[mine.client] * 0.5)  # type: ignore[index]
        assert torch.allclose(torch.from_numpy(mine.arrays["values"]), clipped + added, atol=1e-5)
        assert added.norm() > 1.0


# -- the cost -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("cohort", "kind", "rate", "adjacency"),
    [
        (PoissonCohort(), "poisson-gaussian", 1.0, "add-remove"),
        (PoissonCohort(0.5), "poisson-gaussian", 0.5, "add-remove"),
        (FixedCohort(6), "gaussian", 1.0, "zero-out"),
    ],
)
def test_every_query_batch_is_charged_to_every_peer(cohort: Any, kind: str, rate: float, adjacency: str) -> None:
    d = distillation(cohort=cohort, rounds=3)
    result = d.fit()
    z = float(result.noise_multiplier)  # type: ignore[arg-type]
    event = Event(kind, z, rate, adjacency, "client")
    assert result.ledger is not None
    assert dict(result.ledger.events(dataset="clients")) == {event: 3}
    spent = float(compose({event: 3}, delta=1e-5))
    assert result.epsilon == pytest.approx(spent, rel=1e-9)
    assert set(result.client_epsilons.values()) == {result.epsilon}
    assert 3.9 < spent <= 4.0
    assert all("predict" in e["note"] for e in result.ledger.entries() if e.get("step"))
    assert (result.stopped, result.unit, result.adjacency) == ("rounds", "client", adjacency)
    assert [r.epsilon for r in result.rounds] == sorted(r.epsilon for r in result.rounds)


def test_the_charge_is_in_the_ledger_before_anyone_is_asked() -> None:
    d = distillation(rounds=2)
    seen = []

    class Watching(Tapped):
        def ask(self, task: Task, ids: Sequence[str], *, deadline: float | None) -> Iterator[Reply]:
            assert d.ledger is not None
            seen.append(sum(dict(d.ledger.events(dataset="clients")).values()))
            yield from self.inner.ask(task, ids, deadline=deadline)

    d._exchange.transport = Watching(d.transport)
    d.fit()
    assert seen == [1, 2]


def test_local_level_pays_for_replacement_in_the_peers_ledgers(tmp_path: Path) -> None:
    d = distillation(privacy=LocalLevel(epsilon=8.0), rounds=2, client_ledgers=tmp_path)
    result = d.fit()
    assert result.ledger is None
    assert len(list(tmp_path.glob("*.db"))) == 6
    for name, ledger in result.client_ledgers.items():
        z = result.noise_multiplier[name]  # type: ignore[index]
        assert dict(ledger.events()) == {Event("gaussian", z, 1.0, "replace-one", "client"): 2}
        halved = float(compose({Event("gaussian", z / 2, 1.0, "add-remove", "client"): 2}, delta=1e-5))
        assert result.client_epsilons[name] == pytest.approx(halved, rel=1e-6)
        assert 7.8 < halved <= 8.0


def test_sample_level_pays_for_steps_and_nothing_for_predictions() -> None:
    local = LocalTraining(steps=3, batch_size=10, lr=0.5)
    d = distillation(privacy=SampleLevel(epsilon=3.0), local=local, rounds=2, queries=60)
    result = d.fit()
    assert result.unit == "record"
    for name, ledger in result.client_ledgers.items():
        z = result.noise_multiplier[name]  # type: ignore[index]
        event = Event("poisson-gaussian", z, 10 / 30, "add-remove", "record")
        assert dict(ledger.events()) == {event: 6}
        assert result.client_epsilons[name] == pytest.approx(float(compose({event: 6}, delta=1e-5)), rel=1e-6)
    assert 2.9 < result.epsilon <= 3.0


def test_new_records_every_round_cost_one_round() -> None:
    streams = {"p0": Peer(model(0), Stream(lambda number: TensorDataset(*blobs(30, 500 + number))))}
    local = LocalTraining(steps=3, batch_size=10, lr=0.5)
    result = distillation(privacy=SampleLevel(epsilon=3.0), local=local, rounds=3, peers=streams).fit()
    event = Event("poisson-gaussian", result.noise_multiplier["p0"], 10 / 30, "add-remove", "record")  # type: ignore[index]
    assert [r.accepted for r in result.rounds] == [1, 1, 1]
    assert result.epsilon == pytest.approx(float(compose({event: 3}, delta=1e-5)), rel=1e-6)
    assert sum(1 for e in result.client_ledgers["p0"].entries() if e.get("step") is not None) == 9


def test_a_trained_sample_level_peer_answers_for_free_and_without_its_records() -> None:
    local = LocalTraining(steps=5, batch_size=10, lr=0.5)
    unit = SampleLevel(epsilon=4.0, noise_multiplier=0.9)
    found = []
    for records in (30, 200):
        d = distillation(privacy=unit, local=local, rounds=3, peers=peers(1))
        tap = tapped(d)
        result = d.fit()
        assert result.stopped == "rounds"
        assert max(result.client_epsilons.values()) <= 4.0
        spent = dict(result.client_ledgers["p0"].events())
        assert 0 < sum(spent.values()) < 3 * 5
        d._clients["p0"].data = TensorDataset(*blobs(records, 55))
        again = d.fit()
        assert dict(again.client_ledgers["p0"].events()) == spent
        found.append(tap.replies[-1].arrays["values"])
    np.testing.assert_array_equal(found[0], found[1])


@pytest.mark.parametrize(
    "unit",
    [ClientLevel(epsilon=4.0, noise_multiplier=2.0), LocalLevel(epsilon=8.0, noise_multiplier=2.0)],
    ids=["client", "local"],
)
def test_a_spent_budget_ends_with_a_model(unit: Any) -> None:
    d = distillation(privacy=unit, rounds=60, queries=5)
    result = d.fit()
    assert result.stopped == "budget"
    assert 1 <= len(result.rounds) < 60
    assert 0.5 * unit.epsilon < result.epsilon <= unit.epsilon
    changed = zip(result.model.parameters(), model(1, 99).parameters(), strict=True)
    assert any(not torch.equal(a, b) for a, b in changed)
    assert all(bool(p.isfinite().all()) for p in result.model.parameters())


def test_a_sample_level_budget_without_one_step_ends_with_the_student_it_began_with() -> None:
    d = distillation(privacy=SampleLevel(epsilon=0.01, noise_multiplier=0.5), rounds=5, peers=peers(2))
    result = d.fit()
    assert result.stopped == "budget"
    assert result.epsilon <= 0.01
    for mine, theirs in zip(result.model.parameters(), model(1, 99).parameters(), strict=True):
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize("personal", ["rate", "noise"])
def test_personal_budgets(personal: Any) -> None:
    epsilons = {f"p{i}": 4.0 if i % 2 else 1.0 for i in range(6)}
    d = distillation(privacy=ClientLevel(epsilon=epsilons, personal=personal), rounds=3)
    result = d.fit()
    for name, limit in epsilons.items():
        assert 0.9 * limit < result.client_epsilons[name] <= limit
    own = distillation(peers=peers(epsilon=2.0), rounds=2).fit()
    assert 1.9 < own.epsilon <= 2.0


# -- learning -----------------------------------------------------------------------------------------------------


def test_models_of_other_architectures_teach_and_stay_where_they_are() -> None:
    given = peers(30)
    before = {name: [p.clone() for p in peer.model.parameters()] for name, peer in given.items()}
    d = distillation(peers=given, privacy=ClientLevel(epsilon=4.0), feedback=True, distill=Distill(epochs=20))
    tap = tapped(d)
    start = accuracy(d._student)
    result = d.fit()
    assert accuracy(result.model) > max(0.8, start + 0.2)
    for name, peer in given.items():
        assert all(torch.equal(a, b) for a, b in zip(before[name], peer.model.parameters(), strict=True))
    sizes = {sum(p.numel() for p in peer.model.parameters()) for peer in given.values()}
    assert len(sizes) == 3
    assert {r.arrays["values"].shape for r in tap.replies} == {(SIZE,)}
    assert accuracy(d.peer_model("p1")) > 0.8


@pytest.mark.parametrize("kind", ["client", "sample"])
def test_a_student_learns_digits_with_a_fair_epsilon(kind: str) -> None:
    digits = load_digits()
    order = torch.randperm(len(digits.train), generator=torch.Generator().manual_seed(0))
    public, rest = digits.train.x[order[:400]], order[400:]
    count = 100 if kind == "client" else 4
    torch.manual_seed(0)

    def build(width: int) -> nn.Module:
        layers = [nn.Linear(64, 10)] if width == 0 else [nn.Linear(64, width), nn.ReLU(), nn.Linear(width, 10)]
        return nn.Sequential(nn.Flatten(), *layers)

    given = {
        f"p{i}": Peer(build((0, 16, 32)[i % 3]), TensorDataset(digits.train.x[rows], digits.train.y[rows]))
        for i, rows in enumerate(rest.chunk(count))
    }
    student = build(24)
    d = FederatedDistillation(
        model=student,
        peers=given,
        public=public,
        privacy=ClientLevel(epsilon=4.0, max_update_norm=0.5) if kind == "client" else SampleLevel(epsilon=4.0),
        local=LocalTraining(epochs=20, batch_size=8, lr=0.3)
        if kind == "client"
        else LocalTraining(steps=25, batch_size=64, lr=0.5),
        rounds=1,
        queries=100 if kind == "client" else 400,
        distill=Distill(epochs=20),
        noise="research",
        seed=3,
    )
    result = d.fit()

    def right(m: nn.Module) -> float:
        return float((probabilities(m, digits.test.x, 1.0).argmax(1) == digits.test.y).float().mean())

    assert result.epsilon <= 4.0
    assert right(student) < 0.3
    assert right(result.model) > 0.6


def test_a_seeded_run_repeats_and_a_global_seed_is_left_alone() -> None:
    torch.manual_seed(11)
    want = torch.rand(3)
    torch.manual_seed(11)
    d = distillation()
    torch.manual_seed(11)
    first = d.fit().model
    assert torch.equal(torch.rand(3), want)
    for a, b in zip(first.parameters(), distillation().fit().model.parameters(), strict=True):
        assert torch.equal(a, b)


def test_a_slow_peer_is_not_heard() -> None:
    result = distillation(deadline=1e-9, rounds=1).fit()
    assert (result.rounds[0].cohort, result.rounds[0].accepted) == (6, 0)


# -- refusals -----------------------------------------------------------------------------------------------------


class Normed(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(nn.Linear(6, 4), nn.BatchNorm1d(4), nn.Linear(4, CLASSES))


@pytest.mark.parametrize(
    ("given", "where"),
    [
        ({"privacy": None}, "privacy"),
        ({"privacy": Distributed(epsilon=4.0)}, "privacy"),
        ({"privacy": ClientLevel(noise_multiplier=0.0)}, "noise_multiplier"),
        ({"privacy": LocalLevel(noise_multiplier=0.0)}, "noise_multiplier"),
        ({"privacy": SampleLevel(noise_multiplier=0.0)}, "noise_multiplier"),
        ({"privacy": ClientLevel(epsilon=1.0, max_update_norm=2.0)}, "max_update_norm"),
        ({"privacy": ClientLevel(epsilon=1.0, clipping="per-layer")}, "clipping"),
        ({"privacy": LocalLevel(epsilon=1.0), "ledger": "server.db"}, "ledger"),
        ({"cohort": FixedCohort(3, amplification=True)}, "cohort"),
        ({"public": TensorDataset(PUBLIC, LABELS)}, "public"),
        ({"public": PUBLIC * math.nan}, "public"),
        ({"queries": 61}, "queries"),
        ({"queries": 0}, "queries"),
        ({"peers": {"p0": nn.Linear(6, 3)}}, "peers"),
        ({"peers": {"p0": Peer(nn.Linear(6, 4), TensorDataset(*blobs(9, 0)))}}, "peers"),
        ({"peers": None}, "peers"),
        ({"model": nn.Flatten(0)}, "model"),
        ({"weights": {f"p{i}": 2.0 for i in range(6)}}, None),
    ],
)
def test_what_has_no_guarantee_is_refused(given: dict[str, Any], where: str | None) -> None:
    with pytest.raises(ConfigurationError) as found:
        distillation(**given)
    assert where is None or found.value.where == where


def test_a_peer_with_running_statistics_is_refused() -> None:
    with pytest.raises(UnsupportedError):
        distillation(peers={"p0": Peer(Normed(), TensorDataset(*blobs(9, 0)))})


def test_peers_with_other_public_inputs_do_not_count() -> None:
    d = distillation(rounds=1)
    other = distillation(rounds=1, public=PUBLIC + 1)
    d._exchange.transport = other.transport
    assert d.fit().rounds[0].rejected == {"other base": 6}


def test_a_peers_own_limit_holds_where_the_federation_has_none() -> None:
    given = peers(3) | {"careful": Peer(model(), TensorDataset(*blobs(30, 7)), epsilon=0.5)}
    result = distillation(peers=given, privacy=ClientLevel(noise_multiplier=4.0), rounds=8).fit()
    assert result.client_epsilons["careful"] <= 0.5 < result.client_epsilons["p0"]


@pytest.mark.parametrize("unit", [LocalLevel(epsilon=4.0), SampleLevel(epsilon=3.0)])
def test_answers_that_come_too_late_are_in_the_epsilon(unit: Any) -> None:
    result = distillation(privacy=unit, rounds=1, deadline=1e-9, peers=peers(2)).fit()
    assert [r.accepted for r in result.rounds] == [0]
    for name, ledger in result.client_ledgers.items():
        assert 0 < ledger.epsilon(delta=unit.delta) == pytest.approx(result.client_epsilons[name])
    assert result.rounds[0].epsilon == result.epsilon > 0
