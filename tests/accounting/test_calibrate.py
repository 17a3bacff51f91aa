"""Calibration and step budgets end on the safe side, close to what is needed."""

import pytest

from sfumato.accounting.calibrate import max_steps, noise_multiplier
from sfumato.accounting.events import Event
from sfumato.accounting.pld import compose, epsilon
from sfumato.errors import ConfigurationError
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
