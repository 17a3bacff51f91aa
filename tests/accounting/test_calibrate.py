"""Calibration and step budgets end on the safe side, close to what is needed."""

import math
from dataclasses import replace

import numpy as np
import pytest

from sfumato.accounting import advantage, true_positive_rate
from sfumato.accounting.calibrate import max_steps, noise_multiplier, sample_rate, steps
from sfumato.accounting.events import Event
from sfumato.accounting.pld import compose, epsilon
from sfumato.accounting.search import largest
from sfumato.errors import BudgetExceeded, ConfigurationError
from table import CALIBRATION

EVENT = Event("poisson-gaussian", 1.1, 256 / 6e4, "add-remove")


@pytest.mark.parametrize("name", CALIBRATION)
def test_noise_multiplier(name):
    target, delta, rate, steps, sigma = CALIBRATION[name]
    found = noise_multiplier(target_epsilon=target, target_delta=delta, sample_rate=rate, steps=steps)
    assert sigma <= found + 5e-6 <= sigma * 1.0005 + 1e-5
    spent = epsilon(noise_multiplier=found, sample_rate=rate, steps=steps, delta=delta)
    assert target * (1 - 1e-4) <= spent <= target


@pytest.mark.parametrize("target", [0.01, 0.5, 20.0, 300.0])
@pytest.mark.parametrize(("rate", "steps"), [(1.0, 10), (0.3, 1), (1e-3, 3000)])
def test_safe_side_everywhere(target, rate, steps):
    found = noise_multiplier(target_epsilon=target, target_delta=1e-6, sample_rate=rate, steps=steps)
    assert epsilon(noise_multiplier=found, sample_rate=rate, steps=steps, delta=1e-6) <= target
    if found > 0.011:
        less = epsilon(noise_multiplier=found * 0.999, sample_rate=rate, steps=steps, delta=1e-6)
        assert less > target


def test_nothing_to_hide():
    assert noise_multiplier(target_epsilon=1, target_delta=1e-5, sample_rate=0.1, steps=0) == 0.0


@pytest.mark.parametrize("budget", [0.02, 0.3, 1.0, 3.0])
def test_max_steps_is_the_last_step_that_fits(budget):
    n = max_steps({}, EVENT, epsilon=budget, delta=1e-5)
    assert compose({EVENT: n}, delta=1e-5) <= budget < compose({EVENT: n + 1}, delta=1e-5)


def test_max_steps_beside_other_events():
    other = Event("gaussian", 10.0, 1.0, "add-remove")
    n = max_steps({other: 2, EVENT: 10}, EVENT, epsilon=2.0, delta=1e-5)
    assert compose({other: 2, EVENT: 10 + n}, delta=1e-5) <= 2.0 < compose({other: 2, EVENT: 11 + n}, delta=1e-5)
    assert max_steps({other: 10_000}, EVENT, epsilon=2.0, delta=1e-5) == 0
    free = Event("poisson-gaussian", 0.0, 0.1, "add-remove")
    assert max_steps({}, free, epsilon=2.0, delta=1e-5) == 0


def test_max_steps_of_plain_gaussians():
    event = Event("gaussian", 5.0, 1.0, "zero-out", sampler="shuffle")
    n = max_steps({}, event, epsilon=3.0, delta=1e-5)
    assert compose({event: n}, delta=1e-5) <= 3.0 < compose({event: n + 1}, delta=1e-5)


BAD = {
    "target_epsilon": [0, -1.0, float("nan"), float("inf"), True, "1"],
    "target_delta": [0, 1, -1e-5, 1.5, float("nan"), None],
    "sample_rate": [0, -0.1, 1.0001, float("nan"), True],
    "steps": [-1, 1.0, True, "3", None],
}


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in BAD.items() for value in values])
def test_bad_input(name, value):
    good = {"target_epsilon": 1.0, "target_delta": 1e-5, "sample_rate": 0.1, "steps": 10}
    with pytest.raises(ConfigurationError, match=name) as caught:
        noise_multiplier(**{**good, name: value})
    assert caught.value.found is value
    other = {"target_delta": "delta"}.get(name, name)
    if name != "target_epsilon":
        arguments = {"noise_multiplier": 1.0, "sample_rate": 0.1, "steps": 10, "delta": 1e-5, other: value}
        with pytest.raises(ConfigurationError, match=other):
            epsilon(**arguments)


