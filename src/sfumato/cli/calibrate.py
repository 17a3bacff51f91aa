"""``sfumato calibrate``: the noise, the steps or the sampling rate that a target allows. Imports no torch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ..errors import ConfigurationError
from . import mechanism
from .epsilon import described
from .result import Result

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser, Namespace

SUMMARY = "smallest noise, most steps or largest sampling rate that keeps a target"
COUNTED = ("poisson", "cyclic", "shuffle")  # what a step costs does not depend on the number of records
# What is solved for -> the flag that is then not given.
UNKNOWN = {"noise": "noise_multiplier", "steps": "steps", "rate": "sample_rate"}
TARGETS = ("epsilon", "advantage", "tpr")


def add_arguments(parser: ArgumentParser) -> None:
    """A target, δ, and two of noise, steps and rate."""
    add = parser.add_argument
    # fmt: off
    add("--epsilon", type=float, help="target epsilon")
    add("--advantage", type=float, help="or: target membership advantage, detection less false alarms, 0 to 1")
    add("--tpr", type=float, help="or: target detection rate of any membership attack at --fpr false alarms")
    add("--fpr", type=float, help="false-alarm rate of --tpr (default 0.01)")
    add("--delta", type=float, required=True, help="delta at which epsilon is stated, and held if it is the target")
    add("--solve", type=str, default="noise", choices=list(UNKNOWN), help="what to find (default noise)")
    add("--noise-multiplier", type=float, help="noise over the clipping norm, unless it is solved for")
    add("--sample-rate", type=float, help="chance of each record to be in a step, unless it is solved for")
    add("--steps", type=int, help="number of noisy steps, unless they are solved for")
    # fmt: on
    mechanism.add_arguments(parser)


def run(options: Namespace, argv: Sequence[str]) -> Result:
    """The value found, on the safe side, and the ε it really gives."""
    from ..accounting import budget
    from ..report import at_least, at_most

    how, target = mechanism.scheme(options), _target(options)
    known = {name: options[name] for name in UNKNOWN.values()}
    for solved, name in UNKNOWN.items():
        flag = "--" + name.replace("_", "-")
        if (solved == options.solve) == (known[name] is not None):
            raise ConfigurationError(
                f"{flag} is what --solve {options.solve} finds" if solved == options.solve else f"{flag} is missing"
            )
    checks = {"noise_multiplier": budget.positive, "sample_rate": budget.rate, "steps": budget.count}
    given = {name: checks[name](name, value) for name, value in known.items() if value is not None}
    found = {**given, UNKNOWN[options.solve]: _solved(how, options.solve, given, target)}
    events = mechanism.events(
        how,
        noise_multiplier=float(found["noise_multiplier"]),
        sample_rate=float(found["sample_rate"]),
        steps=int(found["steps"]),
    )
    data, text = described(events, delta=options.delta)
    data |= {f"target_{name}": options[name] for name in TARGETS if options[name] is not None}
    data |= {**found, "sampling": how.sampling, "solved": options.solve}
    if options.tpr is not None:
        data["fpr"] = target["false_positive_rate"]
    shown = {
        "noise": f"noise multiplier = {at_most(found['noise_multiplier'])}",
        "steps": f"steps = {found['steps']}",
        "rate": f"sample rate = {at_least(found['sample_rate'])}",
    }
    return Result(data, f"{shown[options.solve]}\n{text}")


def _target(options: Namespace) -> dict[str, Any]:
    given = [name for name in TARGETS if options[name] is not None]
    if len(given) != 1:
        raise ConfigurationError("give one target: --epsilon, --advantage or --tpr")
    if options.fpr is not None and given != ["tpr"]:
        raise ConfigurationError("--fpr goes with --tpr")
    (name,) = given
    target = {f"target_{name}": float(options[name])}
    if name == "epsilon":
        return target | {"target_delta": float(options.delta)}
    if not 0.0 < options[name] < 1.0:
        raise ConfigurationError(f"--{name} must lie between 0 and 1, got {options[name]:g}")
    if name == "advantage":
        return target
    fpr = 0.01 if options.fpr is None else float(options.fpr)
    if not 0.0 < fpr < options.tpr:
        raise ConfigurationError(f"--fpr must lie between 0 and --tpr: guessing reaches as much, got {fpr:g}")
    return target | {"false_positive_rate": fpr}


def _solved(how: mechanism.Scheme, kind: str, given: dict[str, Any], target: dict[str, Any]) -> float | int:
    """The unknown number. A shuffled epoch, or a cycle, counts as one step in which a record can take part."""
    from .. import accounting

    if kind == "noise":
        ((event, times),) = mechanism.events(how, noise_multiplier=1.0, **given).items()
        return accounting.noise_multiplier(event=event, steps=times, **target)
    if how.sampling not in COUNTED:
        raise ConfigurationError(
            f"--solve {kind} is not implemented for --sampling {how.sampling}.", fix="solve for the noise."
        )
    sigma, shuffled, adjacency = given["noise_multiplier"], how.sampling == "shuffle", how.adjacency
    if kind == "steps" or shuffled:
        rate = 1.0 if shuffled else given["sample_rate"]
        most = accounting.steps(noise_multiplier=sigma, sample_rate=rate, adjacency=adjacency, **target)
        if kind == "steps":
            return most * (mechanism.steps_per_epoch(given["sample_rate"]) if shuffled else how.cycle or 1)
        if most == 0:
            raise ConfigurationError("not even one epoch keeps the target.", fix="raise the noise or the target.")
        return 1.0 / max(1, math.ceil(given["steps"] / most))
    times = mechanism.charges(how, sample_rate=1.0, steps=given["steps"])
    return accounting.sample_rate(noise_multiplier=sigma, steps=times, adjacency=adjacency, **target)
