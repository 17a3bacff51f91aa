"""Messages in the words of the command line: flags instead of keys, kinds of values instead of classes; the log."""

from __future__ import annotations

import logging
import re
import sys
import unicodedata
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TextIO

_KINDS = {"float": "number", "int": "whole number", "str": "text", "bool": "true or false"}


def one_line(text: str) -> str:
    """The text without line breaks, repeated blanks and control characters."""
    return visible(" ".join(text.split()))


def visible(text: str, keep: str = "\n\t") -> str:
    """Text that may hold names from a file, without what would drive a terminal."""
    return "".join(c if c in keep or unicodedata.category(c) != "Cc" else "\N{REPLACEMENT CHARACTER}" for c in text)


def parser_message(text: str, commands: Iterable[str]) -> str:
    """The parser's message, rewritten where it speaks of internals."""
    text = one_line(text)
    names = "|".join(commands)
    text = re.sub(rf"\b(?:{names})\.([a-z_]+)\b", lambda m: _flag(m[1]), text)
    text = re.sub(r'Parser key "([a-z_]+)":', lambda m: f"{_flag(m[1])}:", text)
    text = re.sub(
        r"Expected an? <class '(\w+)'>\. Got value: (.*)",
        lambda m: f"expected a {_KINDS.get(m[1], m[1])}, got {m[2]!r}",
        text,
    )
    return re.sub(r"Subcommand '\w+' does not accept option '([^']+)'", r"unknown option or key '\1'", text)


class _Line(logging.Formatter):
    """One line, whatever names from the data are in it."""

    def format(self, record: logging.LogRecord) -> str:
        return one_line(super().format(record))


@contextmanager
def logged(wanted: bool) -> Iterator[None]:
    """Show what the library logs at INFO, on standard error and only here."""
    if not wanted:
        yield
        return
    logger, handler = logging.getLogger("sfumato"), logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Line("%(name)s: %(message)s"))
    before = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        logger.setLevel(before)
        logger.removeHandler(handler)


@contextmanager
def first_warnings(most: int) -> Iterator[None]:
    """Show the first ``most`` warnings that the library logs, on standard error, and say that there were more."""

    class First(logging.StreamHandler[TextIO]):
        seen = 0

        def emit(self, record: logging.LogRecord) -> None:
            self.seen += 1
            if self.seen <= most:
                super().emit(record)

    logger, handler = logging.getLogger("sfumato"), First(sys.stderr)
    handler.setLevel(logging.WARNING)
    handler.setFormatter(_Line("%(name)s: warning: %(message)s"))
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        if handler.seen > most:
            print(f"sfumato: warning: {handler.seen - most:,} more such warnings (--verbose)", file=sys.stderr)


def _flag(key: str) -> str:
    return "--" + key.replace("_", "-")
