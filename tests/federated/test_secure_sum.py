"""The secure sum: bounds in exact integers, dropouts, the modulus, the price, and the pieces below it."""

from __future__ import annotations

import math
from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy import stats
from scipy.linalg import hadamard
from scipy.special import logsumexp

from sfumato.accounting import Event, compose, renyi
from sfumato.errors import ConfigurationError, DataError
from sfumato.federated.secure.encoding import Grid, centred, clipped, squared_norm, wrapped
from sfumato.federated.secure.masks import Masks
from sfumato.federated.secure.rotation import _signs, padded, rotate, unrotate
from sfumato.federated.secure.secure_sum import SecureSum, Void, _tail, calibrated
from sfumato.noise import Research, Secure

ALPHA = 1e-9


def within(sample: NDArray[np.float64], std: float) -> bool:
    """Whether the sample's variance is that of a normal law of standard deviation ``std``, at ALPHA."""
    statistic = float((sample**2).sum() / std**2)
    return bool(stats.chi2.ppf(ALPHA / 2, len(sample)) < statistic < stats.chi2.isf(ALPHA / 2, len(sample)))


# ---- rotation


@pytest.mark.parametrize("size", [1, 2, 8, 64, 128, 1024])
def test_rotation_is_the_hadamard_matrix_and_signs(size: int) -> None:
    vector = np.random.default_rng(size).normal(size=size)
    expected = hadamard(size) @ (vector * _signs("seed", size)) / math.sqrt(size)
    np.testing.assert_allclose(rotate(vector, "seed"), expected, atol=1e-12)


@pytest.mark.parametrize("size", [1, 3, 65, 1000, 5000])
def test_rotation_keeps_the_norm_and_is_undone(size: int) -> None:
    vector = np.random.default_rng(size).normal(size=size)
    turned = rotate(vector, "a")
    assert turned.shape == (padded(size),)
    assert np.linalg.norm(turned) == pytest.approx(np.linalg.norm(vector), rel=1e-12)
    np.testing.assert_allclose(unrotate(turned, "a", size), vector, atol=1e-12)
    if size > 3:
        assert not np.allclose(turned, rotate(vector, "b"))


def test_rotation_spreads_one_large_coordinate() -> None:
    vector = np.zeros(4096)
    vector[7] = 1.0
    assert np.abs(rotate(vector, "a")).max() == pytest.approx(1 / 64)


# ---- rounding


def hostile(size: int, reach: float) -> list[NDArray[np.float64]]:
    """Vectors of norm ``reach`` that rounding lengthens most, and ordinary ones."""
    rng = np.random.default_rng(size)
    halves = np.full(size, 0.5)
    spike = np.zeros(size)
    spike[0] = reach
    many = [rng.normal(size=size) for _ in range(20)] + [
        halves,
        spike,
        np.full(size, 1e-9),
        rng.laplace(size=size) ** 3,
    ]
    return [v * min(1.0, reach / np.linalg.norm(v)) if v is halves else v * (reach / np.linalg.norm(v)) for v in many]


@pytest.mark.parametrize(("size", "reach"), [(1, 1.0), (1, 2.5), (16, 3.0), (1024, 10.0), (1024, 500.0), (4096, 64.0)])
def test_rounded_vectors_obey_every_bound(size: int, reach: float) -> None:
    grid = Grid(size, reach, reach, 1 << 20, math.exp(-0.5))
    source = Research(1)
    for vector in hostile(size, reach):
        found = grid.rounded(vector, source.uniform)
        exact = sum(int(x) ** 2 for x in found)
        assert exact == squared_norm(found) <= grid.squared <= grid.l2**2
        assert sum(abs(int(x)) for x in found) <= grid.l1
        assert np.abs(found - vector).max() <= 1.0


def test_the_bound_is_needed() -> None:
    """Rounding once, without a condition, goes over it for a share of the draws: the test above can fail."""
    vector = np.full(1024, 10.0 / 32.0)
    grid = Grid(1024, 10.0, 10.0, 100, math.exp(-0.5))
    rng = np.random.default_rng(0)
    over = [squared_norm((rng.random(1024) < vector).astype(np.int64)) > 10.0**2 for _ in range(20)]
    assert all(over)
    assert grid.squared < (10 + 32) ** 2


