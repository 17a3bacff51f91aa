"""The guarantee in plain words, and what it does not cover."""

from __future__ import annotations

import math
from collections.abc import Callable

from .facts import Guarantee, RunFacts

NEIGHBOUR = {
    "add-remove": "adding or removing one {unit}",
    "zero-out": "replacing one {unit} by an empty one",
    "replace-one": "replacing one {unit} by any other",
}
NOT_PRIVATE = "No privacy guarantee: no noise was added (noise multiplier 0), so ε is infinite."


def plain_sentence(guarantee: Guarantee) -> str:
    """One sentence that states (ε, δ), the unit, the adjacency and what is covered."""
    if not math.isfinite(guarantee.epsilon):
        return NOT_PRIVATE
    change = NEIGHBOUR[guarantee.adjacency].format(unit=guarantee.unit)
    return (
        f"Training was ({at_most(guarantee.epsilon)}, {number(guarantee.delta)})-differentially private: {change} of "
        f"the training data changes the probability of any outcome by a factor of at most "
        f"e^{at_most(guarantee.epsilon)} = {at_most(math.exp(guarantee.epsilon))}, plus {number(guarantee.delta)}."
    )


def coverage(facts: RunFacts) -> str:
    """Which outputs the guarantee is about."""
    if not math.isfinite(facts.guarantee.epsilon):
        return "Nothing is covered: treat the model as if it were the training data."
    averaged = "" if facts.training.averaging == "none" else " and any average of them, such as the saved model"
    return (
        f"Covered: the model's parameters after every one of the {facts.mechanism.steps:,} steps taken together"
        f"{averaged}, and everything computed from them without looking at the training data again."
    )


def not_covered(facts: RunFacts) -> list[str]:
    """What a reader might take to be covered and is not."""
    metrics = (
        "Training loss, training accuracy and clip rate (the curves marked so, and metrics.jsonl) are computed from "
        "private records without noise. Keep them as confidential as the data, or train with "
        "--no-private-metrics."
        if facts.private_metrics
        else "Training loss, training accuracy and clip rate were not written (--no-private-metrics)."
    )
    return [
        metrics,
        "Test accuracy is computed from the test records, without noise. The test records were not trained on and are "
        "not protected by this guarantee.",
        "Other trainings on the same records, hyperparameter search included, unless they share this run's ledger.",
        "Attacks on floating-point rounding of the noise, timing, memory use, and the machine while it trains.",
    ]


def at_most(value: float) -> str:
    """:func:`number`, but never rounded down: an upper bound must stay one in print."""
    return _directed(value, math.ceil)


def at_least(value: float) -> str:
    """:func:`number`, but never rounded up."""
    return _directed(value, math.floor)


def _directed(value: float, rounded: Callable[[float], int]) -> str:
    if not math.isfinite(value) or value == 0:
        return number(value)
    digits = 3 - math.floor(math.log10(abs(value)))
    return number(rounded(round(value * 10.0**digits, 9)) / 10.0**digits)


def number(value: float) -> str:
    """A number as a person would write it; ``∞`` for infinity."""
    if not math.isfinite(value):
        return "∞" if value > 0 else "unknown"
    if value == 0 or 1e-3 <= abs(value) < 1e5:
        return f"{value:,.4g}" if abs(value) < 1e4 else f"{value:,.0f}"
    mantissa, exponent = f"{value:.3e}".split("e")
    return f"{float(mantissa):g}e{int(exponent)}"
