"""The release: charged before it is asked for, the noise that was charged, for the cohort that was declared."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from sfumato.accounting import Budget, Event, Ledger, compose
from sfumato.clipping import gradient_multiplier
from sfumato.federated import exchange as module
from sfumato.federated.accounts import DATASET, Accounts
from sfumato.federated.cohorts import FixedCohort, PoissonCohort, Terms, number_of
from sfumato.federated.contributions import Bound
from sfumato.federated.exchange import Exchange, Exhausted, Question
from sfumato.federated.units import ClientLevel, SampleLevel
from sfumato.federated.wire.schema import Schema

ALPHA = 1e-9
BIG = 1_000_000
Z, C = 0.8, 0.5


def schema_of(d: int) -> Schema:
    return Schema((("w", (d,)),))


def question(d: int, **changes: Any) -> Question:
    return replace(Question("train", schema_of(d), Bound(C), Z), **changes)


def exchange_of(transport: Any, **changes: Any) -> Exchange:
    """A server under ClientLevel without limits, in memory."""
    names = tuple(transport.clients())
    unit = ClientLevel(noise_multiplier=Z, max_update_norm=C)
    settings: dict[str, Any] = {
        "unit": unit,
        "cohort": PoissonCohort(),
        "weights": dict.fromkeys(names, 1.0),
        "accounts": None,
        "terms": dict.fromkeys(names, Terms(1.0)),
        "scales": dict.fromkeys(names, 1.0),
        "noise": "secure",
        "seed": 0,
        "deadline": None,
        "run": "run",
    }
    settings |= changes
    if settings["accounts"] is None and isinstance(settings["unit"], ClientLevel):
        settings["accounts"] = Accounts(Ledger(), dict.fromkeys(names), "run")
    return Exchange(transport, **settings)


def silent(task: Any, client: str) -> None:
    return None


def released_noise(
    fed: Any, answering: int, *, weights: Any = None, noise: str = "secure", **more: Any
) -> torch.Tensor:
    """10⁶ draws of what is added to the sum, through the whole path; ``answering`` of 6 clients reply, with zeros."""
    says = {f"c{i}": fed.constant(np.zeros(BIG)) if i < answering else silent for i in range(6)}
    transport = fed.Scripted(says)
    changes = {} if weights is None else {"weights": weights}
    server = exchange_of(transport, noise=noise, **changes)
    answer = server.ask(question(BIG, **more), torch.zeros(BIG))
    assert answer.vector is not None
    expected = 6.0 if weights is None else sum(weights.values())
    return answer.vector.double() * expected


def check_noise(found: torch.Tensor, std: float) -> None:
    """Standard deviation within 1 % (and within what 10⁶ draws allow), and the whole distribution normal."""
    n = len(found)
    measured = float(found.square().mean().sqrt())
    assert abs(measured / std - 1) < min(0.01, 6.2 / math.sqrt(2 * n))
    assert abs(float(found.mean())) < 6.2 * std / math.sqrt(n)
    ordered = (found / std).sort().values
    cdf = torch.special.ndtr(ordered)
    steps = torch.arange(1, n + 1, dtype=torch.float64) / n
    distance = float(torch.maximum((steps - cdf).abs().max(), (cdf - (steps - 1 / n)).abs().max()))
    assert distance < math.sqrt(math.log(2 / ALPHA) / 2 / n)


@pytest.mark.parametrize("answering", [6, 3, 0])
def test_noise_is_that_of_the_declared_cohort(fed: Any, answering: int) -> None:
    """Drop-outs cost usefulness, never noise."""
    check_noise(released_noise(fed, answering), Z * C)


def test_noise_does_not_follow_weights(fed: Any) -> None:
    weights = {f"c{i}": w for i, w in enumerate([1.0, 0.5, 0.01, 0.0, 0.3, 1.0])}
    check_noise(released_noise(fed, 6, weights=weights), Z * C)


def test_noise_of_research(fed: Any) -> None:
    """The same law, from a seed; another question has other noise."""
    check_noise(released_noise(fed, 6, noise="research"), Z * C)


def test_noise_beside_a_count(fed: Any) -> None:
    """Sum and count together cost z, so that the sum gets more noise."""
    check_noise(released_noise(fed, 6, count_noise=1.0), gradient_multiplier(Z, 1.0) * C)


@pytest.mark.parametrize("wrong", [0.7, 1.3, 0.98])
def test_the_noise_test_can_fail(fed: Any, monkeypatch: pytest.MonkeyPatch, wrong: float) -> None:
    """Noise that is 30 % off, or 2 %, is found."""
    real = module.stream

    class Off:
        def __init__(self, *args: Any) -> None:
            self.inner = real(*args)

        def normal(self, shape: Any, *, std: float, **more: Any) -> torch.Tensor:
            return self.inner.normal(shape, std=std * wrong, **more)

        def uniform(self, n: int) -> Any:
            return self.inner.uniform(n)

    monkeypatch.setattr(module, "stream", Off)
    with pytest.raises(AssertionError):
        check_noise(released_noise(fed, 6), Z * C)


def test_count_noise(fed: Any) -> None:
    """The released fraction has mean and spread of Andrew et al. 2021: Σ(b − ½) + N(0, σ_b²), over the declared m."""
    norms = [0.1, 0.2, 0.3, 2.0]
    transport = fed.Scripted({f"c{i}": fed.constant([norm]) for i, norm in enumerate(norms)})
    server = exchange_of(transport, noise="research")
    asked = question(1, count_noise=2.0)
    found = np.array([server.ask(asked, torch.zeros(1)).fraction for _ in range(800)], dtype=float)
    assert abs(found.mean() - 0.75) < 6.2 * 0.5 / math.sqrt(800)
    assert abs(found.std() / 0.5 - 1) < 6.2 / math.sqrt(1600)


@pytest.mark.parametrize("noise", ["secure", "research"])
def test_noise_is_never_used_twice(fed: Any, noise: str) -> None:
    """Neither in two rounds, nor in two kinds of questions, nor for sum and cohort."""
    transport = fed.Scripted({"c0": fed.constant(np.zeros(500))})
    server = exchange_of(transport, noise=noise)
    found = [server.ask(question(500), torch.zeros(500)).vector for _ in range(4)]
    found.append(server.ask(question(500, kind="score"), torch.zeros(500)).vector)
    for i, one in enumerate(found):
        for other in found[:i]:
            assert one is not None
            assert other is not None
            assert abs(float(np.corrcoef(one.numpy(), other.numpy())[0, 1])) < 6.2 / math.sqrt(500)
    numbers = [(task.round, task.nonce) for task in transport.tasks]
    assert len(set(numbers)) == len({n for _, n in numbers}) == 5


def test_charged_before_anybody_is_asked(fed: Any) -> None:
    """The ledger holds this round's events for those who pay when the first task leaves."""
    ledger = Ledger()
    seen: list[int] = []
    transport = fed.Scripted({f"c{i}": fed.constant([1.0]) for i in range(5)})
    transport.before = lambda task, ids: seen.append(len(ledger.entries()))
    accounts = Accounts(ledger, dict.fromkeys(transport.clients()), "run")
    server = exchange_of(transport, accounts=accounts, cohort=PoissonCohort(0.5))
    for k in range(1, 6):
        server.ask(question(1), torch.zeros(1))
        assert seen[-1] == k
        entry = ledger.entries()[-1]
        assert (entry["run"], entry["step"], entry["dataset"]) == ("run", transport.tasks[-1].round, DATASET)
        assert Event.from_json(entry["event"]) == Event("poisson-gaussian", Z, 0.5, "add-remove", "client")


