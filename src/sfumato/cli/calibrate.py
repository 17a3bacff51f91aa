"""``sfumato calibrate``: the noise that a target ε needs. Imports no torch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from .result import Result, finite

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser, Namespace

SUMMARY = "smallest noise multiplier that keeps a target epsilon"


def add_arguments(parser: ArgumentParser) -> None:
    """All four numbers are needed."""
    parser.add_argument("--epsilon", type=float, required=True, help="target epsilon")
    parser.add_argument("--delta", type=float, required=True, help="target delta")
    parser.add_argument("--sample-rate", type=float, required=True, help="chance of each record to be in a step")
    parser.add_argument("--steps", type=int, required=True, help="number of noisy steps")


def run(options: Namespace, argv: Sequence[str]) -> Result:
    """The noise multiplier, on the safe side, and the ε it really gives."""
    from ..accounting import epsilon, noise_multiplier
    from ..report import at_most

    sigma = noise_multiplier(
        target_epsilon=options.epsilon,
        target_delta=options.delta,
        sample_rate=options.sample_rate,
        steps=options.steps,
    )
    reached = epsilon(
        noise_multiplier=sigma, sample_rate=options.sample_rate, steps=options.steps, delta=options.delta
    ).upper
    data = {
        "noise_multiplier": sigma,
        "epsilon": finite(reached),
        "target_epsilon": options.epsilon,
        "delta": options.delta,
        "sample_rate": options.sample_rate,
        "steps": options.steps,
        "adjacency": "add-remove",
    }
    text = f"noise multiplier = {at_most(sigma)} (epsilon = {at_most(reached)} at delta = {options.delta:g})"
    return Result(data, text)
