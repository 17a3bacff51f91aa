"""Rényi divergences against closed forms, high precision, an independent accountant, and our own certified curves."""

import math
from dataclasses import replace

import dp_accounting
import mpmath
import numpy as np
import pytest
from dp_accounting.rdp import RdpAccountant
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import gammaln, ive

from sfumato.accounting import Event, compose, delta, renyi
from sfumato.accounting.moments import HERE, Shifts, drawn, gaussian_divergence, laplace_divergence
from sfumato.errors import ConfigurationError

POISSON = Event("poisson-gaussian", 1.1, 256 / 6e4, "add-remove")
FIXED = Event("fixed-size-gaussian", 4.0, 0.01, "replace-one", sampler="fixed-size", dataset_size=10_000, cap=100)
SKELLAM = Event("skellam", 3.0, 1.0, "add-remove", sensitivity=5.0, l1_sensitivity=20.0, dimension=30)
TRUNCATED = Event(
    "truncated-poisson-gaussian", 1.5, 0.02, "zero-out", sampler="truncated-poisson", dataset_size=2000, cap=50
)
DISCRETE = Event("discrete-gaussian", 3.0, 1.0, "add-remove", sensitivity=4.0, dimension=30)
WITH_LAW = [
    (POISSON, 3000),
    (Event("poisson-gaussian", 2.0, 0.02, "replace-one"), 500),
    (Event("poisson-gaussian", 3.0, 0.01, "zero-out", records=5), 300),
    (Event("gaussian", 9.0, 1.0, "replace-one"), 3),
    (Event("gaussian", 20.0, 1.0, "add-remove", records=3), 3),
    (
        Event(
            "truncated-poisson-gaussian", 1.5, 0.02, "zero-out", sampler="truncated-poisson", dataset_size=2000, cap=50
        ),
        400,
    ),
    (Event("laplace", 20.0, 1.0, "add-remove"), 50),
    (Event("laplace", 5.0, 0.05, "zero-out"), 200),
    (Event("discrete-gaussian", 3.0, 1.0, "replace-one", sensitivity=2.0), 2),
    (Event("discrete-gaussian", 3.0, 0.02, "add-remove", sensitivity=2.0), 500),
]


def precise(p: Shifts, q: Shifts, scale: float, order: float, laplace: bool) -> float:
    def mixture(shifts, x):
        total = mpmath.mpf(0)
        for at, weight in zip(shifts.at, shifts.weight, strict=True):
            far = abs(x - at) / scale
            total += mpmath.mpf(weight) * mpmath.exp(-far if laplace else -far * far / 2)
        return total / (2 * scale if laplace else scale * mpmath.sqrt(2 * mpmath.pi))

    with mpmath.workdps(20):
        knots = sorted({*p.at, *q.at})
        if laplace:
            edges = [knots[0] - 60 * scale, *knots, knots[-1] + 60 * scale]
        else:
            low, high = (2 * order * at + side * 9 * scale for at, side in ((knots[0], -1), (knots[-1], 1)))
            edges = [low + (high - low) * k / 20 for k in range(21)]
        value = mpmath.quad(lambda x: mixture(p, x) ** order * mixture(q, x) ** (1 - order), edges)
        return float(mpmath.log(value) / (order - 1))


@pytest.mark.parametrize("laplace", [False, True])
@pytest.mark.parametrize(
    ("order", "rate", "records", "sigma"),
    [(1.0078125, 1e-3, 1, 0.7), (5.0, 0.3, 2, 3.0), (1.7, 0.02, 4, 1.3), (6.5, 1.0, 1, 2.0), (12.5, 0.99, 1, 1.0)],
)
def test_moments_against_high_precision(order, rate, records, sigma, laplace):
    divergence = laplace_divergence if laplace else gaussian_divergence
    here, opposite = drawn(rate, records), drawn(rate, records, direction=-1.0)
    for p, q in ((here, HERE), (HERE, here), (here, opposite)):
        found = divergence(p, q, sigma, order)
        assert -1e-12 <= found / precise(p, q, sigma, order, laplace) - 1.0 <= 1e-8


@pytest.mark.parametrize("order", [1.5, 20.0, 3e3])
def test_unsampled_mixtures_have_a_closed_form(order):
    for p, q, reach in ((1.0, 0.0, 1.0), (0.0, 1.0, 1.0), (1.0, -1.0, 2.0), (-3.0, 1.0, 4.0)):
        found = gaussian_divergence(Shifts((p,), (1.0,)), Shifts((q,), (1.0,)), 2.0, order)
        assert found == pytest.approx(order * reach**2 / 8, rel=1e-8)