def test_an_empty_cohort_releases_noise_and_is_charged(fed: Any) -> None:
    """Whether anybody was drawn is a secret."""
    transport = fed.Scripted({f"c{i}": fed.constant([1.0]) for i in range(3)})
    ledger = Ledger()
    server = exchange_of(
        transport, accounts=Accounts(ledger, dict.fromkeys(transport.clients()), "run"), cohort=PoissonCohort(1e-9)
    )
    answers = [server.ask(question(1), torch.zeros(1)) for _ in range(5)]
    assert all(a.asked == 0 and a.vector is not None and float(a.vector.abs()) > 0 for a in answers)
    assert sum(e["count"] for e in ledger.entries()) == 5


def test_a_transport_that_breaks_has_been_charged(fed: Any) -> None:
    """An over-count, never an under-count; the next question has another number."""

    def broken(task: Any, client: str) -> None:
        raise OSError("the line is dead")

    transport = fed.Scripted({"c0": broken})
    ledger = Ledger()
    server = exchange_of(transport, accounts=Accounts(ledger, {"c0": None}, "run"))
    for k in (1, 2):
        with pytest.raises(OSError, match="dead"):
            server.ask(question(1), torch.zeros(1))
        assert len(ledger.entries()) == k
    assert transport.tasks[0].round != transport.tasks[1].round