@pytest.mark.parametrize("value", [-1e-9, float("nan"), float("inf"), True, "1", None])
def test_bad_noise(value):
    with pytest.raises(ConfigurationError, match="noise_multiplier"):
        epsilon(noise_multiplier=value, sample_rate=0.1, steps=10, delta=1e-5)


def poisson(sigma, rate, adjacency="add-remove"):
    return Event("poisson-gaussian", sigma, rate, adjacency)


@pytest.mark.parametrize("adjacency", ["add-remove", "replace-one"])
def test_random_configurations_are_safe_and_tight(adjacency):
    rng = np.random.default_rng(7)
    for _ in range(12):
        rate, times = 10 ** rng.uniform(-4, -0.2), int(10 ** rng.uniform(0, 4))
        target, delta = 10 ** rng.uniform(-1, 1.2), 10 ** rng.uniform(-12, -4)
        found = noise_multiplier(
            target_epsilon=target, target_delta=delta, sample_rate=rate, steps=times, adjacency=adjacency
        )
        assert compose({poisson(found, rate, adjacency): times}, delta=delta) <= target
        if found > 0.01:
            assert compose({poisson(0.9995 * found, rate, adjacency): times}, delta=delta) > target


def test_membership_targets():
    rate, times = 0.01, 300
    found = noise_multiplier(target_advantage=0.1, sample_rate=rate, steps=times)
    assert advantage({poisson(found, rate): times}) <= 0.1 < advantage({poisson(0.9995 * found, rate): times})
    found = noise_multiplier(target_tpr=0.05, false_positive_rate=0.01, sample_rate=rate, steps=times)
    assert true_positive_rate({poisson(found, rate): times}, false_positive_rate=0.01) <= 0.05
    assert true_positive_rate({poisson(0.999 * found, rate): times}, false_positive_rate=0.01) > 0.05
    most = steps(noise_multiplier=2.0, sample_rate=rate, target_advantage=0.1)
    assert advantage({poisson(2.0, rate): most}) <= 0.1 < advantage({poisson(2.0, rate): most + 1})


def test_most_steps_and_largest_rate():
    most = steps(noise_multiplier=1.1, sample_rate=0.01, target_epsilon=2.0, target_delta=1e-6)
    assert compose({poisson(1.1, 0.01): most}, delta=1e-6) <= 2.0 < compose({poisson(1.1, 0.01): most + 1}, delta=1e-6)
    rate = sample_rate(noise_multiplier=1.1, steps=1000, target_epsilon=2.0, target_delta=1e-6)
    assert compose({poisson(1.1, rate): 1000}, delta=1e-6) <= 2.0
    assert compose({poisson(1.1, rate * 1.0005): 1000}, delta=1e-6) > 2.0
    assert sample_rate(noise_multiplier=50.0, steps=3, target_epsilon=1.0, target_delta=1e-5) == 1.0
    assert sample_rate(noise_multiplier=1.0, steps=0, target_epsilon=1.0, target_delta=1e-5) == 1.0
    assert steps(noise_multiplier=0.1, sample_rate=1.0, target_epsilon=0.1, target_delta=1e-5) == 0


@pytest.mark.parametrize("target", [1.0829, 1.2, 5.0])
def test_beside_what_is_spent(target):
    spent = {poisson(1.1, 0.01): 500}
    found = noise_multiplier(target_epsilon=target, target_delta=1e-5, sample_rate=0.01, steps=500, spent=spent)
    assert compose({**spent, poisson(found, 0.01): 500}, delta=1e-5) <= target
    assert compose({**spent, poisson(0.9995 * found, 0.01): 500}, delta=1e-5) > target