def test_integer_orders_against_the_binomial_sum():
    rng = np.random.default_rng(1)
    for _ in range(40):
        sigma, rate, order = math.exp(rng.uniform(-1.5, 4)), 10 ** rng.uniform(-5, -0.1), int(rng.integers(2, 400))
        k = np.arange(order + 1)
        log = gammaln(order + 1) - gammaln(k + 1) - gammaln(order - k + 1) + k * math.log(rate)
        log += (order - k) * math.log1p(-rate) + k * (k - 1) / (2 * sigma**2)
        expected = float(np.logaddexp.reduce(log)) / (order - 1)
        found = renyi.divergence(Event("poisson-gaussian", sigma, rate, "add-remove"), float(order))
        assert expected - 1e-12 <= found <= expected * (1 + 1e-8) + 1e-12


def test_closed_forms():
    gaussian = Event("gaussian", 5.0, 1.0, "add-remove")
    assert renyi.divergence(gaussian, 3.0) == pytest.approx(3 / 50)
    assert renyi.divergence(Event("gaussian", 5.0, 1.0, "replace-one"), 3.0) == pytest.approx(4 * 3 / 50)
    assert renyi.divergence(Event("gaussian", 5.0, 1.0, "zero-out", records=3), 3.0) == pytest.approx(9 * 3 / 50)
    assert renyi.divergence(DISCRETE, 7.0) == pytest.approx(7 / 18)
    b, a = 1.5, 4.0  # Mironov 2017, table II
    laplace = math.log(a / (2 * a - 1) * math.exp((a - 1) / b) + (a - 1) / (2 * a - 1) * math.exp(-a / b)) / (a - 1)
    assert renyi.divergence(Event("laplace", b, 1.0, "zero-out"), a) == pytest.approx(laplace, rel=1e-8)
    assert renyi.divergence(Event("laplace", b, 1.0, "zero-out"), 1e6) == pytest.approx(1 / b, rel=1e-4)
    assert renyi.divergence(Event("gaussian", 0.0, 1.0, "zero-out"), 2.0) == math.inf
    # A replaced record under zero-out neighbours is still another record in the batch of fixed size.
    zeroed = Event("fixed-size-gaussian", 4.0, 0.01, "zero-out", sampler="fixed-size", dataset_size=10_000, cap=100)
    assert renyi.divergence(zeroed, 9.0) == renyi.divergence(FIXED, 9.0)


def test_fixed_size_against_dp_accounting():
    relation = dp_accounting.NeighboringRelation.REPLACE_ONE
    orders = [2.0, 3.0, 5.0, 17.0, 33.0, 300.0]
    for sigma in (0.6, 4.0, 30.0):
        event = replace(FIXED, noise_multiplier=sigma)
        other = RdpAccountant(orders=orders, neighboring_relation=relation)
        base = dp_accounting.GaussianDpEvent(sigma / 2)  # its sensitivity is that of replacing: twice the clip
        other.compose(dp_accounting.SampledWithoutReplacementDpEvent(10_000, 100, base))
        assert [renyi.divergence(event, a) for a in orders] == pytest.approx(other._rdp, rel=1e-6)


def test_fixed_size_bounds_a_draw_computed_exactly():
    # Two records, one drawn: (N(1) + N(y)) / 2 against (N(x) + N(y)) / 2, all within the clip.
    for sigma in (0.8, 3.0):
        event = Event("fixed-size-gaussian", sigma, 0.5, "replace-one", sampler="fixed-size", dataset_size=2, cap=1)
        for replaced, other in ((-1.0, 0.0), (-1.0, -1.0), (0.0, -1.0)):
            p, q = Shifts((other, 1.0), (0.5, 0.5)), Shifts((other, replaced), (0.5, 0.5))
            for order in (1.5, 2.0, 6.0, 30.0):
                assert gaussian_divergence(p, q, sigma, order) <= renyi.divergence(event, order)


@pytest.mark.parametrize(("shift", "variance"), [(1, 3.0), (2, 25.0), (5, 400.0)])
def test_skellam_bounds_the_law_computed_exactly(shift, variance):
    event = Event(
        "skellam", math.sqrt(variance) / shift, 1.0, "add-remove", sensitivity=float(shift), l1_sensitivity=float(shift)
    )
    span = int(40 * math.sqrt(variance) + 20 * shift)
    x = np.arange(-span, span + 1)
    with np.errstate(divide="ignore"):
        log = np.log(ive(np.abs(x), variance))  # exp(-variance) I_|x|(variance)
    p, q = log[:-shift], log[shift:]
    usable = np.isfinite(p) & np.isfinite(q) & (p > -600) & (q > -600)
    p, q = p[usable], q[usable]
    for order in (2.0, 3.0, 8.0):
        truth = float(np.logaddexp.reduce(order * p + (1 - order) * q)) / (order - 1)
        assert truth <= renyi.divergence(event, order)


