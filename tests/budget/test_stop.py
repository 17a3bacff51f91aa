"""A budget ends training before the step that would exceed it, and not a step earlier."""

from __future__ import annotations

import logging
import random
from collections import Counter
from typing import Any

import pytest
import torch
from tests.step.harness import train as run
from tests.step.harness import world

import sfumato as sf
from sfumato.accounting import Budget, Ledger, compose
from sfumato.errors import BudgetExceeded, ConfigurationError
from sfumato.plan import Plan
from sfumato.schedules import Cosine, Exponential, Lambda, Schedule, Step
from sfumato.session import Charging, Scope

MOST = 120  # steps of one configuration


def some_schedule(rng: random.Random) -> Schedule | None:
    return rng.choice(
        [
            None,
            None,
            None,
            Exponential(gamma=rng.uniform(0.9, 1.05), every=rng.randint(1, 5)),
            Step(gamma=rng.uniform(0.7, 1.2), every=rng.randint(2, 20)),
            Cosine(steps=rng.randint(5, 50), final=rng.uniform(0.5, 1.5)),
            Lambda(lambda t: 1 + 0.1 * (t % 3), steps=6),
        ]
    )


def some_plan(rng: random.Random) -> Plan:
    n, cycle = rng.choice([100, 1000, 10_000]), rng.randint(2, 5)
    rate = 10 ** rng.uniform(-3, -0.5)
    sampler = rng.choice(
        [sf.Poisson(rate), sf.Poisson(rate), sf.Shuffle(n // 5), sf.CyclicPoisson(rate, cycle=cycle), sf.Poisson(1.0)]
    )
    return Plan(
        noise_multiplier=10 ** rng.uniform(-0.2, 0.8),
        max_grad_norm=1.0,
        sampler=sampler,
        expected_batch_size=max(1, round(rate * n)),
        dataset_size=n,
        steps_per_epoch=5 if isinstance(sampler, sf.Shuffle) else max(1, round(1 / rate)),
        adjacency="add-remove" if isinstance(sampler, sf.Poisson) else "zero-out",
        noise_schedule=some_schedule(rng),
    )


def walk(charging: Charging, plan: Plan) -> int | None:
    """Steps paid until the budget ends them; None if it does not within MOST."""
    for step in range(MOST):
        period = None if plan.period is None else step // plan.period
        if not charging.affordable(plan, step, period):
            return step
        charging.pay(plan, step, period)
    return None


@pytest.mark.parametrize("block", range(10))
def test_the_last_step_fits_and_one_more_would_not(block: int) -> None:
    ended = 0
    for case in range(50):
        rng = random.Random(1000 * block + case)
        plan, delta = some_plan(rng), 10.0 ** rng.randint(-9, -4)
        ledger = Ledger()
        if rng.random() < 0.3:  # something was spent before
            before = Plan(3.0, 1.0, sf.Poisson(0.01), 1, 100, 100, adjacency=plan.adjacency)
            for step in range(rng.randint(1, 5)):
                ledger.append(before.charge(step), run="before", step=step)
        budget = Budget(epsilon=10 ** rng.uniform(-0.5, 1), delta=delta)
        charging = Charging(
            ledger,
            budget,
            Scope(),
            reserve=rng.choice([1, 1, 7]) if plan.period is None and plan.noise_schedule is None else 1,
        )
        steps = walk(charging, plan)
        charging.settle()
        assert ledger.epsilon(delta=delta) <= budget.epsilon
        if steps is not None:
            ended += 1
            more = Counter(ledger.events())
            more[plan.charge(steps)] += 1
            assert compose(more, delta=delta) > budget.epsilon, (block, case)
    assert ended > 10


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"sampling": sf.Shuffle()},
        {"sampling": sf.CyclicPoisson(cycle=3)},
        {"sampling": sf.TruncatedPoisson(max_batch_size=12)},
        {"adjacency": "replace-one"},
        {"clipping": "per-layer"},
        {"clipping": "automatic"},
        {"noise_schedule": Exponential(gamma=0.97)},
        {"clip_schedule": Cosine(steps=10, final=0.1)},
        {"reserve": 5},
        {"max_physical_batch_size": 4},
    ],
    ids=str,
)
def test_the_loader_ends_with_the_model_of_the_last_permitted_step(options: dict[str, Any]) -> None:
    torch.manual_seed(1)
    w = world(budget=sf.Budget(epsilon=8.0, delta=1e-5), noise_multiplier=2.0, **options)
    weights = []
    for _ in range(60):
        for x, y in w.loader:
            w.optimizer.zero_grad()
            torch.nn.functional.cross_entropy(w.model(x), y).backward()
            w.optimizer.step()
            weights.append([p.detach().clone() for p in w.model.parameters()])
        if w.engine.stopped:
            break
    assert w.engine.stopped
    assert w.engine.steps_left == 0
    w.engine.detach()
    assert w.engine.get_epsilon(1e-5) <= 8.0
    assert list(w.loader.dataset[0][0].shape) == [5]


