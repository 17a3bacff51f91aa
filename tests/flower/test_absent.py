"""Where Flower is not installed, nothing breaks but what needs it, and that says what to install."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
ABSENT = """
import importlib.util, sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "flwr":
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Absent())
found = importlib.util.find_spec
importlib.util.find_spec = lambda name, package=None: None if name == "flwr" else found(name, package)
"""


def run(script: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=False, timeout=60
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_nothing_else_imports_flower() -> None:
    script = """
import sys, sfumato, sfumato.integrations.flower, sfumato.federated
[getattr(sfumato, name) for name in sfumato.__all__]
print([name for name in sys.modules if name.split(".")[0] in ("flwr", "ray", "grpc")])
"""
    assert run(script) == "[]"


def test_what_needs_it_says_so() -> None:
    script = f"""{ABSENT}
import sfumato
import sfumato.federated
import sfumato.integrations.flower as flower
from sfumato.errors import ConfigurationError
for name in flower.__all__:
    try:
        getattr(flower, name)
    except ConfigurationError as error:
        assert "sfumato[flower]" in str(error), error
        print(name)
"""
    assert len(run(script).split()) == 5


def test_these_tests_are_skipped_without_it() -> None:
    script = f"""{ABSENT}
import pytest
sys.exit(pytest.main(["-q", "-p", "no:cacheprovider", "tests/flower", "--ignore=tests/flower/test_absent.py"]))
"""
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=False, timeout=60
    )
    assert done.returncode in (0, 5), done.stdout + done.stderr
    assert "error" not in done.stdout.lower()
    assert "skipped" in done.stdout
