"""``sfumato check``: is a model ready for private training?"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import ConfigurationError
from .result import Result

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser, Namespace

SUMMARY = "whether a model, its loss and a batch can be trained privately (exit code 1: a problem was found)"
_KEYS = ("model", "criterion", "batch")


def add_arguments(parser: ArgumentParser) -> None:
    """The factory takes no arguments."""
    parser.add_argument(
        "factory",
        type=str,
        metavar="package.module:factory",
        help="a function that returns (model, criterion, batch), or a dict with these keys",
    )
    parser.add_argument(
        "--loss-reduction", type=str, default="mean", metavar="REDUCTION", help="mean (default) or sum, over records"
    )
    parser.add_argument(
        "--batch-dim", type=int, default=0, help="axis of the model's inputs that holds the records (default 0)"
    )


def run(options: Namespace, argv: Sequence[str]) -> Result:
    """The report, in words or as JSON."""
    if options.loss_reduction not in ("mean", "sum"):
        raise ConfigurationError(f"--loss-reduction: {options.loss_reduction!r} is neither mean nor sum")
    if options.batch_dim < 0:
        raise ConfigurationError(f"--batch-dim: {options.batch_dim} is negative")
    model, criterion, batch = _made(options.factory)
    from ..checking import check

    try:
        report = check(model, criterion, batch, loss_reduction=options.loss_reduction, batch_dim=options.batch_dim)
    except SystemExit as stop:  # a forward that ends the process: its exit code is not the answer
        raise ConfigurationError(f"{options.factory}: the model or the criterion called {_exit(stop)}") from stop
    return Result(report.to_dict(), str(report), ok=report.ok)


def _made(spec: str) -> tuple[Any, Any, Any]:
    module_name, colon, attribute = spec.partition(":")
    if not (module_name and colon and attribute):
        raise ConfigurationError(f"{spec!r} is not package.module:factory")
    if (here := str(Path.cwd())) not in sys.path:
        sys.path.insert(0, here)  # a console script does not have the working directory on its path
    try:
        factory = getattr(importlib.import_module(module_name), attribute)
        made = factory()
    except SystemExit as stop:  # a script without an `if __name__ == "__main__"` guard
        raise ConfigurationError(f"{spec} called {_exit(stop)} when it was imported or called") from stop
    except Exception as error:  # the user's own code: any failure is theirs to read, in one line
        raise ConfigurationError(f"{spec} failed: {type(error).__name__}: {error}") from error
    if isinstance(made, Mapping) and set(made) == set(_KEYS):
        made = tuple(made[k] for k in _KEYS)
    if not isinstance(made, (tuple, list)) or len(made) != len(_KEYS):
        raise ConfigurationError(f"{spec} returned a {type(made).__name__}, not (model, criterion, batch)")
    return made[0], made[1], made[2]


def _exit(stop: SystemExit) -> str:
    return f"sys.exit({'' if stop.code is None else stop.code!r})"
