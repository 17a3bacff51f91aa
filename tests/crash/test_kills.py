"""Killed at any line, a training never forgets a release, and charges at most the step under way too much."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tests.crash.lives import RESERVED

ROOT = Path(__file__).parents[2]


def lives(kind: str, folder: Path, failpoints: int, schedules: int, seed: int) -> dict[str, Any]:
    arguments = [sys.executable, "-m", "tests.crash.lives", kind, str(folder), *map(str, (failpoints, schedules, seed))]
    child = subprocess.run(arguments, cwd=ROOT, capture_output=True, text=True, check=False)
    assert child.returncode == 0, child.stderr
    return dict(json.loads(child.stdout))


def judge(kind: str, found: dict[str, Any], failpoints: int) -> None:
    assert len({tuple(s["victim"]) for s in found["schedules"]}) >= failpoints
    most = RESERVED if kind == "reserved" else 1
    killed = 0
    for schedule in found["schedules"]:
        deaths = schedule["statuses"].count(-signal.SIGKILL)
        killed += deaths
        assert set(schedule["statuses"]) <= {0, -signal.SIGKILL}, schedule  # no crash leaves a ledger that is refused
        assert schedule["statuses"][-1] == 0, schedule
        assert 0 <= schedule["charged"] - schedule["released"] <= most * deaths, schedule
    assert killed >= len(found["schedules"]) / 2  # most lives did end early


@pytest.mark.dist
@pytest.mark.parametrize(("kind", "failpoints"), [("engine", 10), ("entries", 16), ("reserved", 8)])
def test_a_few_kills(kind: str, failpoints: int, tmp_path: Path) -> None:
    judge(kind, lives(kind, tmp_path / "lives", failpoints, 1, 1), failpoints)


@pytest.mark.dist
@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("kind", ["engine", "entries", "reserved"])
def test_many_kills(kind: str, tmp_path: Path) -> None:
    judge(kind, lives(kind, tmp_path / "lives", 40, 10, 2), 40)