def test_to_epsilon_against_dp_accounting():
    orders = (2.0, 3.0, 5.0, 9.0, 17.0, 33.0, 257.0)
    other = RdpAccountant(orders=orders)
    other.compose(dp_accounting.PoissonSampledDpEvent(0.01, dp_accounting.GaussianDpEvent(1.0)), 800)
    event = Event("poisson-gaussian", 1.0, 0.01, "add-remove")
    curve = np.array([800 * renyi.divergence(event, order) for order in orders])
    for target in (1e-3, 1e-6, 1e-12):
        assert renyi.to_epsilon(curve, target, orders) == pytest.approx(other.get_epsilon(target), rel=1e-6)
    assert renyi.to_delta(curve, 2.0, orders) == pytest.approx(other.get_delta(2.0), rel=1e-6)


@pytest.mark.parametrize(("event", "times"), WITH_LAW, ids=lambda value: getattr(value, "mechanism", str(value)))
def test_bounds_what_is_certified_otherwise(event, times):
    tight = compose({event: times}, delta=1e-6)
    found = renyi.compose_renyi({event: times}, 1e-6)
    assert tight.lower <= found <= 1.35 * tight
    assert found.lower == 0.0
    assert delta({event: times}, epsilon=float(found)) <= 1e-6
    for epsilon in (0.0, 0.3, 3.0):
        assert delta({event: times}, epsilon=epsilon) <= renyi.delta_renyi({event: times}, epsilon) * (1 + 1e-3)


def test_compose_uses_it_where_there_is_no_law():
    for event in (FIXED, SKELLAM, DISCRETE):
        found = compose({event: 5}, delta=1e-5)
        assert found == renyi.compose_renyi({event: 5}, 1e-5)
        assert 0.0 == found.lower < found < math.inf
        assert found < compose({event: 6}, delta=1e-5)
    assert compose({POISSON: 100}, delta=1e-5) < compose({POISSON: 100, DISCRETE: 1}, delta=1e-5)


def test_adaptive_events_cost_more_than_planned_ones():
    adaptive = Event("poisson-gaussian", 1.1, 256 / 6e4, "add-remove", adaptive=True)
    planned = renyi.compose_renyi({POISSON: 1000}, 1e-6)
    found = compose({adaptive: 1000}, delta=1e-6)
    assert planned < found < 2.0 * planned
    assert compose({POISSON: 999, adaptive: 1}, delta=1e-6) == pytest.approx(found, rel=1e-12)
    # by hand: one of the orders, at its share of delta
    shares = [
        1000 * renyi.divergence(POISSON, a) + math.log1p(-1 / a) - math.log(1e-6 / len(renyi.ODOMETER) * a) / (a - 1)
        for a in renyi.ODOMETER
    ]
    assert found == pytest.approx(min(shares), rel=1e-12)
    assert renyi.delta_renyi({adaptive: 1000}, float(found)) == pytest.approx(1e-6, rel=1e-9)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    st.floats(0.02, 1e4), st.floats(1e-7, 1.0), st.sampled_from(["add-remove", "replace-one"]),
    st.sampled_from([1.0078125, 1.5, 3.0, 40.0, 1e4]),
)  # fmt: skip
def test_monotone(sigma, rate, adjacency, order):
    def at(sigma, rate, order=order):
        return renyi.divergence(Event("poisson-gaussian", sigma, rate, adjacency), order)

    found = at(sigma, rate)
    assert 0.0 < found <= order * (2.0 if adjacency == "replace-one" else 1.0) ** 2 / (2 * sigma**2) * (1 + 1e-12)
    slack = 1 + 1e-8
    assert at(sigma * 1.01, rate) <= found * slack
    assert at(sigma, min(1.0, rate * 1.01)) * slack >= found
    assert at(sigma, rate, order * 1.01) * slack >= found


def test_tiny_epsilon_needs_high_orders():
    event = Event("poisson-gaussian", 50.0, 1e-3, "add-remove")
    assert 0.0 < renyi.compose_renyi({event: 1000}, 1e-6) < 4e-3


@pytest.mark.parametrize("order", [1.0, 0.5, math.nan, math.inf, True])
def test_bad_order(order):
    with pytest.raises(ConfigurationError, match="order"):
        renyi.divergence(POISSON, order)


def test_unknown_worst_case_is_refused():
    with pytest.raises(ConfigurationError, match="several records"):
        renyi.divergence(Event("poisson-gaussian", 1.0, 0.1, "replace-one", records=2), 2.0)