def test_the_sum_is_not_rounded_before_the_noise(fed: Any) -> None:
    """10⁷·C of others in float32 would turn one client's C into 0 or 2C."""
    names = {f"c{i}": fed.constant([4.0]) for i in range(3)} | {"victim": fed.constant([0.25])}
    transport = fed.Scripted(names)
    server = exchange_of(transport, noise="research", accounts=None)
    asked = question(1, bound=Bound(2.0**25), noise_multiplier=1e-9)
    with_ = server.ask(asked, torch.zeros(1)).vector
    assert with_ is not None
    assert float(with_[0]) * 4 == pytest.approx(12.25, abs=0.2)


# -- hostile replies ----------------------------------------------------------------------------------------------


def test_replies_of_other_rounds_are_not_counted(fed: Any) -> None:
    """Replayed, stale, of another run, twice, from nobody: counted never or once, and the round goes on."""
    kept: list[Any] = []

    def replaying(task: Any, client: str) -> list[Any]:
        good = fed.reply(task, client, [1.0])
        kept.append(good)
        strange = [
            replace(good, run="another"),
            replace(good, client="c9"),
            replace(good, client="honest-but-not-drawn"),
            replace(good, round=task.round + 1),
            None,
            "text",
            replace(good, epsilon=math.nan, done="yes"),
            replace(good, epsilon=[1], client="c1"),
        ]
        return [*kept[:-1], *(s for s in strange if s is not None), good, good]

    transport = fed.Scripted({"c0": replaying, "c1": fed.constant([1.0])})
    server = exchange_of(transport)
    asked = question(1, noise_multiplier=1e-9)
    for k in range(1, 5):
        answer = server.ask(asked, torch.zeros(1))
        assert answer.accepted == 2
        assert answer.vector is not None
        assert float(answer.vector) == pytest.approx(C, rel=1e-6)
        assert answer.rejected["other round"] == k - 1 + 2
    assert server.done == set()


def test_a_client_ends_only_its_own_part(fed: Any) -> None:
    """done and epsilon of a reply that is not of this round, or of nobody, are not heard."""
    unit = SampleLevel(epsilon=1.0)

    def late(task: Any, client: str) -> list[Any]:
        good = fed.reply(task, client, [1.0])
        return [
            replace(good, nonce="old", done=True, epsilon=9.0),
            replace(good, epsilon=0.5),
            replace(good, epsilon=0.4),
        ]

    transport = fed.Scripted({"c0": late, "c1": lambda t, c: fed.reply(t, c, [1.0], done=True, epsilon=1.0)})
    server = exchange_of(transport, unit=unit)
    asked = question(1, bound=None, noise_multiplier=None)
    server.ask(asked, torch.zeros(1))
    assert server.done == {"c1"}
    assert server.all_epsilons() == {"c0": 0.5, "c1": 1.0}
    server.ask(asked, torch.zeros(1))
    assert transport.asked == [("c0", "c1"), ("c0",)]


@pytest.mark.parametrize("answering", range(7))
def test_dropouts(fed: Any, answering: int) -> None:
    """Any number of them: the estimate is Σ/6, whoever is missing, and the charge the same."""
    says = {f"c{i}": fed.constant([0.5]) if i < answering else silent for i in range(6)}
    ledger = Ledger()
    server = exchange_of(fed.Scripted(says), accounts=Accounts(ledger, dict.fromkeys(says), "run"))
    answer = server.ask(question(1, noise_multiplier=1e-7), torch.zeros(1))
    assert answer.vector is not None
    assert float(answer.vector) == pytest.approx(answering * C / 6, abs=1e-5)
    assert answer.accepted == answering
    assert Event.from_json(ledger.entries()[0]["event"]).sample_rate == 1.0


# -- budgets ------------------------------------------------------------------------------------------------------