def test_rounding_that_always_fails_ends_and_obeys_the_bound() -> None:
    vector = np.full(1024, 10.0 / 32.0)
    grid = Grid(1024, 10.0, 10.0, 100, math.exp(-0.5))
    found = grid.rounded(vector, np.zeros)  # always up: norm 32
    assert squared_norm(found) <= grid.squared
    assert not found.any()


def test_rounding_is_unbiased() -> None:
    vector = np.random.default_rng(0).uniform(-3, 3, size=256)
    grid = Grid(256, 1.0, float(np.linalg.norm(vector)) + 30.0, 100, math.exp(-0.5))
    source = Research(2)
    mean = np.mean([grid.rounded(vector, source.uniform) for _ in range(2000)], axis=0)
    assert np.abs(mean - vector).max() < 6.5 * 0.5 / math.sqrt(2000)


def test_a_coordinate_above_the_limit_is_cut() -> None:
    grid = Grid(4, 1.0, 1000.0, 7, 0.5)
    assert list(grid.rounded(np.array([900.0, -900.0, 6.0, 7.5]), Research(0).uniform)) == [7, -7, 6, 7]


def test_squared_norm_does_not_overflow() -> None:
    assert squared_norm(np.full(1 << 17, 1 << 24)) == (1 << 17) * (1 << 48)


@pytest.mark.parametrize("bits", [8, 20, 31, 32])
def test_residues_come_back_up_to_the_boundary(bits: int) -> None:
    half = 1 << (bits - 1)
    values = np.array([-half, -half + 1, -1, 0, 1, half - 1])
    np.testing.assert_array_equal(centred(wrapped(values, bits), bits), values)
    np.testing.assert_array_equal(centred(wrapped(np.array([half, -half - 1]), bits), bits), [-half, half - 1])


@pytest.mark.parametrize("value", [1e30, 1e-45, 1e300, 0.0, 1.0])
def test_clipping_holds_at_every_magnitude(value: float) -> None:
    vector = np.array([value, -value, value, 0.0])
    found = clipped(vector, 1.0)
    assert np.linalg.norm(found) <= 1.0 + 1e-12
    if value * math.sqrt(3) > 1.0:
        assert np.linalg.norm(found) == pytest.approx(1.0)
    else:
        np.testing.assert_array_equal(found, vector)


# ---- the plan


PLAN = SecureSum(300, 20, 2.0, 1.0, max_dropout=0.2, max_colluding=0.1)
PLANS = [
    PLAN,
    SecureSum(300, 20, 2.0, 1.0, "discrete-gaussian", max_dropout=0.2, max_colluding=0.1),
    SecureSum(1, 1, 1e-3, 5.0, bits=12),
    SecureSum(100_000, 1000, 1.0, 3.0, bits=24),
    SecureSum(1000, 50, 7.0, 0.1, bits=32),
    SecureSum(5000, 100, 1.0, 1.0, bits=14),
]


@pytest.mark.parametrize("plan", PLANS)
def test_honest_shares_make_the_noise_promised(plan: SecureSum) -> None:
    promised = Fraction(plan.noise_multiplier) ** 2 * Fraction(plan.grid.l2) ** 2
    held = plan.honest * plan.share_variance
    assert promised <= held <= promised * Fraction(1001, 1000) + Fraction(plan.honest, 1 << 20)


@pytest.mark.parametrize(
    ("clients", "dropout", "colluding", "least", "honest"),
    [(100, 0.29, 0.0, 71, 71), (10, 0.3, 0.2, 7, 5), (10, 0.0, 0.0, 10, 10), (3, 0.1, 0.3, 3, 3), (7, 0.5, 0.4, 4, 2)],
)
def test_the_counts_of_clients(clients: int, dropout: float, colluding: float, least: int, honest: int) -> None:
    plan = SecureSum(10, clients, 1.0, 1.0, max_dropout=dropout, max_colluding=colluding)
    assert (plan.least, plan.honest) == (least, honest)


