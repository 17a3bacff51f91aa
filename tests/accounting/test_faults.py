"""Faults that the accountant once had, each with the value that showed it."""

import math

import mpmath
import pytest

from sfumato.accounting import Budget, Event, Filter, compose, delta, noise_multiplier
from sfumato.accounting.pld import delta_lower
from sfumato.accounting.renyi import divergence
from sfumato.errors import ConfigurationError


def true_delta(sigma, rate, epsilon):
    """Of one Poisson-sampled Gaussian, remove direction, by its crossing point."""
    with mpmath.workdps(60):
        s, q, e = mpmath.mpf(sigma), mpmath.mpf(rate), mpmath.mpf(epsilon)
        x = s**2 * mpmath.log((mpmath.exp(e) - (1 - q)) / q) + mpmath.mpf(1) / 2
        return q * mpmath.ncdf(-(x - 1) / s) + (1 - q - mpmath.exp(e)) * mpmath.ncdf(-x / s)


@pytest.mark.parametrize(
    ("sigma", "rate", "target"),
    [(0.04, 0.5, 1e-5), (0.045, 0.5, 1e-10), (0.06, 0.5, 1e-30), (0.08, 0.5, 1e-60), (0.356, 0.4457, 3.125e-184)],
)
def test_masses_whose_product_underflows_do_not_raise_the_lower_bound(sigma, rate, target):
    found = compose({Event("poisson-gaussian", sigma, rate, "add-remove"): 1}, delta=target)
    assert true_delta(sigma, rate, found.upper) <= target
    assert found.lower == 0.0 or true_delta(sigma, rate, found.lower) >= target


def test_noise_that_the_grid_cannot_hold_gives_no_lower_bound():
    huge = {Event("gaussian", 1e8, 1.0, "add-remove"): 10**9}
    assert compose(huge, delta=1e-5).lower <= 0.000464
    assert delta_lower(huge, epsilon=0.0) <= 1.27e-4 <= delta(huge, epsilon=0.0)


def test_calibration_at_the_least_noise_returns_what_it_has_checked():
    target = 5425.456744962199
    try:
        found = noise_multiplier(target_epsilon=target, target_delta=1e-5, sample_rate=1.0, steps=1)
    except ConfigurationError:
        return
    assert compose({Event("gaussian", found, 1.0, "add-remove"): 1}, delta=1e-5) <= target


def test_a_filter_refuses_what_cannot_be_composed():
    step = Event("gaussian", 5.0, 1.0, "add-remove")
    known = Filter(Budget(2.0, 1e-5), step)
    unpaid = Event("covered", 0.001, 1.0, "zero-out", sampler="shuffle")
    for events, event in (({}, unpaid), ({step: 1}, Event("gaussian", 5.0, 1.0, "replace-one")), ({step: -5}, step)):
        with pytest.raises(ConfigurationError):
            known.allows(events, event)
        with pytest.raises(ConfigurationError):
            known.epsilon({**events, event: events.get(event, 1)})


def test_impossible_events_are_refused():
    with pytest.raises(ConfigurationError, match="rate"):
        Event("fixed-size-gaussian", 1.0, 1e-6, "replace-one", sampler="fixed-size", dataset_size=100, cap=50)
    with pytest.raises(ConfigurationError, match="l1_sensitivity"):
        Event("skellam", 5.0, 1.0, "add-remove", sensitivity=3.0, l1_sensitivity=1.0)


def test_renyi_divergence_sees_the_far_mode_of_a_sampled_replacement():
    assert divergence(Event("poisson-gaussian", 0.07, 0.5, "replace-one"), 1.01) >= 64.2585


@pytest.mark.parametrize(("sigma", "rate"), [(1474.57, 7.96e-8), (1e5, 1e-12)])
def test_the_pure_bound_of_sampled_laplace_is_not_rounded_down(sigma, rate):
    with mpmath.workdps(50):
        pure = mpmath.log(1 + mpmath.mpf(rate) * mpmath.expm1(1 / mpmath.mpf(sigma)))
    assert compose({Event("laplace", sigma, rate, "add-remove"): 1}, delta=1e-144) >= pure
    assert math.isfinite(float(pure))
