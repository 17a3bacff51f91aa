"""Every kind of release against closed forms, enumeration and an independent accountant."""

import itertools
import math
import random

import mpmath
import pytest

from sfumato.accounting.charges import pair_of
from sfumato.accounting.events import Event
from sfumato.accounting.gaussian import log_delta
from sfumato.accounting.pairs import Truncated
from sfumato.accounting.pld import compose, delta, delta_lower
from sfumato.errors import ConfigurationError

TINY = 1e-12


def truncated(sigma, rate, size, cap):
    return Event(
        "truncated-poisson-gaussian", sigma, rate, "zero-out", sampler="truncated-poisson", dataset_size=size, cap=cap
    )


ONE_STEP = {
    "poisson": Event("poisson-gaussian", 0.9, 0.07, "add-remove"),
    "replace": Event("poisson-gaussian", 0.9, 0.07, "replace-one"),
    "records": Event("poisson-gaussian", 1.7, 0.1, "add-remove", records=3),
    "laplace": Event("laplace", 0.8, 1.0, "add-remove"),
    "laplace sampled": Event("laplace", 0.8, 0.2, "zero-out"),
    "laplace replace": Event("laplace", 2.5, 1.0, "replace-one"),
    "discrete": Event("discrete-gaussian", 0.75, 1.0, "zero-out", sensitivity=2.0),
    "discrete sampled": Event("discrete-gaussian", 0.75, 0.3, "zero-out", sensitivity=2.0),
    "discrete replace": Event("discrete-gaussian", 1.5, 0.3, "replace-one", sensitivity=2.0),
    "gaussian replace": Event("gaussian", 3.0, 1.0, "replace-one"),
    "gaussian records": Event("gaussian", 3.0, 1.0, "zero-out", records=2),
    "truncated": truncated(1.1, 0.3, 8, 3),
}


def laws(event):
    """[(weight, shifts of P, shifts of Q)], shifts as {shift: probability}."""
    q, k = mpmath.mpf(event.sample_rate), event.records
    drawn = {j: math.comb(k, j) * q**j * (1 - q) ** (k - j) for j in range(k + 1)}
    if event.mechanism == "truncated-poisson-gaussian":
        return [(w, {0: 1 - r, 1: r}, {0: mpmath.mpf(1)}) for w, r in enumerate_truncated(event)]
    other = {-j: p for j, p in drawn.items()} if event.adjacency == "replace-one" else {0: mpmath.mpf(1)}
    return [(mpmath.mpf(1), drawn, other)]


def enumerate_truncated(event):
    """(probability, rate) by going through every draw of the record 0 and the others, and every subset kept."""
    n, cap, q = event.dataset_size, event.cap, mpmath.mpf(event.sample_rate)
    found = {}
    for drawn in itertools.product((0, 1), repeat=n):
        members = [i for i in range(n) if drawn[i]]
        chance = q ** len(members) * (1 - q) ** (n - len(members))
        batches = list(itertools.combinations(members, cap)) if len(members) > cap else [tuple(members)]
        for batch in batches:
            others = len([i for i in batch if i])
            inside, outside = found.get(others, (0, 0))
            share = chance / len(batches)
            found[others] = (inside + share, outside) if 0 in batch else (inside, outside + share)
    return [(inside + outside, inside / (inside + outside)) for inside, outside in found.values()]


def true_delta(event, epsilon):
    """delta by numerical integration or summation of (P - exp(epsilon) Q)+, worst of both directions, 30 digits."""
    e = mpmath.exp(epsilon)
    unit = mpmath.mpf(event.sensitivity)
    sigma = mpmath.mpf(event.noise_multiplier) * unit
    total = [mpmath.mpf(0), mpmath.mpf(0)]
    for weight, p, q in laws(event):
        if event.mechanism == "discrete-gaussian":
            points = range(-60, 61)
            norm = mpmath.fsum(mpmath.exp(-(mpmath.mpf(x) ** 2) / (2 * sigma**2)) for x in range(-200, 201))
            density = [
                [mpmath.fsum(w * mpmath.exp(-((x - s * unit) ** 2) / (2 * sigma**2)) for s, w in law.items()) / norm
                 for x in points]
                for law in (p, q)
            ]  # fmt: skip
            for side, (a, b) in enumerate((density, density[::-1])):
                total[side] += weight * mpmath.fsum(max(x - e * y, 0) for x, y in zip(a, b, strict=True))
            continue
        cdf = mpmath.ncdf if event.mechanism != "laplace" else laplace_cdf
        tails = [
            lambda x, law=law, cdf=cdf: mpmath.fsum(w * cdf(-(x - s) / sigma) for s, w in law.items()) for law in (p, q)
        ]

        def gap(x, tails=tails):
            return tails[0](x) - e * tails[1](x)  # P and Q beyond x: sets beyond a threshold are the best ones

        def back(x, tails=tails):
            return (1 - tails[1](x)) - e * (1 - tails[0](x))

        for side, curve in enumerate((gap, back)):
            total[side] += weight * max(best(curve), 0)
    return max(total)


