"""The certified bracket against published brackets, closed forms and an independent accountant."""

import copy
import math
import pickle
import random

import mpmath
import pytest
from scipy.optimize import brentq

from sfumato.accounting.events import Event
from sfumato.accounting.gaussian import gaussian_epsilon, log_delta
from sfumato.accounting.pld import compose, epsilon
from table import BRACKETS, TINY_DELTA

dp_accounting = pytest.importorskip("dp_accounting")
from dp_accounting.pld import PLDAccountant  # noqa: E402


def poisson(sigma, rate):
    return Event("poisson-gaussian", sigma, rate, "add-remove")


def oracle(parts, delta, interval):
    accountant = PLDAccountant(value_discretization_interval=interval)
    for (sigma, rate), count in parts.items():
        event = dp_accounting.PoissonSampledDpEvent(rate, dp_accounting.GaussianDpEvent(sigma))
        accountant.compose(event, count)
    return accountant.get_epsilon(delta)


@pytest.mark.parametrize("name", BRACKETS)
def test_true_bracket(name):
    rate, sigma, steps, delta, low, high = BRACKETS[name]
    result = epsilon(noise_multiplier=sigma, sample_rate=rate, steps=steps, delta=delta)
    assert low <= result.upper <= high * 1.001
    assert float(result) == result.upper
    if name != "F":  # its lower end takes seconds; see benchmarks/bookkeeping.py
        assert result.upper * (1 - 1.5e-3) <= result.lower <= high


@pytest.mark.parametrize(("rate", "sigma", "steps", "delta", "true", "digit"), TINY_DELTA)
def test_tiny_delta(rate, sigma, steps, delta, true, digit):
    result = epsilon(noise_multiplier=sigma, sample_rate=rate, steps=steps, delta=delta)
    assert true - digit <= result.upper <= (true + digit) * 1.001
    assert result.lower <= true + digit


def test_delta_1e_15_and_beyond_is_finite_and_ordered():
    values = [epsilon(noise_multiplier=1.1, sample_rate=256 / 6e4, steps=3516, delta=d) for d in (1e-14, 1e-15, 1e-30)]
    assert values[0] < values[1] < values[2] < 20
    assert all(value.lower <= value.upper for value in values)


def single_step_truth(sigma, rate, delta):
    """Closed form, 50 digits: worst of remove and add for one release."""
    with mpmath.workdps(50):
        q, s = mpmath.mpf(rate), mpmath.mpf(sigma)

        def remove(e):
            cut = s**2 * mpmath.log((mpmath.exp(e) - 1 + q) / q) + mpmath.mpf(1) / 2
            tail0, tail1 = mpmath.ncdf(-cut / s), mpmath.ncdf(-(cut - 1) / s)
            return (1 - q) * tail0 + q * tail1 - mpmath.exp(e) * tail0

        def add(e):
            if mpmath.exp(-e) <= 1 - q:
                return mpmath.mpf(0)
            cut = s**2 * mpmath.log((mpmath.exp(-e) - 1 + q) / q) + mpmath.mpf(1) / 2
            head0, head1 = mpmath.ncdf(cut / s), mpmath.ncdf((cut - 1) / s)
            return head0 - mpmath.exp(e) * ((1 - q) * head0 + q * head1)

        return max(brentq(lambda e, f=f: float(f(e) / delta - 1), 1e-12, 200, xtol=1e-13) for f in (remove, add)
                   if f(mpmath.mpf("1e-12")) > delta)  # fmt: skip


@pytest.mark.parametrize(("sigma", "rate"), [(1.0, 0.5), (0.5, 0.01), (2.0, 0.1), (5.0, 0.9), (0.3, 1e-3)])
@pytest.mark.parametrize("delta", [1e-5, 1e-9, 1e-15])
def test_single_step_closed_form(sigma, rate, delta):
    truth = single_step_truth(sigma, rate, delta)
    result = epsilon(noise_multiplier=sigma, sample_rate=rate, steps=1, delta=delta)
    assert result.lower <= truth * (1 + 1e-12)
    assert truth * (1 - 1e-12) <= result.upper <= truth * 1.001


@pytest.mark.parametrize("mu", [1e-3, 0.1, 1.0, 10.0, 100.0])
@pytest.mark.parametrize("delta", [1e-3, 1e-6, 1e-15])
def test_gaussian_closed_form(mu, delta):
    with mpmath.workdps(60):
        low, high = (mpmath.mpf(gaussian_epsilon(mu, delta, upper=side)) for side in (False, True))
        m = mpmath.mpf(mu)

        def true_delta(e):
            return mpmath.ncdf(m / 2 - e / m) - mpmath.exp(e) * mpmath.ncdf(-m / 2 - e / m)

        assert true_delta(high) <= delta
        assert low == 0 or true_delta(low) >= delta
        assert high - low <= 1e-6 * high
        if high > 0:
            assert abs(math.exp(log_delta(float(high), mu)) / float(true_delta(high)) - 1) < 1e-6


def test_gaussians_of_any_kind_compose_in_closed_form():
    events = {Event("gaussian", 4.0, 1.0, "add-remove"): 5, poisson(3.0, 1.0): 7}
    mu = math.sqrt(5 / 16 + 7 / 9)
    assert compose(events, delta=1e-6).upper == gaussian_epsilon(mu, 1e-6, upper=True)