@pytest.mark.parametrize("plan", PLANS)
def test_the_modulus_holds_the_worst_sum_and_its_noise(plan: SecureSum) -> None:
    grid = plan.grid
    variance = float(plan.share_variance * plan.clients)
    noise = _tail(variance, math.log(2 * plan.padded) + 40 * math.log(2))
    assert plan.clients * grid.limit + noise < 2 ** (plan.bits - 1)
    assert not plan._fits(plan._grid(grid.reach * 1.02))  # and no room is wasted


def test_fewer_bits_cost_more_noise() -> None:
    inflation = [replace(PLAN, bits=bits).inflation for bits in (10, 12, 16, 24)]
    assert inflation == sorted(inflation, reverse=True)
    assert inflation[0] > 1.1
    assert 1.0 <= inflation[-1] < 1.0001


@pytest.mark.parametrize("variance", [0.5, 40.0, 1e4])
def test_the_tail_bounds_a_skellam(variance: float) -> None:
    for odds in (3.0, 10.0, 30.0):
        t = _tail(variance, odds)
        beyond = float(stats.skellam.sf(math.ceil(t) - 1, variance / 2, variance / 2))
        assert beyond <= math.exp(-odds) * (1 + 1e-6) + 1e-15
        assert t < 3 * math.sqrt(variance * 2 * odds) + 4 * odds


