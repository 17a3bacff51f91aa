"""The price of tuning: a random number of runs, of which only the best is published."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Literal

import numpy as np
from scipy.optimize import brentq

from ..errors import ConfigurationError
from .budget import number, probability
from .charges import charges
from .events import Event
from .moments import Array
from .pld import Epsilon
from .renyi import ORDERS, to_delta, to_epsilon, total

SHAPES = {"geometric": 1.0, "logarithmic": 0.0}


def repeat_and_select(
    events: Mapping[Event, int],
    *,
    delta: float,
    expected_runs: float,
    distribution: Literal["geometric", "logarithmic", "poisson"] = "geometric",
) -> Epsilon:
    """Epsilon of publishing the best of a random number of runs that cost ``events`` each (Papernot & Steinke 2022).

    The number of runs must be drawn secretly from ``distribution`` with mean ``expected_runs``, independent of the
    data; only the winner is published, and runs are compared by a score that is itself part of what ``events`` pay for
    (or computed on public data). geometric and logarithmic: truncated negative binomial of shape 1 and 0, at least one
    run (theorem 2). poisson: possibly none, and then nothing is published (theorem 6). An upper bound (``lower`` 0).
    Raises ConfigurationError for a mean below 1, and for adaptive events: what a run costs must be known in advance.
    """
    delta, mean = probability("delta", delta), number("expected_runs", expected_runs)
    if distribution != "poisson" and distribution not in SHAPES:
        raise ConfigurationError(
            f"distribution must be geometric, logarithmic or poisson, got {distribution!r}.",
            found=distribution,
            where="distribution",
        )
    if mean < 1.0:
        raise ConfigurationError(
            f"expected_runs must be >= 1, got {expected_runs!r}.", found=expected_runs, where="expected_runs"
        )
    if adaptive := next((event for event in charges(events) if event.adaptive), None):
        raise ConfigurationError(
            "runs with adaptively chosen events cannot be tuned under one bound: their cost is not known in advance.",
            found=adaptive,
            fix="fix the parameters of each run in advance.",
        )
    base = total(events)
    if not base.any():
        return Epsilon(0.0, delta=delta, lower=0.0)
    selected = (
        _poisson(base, mean) if distribution == "poisson" else _negative_binomial(base, mean, SHAPES[distribution])
    )
    return Epsilon(to_epsilon(selected, delta), delta=delta, lower=0.0)


def _negative_binomial(base: Array, mean: float, shape: float) -> Array:
    """Theorem 2: one more order may be used for the price of the number of runs; the best of all is taken."""
    orders = np.asarray(ORDERS)
    log_gamma = _log_gamma(mean, shape)
    with np.errstate(invalid="ignore"):
        price = (1.0 + shape) * ((1.0 - 1.0 / orders) * base - log_gamma / orders)
    return np.asarray(base + float(np.nanmin(price)) + math.log(mean) / (orders - 1.0))


def _log_gamma(mean: float, shape: float) -> float:
    """log of the parameter at which the truncated negative binomial has ``mean``."""
    if mean == 1.0:
        return 0.0
    if shape == 1.0:
        return -math.log(mean)
    # logarithmic: mean = (1/gamma - 1) / log(1/gamma); with x = log(1/gamma): expm1(x) / x
    return -float(brentq(lambda x: math.log(math.expm1(x) / x) - math.log(mean), 1e-12, 700.0, xtol=1e-14, rtol=1e-14))


def _poisson(base: Array, mean: float) -> Array:
    """Theorem 6: (order, divergence), and (log(order / (order - 1)), delta)-DP of one run."""
    orders = np.asarray(ORDERS)
    deltas = np.array([to_delta(base, -math.log1p(-1.0 / order)) for order in ORDERS])
    return np.asarray(base + mean * deltas + math.log(mean) / (orders - 1.0))
