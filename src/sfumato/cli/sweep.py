"""``sfumato sweep``: accuracy and loss against the noise, every trial charged."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from ..errors import ConfigurationError
from . import settings
from .messages import logged
from .result import Result

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser, Namespace

SUMMARY = "train with several noise levels and plot accuracy and loss; every trial is charged to one ledger"
MOST_TRIALS = 1000


def add_arguments(parser: ArgumentParser) -> None:
    """Those of ``train``, with several noise levels instead of one."""
    add = parser.add_argument
    # fmt: off
    add("--noise-multipliers", type=str, metavar="S1,S2,…", help="noise levels to try, such as 0.5,1,2,4")
    add("--epsilons", type=str, metavar="E1,E2,…", help="instead: the noise that gives each of these for a trial alone")
    add("--repeats", type=int, default=1, help="trainings at each noise level (default 1)")
    add("--budget-epsilon", type=float,
        help="epsilon of all trials together; the sweep ends before the trial that would exceed it")
    # fmt: on
    settings.add_arguments(parser, out="sweep", budget="--budget-epsilon")


def run(options: Namespace, argv: Sequence[str]) -> Result:
    """Check every option first: a mistake costs no import of torch and leaves nothing behind."""
    given = {name: options[name] for name in ("noise_multipliers", "epsilons") if options[name] is not None}
    if len(given) != 1:
        raise ConfigurationError("give the noise levels with --noise-multipliers, or with --epsilons (one of the two)")
    ((name, text),) = given.items()
    values = numbers("--" + name.replace("_", "-"), text)
    if options.repeats < 1 or options.repeats * len(values) > MOST_TRIALS:
        raise ConfigurationError(f"--repeats {options.repeats} makes not 1 to {MOST_TRIALS} trials")
    settings.positive("--budget-epsilon", options.budget_epsilon)
    settings.check(options)
    options.epsilon = options.noise_multiplier = None
    from .trials import run_sweep

    with logged(options.verbose):
        return run_sweep(options, argv, values, targets=name == "epsilons")


def numbers(flag: str, text: str) -> list[float]:
    """Different numbers above 0, separated by commas. No noise at all would make the whole ledger's ε infinite."""
    try:
        found = [float(part) for part in text.split(",")]
    except ValueError:
        raise ConfigurationError(f"{flag} must be numbers separated by commas, got {text!r}") from None
    if not all(math.isfinite(value) and value > 0 for value in found):
        raise ConfigurationError(f"{flag} must be finite and greater than 0, got {text!r}")
    if len(set(found)) < len(found):
        raise ConfigurationError(f"{flag} names a value twice: {text!r}", fix="use --repeats.")
    return found
