"""What is seen of a federation while it goes on: ``metrics.jsonl``, and one line a round on standard error."""

from __future__ import annotations

import statistics
import sys
from dataclasses import asdict
from pathlib import Path
from types import TracebackType

from ..federated import Round
from ..report import RoundRow
from .metrics import JsonLines

LINES = 50  # at most so many on the screen, evenly spread
_NOTE = (
    "epsilon and client_* are certified upper bounds. cohort, accepted, rejected and bytes are for whoever "
    "runs the server: where cohorts are drawn at random, the guarantee does not cover their publication. "
    "test_accuracy is computed from test records, which the guarantee is not about; measure from public records."
)


class FederatedMetrics:
    """Collects rows, writes each one as a line of JSON (the first line is a note) and shows progress."""

    def __init__(self, folder: Path, *, planned: int):
        self.rows: list[RoundRow] = []
        self._planned = planned
        self._lines = JsonLines(folder)
        self._lines.write({"kind": "note", "note": _NOTE})

    def __enter__(self) -> FederatedMetrics:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._lines.close()

    def add(self, found: Round, test_accuracy: float) -> None:
        """One round, when it is over."""
        row = row_of(found, test_accuracy)
        self.rows.append(row)
        self._lines.write({"kind": "round"} | asdict(row) | {"rejected": dict(row.rejected)})
        every = -(-self._planned // LINES)
        if row.round % every == 0 or row.round == self._planned:
            print(_shown(row, self._planned), file=sys.stderr, flush=True)


def row_of(found: Round, test_accuracy: float) -> RoundRow:
    """The report's row of a round."""
    values = list(found.client_epsilons.values()) or [found.epsilon]
    return RoundRow(
        round=found.number,
        cohort=found.cohort,
        accepted=found.accepted,
        rejected=tuple(sorted(found.rejected.items())),
        epsilon=found.epsilon,
        client_min=min(values),
        client_median=statistics.median(values),
        client_max=max(values),
        max_update_norm=found.max_update_norm,
        noise_std=found.noise_std,
        bytes_up=found.bytes_up,
        bytes_down=found.bytes_down,
        seconds=found.seconds,
        measure=found.measure,
        test_accuracy=test_accuracy,
    )


def _shown(row: RoundRow, planned: int) -> str:
    accuracy = "" if row.test_accuracy is None else f"  test_accuracy {row.test_accuracy:.4f}"
    return (
        f"round {row.round} of {planned}  epsilon {row.epsilon:.3f} (clients {row.client_min:.3f} / "
        f"{row.client_median:.3f} / {row.client_max:.3f})  answers {row.accepted} of {row.cohort}{accuracy}"
    )
