"""Events: closed sets, JSON, and how they combine."""

import json
import os
import subprocess
import sys

import pytest

from sfumato.accounting.budget import Budget
from sfumato.accounting.events import Event
from sfumato.accounting.gaussian import gaussian_epsilon
from sfumato.accounting.pld import compose
from sfumato.errors import ConfigurationError

POISSON = Event("poisson-gaussian", 1, 0.01, "add-remove")
EPOCH = Event("gaussian", 2.0, 1.0, "zero-out", sampler="shuffle")
COVERED = Event("covered", 2.0, 1.0, "zero-out", sampler="shuffle")


@pytest.mark.parametrize("event", [POISSON, EPOCH, COVERED])
def test_json_round_trip(event):
    assert Event.from_json(json.loads(json.dumps(event.to_json()))) == event


def test_equal_numbers_are_one_event():
    assert Event("poisson-gaussian", 1.0, 0.01, "add-remove") == POISSON
    assert json.dumps(POISSON.to_json()) == json.dumps(Event("poisson-gaussian", 1.0, 0.01, "add-remove").to_json())


@pytest.mark.parametrize(
    "change",
    [
        {"mechanism": "exponential"},
        {"adjacency": "bounded"},
        {"sampler": "weighted"},
        {"unit": ""},
        {"version": 3},
        {"version": True},
        {"noise_multiplier": -1.0},
        {"noise_multiplier": float("inf")},
        {"noise_multiplier": None},
        {"sample_rate": 0.0},
        {"sample_rate": 1.1},
        {"mechanism": "gaussian"},
        {"sampler": "shuffle"},
        {"extra": 1},
    ],
)
def test_refused(change):
    with pytest.raises(ConfigurationError):
        Event.from_json({**POISSON.to_json(), **change})


def test_missing_field_is_named():
    data = POISSON.to_json()
    del data["sample_rate"]
    with pytest.raises(ConfigurationError, match="sample_rate"):
        Event.from_json(data)


def test_covered_releases_cost_nothing_but_need_their_payer():
    paid = compose({EPOCH: 3, COVERED: 300}, delta=1e-5)
    assert paid.upper == gaussian_epsilon(3**0.5 / 2, 1e-5, upper=True)
    with pytest.raises(ConfigurationError, match="covered"):
        compose({COVERED: 300}, delta=1e-5)


def test_units_do_not_mix():
    user = Event("gaussian", 2.0, 1.0, "add-remove", unit="user")
    with pytest.raises(ConfigurationError, match="unit"):
        compose({POISSON: 1, user: 1}, delta=1e-5)


@pytest.mark.parametrize("count", [-1, 1.5, True])
def test_bad_count(count):
    with pytest.raises(ConfigurationError):
        compose({POISSON: count}, delta=1e-5)


@pytest.mark.parametrize(
    ("epsilon", "delta"), [(0, 1e-5), (-1, 1e-5), (float("nan"), 1e-5), (1, 0), (1, 1), (True, 0.1)]
)
def test_bad_budget(epsilon, delta):
    with pytest.raises(ConfigurationError):
        Budget(epsilon, delta)


def test_import_does_not_touch_torch():
    code = "import sys, sfumato.accounting.pld, sfumato.accounting.calibrate; sys.exit('torch' in sys.modules)"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    assert subprocess.run([sys.executable, "-c", code], env=environment, check=False).returncode == 0
