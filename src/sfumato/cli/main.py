"""Parse, run one sub-command, print its result, and turn errors into one line and an exit code.

Exit codes: 0 done; 1 the budget or the guarantee failed, or the run was interrupted; 2 bad usage or bad input.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Sequence
from types import ModuleType
from typing import TYPE_CHECKING, Protocol

from ..errors import BudgetExceeded, PrivacyError, SfumatoError
from . import calibrate, check, epsilon, federate, ledger, report, sweep, train
from .messages import one_line, parser_message, visible
from .result import Result

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser, Namespace

OK, FAILED, USAGE = 0, 1, 2
COMMANDS: dict[str, ModuleType] = {
    "train": train,
    "sweep": sweep,
    "epsilon": epsilon,
    "calibrate": calibrate,
    "check": check,
    "ledger": ledger,
    "report": report,
    "federate": federate,
}


class Command(Protocol):
    """What a sub-command module offers."""

    SUMMARY: str

    def add_arguments(self, parser: ArgumentParser) -> None: ...

    def run(self, options: Namespace, argv: Sequence[str]) -> Result: ...


def main(argv: Sequence[str] | None = None) -> int:
    """Run ``sfumato`` with ``argv`` (default: the process's arguments) and return the exit code.

    Standard output carries the result and nothing else (one JSON object with ``--json``); progress, warnings and
    errors go to standard error. An error is one line.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        import argparse

        import jsonargparse  # noqa: F401
    except ImportError:
        return _fail("sfumato", "the command line needs its extra packages. Fix: pip install 'sfumato[cli]'", USAGE)
    try:
        options = _parser().parse_args(arguments)
    except SystemExit as stop:  # --help and --version
        return int(stop.code or 0)
    except (argparse.ArgumentError, TypeError, ValueError) as error:
        return _fail(_name(arguments), parser_message(str(error), COMMANDS), USAGE)
    name = f"sfumato {options.command}"
    try:
        # What the user's own code prints must not end up in the result.
        with contextlib.redirect_stdout(sys.stderr):
            result: Result = COMMANDS[options.command].run(options[options.command], arguments)
    except (BudgetExceeded, PrivacyError) as error:
        return _fail(name, _text(error), FAILED)
    except (SfumatoError, OSError) as error:
        if options[options.command].json and isinstance(error.__cause__, SystemExit):  # the user's code ended it
            print(json.dumps({"ok": False, "error": _text(error)}))
        return _fail(name, _text(error), USAGE)
    except KeyboardInterrupt as error:
        return _fail(name, "interrupted. " + _text(error), FAILED)
    _print(json.dumps(result.data, allow_nan=False) if options[options.command].json else result.text)
    return OK if result.ok else FAILED


def _parser() -> ArgumentParser:
    import argparse

    from jsonargparse import ArgumentParser

    def new(summary: str) -> ArgumentParser:
        return ArgumentParser(
            description=summary,
            formatter_class=argparse.HelpFormatter,
            exit_on_error=False,
            allow_abbrev=False,
            default_env=False,
        )

    parser = new("Train PyTorch models with differential privacy, and account for it.")
    parser.prog = "sfumato"
    parser.add_argument("--version", action="version", version=f"sfumato {_version()}")
    commands = parser.add_subcommands(required=True, dest="command")
    for name, command in COMMANDS.items():
        sub = new(command.SUMMARY)
        sub.add_argument(
            "--config", action="config", metavar="FILE.yaml", help="options from a YAML file, keys as the flags"
        )
        sub.add_argument("--json", action="store_true", help="print exactly one JSON object on standard output")
        command.add_arguments(sub)
        commands.add_subcommand(name, sub, help=command.SUMMARY)
    return parser


def _print(text: str) -> None:
    try:
        print(visible(text), flush=True)
    except BrokenPipeError:  # the reader has seen enough, as in `sfumato ledger show … | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _version() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("sfumato")
    except PackageNotFoundError:
        return "(not installed)"


def _name(arguments: Sequence[str]) -> str:
    return f"sfumato {arguments[0]}" if arguments and arguments[0] in COMMANDS else "sfumato"


def _text(error: BaseException) -> str:
    return " ".join([str(error), *getattr(error, "__notes__", [])])


def _fail(name: str, message: str, code: int) -> int:
    print(f"{name}: error: {one_line(message)}", file=sys.stderr)
    return code
