"""``sfumato check``: the report of sf.check, as an exit code."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.cli.helpers import Run

CODE = """
import torch
from torch import nn

def vectors():
    return torch.randn(6, 4), torch.arange(6) % 3

def sound():
    print("noise on standard output")
    return nn.Linear(4, 3), nn.CrossEntropyLoss(), vectors()

def named():
    return {"model": nn.Linear(4, 3), "criterion": nn.CrossEntropyLoss(), "batch": vectors()}

def summed():
    return nn.Linear(4, 3), nn.CrossEntropyLoss(reduction="sum"), vectors()

def coupled():
    return nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3)), nn.CrossEntropyLoss(), vectors()

def single():
    return nn.Linear(4, 3), nn.CrossEntropyLoss(), (torch.randn(1, 4), torch.zeros(1).long())

def broken():
    raise RuntimeError("no such file")

def leaves():
    raise SystemExit(0)

class Leaves(nn.Linear):
    def forward(self, x):
        raise SystemExit(7)

def leaves_in_forward():
    return Leaves(4, 3), nn.CrossEntropyLoss(), vectors()

def pair():
    return nn.Linear(4, 3), vectors()

NUMBER = 3
"""


@pytest.fixture(autouse=True)
def _factories(sfumato: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "their_code.py").write_text(CODE)
    (tmp_path / "their_script.py").write_text("import sys\ndef make(): ...\nsys.exit(0)\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(__import__("sys").modules, "their_code", raising=False)


@pytest.mark.parametrize("factory", ["sound", "named"])
def test_a_sound_model_exits_with_0(sfumato: Run, factory: str) -> None:
    ran = sfumato("check", f"their_code:{factory}", "--json")
    assert ran.code == 0, ran.err
    assert ran.json["ok"] is True
    assert ran.json["coverage"] == {"weight": "rule", "bias": "rule"}
    assert sfumato("check", f"their_code:{factory}").out.startswith("No problem found")


def test_a_problem_exits_with_1_and_prints_the_report(sfumato: Run) -> None:
    ran = sfumato("check", "their_code:coupled", "--json")
    assert ran.code == 1
    assert ran.json["ok"] is False
    assert ran.json["problems"][0]["where"] == "1"
    words = sfumato("check", "their_code:coupled")
    assert words.code == 1
    assert "GroupNorm" in words.out


def test_the_reduction_is_passed_on(sfumato: Run) -> None:
    assert sfumato("check", "their_code:summed").code == 1
    assert sfumato("check", "their_code:summed", "--loss-reduction", "sum").code == 0


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], "factory"),
        (["their_code"], "package.module:factory"),
        (["nowhere_at_all:factory"], "nowhere_at_all"),
        (["their_code:missing"], "missing"),
        (["their_code:NUMBER"], "not callable"),
        (["their_code:broken"], "no such file"),
        (["their_code:leaves"], "sys.exit(0)"),
        (["their_code:leaves_in_forward"], "sys.exit(7)"),
        (["their_script:make"], "sys.exit(0)"),
        (["their_code:pair"], "(model, criterion, batch)"),
        (["their_code:single"], "2 records"),
        (["their_code:sound", "--loss-reduction", "median"], "--loss-reduction"),
        (["their_code:sound", "--batch-dim", "-1"], "--batch-dim"),
    ],
)
def test_bad_usage_exits_with_2(sfumato: Run, arguments: list[str], says: str) -> None:
    assert says in sfumato("check", *arguments).failed(2)


@pytest.mark.parametrize("factory", ["their_code:leaves", "their_code:leaves_in_forward", "their_script:make"])
def test_a_process_that_ends_itself_is_an_error_for_programs(sfumato: Run, factory: str) -> None:
    ran = sfumato("check", factory, "--json")
    assert ran.code == 2
    assert ran.json["ok"] is False
    assert "sys.exit" in ran.json["error"]


def test_help(sfumato: Run) -> None:
    assert "package.module:factory" in sfumato("check", "--help").out
