"""Parser messages in the words of the command line: flags instead of keys, kinds of values instead of classes."""

from __future__ import annotations

import re
from collections.abc import Iterable

_KINDS = {"float": "number", "int": "whole number", "str": "text", "bool": "true or false"}


def one_line(text: str) -> str:
    """The text without line breaks and repeated blanks."""
    return " ".join(text.split())


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


def _flag(key: str) -> str:
    return "--" + key.replace("_", "-")
