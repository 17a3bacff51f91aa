"""One rule for each operation in which a parameter meets records.

A rule has the signature of the torch function it stands for (after ``c``, the capture), so positional and keyword
calls bind alike. Operations without a rule of their own go through ``broadcast``: the parameter is spread, one copy
for each record, and the operation runs as it is. ``NoRule`` sends the module down the fallback ladder.
"""

from sfumato.ghost.rules import aligned, attention, conv, linear, lookup, norm, recurrent, routed, user
from sfumato.ghost.rules.elementwise import broadcast
from sfumato.ghost.rules.table import RULES, SCREENS, NoRule, Split

__all__ = [
    "RULES",
    "SCREENS",
    "NoRule",
    "Split",
    "aligned",
    "attention",
    "broadcast",
    "conv",
    "linear",
    "lookup",
    "norm",
    "recurrent",
    "routed",
    "user",
]