@pytest.mark.parametrize(
    ("changed", "where"),
    [
        ({"bits": 7}, "bits"), ({"bits": 33}, "bits"), ({"size": 10**7, "bits": 8}, "bits"), ({"size": 0}, "size"),
        ({"clients": 0}, "clients"), ({"max_update_norm": math.inf}, "max_update_norm"),
        ({"noise_multiplier": 0.0}, "noise_multiplier"), ({"max_dropout": 1.0}, "max_dropout"),
        ({"max_dropout": math.nan}, "max_dropout"), ({"max_colluding": -0.1}, "max_colluding"),
        ({"max_colluding": 0.9}, "max_colluding"), ({"beta": 1.0}, "beta"), ({"mechanism": "gaussian"}, "mechanism"),
        ({"clients": 10**6, "bits": 16}, "bits"),
    ],
)  # fmt: skip
def test_plans_that_cannot_hold_are_refused(changed: dict[str, object], where: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        replace(PLAN, **changed).event()  # type: ignore[arg-type]
    assert caught.value.where == where


# ---- one round


def updates(plan: SecureSum, seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {f"c{i}": torch.randn(plan.size, generator=generator) for i in range(plan.clients)}


def masks(plan: SecureSum, label: str = "round 1") -> Masks:
    return Masks(bytes(range(32)), label, tuple(f"c{i}" for i in range(plan.clients)), plan.padded, plan.bits)


@pytest.mark.parametrize("mechanism", ["skellam", "discrete-gaussian"])
@pytest.mark.parametrize("clients", [5, 24])  # all pairs; a ring
def test_every_number_of_dropouts(mechanism: str, clients: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Masks cancel exactly for every k that is allowed; for fewer, nothing is unmasked."""
    plan = SecureSum(70, clients, 1.0, 1.0, mechanism, max_dropout=0.4)  # type: ignore[arg-type]
    hidden = masks(plan)
    plain = {c: plan.encode(v, Secure(), rotation="r") for c, v in updates(plan).items()}
    sent = {c: hidden.hide(c, message) for c, message in plain.items()}
    order = np.random.default_rng(1).permutation(list(plain))
    for k in range(plan.least, clients + 1):
        arrived = [str(c) for c in order[:k]]
        expected = centred(sum(plain[c].astype(np.int64) for c in arrived) % (1 << plan.bits), plan.bits)  # type: ignore[union-attr]
        np.testing.assert_array_equal(plan.total({c: sent[c] for c in arrived}, hidden), expected)

    def never(*_: object) -> None:
        raise AssertionError("unmasked")

    monkeypatch.setattr(Masks, "reveal", never)
    for k in range(plan.least):
        with pytest.raises(Void):
            plan.total({str(c): sent[str(c)] for c in order[:k]}, hidden)


def test_the_sum_is_right_and_its_noise_is_that_of_the_plan() -> None:
    """All clients send the same update: the largest sum there is."""
    plan = replace(PLAN, size=20_000)
    update = torch.randn(plan.size, generator=torch.Generator().manual_seed(5))
    messages = {f"c{i}": plan.encode(update, Secure(), rotation="r") for i in range(plan.clients)}
    found = plan.decode(plan.total(messages), rotation="r")
    assert found.shape == (plan.size,)
    assert found.dtype == torch.float32
    error = (found - plan.clients * 2.0 * update / update.norm()).double().numpy()
    assert within(error, plan.noise_std)
    assert not within(error * 1.3, plan.noise_std)
    assert not within(error * 0.7, plan.noise_std)


def test_with_the_most_missing_and_colluding_the_noise_is_still_enough() -> None:
    """Only ``honest`` shares are secret; one share fewer, and the test of the variance fails."""
    plan = replace(PLAN, size=1 << 17)
    shares = [plan._noise(Secure()) for _ in range(plan.honest)]
    target = plan.noise_multiplier * plan.grid.l2
    whole = np.sum(shares, axis=0).astype(float)
    assert within(whole, target)
    assert not within((whole - shares[0]).astype(float), target)
    assert not within(whole * 1.3, target)
    assert not within(whole * 0.7, target)


def test_one_client_set_to_zero_moves_the_sum_by_at_most_the_sensitivity() -> None:
    plan = SecureSum(60, 6, 1.0, 1.0, bits=14)  # a coarse grid, where rounding matters
    source = Research(0)
    rng = np.random.default_rng(0)
    longest = 0
    for trial in range(200):
        vectors = [torch.from_numpy(rng.normal(size=60) ** 3 * 10.0 ** rng.integers(-3, 8)) for _ in range(6)]
        rounded = [plan.quantized(v, source, rotation=str(trial)) for v in vectors]
        without = [*rounded[:3], plan.quantized(torch.zeros(60), source, rotation=str(trial)), *rounded[4:]]
        difference = np.sum(rounded, axis=0) - np.sum(without, axis=0)
        longest = max(longest, squared_norm(difference))
        assert math.sqrt(squared_norm(difference)) <= plan.event().sensitivity
        assert np.abs(difference).sum() <= (plan.event().l1_sensitivity or 0.0)
        assert np.abs(rounded).max() <= plan.grid.limit
    assert longest > 0.9 * plan.grid.reach**2


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_number_that_is_not_finite_makes_the_update_zero(value: float) -> None:
    vector = torch.ones(300)
    vector[17] = value
    assert not PLAN.quantized(vector, Research(0), rotation="r").any()


@pytest.mark.parametrize("value", [1e30, 3e38, 1e-45])
def test_extreme_updates_stay_within_the_bounds(value: float) -> None:
    found = PLAN.quantized(torch.full((300,), value), Research(0), rotation="r")
    assert squared_norm(found) <= PLAN.grid.squared


@pytest.mark.parametrize("vector", [torch.zeros(299), torch.zeros(300, 1), torch.zeros(1)])
def test_an_update_of_another_shape_is_refused(vector: torch.Tensor) -> None:
    with pytest.raises(DataError):
        PLAN.encode(vector, Secure(), rotation="r")


@pytest.mark.parametrize(
    "message",
    [
        None, [0] * 512, np.zeros(512, np.int64), np.zeros(511, np.uint32), np.zeros((512, 1), np.uint32),
        np.full(512, 1 << 20, np.uint32), np.zeros(512, np.float32),
    ],
)  # fmt: skip
def test_malformed_messages_are_refused(message: object) -> None:
    assert not PLAN.accepts(message)
    good = np.full(512, (1 << 20) - 1, np.uint32)
    assert PLAN.accepts(good)
    with pytest.raises(DataError):
        PLAN.total({**{f"c{i}": good for i in range(19)}, "c19": message})  # type: ignore[dict-item]


def test_strangers_and_foreign_masks_are_refused() -> None:
    good = np.zeros(512, np.uint32)
    with pytest.raises(DataError):
        PLAN.total({f"c{i}": good for i in range(21)})
    with pytest.raises(DataError):
        PLAN.total({**{f"c{i}": good for i in range(18)}, "stranger": good}, masks(PLAN))
    with pytest.raises(ConfigurationError):
        PLAN.total({f"c{i}": good for i in range(18)}, masks(replace(PLAN, bits=21)))


# ---- what it costs


def renyi_divergence(pmf: NDArray[np.float64], shift: int, order: float) -> float:
    p, q = pmf[shift:], pmf[: len(pmf) - shift]
    used = (p > 1e-290) & (q > 1e-290)
    return float(logsumexp(order * np.log(p[used]) + (1 - order) * np.log(q[used]))) / (order - 1)


@pytest.mark.parametrize("z", [0.7, 2.0])
@pytest.mark.parametrize("bits", [8, 10])
def test_the_skellam_event_is_above_the_exact_divergence(bits: int, z: float) -> None:
    plan = SecureSum(1, 2, 1.0, z, bits=bits, max_dropout=0.0)
    event = plan.event()
    assert event == Event(
        "skellam", z, 1.0, "zero-out", "client",
        sensitivity=plan.grid.l2, l1_sensitivity=plan.grid.l1, dimension=1,
    )  # fmt: skip
    variance = float(plan.share_variance * plan.honest)
    reach = int(25 * math.sqrt(variance)) + 60
    pmf = np.asarray(stats.skellam.pmf(np.arange(-reach, reach + 1), variance / 2, variance / 2))
    for order in (1.5, 2.0, 4.0, 9.0):
        exact = renyi_divergence(pmf, math.isqrt(plan.grid.squared), order)
        assert exact <= renyi.divergence(event, order)
        assert exact > 0.5 * order / (2 * z**2) * (math.isqrt(plan.grid.squared) / plan.grid.l2) ** 2


@pytest.mark.parametrize("share", [Fraction(1, 4), Fraction(4, 10), Fraction(1)])
@pytest.mark.parametrize("clients", [2, 5])
def test_the_discrete_gaussian_event_is_above_the_exact_divergence(
    share: Fraction, clients: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On grids so coarse that the sum is visibly not discrete Gaussian, with shares set by hand."""
    monkeypatch.setattr(SecureSum, "share_variance", share)
    xs = np.arange(-60, 61)
    one = np.exp(-(xs**2) / (2 * float(share)))
    one /= one.sum()
    total = one
    for _ in range(clients - 1):
        total = np.convolve(total, one)
    for shift in (1, 2):
        std = math.sqrt(float(share) * clients)
        plan = SecureSum(1, clients, 1.0, 1.0, "discrete-gaussian", max_dropout=0.0)
        plan = replace(plan, noise_multiplier=std / shift)
        event = plan.event()
        assert event.dimension == 2  # or the accountant would take the exact law of ONE discrete Gaussian
        gap = 10 * sum(math.exp(-2 * math.pi**2 * float(share) * k / (k + 1)) for k in range(1, clients))
        assert 1 / event.noise_multiplier == pytest.approx(shift / std + gap, rel=1e-9)
        for order in (1.25, 2.0, 3.0, 5.0):
            assert renyi_divergence(total, shift, order) <= renyi.divergence(event, order) * (1 + 1e-9)


def test_discrete_gaussian_shares_too_narrow_to_bound_are_refused() -> None:
    coarse = SecureSum(64, 40, 1.0, 0.5, bits=8)
    assert coarse.share_variance < Fraction(1, 4)
    with pytest.raises(ConfigurationError) as caught:
        replace(coarse, mechanism="discrete-gaussian")
    assert caught.value.where == "mechanism"


@pytest.mark.parametrize("plan", PLANS)
def test_noise_in_shares_costs_no_less_than_the_gaussian(plan: SecureSum) -> None:
    central = Event("gaussian", plan.noise_multiplier, 1.0, "zero-out", "client")
    orders = (1.5, 2.0, 8.0, 64.0)
    assert all(renyi.divergence(plan.event(), a) >= renyi.divergence(central, a) * (1 - 1e-12) for a in orders)
    assert plan.event(adjacency="replace-one", unit="silo").unit == "silo"
    twice = plan.event(adjacency="replace-one")
    assert all(renyi.divergence(twice, a) >= 3.9 * renyi.divergence(central, a) for a in orders)


def test_a_client_that_is_removed_is_not_covered() -> None:
    with pytest.raises(ConfigurationError, match="takes its noise"):
        PLAN.event(adjacency="add-remove")


@pytest.mark.parametrize("plan", [PLAN, SecureSum(10_000, 40, 1.0, 1.0, "discrete-gaussian", bits=18)])
@pytest.mark.parametrize("epsilon", [0.7, 8.0])
def test_calibration_meets_the_target_and_no_more(plan: SecureSum, epsilon: float) -> None:
    found = calibrated(plan, target_epsilon=epsilon, target_delta=1e-5, rounds=12)
    assert replace(found, noise_multiplier=1.0) == replace(plan, noise_multiplier=1.0)
    assert float(compose({found.event(): 12}, delta=1e-5)) <= epsilon
    less = replace(found, noise_multiplier=found.noise_multiplier * 0.999)
    assert float(compose({less.event(): 12}, delta=1e-5)) > epsilon


@pytest.mark.parametrize("mechanism", ["skellam", "discrete-gaussian"])
def test_little_noise_is_found_where_more_would_not_fit(mechanism: str) -> None:
    plan = SecureSum(64, 4, 1.0, 0.5, mechanism, bits=8, max_dropout=0.0)  # type: ignore[arg-type]
    with pytest.raises(ConfigurationError):
        replace(plan, noise_multiplier=4.0).event()
    found = calibrated(plan, target_epsilon=30.0, target_delta=1e-5, rounds=1)
    assert found.noise_multiplier < 1.0
    assert 29.0 < float(compose({found.event(): 1}, delta=1e-5)) <= 30.0
    with pytest.raises(ConfigurationError) as caught:
        calibrated(plan, target_epsilon=0.1, target_delta=1e-5, rounds=1)
    assert caught.value.where == "bits"


@pytest.mark.parametrize("changed", [{"target_epsilon": 0.0}, {"rounds": 0}, {"target_delta": 1.5}])
def test_targets_out_of_range_are_refused(changed: dict[str, float]) -> None:
    with pytest.raises(ConfigurationError):
        calibrated(PLAN, **{"target_epsilon": 1.0, "target_delta": 1e-5, "rounds": 2, **changed})  # type: ignore[arg-type]


# ---- masks


def test_a_masked_message_looks_uniform_and_no_two_alike() -> None:
    hidden = Masks(bytes(32), "r", ("a", "b", "c"), 600_000, 8)
    zero = np.zeros(600_000, np.uint32)
    first = hidden.hide("a", zero)
    assert stats.chisquare(np.bincount(first, minlength=256)).pvalue > ALPHA
    for other in (
        hidden.hide("b", zero),
        replace(hidden, label="s").hide("a", zero),
        replace(hidden, secret=b"1" * 32).hide("a", zero),
    ):
        assert stats.chisquare(np.bincount((first + other) & 255, minlength=256)).pvalue > ALPHA
        assert stats.chisquare(np.bincount((first - other) & 255, minlength=256)).pvalue > ALPHA
    blocks = first[: 1 << 18], first[1 << 18 : 1 << 19]  # across the 1 MiB block of the cipher
    assert not np.array_equal(*blocks)


def test_masks_cancel_over_the_cohort_only() -> None:
    hidden = masks(PLAN)
    zero = np.zeros(512, np.uint32)
    sent = [hidden.hide(c, zero) for c in hidden.cohort]
    bits = np.uint32((1 << 20) - 1)
    assert not (np.sum(sent, axis=0, dtype=np.uint32) & bits).any()
    assert (np.sum(sent[1:], axis=0, dtype=np.uint32) & bits).any()


@pytest.mark.parametrize(
    "changed",
    [{"secret": b"short"}, {"cohort": ()}, {"cohort": ("a", "a")}, {"bits": 33}, {"neighbours": 3}, {"size": 0}],
)
def test_masks_that_cannot_hold_are_refused(changed: dict[str, object]) -> None:
    with pytest.raises(ConfigurationError):
        replace(masks(PLAN), **changed)  # type: ignore[arg-type]


def test_a_stranger_has_no_masks_and_the_secret_is_not_printed() -> None:
    with pytest.raises(ConfigurationError):
        masks(PLAN).hide("stranger", np.zeros(512, np.uint32))
    assert "secret" not in repr(masks(PLAN))
