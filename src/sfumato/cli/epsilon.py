"""``sfumato epsilon``: what a training run costs. Imports no torch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from .result import Result, finite

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser, Namespace

SUMMARY = "certified epsilon of DP-SGD with Poisson sampling"


def add_arguments(parser: ArgumentParser) -> None:
    """All four numbers are needed."""
    parser.add_argument(
        "--noise-multiplier", type=float, required=True, help="noise standard deviation over the clipping norm"
    )
    parser.add_argument("--sample-rate", type=float, required=True, help="chance of each record to be in a step")
    parser.add_argument("--steps", type=int, required=True, help="number of noisy steps")
    parser.add_argument("--delta", type=float, required=True)


def run(options: Namespace, argv: Sequence[str]) -> Result:
    """Certified upper and lower bound of ε (add-or-remove one record)."""
    from ..accounting import epsilon
    from ..report import at_least, at_most

    spent = epsilon(
        noise_multiplier=options.noise_multiplier,
        sample_rate=options.sample_rate,
        steps=options.steps,
        delta=options.delta,
    )
    data = {
        "epsilon": finite(spent.upper),
        "lower": finite(spent.lower),
        "delta": options.delta,
        "noise_multiplier": options.noise_multiplier,
        "sample_rate": options.sample_rate,
        "steps": options.steps,
        "adjacency": "add-remove",
        "private": math.isfinite(spent.upper),
    }
    text = (
        f"epsilon = {at_most(spent.upper)} at delta = {options.delta:g} for adding or removing one record "
        f"(certified: the true value is at least {at_least(spent.lower)})"
    )
    return Result(data, text)
