"""``sfumato report``: from a run folder's own files, proved by its ledger or refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from tests.cli.helpers import Run

from sfumato.accounting import Event, Ledger
from sfumato.cli import main


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run; tests work on copies."""
    folder = tmp_path_factory.mktemp("trained") / "run"
    options = "train --data digits --epochs 2 --batch-size 256 --seed 1 --epsilon 3 --model linear --json"
    assert main([*options.split(), "--out", str(folder)]) == 0
    return folder


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    shutil.copytree(trained, tmp_path / "run")
    return tmp_path / "run"


def changed(run: Path, part: str, **values: object) -> None:
    file = run / "report.json"
    document = json.loads(file.read_text())
    document[part] |= values
    file.write_text(json.dumps(document))


def test_the_report_is_made_again_to_the_letter(sfumato: Run, run: Path) -> None:
    before = {name: (run / name).read_text() for name in ("report.json", "report.html")}
    for name in before:
        (run / name).write_text(before[name].replace("digits", "sums"))
    changed(run, "data", name="digits")
    (run / "report.html").unlink()
    ran = sfumato("report", "run", "--json")
    assert ran.code == 0, ran.err
    written = json.loads(before["report.json"])
    assert (ran.json["epsilon"], ran.json["later_entries"]) == (written["guarantee"]["epsilon"], 0)
    assert ran.json["written"] == ["run/report.html", "run/report.json"]
    found = json.loads((run / "report.json").read_text())
    assert found | {"command": written["command"]} == written
    assert (run / "report.html").read_text().count("<svg") == 6


def test_the_run_folder_keeps_the_head_of_its_ledger(run: Path) -> None:
    document = json.loads((run / "report.json").read_text())
    with Ledger(run / "ledger.db") as ledger:
        assert document["ledger"]["head"] == ledger.head
    assert 0.01 < document["meaning"]["tpr"]["0.01"] < 1
    assert document["meaning"]["advantage"] < 1
    assert document["meaning"]["epsilon_without_amplification"] > document["guarantee"]["epsilon"]
    groups = document["meaning"]["group_epsilon"]
    assert document["guarantee"]["epsilon"] < groups["2"] < groups["5"] < groups["10"]


@pytest.mark.parametrize(
    ("kind", "says"),
    [("html", "<!doctype html>"), ("markdown", "# Privacy report"), ("json", '{\n  "schema"'), ("card", "## Privacy")],
)
def test_formats(sfumato: Run, run: Path, tmp_path: Path, kind: str, says: str) -> None:
    before = {p.name: p.read_bytes() for p in run.iterdir()}
    text = sfumato("report", "run", "--format", kind).out
    assert text.startswith(says)
    assert "digits" in text or kind == "card"
    found = sfumato("report", "run", "--format", kind, "--json").json
    assert found["document"].startswith(says)
    assert sfumato("report", "run", "--format", kind, "--out", "x", "--json").json["written"] == ["x"]
    assert (tmp_path / "x").read_text() == found["document"]
    assert "exists" in sfumato("report", "run", "--format", kind, "--out", "x").failed(2)
    assert {p.name: p.read_bytes() for p in run.iterdir()} == before


def test_a_moved_run_and_a_moved_ledger(sfumato: Run, run: Path, tmp_path: Path) -> None:
    run.rename(tmp_path / "elsewhere")
    assert sfumato("report", "elsewhere").code == 0
    for name in ("ledger.db", "ledger.db.seal"):
        (tmp_path / "elsewhere" / name).rename(tmp_path / name)
    assert "not a file" in sfumato("report", "elsewhere").failed(2)
    assert sfumato("report", "elsewhere", "--ledger", "ledger.db").code == 0
    assert not (tmp_path / "elsewhere" / "ledger.db").exists()


def test_a_damaged_ledger_is_a_failed_guarantee(sfumato: Run, run: Path) -> None:
    before = (run / "report.json").read_bytes()
    content = bytearray((run / "ledger.db").read_bytes())
    content[content.index(b"poisson-gaussian")] ^= 1
    (run / "ledger.db").write_bytes(content)
    assert "ledger" in sfumato("report", "run").failed(1)
    assert (run / "report.json").read_bytes() == before


def test_another_or_an_older_ledger_is_a_failed_guarantee(sfumato: Run, run: Path, tmp_path: Path) -> None:
    with Ledger(tmp_path / "other.db") as other:
        other.append(Event("poisson-gaussian", 9.0, 0.1, "add-remove"), run="r", step=0)
    assert "older copy" in sfumato("report", "run", "--ledger", "other.db").failed(1)