def test_a_spent_client_is_not_asked_and_all_spent_ends_it(fed: Any) -> None:
    ledger = Ledger()
    small, large = Budget(2.0, 1e-5), Budget(4.0, 1e-5)
    limits = {"c0": small, "c1": large, "c2": large}
    transport = fed.Scripted({c: fed.constant([1.0]) for c in limits})
    accounts = Accounts(ledger, limits, "run")
    server = exchange_of(transport, accounts=accounts, cohort=FixedCohort(3))
    asked = question(1, noise_multiplier=4.0)
    stopped = False
    while not stopped and len(transport.asked) < 100:
        try:
            server.ask(asked, torch.zeros(1))
        except Exhausted:
            stopped = True
    assert stopped
    assert ("c1", "c2") in transport.asked
    assert ("c0", "c1", "c2") in transport.asked
    for c, budget in limits.items():
        spent = accounts.epsilon(c, 1e-5)
        assert spent <= budget.epsilon
        assert float(ledger.epsilon(delta=1e-5, dataset=DATASET, records=[number_of(c)])) == pytest.approx(spent)
        more = {e: n + 1 for e, n in ledger.events(dataset=DATASET, records=[number_of(c)]).items()}
        assert compose(more, delta=1e-5) > budget.epsilon  # one more would have been too much


def test_a_ledger_that_others_use_too(fed: Any) -> None:
    """Two servers on one ledger: what the other spent counts, and the sum stays within the budget."""
    ledger = Ledger()
    limits = {"c0": Budget(3.0, 1e-5)}
    servers = [
        exchange_of(fed.Scripted({"c0": fed.constant([1.0])}), accounts=Accounts(ledger, limits, f"run {i}"))
        for i in range(2)
    ]
    asked = question(1, noise_multiplier=3.0)
    stopped = set()
    for k in range(60):
        if k % 2 not in stopped:
            try:
                servers[k % 2].ask(asked, torch.zeros(1))
            except Exhausted:
                stopped.add(k % 2)
    assert stopped == {0, 1}
    assert 2.0 < float(ledger.epsilon(delta=1e-5)) <= 3.0


def test_a_client_that_others_charged_does_not_end_it_for_everybody(fed: Any) -> None:
    """Who cannot pay any more is left out, and the others go on."""
    ledger = Ledger()
    limits = {f"c{i}": Budget(3.0, 1e-5) for i in range(3)}
    both = fed.Scripted({c: fed.constant([1.0]) for c in limits})
    server = exchange_of(both, accounts=Accounts(ledger, limits, "run"), cohort=FixedCohort(3))
    asked = question(1, noise_multiplier=5.0)
    server.ask(asked, torch.zeros(1))
    other = Accounts(ledger, {"c1": None}, "another run")
    other.charge([(Event("gaussian", 1.45, 1.0, "zero-out", "client"), ("c1",))], 1, "")
    answer = server.ask(asked, torch.zeros(1))
    assert both.asked == [("c0", "c1", "c2"), ("c0", "c2")]
    assert answer.asked == 2
    assert server.accounts is not None
    for c in limits:
        held = float(ledger.epsilon(delta=1e-5, dataset=DATASET, records=[number_of(c)]))
        assert server.accounts.epsilon(c, 1e-5) == pytest.approx(held)
        assert held <= 3.0 or c == "c1"


def test_accounts_of_a_new_process_know_what_was_spent(fed: Any) -> None:
    ledger = Ledger()
    limits = {f"c{i}": Budget(5.0, 1e-5) for i in range(4)}
    transport = fed.Scripted({c: fed.constant([1.0]) for c in limits})
    first = Accounts(ledger, limits, "run")
    server = exchange_of(transport, accounts=first, cohort=FixedCohort(2))
    for _ in range(4):
        server.ask(question(1, noise_multiplier=3.0), torch.zeros(1))
    second = Accounts(ledger, {**limits, "new": Budget(5.0, 1e-5)}, "other run")
    for c in limits:
        assert second.epsilon(c, 1e-5) == pytest.approx(first.epsilon(c, 1e-5))
    assert second.epsilon("new", 1e-5) == 0.0


def test_personal_noise_pays_for_its_vote_too(fed: Any) -> None:
    """A client with the bound s·C is charged z/s, so that its vote on C weighs s as well."""
    says = {"c0": fed.constant([0.001]), "c1": fed.constant([0.001])}
    for scale in (1.0, 0.1):
        server = exchange_of(fed.Scripted(says), noise="research", scales={"c0": 1.0, "c1": scale})
        alone = exchange_of(
            fed.Scripted({"c0": says["c0"], "c1": silent}), noise="research", scales={"c0": 1.0, "c1": scale}
        )
        asked = question(1, count_noise=1.0)
        one, other = (s.ask(asked, torch.zeros(1)).fraction for s in (server, alone))
        assert one is not None
        assert other is not None
        assert (one - other) * (1 + scale) == pytest.approx(scale / 2)  # of the sum of votes
