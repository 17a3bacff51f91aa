"""Messages in the words of the command line: flags instead of keys, kinds of values instead of classes; the log."""

from __future__ import annotations

import logging
import re
import sys
import unicodedata
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

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


@contextmanager
def logged(wanted: bool) -> Iterator[None]:
    """Show what the library logs at INFO, on standard error and only here."""
    if not wanted:
        yield
        return
    logger, handler = logging.getLogger("sfumato"), logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(name)s: %(message)s"))
    before = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        logger.setLevel(before)
        logger.removeHandler(handler)


def _flag(key: str) -> str:
    return "--" + key.replace("_", "-")
