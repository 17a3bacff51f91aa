"""``sfumato federate``: one model trained across clients, private model and report out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from . import federated_settings as settings
from .messages import first_warnings, logged
from .result import Result

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser, Namespace

SHOWN = 3  # failures of clients; all are counted in the report
SUMMARY = "train one classifier across clients with differential privacy and write a report"


def add_arguments(parser: ArgumentParser) -> None:
    """See :mod:`.federated_settings`."""
    settings.add_arguments(parser)


def run(options: Namespace, argv: Sequence[str]) -> Result:
    """Check every option first: a mistake costs no import of torch and leaves nothing behind."""
    checked = settings.check(options)
    from .federated_job import run_job

    with logged(True) if options.verbose else first_warnings(SHOWN):
        return run_job(options, checked, argv)