def test_another_process_may_spend_the_last_step_meanwhile() -> None:
    """The batch that was drawn and can no longer be paid for changes nothing."""
    torch.manual_seed(0)
    budget = sf.Budget(epsilon=3.0, delta=1e-5)
    w = world(budget=budget, everybody=True, batch_size=6)
    batches = iter(w.loader)
    x, y = next(batches)
    event = w.engine.plan.event
    while True:  # the other one
        try:
            w.engine.ledger.append(event, run="other", step=0, budget=budget)
        except BudgetExceeded:
            break
    before = [p.detach().clone() for p in w.model.parameters()]
    entries = w.charges
    torch.nn.functional.cross_entropy(w.model(x), y).backward()
    w.optimizer.step()
    assert w.engine.stopped
    assert w.charges == entries
    assert all(torch.equal(a, b) for a, b in zip(before, w.model.parameters(), strict=True))


def test_steps_left_counts_down_to_the_end() -> None:
    w = world(budget=sf.Budget(epsilon=4.0, delta=1e-5), noise_multiplier=1.5)
    left = w.engine.steps_left
    assert left is not None
    assert left > 1
    run(w, 1)
    assert w.engine.steps_left == left - w.engine.steps
    assert world().engine.steps_left is None


def test_numbers_chosen_on_the_way_are_charged_by_the_filter() -> None:
    torch.manual_seed(0)
    w = world(budget=sf.Budget(epsilon=6.0, delta=1e-5), noise_multiplier=3.0)
    for epoch in range(200):
        run(w, 1)
        if w.engine.stopped:
            break
        w.engine.change(noise_multiplier=3.0 + (epoch % 3))
    assert w.engine.stopped
    assert w.engine.get_epsilon(1e-5) <= 6.0
    events = w.engine.ledger.events()
    assert any(e.adaptive for e in events)
    fixed = Counter()
    for event, n in events.items():
        fixed[sf.Event("poisson-gaussian", event.noise_multiplier, event.sample_rate, event.adjacency)] += n
    assert compose(fixed, delta=1e-5) < w.engine.get_epsilon(1e-5)  # the price of choosing


def test_numbers_do_not_change_within_a_logical_batch() -> None:
    w = world(everybody=True, max_physical_batch_size=10)
    batches = iter(w.loader)
    x, y = next(batches)
    torch.nn.functional.cross_entropy(w.model(x), y).backward()
    with pytest.raises(sf.errors.PrivacyError, match="half done"):
        w.engine.change(max_grad_norm=9.0)


@pytest.mark.parametrize("reserve", [0, -1, 2.0, True])
def test_bad_reserve(reserve: Any) -> None:
    with pytest.raises(ConfigurationError):
        world(reserve=reserve)


def test_a_reserve_needs_equal_steps() -> None:
    with pytest.raises(ConfigurationError, match="reserve"):
        world(reserve=5, noise_schedule=Exponential(gamma=0.9))


def test_what_was_reserved_and_not_used_is_given_back() -> None:
    w = world(reserve=50)
    run(w, 1)
    assert sum(w.engine.ledger.events().values()) >= 50 > w.engine.steps
    spent = w.engine.steps
    w.engine.detach()
    assert sum(w.engine.ledger.events().values()) == spent
    w.engine.ledger.verify()


def test_the_log_shows_the_privacy_of_every_step(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="sfumato"):
        w = world(budget=sf.Budget(epsilon=8.0, delta=1e-6))
        run(w, 1)
    lines = [r.getMessage() for r in caplog.records if "epsilon" in r.getMessage()]
    assert len(lines) == w.engine.steps
    assert f"{w.engine.get_epsilon(1e-6):.4f}" in lines[-1]
    assert "1e-06" in lines[-1]
    assert f"{w.engine.steps_left} charges left" in lines[-1]