def laplace_cdf(x):
    return mpmath.exp(x) / 2 if x < 0 else 1 - mpmath.exp(-x) / 2


def best(curve):
    """Maximum of a unimodal curve."""
    low, high = min((mpmath.mpf(k) / 4 for k in range(-120, 121)), key=lambda x: -curve(x)), None
    low, high = low - mpmath.mpf(1) / 4, low + mpmath.mpf(1) / 4
    for _ in range(60):
        left, right = low + (high - low) * 2 / 5, high - (high - low) * 2 / 5
        low, high = (left, high) if curve(left) < curve(right) else (low, right)
    return max(curve(low), curve(high), curve(mpmath.mpf(0)), curve(mpmath.mpf(1)), curve(mpmath.mpf(-1)))


@pytest.mark.parametrize("name", ONE_STEP)
@pytest.mark.parametrize("epsilon", [0.0, 0.3, 1.0])
def test_one_step_against_closed_form(name, epsilon):
    event = ONE_STEP[name]
    with mpmath.workdps(30):
        truth = float(true_delta(event, epsilon))
    assert truth * (1 - 1e-9) <= delta({event: 1}, epsilon=epsilon) <= truth * 1.002 + TINY
    assert truth * 0.95 <= delta_lower({event: 1}, epsilon=epsilon) + TINY
    assert delta_lower({event: 1}, epsilon=epsilon) <= truth * (1 + 1e-9)
    if epsilon > 0.0 and truth > 0.0:
        found = compose({event: 1}, delta=truth)
        assert epsilon * 0.95 <= found.lower <= epsilon * (1 + 1e-9)
        assert epsilon * (1 - 1e-9) <= found.upper <= epsilon * 1.001


def test_truncated_draws_by_enumeration():
    for size, cap, rate in ((5, 2, 0.4), (6, 1, 0.2), (4, 3, 0.7)):
        pair = pair_of(truncated(1.0, rate, size, cap))
        assert isinstance(pair, Truncated)
        with mpmath.workdps(30):
            expected = {}
            for weight, inside in enumerate_truncated(truncated(1.0, rate, size, cap)):
                key = round(float(inside), 9)
                expected[key] = expected.get(key, 0.0) + float(weight)
        found = {round(r, 9): w for w, r in pair.parts if w}
        assert found == pytest.approx(expected, rel=1e-12)


def test_truncated_rates_are_good_to_what_the_rounding_allows():
    n, q, cap = 60000, 256 / 6e4, 304
    pair = pair_of(truncated(1.1, q, n, cap))
    with mpmath.workdps(40):
        rate = mpmath.mpf(q)
        mass = {k: mpmath.binomial(n - 1, k) * rate**k * (1 - rate) ** (n - 1 - k) for k in range(cap - 1, 900)}
        kept = rate * (mass[cap - 1] + sum(mass[k] * mpmath.mpf(cap) / (k + 1) for k in range(cap, 900)))
        edge = kept + (1 - rate) * mass[cap - 1]
    assert pair.parts[1] == pytest.approx((float(edge), float(kept / edge)), rel=2e-12)


def test_a_cap_that_is_never_reached_costs_what_poisson_does():
    plain = compose({Event("poisson-gaussian", 1.0, 0.01, "zero-out"): 100}, delta=1e-6)
    assert compose({truncated(1.0, 0.01, 1000, 1000): 100}, delta=1e-6) == plain
    assert plain <= compose({truncated(1.0, 0.01, 1000, 60): 100}, delta=1e-6) <= plain * 1.001
    assert compose({truncated(1.0, 0.01, 1000, 10): 100}, delta=1e-6) > plain * 1.5


def dp(name):
    return getattr(pytest.importorskip("dp_accounting"), name)


