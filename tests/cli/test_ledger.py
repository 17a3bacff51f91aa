"""``sfumato ledger``: what it shows, what it refuses, and that looking changes nothing."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from tests.cli.helpers import Run

import sfumato as sf
from sfumato.accounting import Event, Ledger, compose

STEP = Event("poisson-gaussian", 1.0, 0.1, "add-remove")
OTHER = Event("poisson-gaussian", 2.0, 0.1, "add-remove")


@pytest.fixture
def ledger(tmp_path: Path) -> Path:
    path = tmp_path / "l.db"
    with Ledger(path) as open_ledger:
        for step in range(5):
            open_ledger.append(STEP, run="first", step=step)
        open_ledger.append(OTHER, run="second", step=0, group="north", note="n")
        open_ledger.append(OTHER, run="second", step=1, group="south")
    return path


def files(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir()}


def test_show_adds_up_by_run_group_and_event(sfumato: Run, ledger: Path) -> None:
    found = sfumato("ledger", "show", ledger, "--delta", 1e-6, "--json")
    assert found.code == 0, found.err
    data = found.json
    with Ledger(ledger) as same:
        assert data["epsilon"] == pytest.approx(float(same.epsilon(delta=1e-6)))
        assert data["groups"]["north"] == pytest.approx(float(same.epsilon(delta=1e-6, group="north")))
        assert data["head"] == same.head
    assert (data["entries"], data["releases"], data["unit"], data["delta"]) == (7, 7, "record", 1e-6)
    assert data["lower"] <= data["epsilon"]
    assert data["runs"]["first"] == pytest.approx(float(compose({STEP: 5}, delta=1e-6)))
    assert [(line["run"], line["group"], line["count"]) for line in data["lines"]] == [
        ("first", None, 5),
        ("second", "north", 1),
        ("second", "south", 1),
    ]
    assert data["lines"][0]["event"] == STEP.to_json()
    text = sfumato("ledger", "show", ledger).out
    for part in (
        "7 entries",
        "epsilon = ",
        "group north",
        "run alone second",
        "poisson-gaussian (poisson, add-remove)",
    ):
        assert part in text


def test_an_empty_ledger_costs_nothing(sfumato: Run, tmp_path: Path) -> None:
    Ledger(tmp_path / "e.db").close()
    found = sfumato("ledger", "show", "e.db", "--json").json
    assert (found["epsilon"], found["entries"], found["lines"]) == (0, 0, [])
    assert sfumato("ledger", "show", "e.db").code == 0
    assert sfumato("ledger", "verify", "e.db").code == 0


def test_a_run_without_noise_has_no_finite_epsilon(sfumato: Run, tmp_path: Path) -> None:
    with Ledger(tmp_path / "n.db") as open_ledger:
        open_ledger.append(Event("poisson-gaussian", 0.0, 0.1, "add-remove"), run="r", step=0)
    assert sfumato("ledger", "show", "n.db", "--json").json["epsilon"] is None
    assert "∞" in sfumato("ledger", "show", "n.db").out


def test_verify_and_the_head_kept_elsewhere(sfumato: Run, ledger: Path, tmp_path: Path) -> None:
    shutil.copy(ledger, tmp_path / "older.db")
    with Ledger(ledger) as open_ledger:
        middle = open_ledger.entries()[3]["hash"]
        open_ledger.append(STEP, run="third", step=0)
        head = open_ledger.head
    found = sfumato("ledger", "verify", ledger, "--json")
    assert (found.code, found.json["ok"], found.json["entries"], found.json["head"]) == (0, True, 8, head)
    assert sfumato("ledger", "verify", ledger, "--head", middle).code == 0
    for action in ("verify", "show", "export"):
        assert "older copy" in sfumato("ledger", action, "older.db", "--head", head).failed(1)
    assert sfumato("ledger", "verify", "older.db", "--head", middle).code == 0


def test_damage_is_exit_code_1(sfumato: Run, ledger: Path) -> None:
    content = bytearray(ledger.read_bytes())
    place = content.index(b"poisson-gaussian")
    content[place] ^= 1
    ledger.write_bytes(content)
    for action in ("verify", "show", "export"):
        assert "ledger" in sfumato("ledger", action, ledger).failed(1)
        assert sfumato("ledger", action, ledger, "--json").code == 1


def test_looking_changes_nothing(sfumato: Run, ledger: Path, tmp_path: Path) -> None:
    before = files(tmp_path)
    for action in ("show", "verify", "export"):
        assert sfumato("ledger", action, ledger, "--json").code == 0
    assert files(tmp_path) == before


def test_export_to_a_new_file_or_standard_output(sfumato: Run, ledger: Path, tmp_path: Path) -> None:
    printed = sfumato("ledger", "export", ledger, "--json").json
    assert json.loads(sfumato("ledger", "export", ledger).out) == printed
    assert [entry["seq"] for entry in printed["entries"]] == list(range(1, 8))
    found = sfumato("ledger", "export", ledger, "--out", "e.json", "--json").json
    assert (found["entries"], found["out"]) == (7, "e.json")
    assert json.loads((tmp_path / "e.json").read_text()) == printed


@pytest.mark.parametrize("target", ["l.db", "l.db.seal", "taken.json", "link.json", "nowhere/e.json"])
def test_export_overwrites_nothing(sfumato: Run, ledger: Path, tmp_path: Path, target: str) -> None:
    (tmp_path / "taken.json").write_text("mine")
    before = files(tmp_path)
    (tmp_path / "link.json").symlink_to(tmp_path / "new.json")
    sfumato("ledger", "export", ledger, "--out", target).failed(2)
    (tmp_path / "link.json").unlink()
    assert files(tmp_path) == before


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["show"], "path"),
        (["forget", "l.db"], "forget"),
        (["show", "nowhere.db"], "not a file"),
        (["show", "."], "not a file"),
        (["show", "l.db", "--head", "abc"], "64 hexadecimal"),
        (["show", "l.db", "--head", "../" * 30], "64 hexadecimal"),
        (["show", "l.db", "--delta", "0"], "delta"),
        (["show", "l.db", "--delta", "2"], "delta"),
        (["show", "l.db", "--out", "x.json"], "--out"),
        (["verify", "l.db", "--out", "x.json"], "--out"),
    ],
)
@pytest.mark.parametrize("flags", [[], ["--json"]])
def test_bad_usage(sfumato: Run, ledger: Path, tmp_path: Path, arguments: list, flags: list, says: str) -> None:
    before = set(files(tmp_path))
    assert says in sfumato("ledger", *arguments, *flags).failed(2)
    assert set(files(tmp_path)) == before  # above all, no new ledger


@pytest.mark.parametrize("content", [b"hello", b"", b"SQLite format 3\0" + b"\0" * 4096])
def test_a_file_that_is_no_ledger(sfumato: Run, tmp_path: Path, content: bytes) -> None:
    (tmp_path / "f.db").write_bytes(content)
    sfumato("ledger", "verify", "f.db").failed(1)
    assert (tmp_path / "f.db").read_bytes() == content


def test_names_from_the_file_cannot_drive_the_terminal(sfumato: Run, tmp_path: Path) -> None:
    with Ledger(tmp_path / "h.db") as open_ledger:
        open_ledger.append(STEP, run="\x1b[2Jgone\nnew line", step=0, group="g\r\x07")
    text = sfumato("ledger", "show", "h.db").out
    assert not {"\x1b", "\r", "\x07"} & set(text)
    assert "\nnew line" not in text
    assert sfumato("ledger", "show", "h.db", "--json").json["lines"][0]["run"] == "\x1b[2Jgone\nnew line"


def test_a_unit_from_the_file_cannot_either(sfumato: Run, tmp_path: Path) -> None:
    with Ledger(tmp_path / "h.db") as open_ledger:
        open_ledger.append(Event("poisson-gaussian", 1.0, 0.1, "add-remove", unit="\x1b[2Jx\x9b"), run="r", step=0)
    assert not {"\x1b", "\x9b"} & set(sfumato("ledger", "show", "h.db").out)


def test_scopes_compose_in_parallel_and_are_shown(sfumato: Run, tmp_path: Path) -> None:
    with Ledger(tmp_path / "s.db") as open_ledger:
        for i in range(4):
            open_ledger.append(STEP, run=f"round{i}", step=0, dataset="d", records=range(10 * i, 10 * i + 10), count=3)
    found = sfumato("ledger", "show", "s.db", "--json").json
    assert found["epsilon"] == pytest.approx(float(compose({STEP: 3}, delta=1e-5)))
    assert found["datasets"] == {"d": found["epsilon"]}
    assert found["releases"] == 12
    assert "data set d" in sfumato("ledger", "show", "s.db").out
    assert len(sfumato("ledger", "export", "s.db", "--json").json["scopes"]) == 4


def test_many_lines_are_cut_for_people_only(sfumato: Run, tmp_path: Path) -> None:
    with Ledger(tmp_path / "m.db") as open_ledger:
        for i in range(60):
            open_ledger.append(STEP, run=f"run{i}", step=0)
    assert "more (all with --json)" in sfumato("ledger", "show", "m.db").out
    assert len(sfumato("ledger", "show", "m.db", "--json").json["lines"]) == 60


def test_the_units_are_named(sfumato: Run, tmp_path: Path) -> None:
    with sf.Ledger(tmp_path / "u.db") as open_ledger:
        open_ledger.append(Event("poisson-gaussian", 1.0, 0.1, "add-remove", unit="user"), run="r", step=0)
    assert "for one user" in sfumato("ledger", "show", "u.db").out
