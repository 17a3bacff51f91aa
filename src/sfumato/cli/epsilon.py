"""``sfumato epsilon``: what a training run costs, and what that means. Imports no torch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from . import mechanism
from .result import Result, finite

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser, Namespace

    from ..accounting import Event

SUMMARY = "certified epsilon of noisy training steps, and what it means"


def add_arguments(parser: ArgumentParser) -> None:
    """Four numbers are needed; the sampling has a default."""
    parser.add_argument(
        "--noise-multiplier", type=float, required=True, help="noise standard deviation over the clipping norm"
    )
    parser.add_argument("--sample-rate", type=float, required=True, help="chance of each record to be in a step")
    parser.add_argument("--steps", type=int, required=True, help="number of noisy steps")
    parser.add_argument("--delta", type=float, required=True)
    mechanism.add_arguments(parser)


def run(options: Namespace, argv: Sequence[str]) -> Result:
    """Certified bounds of ε, and what any attack can make of it."""
    how = mechanism.scheme(options)
    events = mechanism.events(
        how, noise_multiplier=options.noise_multiplier, sample_rate=options.sample_rate, steps=options.steps
    )
    (event,) = events
    data, text = described(events, delta=options.delta)
    data |= {
        "noise_multiplier": options.noise_multiplier,
        "sample_rate": options.sample_rate if how.sampling != "fixed-size" else event.sample_rate,
        "steps": options.steps,
        "sampling": how.sampling,
    }
    return Result(data, text)


def described(events: dict[Event, int], *, delta: float) -> tuple[dict[str, Any], str]:
    """(JSON, text) about the ε of ``events``: bounds, attacks, sampling, groups, values that others chose."""
    from ..accounting import compose
    from ..report import Guarantee, at_least, at_most, meaning, meaning_json, plain_text
    from ..report.words import NEIGHBOUR

    spent = compose(events, delta=delta)
    (adjacency,) = {event.adjacency for event in events}
    guarantee = Guarantee(spent.upper, spent.lower, delta, "record", adjacency)
    found = meaning(events, delta=delta)
    change = NEIGHBOUR[adjacency].format(unit="record")
    text = f"epsilon = {at_most(spent.upper)} at delta = {delta:g} for {change}"
    if spent.lower > 0.0:
        text += f" (certified: the true value is at least {at_least(spent.lower)})"
    data = {
        "epsilon": finite(spent.upper),
        "lower": finite(spent.lower),
        "delta": delta,
        "adjacency": adjacency,
        "private": math.isfinite(spent.upper),
        **meaning_json(found),
    }
    return data, f"{text}\n{plain_text(guarantee, found)}"