def test_nothing_left_is_refused():
    spent = {poisson(1.1, 0.01): 500}
    with pytest.raises(BudgetExceeded, match="no room"):
        noise_multiplier(target_epsilon=1.0, target_delta=1e-5, sample_rate=0.01, steps=500, spent=spent)


def test_schedule_of_factors():
    factors = [2.0, 2.0, 1.0, 0.5] * 25
    found = noise_multiplier(target_epsilon=2.0, target_delta=1e-5, sample_rate=0.05, factors=factors)

    def total(sigma):
        return compose(
            {poisson(sigma * f, 0.05): 100 // 4 * (2 if f == 2.0 else 1) for f in (2.0, 1.0, 0.5)}, delta=1e-5
        )

    assert total(found) <= 2.0 < total(0.9995 * found)
    same = noise_multiplier(target_epsilon=2.0, target_delta=1e-5, sample_rate=0.05, factors=[1.0] * 100)
    assert same == noise_multiplier(target_epsilon=2.0, target_delta=1e-5, sample_rate=0.05, steps=100)


@pytest.mark.parametrize(
    "event",
    [
        Event("gaussian", 1.0, 1.0, "zero-out", sampler="shuffle"),
        Event("poisson-gaussian", 1.0, 0.01, "add-remove", records=4),
        Event("fixed-size-gaussian", 1.0, 0.01, "replace-one", sampler="fixed-size", dataset_size=1000, cap=10),
        Event("poisson-gaussian", 1.0, 0.01, "add-remove", adaptive=True),
        Event("discrete-gaussian", 1.0, 1.0, "add-remove", sensitivity=8.0, dimension=9),
    ],
    ids=lambda event: f"{event.mechanism}-{event.adaptive}",
)
def test_every_kind_of_event(event):
    sigma = noise_multiplier(target_epsilon=2.0, target_delta=1e-5, steps=40, event=event)
    assert compose({replace(event, noise_multiplier=sigma): 40}, delta=1e-5) <= 2.0
    assert compose({replace(event, noise_multiplier=0.9995 * sigma): 40}, delta=1e-5) > 2.0
    used = replace(event, noise_multiplier=sigma)
    most = max_steps({used: 7}, used, epsilon=2.0, delta=1e-5)
    assert compose({used: 7 + most}, delta=1e-5) <= 2.0 < compose({used: 8 + most}, delta=1e-5)
    assert 33 <= most <= 34


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "exactly one of"),
        ({"target_epsilon": 1.0, "target_delta": 1e-5, "target_advantage": 0.1}, "exactly one of"),
        ({"target_advantage": 0.1, "target_delta": 1e-5}, "target_delta goes with"),
        ({"target_advantage": 1.5}, "target_advantage"),
        ({"target_tpr": 0.1}, "false_positive_rate"),
        ({"target_tpr": 0.01, "false_positive_rate": 0.02}, "guessing"),
        ({"target_advantage": 0.1, "false_positive_rate": 0.1}, "false_positive_rate goes with"),
    ],
)
def test_one_kind_of_target(given, message):
    with pytest.raises(ConfigurationError, match=message):
        noise_multiplier(sample_rate=0.1, steps=10, **given)


@pytest.mark.parametrize("root", [0.3, 1.0, 5.7, 12345.6, 9.9e8, 3e9])
@pytest.mark.parametrize("slope", [0.01, 1.0, 4.0])
@pytest.mark.parametrize("guess", [1, 1000, 10**9])
def test_search(root, slope, guess):
    seen = []

    def excess(k):
        seen.append(k)
        return slope * math.log(k / root)

    assert largest(excess, guess, 1, 10**9, grain=None) == min(math.floor(root), 10**9)
    assert len(seen) <= 25
