"""What a sub-command hands back to be printed."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Result:
    """``data``: the JSON object; ``text``: the same for people; ``ok``: False exits with 1."""

    data: dict[str, Any]
    text: str
    ok: bool = True


def finite(value: float) -> float | None:
    """A number JSON can hold: infinity and NaN become null."""
    return float(value) if math.isfinite(value) else None