def test_independent_accountant():
    pld = pytest.importorskip("dp_accounting").pld.privacy_loss_distribution
    h = {"value_discretization_interval": 2e-4}
    events = {
        Event("poisson-gaussian", 2.0, 0.02, "zero-out", records=3): 100,
        Event("laplace", 10.0, 1.0, "zero-out"): 3,
        Event("laplace", 1.5, 0.05, "zero-out"): 40,
        Event("discrete-gaussian", 1.5, 0.05, "zero-out", sensitivity=2): 60,
        Event("discrete-gaussian", 6.0, 1.0, "zero-out", sensitivity=3): 2,
        Event("poisson-gaussian", 1.1, 0.01, "zero-out"): 300,
    }
    mixture = [0.98**3, 3 * 0.98**2 * 0.02, 3 * 0.98 * 0.02**2, 0.02**3]
    theirs = [
        pld.from_mixture_gaussian_mechanism(2.0, [0, 1, 2, 3], mixture, **h),
        pld.from_laplace_mechanism(10.0, **h),
        pld.from_laplace_mechanism(1.5, sampling_prob=0.05, **h),
        pld.from_discrete_gaussian_mechanism(3.0, 2, sampling_prob=0.05, **h),
        pld.from_discrete_gaussian_mechanism(18.0, 3, **h),
        pld.from_gaussian_mechanism(1.1, sampling_prob=0.01, **h),
    ]
    whole = None
    for law, (event, count) in zip(theirs, events.items(), strict=True):
        ours, other = compose({event: count}, delta=1e-6), law.self_compose(count)
        assert ours.lower <= (expected := other.get_epsilon_for_delta(1e-6)), event
        assert expected * (1 - 6e-3) <= ours.upper <= expected * 1.001, event  # their grid errs upwards
        whole = other if whole is None else whole.compose(other)
    ours = compose(events, delta=1e-6)
    assert whole.get_epsilon_for_delta(1e-6) * (1 - 3e-3) <= ours.upper <= whole.get_epsilon_for_delta(1e-6) * 1.001
    assert ours.upper * (1 - 1e-3) <= ours.lower <= ours.upper
    expected = whole.get_delta_for_epsilon(1.0)
    assert expected * 0.98 <= delta(events, epsilon=1.0) <= expected * 1.001


def test_independent_accountant_of_replaced_records():
    accountant = pytest.importorskip("dp_accounting").pld.PLDAccountant(
        dp("NeighboringRelation").REPLACE_ONE, value_discretization_interval=2e-4
    )
    accountant.compose(dp("PoissonSampledDpEvent")(0.05, dp("GaussianDpEvent")(1.2)), 100)
    theirs = accountant.get_epsilon(1e-6)
    ours = compose({Event("poisson-gaussian", 1.2, 0.05, "replace-one"): 100}, delta=1e-6)
    assert ours.lower <= theirs
    assert theirs * (1 - 1e-3) <= ours.upper <= theirs * 1.001


@pytest.mark.parametrize(("mu", "epsilon"), [(0.1, 0.0), (0.1, 1.5), (1.0, 0.7), (1.0, 30.0), (10.0, 3.0), (3.0, 90.0)])
def test_delta_of_gaussians(mu, epsilon):
    with mpmath.workdps(60):
        m, e = mpmath.mpf(mu), mpmath.mpf(epsilon)
        truth = mpmath.ncdf(m / 2 - e / m) - mpmath.exp(e) * mpmath.ncdf(-m / 2 - e / m)
    event = Event("gaussian", 1 / mu, 1.0, "add-remove")
    assert truth <= delta({event: 1}, epsilon=epsilon) <= truth * (1 + 1e-6)
    assert math.exp(log_delta(0.0, mu)) == pytest.approx(math.erf(mu / math.sqrt(8)), rel=1e-9)


def test_delta_at_the_ends():
    event = Event("poisson-gaussian", 1.0, 0.01, "add-remove")
    assert delta({}, epsilon=0.0) == 0.0
    assert delta({Event("poisson-gaussian", 0.0, 0.01, "add-remove"): 1}, epsilon=5.0) == 1.0
    assert delta({event: 100}, epsilon=1e4) < 1e-100
    assert delta({Event("laplace", 2.0, 1.0, "add-remove"): 3}, epsilon=1.5001) == 0.0
    curve = [delta({event: 100}, epsilon=0.05 * k) for k in range(40)]
    assert curve == sorted(curve, reverse=True)
    assert 0.0 < curve[0] < 1.0
    for bad in (-1.0, math.nan, math.inf, "1"):
        with pytest.raises(ConfigurationError, match="epsilon"):
            delta({event: 1}, epsilon=bad)


@pytest.mark.parametrize("target", [1e-15, 1e-9, 1e-3])
def test_delta_and_epsilon_are_inverse(target):
    events = {Event("poisson-gaussian", 1.0, 0.02, "zero-out"): 700, Event("laplace", 9.0, 1.0, "zero-out"): 5}
    found = compose(events, delta=target)
    assert delta(events, epsilon=found.upper) <= target * 1.0001
    assert delta(events, epsilon=found.lower) >= target
    assert delta_lower(events, epsilon=found.lower * 0.999) <= delta(events, epsilon=found.lower * 0.999)


@pytest.mark.parametrize(
    ("event", "reason"),
    [
        (Event("poisson-gaussian", 1.0, 0.1, "replace-one", records=2), "records"),
        (Event("laplace", 1.0, 0.1, "replace-one"), "Laplace"),
        (Event("discrete-gaussian", 1.0, 1.0, "zero-out", sensitivity=1.5), "integer"),
        (Event("skellam", 1.0, 1.0, "zero-out", l1_sensitivity=1.0), "law"),
        (Event("poisson-gaussian", 1.0, 0.1, "zero-out", adaptive=True), "law"),
    ],
)
def test_refused_by_name(event, reason):
    with pytest.raises(ConfigurationError, match=reason):
        delta({event: 1}, epsilon=1.0)


