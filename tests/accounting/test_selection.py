"""Publishing the best of several runs, against an independent implementation of the same theorems."""

import math

import dp_accounting
import pytest
from dp_accounting.dp_event import RepeatAndSelectDpEvent
from dp_accounting.rdp import RdpAccountant

from sfumato.accounting import Event, compose, renyi, repeat_and_select
from sfumato.errors import ConfigurationError

EVENTS = {Event("gaussian", 30.0, 1.0, "add-remove"): 100, Event("gaussian", 50.0, 1.0, "add-remove"): 1}
SHAPE = {"geometric": 1.0, "logarithmic": 0.0, "poisson": math.inf}


@pytest.mark.parametrize("distribution", SHAPE)
@pytest.mark.parametrize("mean", [1.0, 2.5, 10.0, 200.0])
@pytest.mark.parametrize("delta", [1e-5, 1e-10])
def test_against_dp_accounting(distribution, mean, delta):
    other = RdpAccountant(orders=renyi.ORDERS)
    base = [dp_accounting.GaussianDpEvent(30.0)] * 100 + [dp_accounting.GaussianDpEvent(50.0)]
    other.compose(RepeatAndSelectDpEvent(dp_accounting.ComposedDpEvent(base), mean, SHAPE[distribution]))
    found = repeat_and_select(EVENTS, delta=delta, expected_runs=mean, distribution=distribution)
    assert found == pytest.approx(other.get_epsilon(delta), rel=1e-6)
    assert found.lower == 0.0


def test_costs_less_than_all_runs_and_more_than_one():
    event = Event("poisson-gaussian", 1.1, 256 / 6e4, "add-remove")
    once, ten = compose({event: 3516}, delta=1e-5), compose({event: 35160}, delta=1e-5)
    geometric = repeat_and_select({event: 3516}, delta=1e-5, expected_runs=10)
    logarithmic = repeat_and_select({event: 3516}, delta=1e-5, expected_runs=10, distribution="logarithmic")
    assert once < logarithmic < geometric < ten
    # figures of Papernot & Steinke's bounds for this setting
    assert geometric == pytest.approx(2.66, abs=0.02)
    assert logarithmic == pytest.approx(2.24, abs=0.02)
    assert repeat_and_select({event: 3516}, delta=1e-5, expected_runs=50) > geometric


def test_nothing_released_costs_nothing():
    assert repeat_and_select({}, delta=1e-5, expected_runs=10) == 0.0


def test_refusals():
    adaptive = Event("gaussian", 3.0, 1.0, "add-remove", adaptive=True)
    with pytest.raises(ConfigurationError, match="adaptively"):
        repeat_and_select({adaptive: 1}, delta=1e-5, expected_runs=10)
    with pytest.raises(ConfigurationError, match="distribution"):
        repeat_and_select(EVENTS, delta=1e-5, expected_runs=10, distribution="fixed")
    for mean in (0.0, 0.99, math.nan, math.inf, True, "3"):
        with pytest.raises(ConfigurationError, match="expected_runs"):
            repeat_and_select(EVENTS, delta=1e-5, expected_runs=mean)
    with pytest.raises(ConfigurationError, match="delta"):
        repeat_and_select(EVENTS, delta=0.0, expected_runs=3)
