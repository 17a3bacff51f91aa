"""What the tests of the command line share."""

from __future__ import annotations

import gzip
import json
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Ran:
    code: int
    out: str
    err: str

    @property
    def json(self) -> dict[str, Any]:
        """Standard output must be one JSON object and nothing else, in strict JSON."""

        def refuse(constant: str) -> float:
            raise AssertionError(f"{constant} is not JSON")

        assert self.out.count("\n") == 1, self.out
        return json.loads(self.out, parse_constant=refuse)

    def failed(self, code: int) -> str:
        """One clear line on standard error, nothing on standard output; returns the line."""
        assert (self.code, self.out) == (code, ""), (self.code, self.out, self.err)
        lines = [line for line in self.err.splitlines() if ": warning: " not in line]
        assert len(lines) == 1, self.err
        assert lines[0].startswith("sfumato")
        assert ": error: " in lines[0]
        assert "Traceback" not in self.err
        return lines[0]


Run = Callable[..., Ran]


def write_idx(path: Path, array: np.ndarray) -> None:
    content = bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
