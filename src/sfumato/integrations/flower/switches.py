"""Switches of Flower's processes: nothing is sent home, looked up or installed, and state stays in one folder."""

from __future__ import annotations

import os
import sys
from pathlib import Path

# Telemetry and the update check are on by default, and so is ``uv sync`` of whatever an app declares.
SWITCHES = {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
}


def environment(home: str | Path) -> dict[str, str]:
    """The variables to start any process of Flower with: those of this process, with the switches.

    ``home``: folder for Flower's configuration, installed apps and credentials (``FLWR_HOME``); it is created, readable
    by its owner only. Flower's own default is one folder for all that a user runs.
    """
    folder = Path(home).absolute()
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    # Flower's processes start each other by name.
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
    return {**os.environ, **SWITCHES, "FLWR_HOME": str(folder), "PATH": path}