def test_numbers_of_a_batch_that_is_drawn_are_fixed() -> None:
    w = world(everybody=True, noise_multiplier=0.5)
    for x, y in w.loader:
        with pytest.raises(sf.errors.PrivacyError, match="half done"):
            w.engine.change(noise_multiplier=50.0)
        torch.nn.functional.cross_entropy(w.model(x), y).backward()
        w.engine.change(noise_multiplier=50.0)
        break
    (entry,) = w.engine.ledger.entries()
    assert entry["event"]["noise_multiplier"] == 0.5
    with pytest.raises(ConfigurationError, match="nothing"):
        w.engine.change()


@pytest.mark.parametrize("sampling", [sf.Shuffle(), sf.CyclicPoisson(cycle=4)], ids=str)
def test_less_noise_within_a_period_is_paid_for(sampling: Any) -> None:
    torch.manual_seed(0)
    w = world(sampling=sampling, noise_multiplier=5.0)
    done = 0
    for x, y in w.loader:
        w.optimizer.zero_grad()
        torch.nn.functional.cross_entropy(w.model(x), y).backward()
        if (done := done + 1) == 1:
            w.engine.change(noise_multiplier=1.0)
    events = w.engine.ledger.events()
    payers = [e for e, n in events.items() if e.mechanism != "covered" and n]
    assert {e.noise_multiplier for e in payers} == {5.0, 1.0}
    assert w.engine.get_epsilon(1e-5) > 0


def test_a_falling_schedule_stays_within_the_budget_after_a_change() -> None:
    torch.manual_seed(0)
    w = world(budget=sf.Budget(epsilon=8.0, delta=1e-5), noise_multiplier=10.0, noise_schedule=Step(gamma=0.1, every=3))
    w.engine.change(max_grad_norm=0.9)
    run(w, 4)
    assert w.engine.stopped
    assert w.engine.get_epsilon(1e-5) <= 8.0


def test_steps_replayed_from_a_checkpoint_are_checked_again(tmp_path: Any) -> None:
    """What had been found to fit was the rest of the schedule, not its beginning."""
    torch.manual_seed(0)
    budget = sf.Budget(epsilon=4.0, delta=1e-5)
    w = world(budget=budget, noise_multiplier=1.0, noise_schedule=Exponential(gamma=2.0), everybody=True)
    w.engine.save_checkpoint(tmp_path / "start")
    for _ in range(40):
        w.engine.load_checkpoint(tmp_path / "start")
        run(w, 1)
        assert w.engine.get_epsilon(1e-5) <= 4.0
        if w.engine.stopped:
            break
    assert w.engine.stopped


def test_what_is_left_is_asked_again_for_another_step_than_the_next() -> None:
    """Steps that were looked at in advance say nothing about later, dearer ones."""
    budget = Budget(epsilon=6.0, delta=1e-5)
    plan = some_falling_plan()
    charging = Charging(Ledger(), budget, Scope(), reserve=1)
    assert charging.left(plan, 0) != Charging(Ledger(), budget, Scope(), reserve=1).left(plan, 12)
    assert charging.left(plan, 12) == Charging(Ledger(), budget, Scope(), reserve=1).left(plan, 12)


def test_a_schedule_goes_on_where_the_look_ahead_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    budget = Budget(epsilon=6.0, delta=1e-5)
    steps = walk(Charging(Ledger(), budget, Scope(), reserve=1), some_falling_plan())
    monkeypatch.setattr("sfumato.session.charging.LOOKAHEAD", 4)
    assert steps is not None
    assert steps > 8
    assert walk(Charging(Ledger(), budget, Scope(), reserve=1), some_falling_plan()) == steps


def some_falling_plan() -> Plan:
    return Plan(
        noise_multiplier=3.0,
        max_grad_norm=1.0,
        sampler=sf.Poisson(0.2),
        expected_batch_size=20,
        dataset_size=100,
        steps_per_epoch=5,
        noise_schedule=Exponential(gamma=0.9, every=1),
    )


def test_more_noise_lets_the_loader_go_on_after_the_budget_ended_it() -> None:
    torch.manual_seed(0)
    w = world(budget=sf.Budget(epsilon=3.0, delta=1e-5), noise_multiplier=0.8)
    run(w, 50)
    assert w.engine.stopped
    done = w.engine.steps
    w.engine.change(noise_multiplier=50.0)
    run(w, 1)
    assert w.engine.steps >= done + w.engine.plan.steps_per_epoch
    assert not w.engine.stopped
    assert w.engine.get_epsilon(1e-5) <= 3.0