def test_fft_path_agrees_with_closed_form_as_the_rate_tends_to_one():
    exact = gaussian_epsilon(math.sqrt(200) / 30, 1e-6, upper=True)
    result = epsilon(noise_multiplier=30.0, sample_rate=1 - 1e-9, steps=200, delta=1e-6)
    assert result.lower <= exact * (1 + 1e-9)
    assert result.upper == pytest.approx(exact, rel=3e-4)


def test_independent_accountant_on_a_random_grid():
    draw = random.Random(7)
    for _ in range(6):
        sigma, rate = math.exp(draw.uniform(math.log(0.6), math.log(4))), 10 ** draw.uniform(-2.5, -0.5)
        steps, delta = int(10 ** draw.uniform(1, 3)), 10 ** draw.uniform(-8, -4)
        ours = epsilon(noise_multiplier=sigma, sample_rate=rate, steps=steps, delta=delta)
        theirs = oracle({(sigma, rate): steps}, delta, 5e-4)
        assert ours.lower <= theirs, (sigma, rate, steps, delta)
        assert ours.upper <= theirs * 1.001, (sigma, rate, steps, delta)


def test_heterogeneous_composition():
    parts = {(1.0, 0.01): 500, (1.5, 0.02): 300, (0.8, 0.005): 1000}
    ours = compose({poisson(sigma, rate): n for (sigma, rate), n in parts.items()}, delta=1e-6)
    theirs = oracle(parts, 1e-6, 1e-4)
    assert ours.lower <= theirs
    assert theirs * (1 - 1e-4) <= ours.upper <= theirs * 1.001


def test_splitting_a_run_does_not_change_it():
    whole = epsilon(noise_multiplier=1.0, sample_rate=0.01, steps=1000, delta=1e-6)
    nudged = {poisson(1.0, 0.01): 400, poisson(1.0 + 1e-9, 0.01): 600}
    assert compose(nudged, delta=1e-6) == pytest.approx(whole, rel=5e-5)


def test_mixture_with_a_plain_gaussian():
    ours = compose({poisson(1.0, 0.01): 500, Event("gaussian", 5.0, 1.0, "add-remove"): 2}, delta=1e-6)
    theirs = oracle({(1.0, 0.01): 500, (5.0, 1.0): 2}, 1e-6, 1e-4)
    assert ours.lower <= theirs
    assert theirs * (1 - 2e-4) <= ours.upper <= theirs * 1.001


def test_adding_is_bounded_too():
    """Both directions are certified: neither may exceed the reported maximum."""
    from sfumato.accounting.bounds import epsilon_bound
    from sfumato.accounting.pairs import Release

    for sigma, rate, steps in ((1.0, 0.01, 500), (8.0, 0.3, 50), (3.0, 0.9, 20)):
        result = epsilon(noise_multiplier=sigma, sample_rate=rate, steps=steps, delta=1e-6)
        parts = {Release(sigma, rate): steps}
        for add in (False, True):
            upper = epsilon_bound(parts, 1e-6, add=add)
            assert epsilon_bound(parts, 1e-6, add=add, upper=False) <= upper <= result.upper


def test_monotone_in_every_argument():
    base = {"noise_multiplier": 1.0, "sample_rate": 0.01, "steps": 500, "delta": 1e-6}
    for name, values in {
        "noise_multiplier": [2.0, 1.5, 1.0, 0.7, 0.5, 0.0],
        "sample_rate": [1e-4, 1e-3, 0.01, 0.1, 0.99, 1.0],
        "steps": [0, 1, 2, 10, 100, 1000, 10_000],
        "delta": [0.5, 0.1, 1e-3, 1e-6, 1e-10, 1e-15],
    }.items():
        found = [epsilon(**{**base, name: value}) for value in values]
        assert found == sorted(found), name
        assert all(0 <= value.lower <= value.upper for value in found)


def test_edges():
    assert epsilon(noise_multiplier=1.0, sample_rate=0.1, steps=0, delta=1e-5) == 0.0
    assert epsilon(noise_multiplier=0.0, sample_rate=0.1, steps=1, delta=1e-5).lower == math.inf
    assert epsilon(noise_multiplier=0.0, sample_rate=0.1, steps=0, delta=1e-5) == 0.0
    assert epsilon(noise_multiplier=0.1, sample_rate=1e-6, steps=9, delta=1e-5) == 0.0
    assert compose({}, delta=1e-5) == 0.0
    for sigma in (0.02, 0.05, 0.1, 1e4):
        result = epsilon(noise_multiplier=sigma, sample_rate=0.01, steps=100, delta=1e-6)
        assert 0 <= result.lower <= result.upper < math.inf


def test_result_is_a_plain_value():
    result = epsilon(noise_multiplier=1.0, sample_rate=0.01, steps=100, delta=1e-6)
    for twin in (pickle.loads(pickle.dumps(result)), copy.deepcopy(result)):
        assert (twin, twin.delta, twin.lower) == (result, 1e-6, result.lower)
