"""Schedules are public functions of the step alone: values, validation, JSON."""

import json
import math
import subprocess
import sys
from dataclasses import FrozenInstanceError

import numpy as np
import pytest

from sfumato.errors import ConfigurationError
from sfumato.schedules import Constant, Cosine, Exponential, Lambda, Step, checked, factor, from_json, to_json

ALL = [
    Constant(),
    Exponential(0.9),
    Exponential(1.1, every=7),
    Step(0.5, 3),
    Cosine(10, 0.25),
    Cosine(1, 3.0),
    Lambda(lambda t: 1 / (t + 1), 4),
]


def values(schedule, steps):
    return [factor(schedule, t) for t in range(steps)]


def test_values():
    assert values(Constant(), 3) == [1.0, 1.0, 1.0]
    assert values(Exponential(0.5), 4) == [1.0, 0.5, 0.25, 0.125]
    assert values(Exponential(0.25, every=2), 3) == [1.0, 0.5, 0.25]
    assert values(Step(0.5, 2), 6) == [1.0, 1.0, 0.5, 0.5, 0.25, 0.25]
    assert values(Lambda(lambda t: 2.0 - t / 2, 3), 5) == [2.0, 1.5, 1.0, 1.0, 1.0]
    cosine = values(Cosine(4, 0.2), 7)
    assert cosine[0] == 1.0
    assert cosine[2] == pytest.approx(0.6)
    assert cosine[4:] == [0.2] * 3
    assert factor(Cosine(10, 1e-20), 10) == 1e-20


def test_a_function_is_asked_once_and_cannot_follow_the_training():
    seen, state = [], {"loss": 1.0}

    def fn(step):
        seen.append(step)
        return state["loss"] * (step + 1)

    schedule = Lambda(fn, 3)
    assert seen == [0, 1, 2]
    state["loss"] = 100.0
    assert values(schedule, 5) == [1.0, 2.0, 3.0, 3.0, 3.0]
    assert seen == [0, 1, 2]


def test_scalars_of_numpy_are_numbers():
    assert Lambda(lambda t: np.float32(0.5), 2) == Lambda(lambda t: 0.5, 2)


@pytest.mark.parametrize("schedule", ALL, ids=repr)
def test_json_restores_an_equal_schedule(schedule):
    again = from_json(json.loads(json.dumps(to_json(schedule))))
    assert again == schedule
    assert hash(again) == hash(schedule)
    assert values(again, 30) == values(schedule, 30)
    with pytest.raises(FrozenInstanceError):
        again.gamma = 2.0


@pytest.mark.parametrize(
    "data",
    [
        {},
        {"kind": "linear"},
        {"kind": "exponential"},
        {"kind": "constant", "gamma": 0.5},
        {"kind": "step", "gamma": 0.5},
        {"kind": "step", "gamma": -0.5, "every": 1},
        {"kind": "cosine", "steps": 0, "final": 1.0},
        {"kind": "lambda", "values": []},
        {"kind": "lambda", "values": [1.0, 0.0]},
        {"kind": "lambda", "values": "11"},
        {"kind": "lambda", "fn": "print", "steps": 1},
    ],
)
def test_json_that_is_no_schedule(data):
    with pytest.raises(ConfigurationError):
        from_json(data)


@pytest.mark.parametrize("bad", [0.0, -1.0, math.nan, math.inf, True, "1", None])
def test_factors_are_positive_and_finite(bad):
    for build in (
        lambda: Exponential(bad),
        lambda: Step(bad, 1),
        lambda: Cosine(1, bad),
        lambda: Lambda(lambda t: bad if t == 2 else 1.0, 3),
    ):
        with pytest.raises(ConfigurationError):
            build()


@pytest.mark.parametrize("bad", [0, -1, 1.5, True, "1"])
def test_counts(bad):
    for build in (
        lambda: Exponential(0.5, bad),
        lambda: Step(0.5, bad),
        lambda: Cosine(bad, 0.5),
        lambda: Lambda(lambda t: 1.0, bad),
    ):
        with pytest.raises(ConfigurationError):
            build()


@pytest.mark.parametrize("schedule", [Exponential(0.5), Exponential(2.0), Step(1e-300, 1), Step(1e300, 1)], ids=repr)
def test_a_factor_out_of_range_is_refused_not_rounded_to_zero(schedule):
    assert factor(schedule, 1) > 0
    with pytest.raises(ConfigurationError, match="at step 5000"):
        factor(schedule, 5000)


@pytest.mark.parametrize("step", [-1, 0.5, True, None])
def test_steps_are_numbers_from_zero(step):
    with pytest.raises(ConfigurationError, match="step"):
        factor(Constant(), step)


def test_checked():
    assert checked(None, "noise_schedule") == Constant()
    assert checked(ALL[1], "noise_schedule") is ALL[1]
    for bad in (0.9, "cosine", lambda t: 1.0):
        with pytest.raises(ConfigurationError, match="noise_schedule"):
            checked(bad, "noise_schedule")
    with pytest.raises(ConfigurationError, match="callable"):
        Lambda(0.9, 3)


def test_importing_schedules_does_not_import_torch():
    code = "import sys, sfumato.schedules; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