@pytest.mark.parametrize(
    ("part", "values", "says"),
    [
        ("guarantee", {"epsilon": 0.5}, "claims epsilon = 0.5"),
        ("guarantee", {"epsilon": 2.9, "lower": 2.9}, "claims"),
        ("guarantee", {"delta": 1e-7}, "claims"),
        ("mechanism", {"noise_multiplier": 9.0}, "sigma = 9"),
        ("mechanism", {"sample_rate": 0.001}, "rate 0.001"),
        ("mechanism", {"sampler": "shuffle"}, "does not record"),
        ("mechanism", {"steps": 1000}, "1000 steps"),
        ("ledger", {"entries": 11}, "11 ledger entries"),
        ("ledger", {"head": "0" * 64}, "is entry 0"),
    ],
)
def test_a_report_that_claims_what_its_ledger_does_not_prove(
    sfumato: Run, run: Path, part: str, values: dict, says: str
) -> None:
    changed(run, part, **values)
    before = (run / "report.json").read_bytes()
    assert sfumato("report", "run", "--json").code == 1
    assert says in sfumato("report", "run").failed(1)
    assert (run / "report.json").read_bytes() == before


def test_what_the_ledger_says_is_written_not_what_the_report_said(sfumato: Run, run: Path) -> None:
    before = json.loads((run / "report.json").read_text())
    changed(run, "guarantee", epsilon=100.0, unit="city", adjacency="zero-out")
    assert sfumato("report", "run").code == 0
    assert json.loads((run / "report.json").read_text())["guarantee"] == before["guarantee"]


def test_later_entries_are_named_and_not_counted(sfumato: Run, run: Path) -> None:
    before = json.loads((run / "report.json").read_text())["guarantee"]["epsilon"]
    with Ledger(run / "ledger.db") as ledger:
        ledger.append(Event("gaussian", 1.0, 1.0, "add-remove", sampler="shuffle"), run="later", step=0)
    ran = sfumato("report", "run", "--json")
    assert (ran.code, ran.json["later_entries"], ran.json["epsilon"]) == (0, 1, before)
    assert "1 later entries" in sfumato("report", "run").out


def test_a_shared_ledger_is_found_where_the_run_left_it(sfumato: Run, tmp_path: Path) -> None:
    options = "train --epochs 1 --batch-size 256 --seed 1 --noise-multiplier 2 --model linear --ledger all.db".split()
    first, second = (sfumato(*options, "--out", out, "--json").json["epsilon"] for out in ("a", "b"))
    assert sfumato("report", "a", "--json").json["epsilon"] == pytest.approx(first)
    again = sfumato("report", "b", "--json").json
    assert (again["epsilon"], again["later_entries"]) == (pytest.approx(second), 0)
    assert sfumato("report", "a", "--json").json["later_entries"] > 0


def test_a_run_without_noise(sfumato: Run) -> None:
    sfumato("train", "--epochs", 1, "--model", "linear", "--noise-multiplier", 0)
    ran = sfumato("report", "run", "--json")
    assert (ran.code, ran.json["epsilon"], ran.json["private"]) == (0, None, False)
    assert "No privacy guarantee" in sfumato("report", "run", "--format", "card").out


def test_a_link_in_the_place_of_the_report_is_not_followed(sfumato: Run, run: Path, tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("mine")
    (run / "report.html").unlink()
    (run / "report.html").symlink_to(tmp_path / "precious")
    assert sfumato("report", "run").code == 0
    assert (tmp_path / "precious").read_text() == "mine"


def test_a_report_cannot_send_the_command_to_a_ledger_outside(sfumato: Run, run: Path, tmp_path: Path) -> None:
    changed(run, "ledger", path="../../outside.db")
    assert "run/outside.db" in sfumato("report", "run").failed(2)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], "run"),
        (["nowhere"], "no run folder"),
        (["."], "no run folder"),
        (["run", "--format", "pdf"], "pdf"),
        (["run", "--out", "x"], "--format"),
        (["run", "--ledger", "nowhere.db"], "nowhere.db"),
        (["run", "--format", "card", "--out", "no/where"], "no/where"),
    ],
)
@pytest.mark.parametrize("flags", [[], ["--json"]])
def test_bad_usage(sfumato: Run, run: Path, tmp_path: Path, arguments: list, flags: list, says: str) -> None:
    assert says in sfumato("report", *arguments, *flags).failed(2)
    assert [p.name for p in tmp_path.iterdir()] == ["run"]


@pytest.mark.parametrize("name", ["report.json", "metrics.jsonl"])
@pytest.mark.parametrize("content", [None, b"", b"{}", b"nonsense", b"\xff\xfe", b'{"kind": "step"}', b"[" * 50_000])
def test_damaged_files(sfumato: Run, run: Path, name: str, content: bytes | None) -> None:
    if content is None:
        (run / name).unlink()
    elif content == b"" and name == "metrics.jsonl":
        return  # no rows: a report without curves
    else:
        (run / name).write_bytes(content)
    assert name in sfumato("report", "run").failed(2)


def test_absurd_metrics_make_no_crash(sfumato: Run, run: Path) -> None:
    rows = [
        {"kind": "step", "step": 2**62, "epoch": 1, "epsilon": None, "loss": 1e300, "clip_rate": -1e300},
        {"kind": "epoch", "step": 1, "epoch": 1, "epsilon": None, "test_accuracy": 1e300},
    ]
    (run / "metrics.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert sfumato("report", "run").code == 0
