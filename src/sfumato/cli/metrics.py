"""What is seen of a run while it goes on: ``metrics.jsonl``, and progress on standard error."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import TextIO

from tqdm import tqdm

from ..report import EpochRow, StepRow
from .result import finite

METRICS_NAME = "metrics.jsonl"
_WITH = (
    "loss, train_accuracy and clip_rate are computed from private records without noise: they are NOT covered by the "
    "privacy guarantee. test_accuracy is computed from test records, which the guarantee is not about."
)
_WITHOUT = (
    "Un-noised training metrics were left out (--no-private-metrics). test_accuracy is computed from test records, "
    "which the guarantee is not about."
)


class JsonLines:
    """``metrics.jsonl`` in ``folder``; without a folder nothing is written."""

    def __init__(self, folder: Path | None):
        self._file: TextIO | None = None if folder is None else (folder / METRICS_NAME).open("w", encoding="utf-8")

    def write(self, row: dict[str, object]) -> None:
        """One line, on disk at once: None is left out, infinity and NaN become null."""
        if self._file is None:
            return
        kept = {k: finite(v) if isinstance(v, float) else v for k, v in row.items() if v is not None}
        self._file.write(json.dumps(kept, allow_nan=False) + "\n")
        self._file.flush()

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            self._file.close()


class Metrics:
    """Collects rows, writes each one as a line of JSON (the first line is a note), and moves a progress bar.

    Nothing is written without a ``folder``.
    """

    def __init__(self, folder: Path | None, *, planned_steps: int, private: bool):
        self.steps: list[StepRow] = []
        self.epochs: list[EpochRow] = []
        self._private = private
        self._lines = JsonLines(folder)
        self._live = sys.stderr.isatty()
        self._bar = tqdm(total=planned_steps, unit="step", file=sys.stderr, disable=not self._live, leave=False)
        self._shown: dict[str, str] = {}
        self._lines.write({"kind": "note", "note": _WITH if private else _WITHOUT})

    def __enter__(self) -> Metrics:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.close()
        self._lines.close()

    def step(self, row: StepRow) -> None:
        """One release."""
        self.steps.append(row)
        self._lines.write({"kind": "step"} | asdict(row))
        formats: dict[str, Callable[[float], str]] = {
            "loss": "{:.3f}".format,
            "train_accuracy": "{:.3f}".format,
            "clip_rate": "{:.2f}".format,
            "epsilon": "{:.3f}".format,
        }
        for name, form in formats.items():
            if (value := getattr(row, name)) is not None:
                self._shown[name] = form(value)
        self._bar.set_postfix_str(" ".join(f"{k}={v}" for k, v in self._shown.items()), refresh=False)
        self._bar.update(row.step - self._bar.n)

    def epoch(self, row: EpochRow) -> None:
        """One evaluation; without a terminal, also one line of progress."""
        self.epochs.append(row)
        self._lines.write({"kind": "epoch"} | asdict(row))
        self._shown |= {"epsilon": f"{row.epsilon:.3f}", "test_accuracy": f"{row.test_accuracy:.4f}"}
        if not self._live:
            shown = "  ".join(f"{k} {v}" for k, v in self._shown.items())
            print(f"step {row.step} of {self._bar.total}  {shown}", file=sys.stderr, flush=True)
