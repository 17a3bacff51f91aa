"""Advantage, detection rate and trade-off curve: above the truth, and close to it."""

import math

import dp_accounting
import numpy as np
import pytest
from dp_accounting.pld import PLDAccountant
from scipy.special import ndtr, ndtri

from sfumato.accounting import Event, advantage, delta, trade_off, true_positive_rate
from sfumato.errors import ConfigurationError

MNIST = {Event("poisson-gaussian", 1.1, 256 / 6e4, "add-remove"): 3516}
FULL = Event("gaussian", 4.0, 1.0, "add-remove")


@pytest.mark.parametrize("a", [1e-9, 1e-4, 0.01, 0.3, 0.45, 0.6, 0.9, 0.9999])
@pytest.mark.parametrize("steps", [1, 16, 400])
def test_gaussian_closed_form(a, steps):
    mu = math.sqrt(steps) / 4.0
    found, truth = true_positive_rate({FULL: steps}, false_positive_rate=a), float(ndtr(ndtri(a) + mu))
    assert truth <= found * (1 + 1e-13)
    assert found <= truth * (1 + 1e-6)
    assert 1.0 - found >= float(ndtr(-ndtri(a) - mu)) * (1 - 1e-6) - 1e-15
    assert advantage({FULL: steps}) == pytest.approx(2 * ndtr(mu / 2) - 1, rel=1e-9)


def test_one_sampled_step_against_its_likelihood_ratio_test():
    # One step: the best test rejects above a threshold t, and both neighbours may be the null hypothesis.
    rate, sigma = 0.3, 1.5
    events = {Event("poisson-gaussian", sigma, rate, "add-remove"): 1}
    for t in (-3.0, 0.0, 0.5, 2.0, 6.0):
        out, inside = float(ndtr(-t / sigma)), float(ndtr((1 - t) / sigma))
        present = (1 - rate) * out + rate * inside
        for a, truth in ((out, present), (1 - present, 1 - out)):
            found = true_positive_rate(events, false_positive_rate=a)
            assert truth <= found * (1 + 1e-12)
    assert advantage(events) == pytest.approx(rate * (2 * ndtr(0.5 / sigma) - 1), rel=1e-4)


@pytest.mark.parametrize("a", [1e-5, 0.01, 0.2, 0.8])
def test_no_epsilon_gives_a_better_bound(a):
    found = true_positive_rate(MNIST, false_positive_rate=a)
    grid = [0.1 * k for k in range(20)]
    least = min(
        min(d + math.exp(e) * a, 1 - math.exp(-e) * (1 - d - a))
        for e, d in ((e, delta(MNIST, epsilon=e)) for e in grid)
    )
    assert found <= least * (1 + 1e-9)


def test_against_dp_accounting():
    other = PLDAccountant(value_discretization_interval=1e-4)
    other.compose(dp_accounting.PoissonSampledDpEvent(256 / 6e4, dp_accounting.GaussianDpEvent(1.1)), 3516)
    for epsilon in (0.0, 0.5, 1.0):
        assert delta(MNIST, epsilon=epsilon) == pytest.approx(other.get_delta(epsilon), rel=2e-3)
    # true-positive rates of its development version at these false-positive rates: 1 - .999686
    assert true_positive_rate(MNIST, false_positive_rate=1e-4) == pytest.approx(1 - 0.999686, abs=1e-6)
    assert true_positive_rate(MNIST, false_positive_rate=8e-6) == pytest.approx(1 - 0.999970, abs=1e-6)


def test_curve():
    rates = [0.0, 1e-6, 1e-3, 0.05, 0.3, 0.5, 0.8, 0.99, 1.0]
    found = trade_off(MNIST, rates)
    assert found[0] < 1e-6
    assert found[-1] == 1.0
    assert found == sorted(found)
    for a, value in zip(rates[1:-1], found[1:-1], strict=True):
        best = true_positive_rate(MNIST, false_positive_rate=a)
        assert a < best <= value * (1 + 1e-9)
        assert value <= best * 1.01
        assert value - a <= advantage(MNIST) * (1 + 1e-9)
    # mirrored: detection rate b at a means 1 - a at 1 - b
    assert trade_off(MNIST, [1 - found[3]])[0] == pytest.approx(1 - rates[3], abs=2e-3)


@pytest.mark.parametrize(
    "event",
    [
        Event("skellam", 30.0, 1.0, "add-remove", sensitivity=5.0, l1_sensitivity=20.0, dimension=30),
        Event("poisson-gaussian", 4.0, 0.01, "add-remove", adaptive=True),
    ],
    ids=["skellam", "adaptive"],
)
def test_renyi_only(event):
    planned = {Event("gaussian", 30.0 if event.mechanism == "skellam" else 4.0, 1.0, "add-remove"): 1}
    rate = true_positive_rate({event: 1}, false_positive_rate=0.01)
    assert 0.01 < rate <= 1.0
    if event.mechanism == "skellam":
        assert rate > true_positive_rate(planned, false_positive_rate=0.01) * 0.9
        assert rate < 0.05
    assert trade_off({event: 3}, [0.1, 0.5]) == sorted(trade_off({event: 3}, [0.1, 0.5]))


def test_between_guessing_and_certainty_and_monotone():
    rng = np.random.default_rng(5)
    cases = [(0.4, 1e-5, 1745, 1e-6), (1.0, 0.0625, 1, 1e-6)]
    for _ in range(12):
        sigma, rate = math.exp(rng.uniform(-0.7, 3.0)), 10 ** rng.uniform(-4, 0)
        cases.append((sigma, rate, int(10 ** rng.uniform(0, 3)), 10 ** rng.uniform(-5, -0.01)))
    for sigma, rate, steps, a in cases:

        def at(sigma, steps, a, rate=rate):
            return true_positive_rate(
                {Event("poisson-gaussian", sigma, rate, "zero-out"): steps}, false_positive_rate=a
            )

        found = at(sigma, steps, a)
        assert a <= found <= 1.0
        slack = 2e-3 * (found - a) + 1e-12
        assert at(1.2 * sigma, steps, a) <= found + slack
        assert at(sigma, 2 * steps, a) >= found - slack
        assert at(sigma, steps, min(0.9999, 1.5 * a)) >= found - slack


def test_ends():
    nothing = {FULL: 0}
    assert advantage(nothing) == 0.0
    assert true_positive_rate(nothing, false_positive_rate=0.2) == 0.2
    assert trade_off({}, [0.0, 0.3, 1.0]) == [0.0, 0.3, 1.0]
    noiseless = {Event("gaussian", 0.0, 1.0, "add-remove"): 1}
    assert advantage(noiseless) == 1.0
    assert true_positive_rate(noiseless, false_positive_rate=0.2) == 1.0


@pytest.mark.parametrize("a", [0.0, 1.0, -0.1, math.nan, True, "0.1"])
def test_bad_false_positive_rate(a):
    with pytest.raises(ConfigurationError, match="false_positive_rate"):
        true_positive_rate(MNIST, false_positive_rate=a)
    if a not in (0.0, 1.0) or a is True:
        with pytest.raises(ConfigurationError, match="false_positive_rates"):
            trade_off(MNIST, [0.5, a])
