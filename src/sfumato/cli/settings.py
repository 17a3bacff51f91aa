"""The options of ``sfumato train``: declared, checked, and completed by a recipe."""

from __future__ import annotations

import math
import secrets
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import ConfigurationError
from .recipes import Recipe

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser, Namespace

OPTIMIZERS = ("sgd", "adam")
SCHEDULES = ("constant", "linear", "cosine")
DEVICES = ("auto", "cpu", "cuda")
DEFAULT_DELTA = 1e-5


@dataclass(frozen=True)
class Settings:
    """A complete, valid set of options; ``recipe`` holds the hyperparameters after overrides."""

    epsilon: float | None
    delta: float
    noise_multiplier: float | None
    recipe: Recipe
    seed: int
    device: str
    ledger: Path | None
    private_metrics: bool


def add_target(parser: ArgumentParser) -> None:
    """Flags for how much privacy one training may cost."""
    add = parser.add_argument
    # fmt: off
    add("--epsilon", type=float, help="privacy budget; training ends before the step that would exceed it")
    add("--noise-multiplier", type=float, help="noise over clipping norm; default: what --epsilon allows")
    # fmt: on


def add_data(parser: ArgumentParser, *, more: str = "") -> None:
    """Flags for what is trained on, and which model."""
    add = parser.add_argument
    # fmt: off
    add("--data", type=str, default="digits", metavar="DATA",
        help=f"'digits' (embedded, default), {more}an idx folder, a CSV or Parquet file, or an image folder")
    add("--label", type=str, metavar="COLUMN", help="column to predict (tables)")
    add("--bounds", type=str, metavar="FILE.yaml",
        help="public ranges and categories of a table's columns: {age: [0, 120], colour: [red, blue]}")
    add("--test-fraction", type=float, help="part of the records held out for testing (default 0.2; digits 360)")
    add("--image-size", type=int, help="resize images of a folder to this many pixels squared")
    add("--model", type=str,
        help="linear, mlp, cnn, tramer_boneh, papernot, scattering, energy, or package.module:factory")
    # fmt: on


def add_arguments(parser: ArgumentParser, *, out: str, budget: str) -> None:
    """Flags; a hyperparameter that is not given comes from the recipe of the data set."""
    add_data(parser)
    add = parser.add_argument
    # fmt: off
    add("--delta", type=float, default=DEFAULT_DELTA, help="delta of the guarantee (default 1e-5)")
    add("--epochs", type=int, help="passes over the data (expected)")
    add("--batch-size", type=int, help="expected records per step; each is drawn independently")
    add("--lr", type=float, help="learning rate")
    add("--lr-schedule", type=str, choices=list(SCHEDULES), help="constant, linear or cosine (to zero)")
    add("--momentum", type=float, help="momentum (sgd)")
    add("--optimizer", type=str, choices=list(OPTIMIZERS), help="sgd or adam")
    add("--max-grad-norm", type=float, help="clipping norm of each record's gradient")
    add("--max-physical-batch-size", type=int, help="records processed at once; bounds memory, changes nothing else")
    add("--averaging", type=str, metavar="none|ema:DECAY|last:FRACTION",
        help="average of released parameters to save; costs no privacy")
    add("--seed", type=int, help="initialisation; noise and record selection are never seeded")
    add("--device", type=str, default="auto", choices=list(DEVICES), help="auto (default), cpu or cuda")
    add("--ledger", type=str, metavar="FILE.db",
        help=f"ledger shared by several runs on the same records; {budget} is then the budget of all of them")
    add("--no-private-metrics", action="store_true",
        help="leave un-noised training loss, accuracy and clip rate out of the screen, the report and metrics.jsonl")
    add("--verbose", action="store_true", help="print the privacy metrics of each step or epoch on standard error")
    add("--out", type=str, default=out, help=f"new folder for everything that is written (default: {out})")
    # fmt: on


def check_target(options: Namespace) -> None:
    """Raise :class:`ConfigurationError` unless the flags of :func:`add_target` say how much may be spent."""
    if options.epsilon is None and options.noise_multiplier is None:
        raise ConfigurationError("give a budget with --epsilon, or the noise with --noise-multiplier")
    positive("--epsilon", options.epsilon)
    sigma = options.noise_multiplier
    if sigma is not None and not (math.isfinite(sigma) and sigma >= 0):
        raise ConfigurationError(f"--noise-multiplier must be 0 or more, got {sigma:g}")
    if sigma == 0 and options.epsilon is not None:
        raise ConfigurationError("--noise-multiplier 0 adds no noise, so no --epsilon can hold")


def check(options: Namespace) -> None:
    """Raise :class:`ConfigurationError` for a value no data set could make sense of."""
    if not 0 < options.delta < 1:
        raise ConfigurationError(f"--delta must lie between 0 and 1, got {options.delta:g}")
    for name in ("lr", "max_grad_norm", "epochs", "batch_size", "max_physical_batch_size"):
        positive("--" + name.replace("_", "-"), options[name])
    if options.momentum is not None and not 0 <= options.momentum < 1:
        raise ConfigurationError(f"--momentum must lie in [0, 1), got {options.momentum:g}")
    if options.seed is not None and not 0 <= options.seed < 2**63:
        raise ConfigurationError(f"--seed must be a whole number from 0 to 2^63 - 1, got {options.seed}")
    if options.averaging is not None:
        parse_averaging(options.averaging)
    if options.ledger and not Path(options.ledger).absolute().parent.is_dir():
        raise ConfigurationError(f"--ledger {options.ledger}: its folder does not exist")


def complete(options: Namespace, recipe: Recipe) -> Settings:
    """The options over the recipe's defaults."""
    chosen = {
        name: getattr(recipe, name) if options[name] is None else options[name] for name in Recipe.__dataclass_fields__
    }
    return Settings(
        epsilon=options.epsilon,
        delta=options.delta,
        noise_multiplier=options.noise_multiplier,
        recipe=Recipe(**chosen),
        seed=secrets.randbits(31) if options.seed is None else options.seed,
        device=options.device,
        ledger=Path(options.ledger) if options.ledger else None,
        private_metrics=not options.no_private_metrics,
    )


def parse_averaging(text: str) -> tuple[str, float]:
    """("none", 0), ("ema", decay) or ("last", fraction), both in (0, 1)."""
    kind, _, number = text.partition(":")
    if text == "none":
        return "none", 0.0
    try:
        value = float(number)
    except ValueError:
        value = -1.0
    if kind not in ("ema", "last") or not 0 < value < 1:
        raise ConfigurationError(
            f"--averaging must be none, ema:DECAY or last:FRACTION (between 0 and 1), got {text!r}"
        )
    return kind, value


def positive(flag: str, value: float | None) -> None:
    """Raise :class:`ConfigurationError` unless ``value`` is None or a finite number above 0."""
    if value is not None and not (math.isfinite(value) and value > 0):
        raise ConfigurationError(f"{flag} must be greater than 0, got {value:g}")
