"""The table of rules: operation name to function, filled by the modules of this folder."""

from collections.abc import Callable
from typing import Any

from torch import Tensor


class NoRule(BaseException):
    """Internal: this operation needs a lower tier. No ``except Exception`` of the user's may swallow it."""

    def __init__(self, operation: str, why: str):
        super().__init__(f"{operation}: {why}")
        self.operation, self.why = operation, why


class Split(BaseException):
    """Internal: the records decide a branch differently, so each group must run on its own."""

    def __init__(self, each: Tensor):
        super().__init__("a decision that the records take differently")
        self.each = each


RULES: dict[str, Callable[..., Any]] = {}
# Operations that are refused by their arguments, whether or not they hold parameters.
SCREENS: dict[str, Callable[..., None]] = {}


def rule(*names: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    def register(fn: Callable[..., Any]) -> Callable[..., Any]:
        for name in names:
            RULES[name] = fn
        return fn

    return register
