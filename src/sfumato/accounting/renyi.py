"""Rényi differential privacy (Mironov 2017): for releases whose privacy loss has no known law, and for tuning.

Every bound here holds for both directions of its adjacency; none is ever too small (quadratures are rounded up).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import lru_cache

import numpy as np

from ..errors import ConfigurationError
from .budget import number, probability
from .charges import charges, pair_of
from .events import Event
from .moments import (
    HERE,
    MARGIN,
    Array,
    central_log_moments,
    counted_divergence,
    drawn,
    gaussian_divergence,
    laplace_divergence,
    replaced_divergence,
)
from .pairs import Laplace, Mixture, Pair, Release, Truncated, largest_loss
from .pld import Epsilon

ORDERS: tuple[float, ...] = tuple(1.0 + 2.0 ** (k / 8.0) for k in range(-56, 161))  # 1.008 … 1e6
# Orders of the odometer for adaptively chosen releases; each costs the others log(how many there are) / (order - 1).
ODOMETER: tuple[float, ...] = tuple(1.0 + 2.0**k for k in range(-1, 11))
HIGHEST_COUNTED = 4096  # integer orders that are summed term by term
HIGHEST_CENTRAL = 128  # … with central moments, each of which is a quadrature


@lru_cache(maxsize=1024)
def _curve(event: Event) -> Array:
    curve = np.array([divergence(event, order) for order in ORDERS])
    curve.flags.writeable = False
    return curve


def curve(event: Event) -> Array:
    """Rényi divergence of one ``event`` at every order of ``ORDERS``; inf where there is no bound."""
    return _curve(replace(event, adaptive=False))


@lru_cache(maxsize=1 << 16)
def divergence(event: Event, order: float) -> float:
    """Bound on the Rényi divergence of ``order`` > 1 between the outputs of one ``event`` on any two neighbours.

    Gaussian: Mironov 2017; Poisson-sampled: Mironov, Talwar & Zhang 2019, by exact quadrature; discrete Gaussian:
    Canonne, Kamath & Steinke 2020; fixed size: Wang, Balle & Kasiviswanathan 2019; Skellam: Agarwal, Kairouz & Liu
    2021. A fixed-size draw under zero-out is charged as replace-one: the batch without the record holds another one.
    Raises ConfigurationError for an event without a known bound.
    """
    if not number("order", order) > 1.0:
        raise ConfigurationError(f"order must be > 1, got {order!r}.", found=order, where="order")
    if event.mechanism == "covered":
        return 0.0
    if event.noise_multiplier == 0.0:
        return math.inf
    match event.mechanism:
        case "fixed-size-gaussian":
            return _replaced(event.sample_rate, 0.5 * event.noise_multiplier, order, gaussian=True)
        case "skellam":
            return _skellam(event, order)
        case "discrete-gaussian":
            return _discrete(event, order)
    return _of_pair(pair_of(replace(event, adaptive=False)), order)


def _of_pair(pair: Pair, order: float) -> float:
    """Divergence of a Gaussian or Laplace pair, never above that of the same pair without sampling."""
    match pair:
        case Release(sigma, 1.0):
            return order / (2.0 * sigma**2)
        case Release(sigma, rate):
            # The direction that removes the record is the larger one (Mironov, Talwar & Zhang 2019, theorem 5).
            return min(gaussian_divergence(drawn(rate), HERE, sigma, order), order / (2.0 * sigma**2))
        case Mixture():
            here, there = drawn(pair.rate, pair.records), HERE
            if pair.replaced:
                there = drawn(pair.rate, pair.records, direction=-1.0)
            reach = pair.records * (2.0 if pair.replaced else 1.0) / pair.sigma
            found = gaussian_divergence(here, there, pair.sigma, order)
            if not pair.replaced:
                found = max(found, gaussian_divergence(there, here, pair.sigma, order))
            return min(found, 0.5 * order * reach**2)
        case Truncated():
            log_excess = -math.inf  # which others are in the batch is revealed, so moments average over it
            for weight, rate in pair.parts:
                excess = (order - 1.0) * _of_pair(Release(pair.sigma, rate), order) if rate > 0.0 else 0.0
                if weight > 0.0 and excess > 0.0:
                    log_excess = float(np.logaddexp(log_excess, math.log(weight) + _log_expm1(excess)))
            return float(np.logaddexp(0.0, log_excess)) * (1.0 + MARGIN) / (order - 1.0)
        case Laplace():
            here = drawn(pair.rate)
            both = [laplace_divergence(*laws, pair.sigma, order) for laws in ((here, HERE), (HERE, here))]
            return min(max(both), max(largest_loss(pair, add=add) for add in (False, True)))
    raise AssertionError(pair)


def _log_expm1(value: float) -> float:
    return math.log(math.expm1(value)) if value < 30.0 else value


def _interpolated(bound: Callable[[int], float], order: float) -> float:
    """(order - 1) * divergence is convex in the order and 0 at 1, so chords between integer orders are bounds."""
    low = math.floor(order)
    if low + 1 > HIGHEST_COUNTED:
        return math.inf
    below = (low - 1) * bound(low) if low > 1 else 0.0
    if low == order:
        return below / (order - 1.0)
    share = order - low
    return ((1.0 - share) * below + share * low * bound(low + 1)) / (order - 1.0)


@lru_cache(maxsize=64)
def _gaussian_log_moments(sigma: float) -> Array:
    """log E_Q[(P/Q)^k], k = 0 … HIGHEST_COUNTED, of two Gaussians one sensitivity apart."""
    k = np.arange(HIGHEST_COUNTED + 1.0)
    return np.asarray(k * (k - 1.0) / (2.0 * sigma**2))


@lru_cache(maxsize=64)
def _gaussian_central(sigma: float) -> Array:
    return central_log_moments(sigma, HIGHEST_CENTRAL)


def _replaced(rate: float, sigma: float, order: float, *, gaussian: bool = False) -> float:
    """Sampling with ``rate`` of outputs that diverge between any two batches no more than N(1, sigma^2) from N(0, …).

    ``gaussian``: they are those Gaussians, which is more than a bound on their divergences.
    """
    plain = order / (2.0 * sigma**2)
    if rate == 1.0:
        return plain
    moments = _gaussian_log_moments(sigma)
    central = _gaussian_central(sigma) if gaussian and sigma > 0.1 and order <= HIGHEST_CENTRAL else None
    return min(plain, _interpolated(lambda a: replaced_divergence(rate, moments, a, central), order))


def _discrete(event: Event, order: float) -> float:
    """A discrete Gaussian diverges by no more than the Gaussian (Canonne, Kamath & Steinke 2020, theorem 14)."""
    if event.adjacency == "replace-one":
        return _replaced(event.sample_rate, 0.5 * event.noise_multiplier, order)
    plain = order / (2.0 * event.noise_multiplier**2)
    if event.sample_rate == 1.0:
        return plain
    # P and Q mirror each other, so removing is the worse direction here too (Mironov, Talwar & Zhang 2019, theorem 5).
    moments = _gaussian_log_moments(event.noise_multiplier)
    return min(plain, _interpolated(lambda a: counted_divergence(event.sample_rate, moments, a), order))


def _skellam(event: Event, order: float) -> float:
    """Agarwal, Kairouz & Liu 2021, theorem 3.5; ``mu`` is the variance of the noise in each coordinate."""
    if event.l1_sensitivity is None:
        raise ConfigurationError("a Skellam event needs its l1_sensitivity", found=event)
    factor = 2.0 if event.adjacency == "replace-one" else 1.0
    l1, l2 = factor * event.l1_sensitivity, factor * event.sensitivity
    mu = (event.noise_multiplier * event.sensitivity) ** 2

    def bound(a: int) -> float:
        rest = min(((2.0 * a - 1.0) * l2**2 + 6.0 * l1) / (4.0 * mu**2), 1.5 * l1 / mu)
        return a * l2**2 / (2.0 * mu) + rest

    if order > HIGHEST_COUNTED:
        return bound(math.ceil(order))  # divergences do not fall as the order grows
    return _interpolated(bound, order)


def total(events: Mapping[Event, int]) -> Array:
    """Rényi divergence of all ``events`` together at every order of ``ORDERS``."""
    result = np.zeros(len(ORDERS))
    for event, times in charges(events).items():
        result += times * curve(event)
    return result


def to_epsilon(divergences: Array, delta: float, orders: tuple[float, ...] = ORDERS) -> float:
    """Smallest epsilon at ``delta`` over all orders (Canonne, Kamath & Steinke 2020, proposition 12)."""
    order = np.asarray(orders)
    return max(0.0, float(np.min(divergences + conversion(order, probability("delta", delta)))))


def conversion(order: Array, delta: float) -> Array:
    """What proposition 12 adds to a divergence of ``order`` to make it an epsilon at ``delta``."""
    return np.log1p(-1.0 / order) - (math.log(delta) + np.log(order)) / (order - 1.0)


def to_delta(divergences: Array, epsilon: float, orders: tuple[float, ...] = ORDERS) -> float:
    """Smallest delta at ``epsilon`` >= 0 over all orders: :func:`to_epsilon` turned round."""
    order = np.asarray(orders)
    log_delta = (order - 1.0) * (divergences - epsilon + np.log1p(-1.0 / order)) - np.log(order)
    return math.exp(min(0.0, float(log_delta.min())))


def _spent(events: Mapping[Event, int]) -> Array:
    """Divergence of all ``events`` at each order of the odometer."""
    one = [(replace(event, adaptive=False), times) for event, times in events.items()]
    return np.array([sum(times * divergence(event, order) for event, times in one) for order in ODOMETER])


def compose_renyi(events: Mapping[Event, int], delta: float) -> Epsilon:
    """Epsilon of ``events`` by Rényi divergences: an upper bound only, its ``lower`` is 0.

    With adaptive events the divergences R_a spent are random, and no order may be picked afterwards. Then, for any two
    neighbours P, Q and any moment of stopping, chosen by looking or not, the value stated there satisfies
    P(E) <= E_Q[exp(epsilon) 1_E] + delta for every event E; so if it never passes a bound, that bound is differential
    privacy. Reason: exp((a - 1)(loss - R_a)) is a supermartingale of mean at most 1 (Feldman & Zrnic 2021; Whitehouse,
    Ramdas, Rogers & Wu 2023), hence so is its mean over ``ODOMETER``, and proposition 12 of Canonne, Kamath & Steinke
    2020 bounds 1 - exp(epsilon - loss) by delta times any one term. A :class:`Filter` is tighter where a budget is
    known from the start. Raises ConfigurationError as :func:`compose`.
    """
    delta, events = probability("delta", delta), charges(events)
    if any(event.adaptive for event in events):
        return Epsilon(to_epsilon(_spent(events), delta / len(ODOMETER), ODOMETER), delta=delta, lower=0.0)
    return Epsilon(to_epsilon(total(events), delta), delta=delta, lower=0.0)


def delta_renyi(events: Mapping[Event, int], epsilon: float) -> float:
    """Bound on delta at ``epsilon`` >= 0, for the events that :func:`compose_renyi` is for and in the same sense.

    Total variation, which is delta at 0, is also at most sqrt(1 - exp(-KL)) (Bretagnolle & Huber 1979), and KL at most
    any of the divergences, where these are known in advance.
    """
    events = charges(events)
    if any(event.adaptive for event in events):
        return min(1.0, len(ODOMETER) * to_delta(_spent(events), epsilon, ODOMETER))
    divergences = total(events)
    return min(to_delta(divergences, epsilon), math.sqrt(-math.expm1(-float(divergences.min()))))