def test_adjacencies_that_do_not_compare():
    with pytest.raises(ConfigurationError, match="neighbours"):
        compose({ONE_STEP["poisson"]: 1, ONE_STEP["replace"]: 1}, delta=1e-5)


def test_cyclic_releases_are_paid_for_by_the_noisiest_release_at_most():
    def cyclic(mechanism, sigma):
        return Event(mechanism, sigma, 0.1 if mechanism != "covered" else 1.0, "zero-out", sampler="cyclic")

    payer = cyclic("poisson-gaussian", 1.0)
    paid = compose({payer: 4, cyclic("covered", 1.0): 36, cyclic("covered", 2.0): 3}, delta=1e-5)
    assert paid == compose({Event("poisson-gaussian", 1.0, 0.1, "zero-out"): 4}, delta=1e-5)
    shuffled = Event("covered", 1.0, 1.0, "zero-out", sampler="shuffle")
    for covered in (cyclic("covered", 0.9), shuffled):
        with pytest.raises(ConfigurationError, match="covered"):
            compose({payer: 4, covered: 1}, delta=1e-5)


def draw_events(seed):
    draw = random.Random(seed)

    def between(low, high):
        return math.exp(draw.uniform(math.log(low), math.log(high)))

    def event(kind):
        sigma, rate = between(0.5, 10), between(1e-3, 0.9)
        if kind == "truncated":
            size = int(between(100, 1e5))
            mean = rate * size / 3
            return truncated(sigma, rate / 3, size, min(size, 1 + int(mean + draw.uniform(0, 5) * math.sqrt(mean))))
        if kind == "laplace":
            return Event("laplace", between(0.5, 50), draw.choice((1.0, rate)), "zero-out")
        if kind == "discrete":
            return Event("discrete-gaussian", sigma, 1.0, "zero-out", sensitivity=draw.choice((1, 3, 64)))
        if kind == "replace":
            return Event("poisson-gaussian", sigma, rate, "replace-one")
        return Event("poisson-gaussian", sigma, rate, "zero-out", records=draw.choice((1, 1, 3)))

    kind = draw.choice(("poisson", "poisson", "poisson", "truncated", "laplace", "discrete", "replace"))
    events = {event(kind): int(between(1, 5000))}
    if kind == "poisson" and draw.random() < 0.4:
        events[event(draw.choice(("poisson", "truncated", "laplace")))] = int(between(1, 500))
    return events, 10 ** draw.uniform(-15, -2)


def bracket_is_narrow(seed, gap=1e-3):
    events, target = draw_events(seed)
    found = compose(events, delta=target)
    assert found.lower <= found.upper
    if found.upper >= 50.0:
        return
    assert found.lower >= found.upper * (1 - gap) - 1e-12, (seed, found.upper, found.lower, events)
    more = {event: count + max(1, count // 100) for event, count in events.items()}
    assert compose(more, delta=target) >= found, (seed, events)
    assert compose(events, delta=target * 0.99) >= found, (seed, events)


@pytest.mark.parametrize("seed", range(60))
def test_bracket(seed):
    bracket_is_narrow(seed)


@pytest.mark.slow
@pytest.mark.parametrize("block", range(10))
def test_bracket_of_many(block):
    wide = 0  # two of the thousand are: one at delta = 1.6e-15, one at epsilon = 0.015
    for seed in range(1000 + 100 * block, 1100 + 100 * block):
        try:
            bracket_is_narrow(seed)
        except AssertionError:
            bracket_is_narrow(seed, gap=2e-3)
            wide += 1
    assert wide <= 1


def test_steps_never_make_epsilon_smaller():
    event, other = ONE_STEP["poisson"], Event("gaussian", 20.0, 1.0, "zero-out")
    for first in (1, 1000):
        values = [compose({event: n, other: 3}, delta=1e-7) for n in range(first, first + 150)]
        assert values == sorted(values)


def test_a_thousand_different_events():
    def schedule(count):
        return {Event("poisson-gaussian", 1.0 + k / 1000, 0.01, "zero-out"): 1 for k in range(count)}

    values = [compose(schedule(count), delta=1e-6) for count in (100, 101, 500, 502)]
    assert values == sorted(values)
    same = compose({Event("poisson-gaussian", 1.25, 0.01, "zero-out"): 500}, delta=1e-6)
    worst = compose({Event("poisson-gaussian", 1.0, 0.01, "zero-out"): 500}, delta=1e-6)
    assert same < values[2] < worst
