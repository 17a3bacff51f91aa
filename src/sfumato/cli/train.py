"""``sfumato train``: data in, private model and report out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from . import settings
from .messages import logged
from .result import Result

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser, Namespace

SUMMARY = "train a classifier with differential privacy and write a report"


def add_arguments(parser: ArgumentParser) -> None:
    """See :mod:`.settings`."""
    settings.add_target(parser)
    settings.add_arguments(parser, out="run", budget="--epsilon")


def run(options: Namespace, argv: Sequence[str]) -> Result:
    """Check every option first: a mistake costs no import of torch and leaves nothing behind."""
    settings.check_target(options)
    settings.check(options)
    from .job import run_job

    with logged(options.verbose):
        return run_job(options, argv)
