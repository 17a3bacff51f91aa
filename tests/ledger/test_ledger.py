"""The ledger records before it returns, shares one file among processes and threads, and notices every edit."""

from __future__ import annotations

import json
import os
import signal
import sqlite3
import stat
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from sfumato.accounting import Event, Ledger, compose
from sfumato.accounting.ledger_seal import seal_of
from sfumato.errors import ConfigurationError, LedgerError

EVENT = Event("poisson-gaussian", 1.1, 0.01, "add-remove")
OTHER = Event("gaussian", 2.0, 1.0, "zero-out", sampler="shuffle")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "ledger.db"


@pytest.fixture(params=["file", "memory"])
def ledger(request: pytest.FixtureRequest, path: Path) -> Iterator[Ledger]:
    with Ledger(path if request.param == "file" else None) as opened:
        yield opened


def python(code: str, *arguments: object) -> subprocess.Popen[str]:
    head = "import os, sys\nfrom sfumato.accounting import Event, Ledger\n"
    head += "event = Event('poisson-gaussian', 1.1, 0.01, 'add-remove')\n"
    return subprocess.Popen(
        [sys.executable, "-c", head + code, *map(str, arguments)], stdout=subprocess.PIPE, text=True
    )


def test_append_read_and_account(ledger: Ledger) -> None:
    empty = ledger.head
    assert ledger.events() == {}
    assert ledger.epsilon(delta=1e-5) == 0.0
    assert [ledger.append(EVENT, run="a", step=i) for i in range(3)] == [1, 2, 3]
    assert ledger.append(OTHER, run="b", step=0, group="g", note="späť") == 4
    assert ledger.events() == {EVENT: 3, OTHER: 1}
    assert ledger.epsilon(delta=1e-5) == compose({EVENT: 3, OTHER: 1}, delta=1e-5)
    entry = ledger.entries()[-1]
    assert entry.pop("hash") == ledger.head != empty
    assert entry == {
        "seq": 4,
        "run": "b",
        "step": 0,
        "group": "g",
        "dataset": None,
        "records": None,
        "note": "späť",
        "event": OTHER.to_json(),
        "count": 1,
        "reservation": None,
    }
    assert ledger.verify() == 4


def test_an_entry_without_a_group_counts_in_every_group(ledger: Ledger) -> None:
    ledger.append(EVENT, run="a", step=0)
    ledger.append(EVENT, run="a", step=1, group="x")
    ledger.append(OTHER, run="a", step=2, group="y")
    assert ledger.events("x") == {EVENT: 2}
    assert ledger.events("y") == {EVENT: 1, OTHER: 1}
    assert ledger.events("z") == {EVENT: 1}
    assert ledger.events() == {EVENT: 2, OTHER: 1}


def test_an_entry_for_another_unit_is_refused_before_anything_is_written(ledger: Ledger) -> None:
    ledger.append(EVENT, run="a", step=0)
    head = ledger.head
    with pytest.raises(LedgerError, match="one record") as raised:
        ledger.append(replace(EVENT, unit="user"), run="b", step=0, group="g")
    assert raised.value.found == ["record"]
    assert (ledger.head, ledger.verify(), ledger.events()) == (head, 1, {EVENT: 1})
    assert ledger.append(OTHER, run="a", step=1) == 2


def test_units_written_through_another_connection_count(path: Path) -> None:
    with Ledger(path) as one, Ledger(path) as other:
        one.append(replace(EVENT, unit="user"), run="a", step=0)
        with pytest.raises(LedgerError, match="one user"):
            other.append(EVENT, run="b", step=0)
        assert other.append(replace(EVENT, unit="user"), run="b", step=0) == 2


def test_queries_change_nothing(ledger: Ledger) -> None:
    ledger.append(EVENT, run="a", step=0)
    head, answer = ledger.head, ledger.events()
    answer.clear()
    ledger.epsilon(delta=1e-6)
    assert ledger.events() == {EVENT: 1}
    assert ledger.head == head


@pytest.mark.parametrize("sigma", [float("nan"), -1.0, float("inf")])
def test_a_forged_event_is_refused_before_anything_is_written(ledger: Ledger, sigma: float) -> None:
    forged = Event("poisson-gaussian", 1.1, 0.01, "add-remove")
    object.__setattr__(forged, "noise_multiplier", sigma)
    with pytest.raises(ConfigurationError):
        ledger.append(forged, run="a", step=0)
    assert ledger.verify() == 0


def test_bad_arguments_write_nothing(ledger: Ledger) -> None:
    for event, run, step, group, note in (
        (None, "a", 0, None, ""),
        (EVENT, 1, 0, None, ""),
        (EVENT, "a", 0.5, None, ""),
        (EVENT, "a", True, None, ""),
        (EVENT, "a", 0, 3, ""),
        (EVENT, "a", 0, None, None),
    ):
        with pytest.raises(ConfigurationError):
            ledger.append(event, run=run, step=step, group=group, note=note)  # type: ignore[arg-type]
    for run, step in (("\ud800", 0), ("a", 2**63)):
        with pytest.raises(LedgerError):
            ledger.append(EVENT, run=run, step=step)
    assert ledger.verify() == 0
    assert ledger.append(EVENT, run="a", step=0) == 1


def test_reopening_continues_the_chain(path: Path) -> None:
    with Ledger(path) as first:
        first.append(EVENT, run="a", step=0)
        head = first.head
    with Ledger(str(path)) as second:
        assert second.head == head
        assert second.append(EVENT, run="b", step=0) == 2
        assert second.verify() == 2
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert sorted(p.name for p in path.parent.iterdir()) == [path.name, seal_of(path).name]
    assert stat.S_IMODE(seal_of(path).stat().st_mode) == 0o600


def test_the_file_is_in_wal_mode_and_synced_at_every_commit(path: Path) -> None:
    with Ledger(path) as ledger:
        assert ledger._store.connection.execute("PRAGMA journal_mode").fetchone() == ("wal",)
        assert ledger._store.connection.execute("PRAGMA synchronous").fetchone() == (2,)


def test_what_is_not_a_ledger_is_refused_and_left_alone(tmp_path: Path) -> None:
    text, database, empty = tmp_path / "a.txt", tmp_path / "b.db", tmp_path / "empty.db"
    text.write_text("hello\n" * 1000)
    empty.touch()
    connection = sqlite3.connect(database)
    connection.execute("CREATE TABLE t (x)")
    connection.close()
    link = tmp_path / "link.db"
    link.symlink_to(database)
    for other in (text, database, empty, link, tmp_path):
        before = other.read_bytes() if other.is_file() else None
        with pytest.raises(LedgerError, match="is not a Sfumato ledger"):
            Ledger(other)
        assert before is None or other.read_bytes() == before
    with pytest.raises(LedgerError, match="cannot be created"):
        Ledger(tmp_path / "missing" / "ledger.db")
    with pytest.raises(LedgerError, match="cannot be opened"):
        Ledger(tmp_path / "nul\0")


@pytest.mark.parametrize("schema", ["1", "3"])
def test_another_schema_is_refused_by_name(path: Path, schema: str) -> None:
    Ledger(path).close()
    edit(path, f"UPDATE meta SET value = '{schema}' WHERE key = 'schema'")
    with pytest.raises(LedgerError, match=f"schema '{schema}'"):
        Ledger(path)


def edit(path: Path, statement: str) -> None:
    connection = sqlite3.connect(path, isolation_level=None)
    connection.execute(statement)
    connection.close()


@pytest.mark.parametrize("statement", ["DELETE FROM entries WHERE seq = 5", "DELETE FROM entries"])
def test_removed_entries_are_found(path: Path, statement: str) -> None:
    with Ledger(path) as ledger:
        for step in range(5):
            ledger.append(EVENT, run="a", step=step)
        assert ledger.events() == {EVENT: 5}
        edit(path, statement)
        with pytest.raises(LedgerError, match="entries up to 5 were here before, and have been rolled back"):
            ledger.verify()
    seal_of(path).unlink(missing_ok=True)
    with pytest.raises(LedgerError, match=r"entries after [04] were removed"):
        Ledger(path)


@pytest.mark.parametrize(
    ("statement", "where"),
    [
        ("UPDATE entries SET event = replace(event, '1.1', '9.1') WHERE seq = 3", "entry 3 "),
        ("UPDATE entries SET run = 'z' WHERE seq = 1", "entry 1 "),
        ("UPDATE entries SET step = 7 WHERE seq = 5", "entry 5 "),
        ("UPDATE entries SET \"group\" = 'g' WHERE seq = 2", "entry 2 "),
        ("UPDATE entries SET note = x'00' WHERE seq = 2", "entry 2 "),
        ("UPDATE entries SET hash = '' WHERE seq = 2", "entry 2 "),
        ("DELETE FROM entries WHERE seq = 2", "entry 2 "),
        ("UPDATE entries SET count = 0 WHERE seq = 2", "entry 2 "),
        ("UPDATE entries SET dataset = 'd' WHERE seq = 2", "entry 2 "),
        ("UPDATE entries SET reservation = 2 WHERE seq = 2", "entry 2 "),
        ("INSERT INTO scopes VALUES ('x', 'runs:')", "no entry names"),
        ("UPDATE meta SET value = 'x' WHERE key = 'head'", "entries after 5 "),
        ("DELETE FROM meta WHERE key = 'head'", "entries after 5 "),
    ],
)
def test_edits_are_found_and_named(path: Path, statement: str, where: str) -> None:
    with Ledger(path) as ledger:
        for step in range(5):
            ledger.append(EVENT, run="a", step=step)
        edit(path, statement)
        with pytest.raises(LedgerError, match=where):
            ledger.verify()
    seal_of(path).unlink(missing_ok=True)
    with pytest.raises(LedgerError, match=where):
        Ledger(path)


def test_a_rollback_under_an_open_ledger_is_refused(path: Path) -> None:
    with Ledger(path) as ledger:
        ledger.append(EVENT, run="a", step=0)
        head = ledger.head
        ledger.append(EVENT, run="a", step=1)
        assert ledger.events() == {EVENT: 2}
        edit(path, "DELETE FROM entries WHERE seq = 2")
        edit(path, f"UPDATE meta SET value = '{head}' WHERE key = 'head'")
        with pytest.raises(LedgerError, match="rolled back"):
            ledger.append(EVENT, run="a", step=2)


def test_a_ledger_that_was_deleted_or_replaced_is_refused(path: Path) -> None:
    with Ledger(path) as ledger:
        path.unlink()
        with pytest.raises(LedgerError, match="deleted or replaced"):
            ledger.append(EVENT, run="a", step=0)
        Ledger(path).close()
        with pytest.raises(LedgerError, match="deleted or replaced"):
            ledger.events()


def test_a_closed_ledger_raises(ledger: Ledger) -> None:
    ledger.close()
    ledger.close()
    with pytest.raises(LedgerError, match="closed"):
        ledger.append(EVENT, run="a", step=0)


def test_an_interrupted_append_leaves_no_trace(ledger: Ledger, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(entry: object, previous: str) -> str:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("sfumato.accounting.ledger_chain.Entry.chained", interrupt)
        with pytest.raises(KeyboardInterrupt):
            ledger.append(EVENT, run="a", step=0)
    assert ledger.append(EVENT, run="a", step=0) == 1
    assert ledger.verify() == 1


def test_threads_append_and_read_together(ledger: Ledger) -> None:
    def work(run: str) -> None:
        for step in range(25):
            ledger.append(EVENT, run=run, step=step)
            ledger.events()

    threads = [threading.Thread(target=work, args=(str(i),)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert ledger.verify() == 100
    assert ledger.events() == {EVENT: 100}


@pytest.mark.dist
def test_processes_take_turns_even_in_creating_the_file(path: Path) -> None:
    code = "ledger = Ledger(sys.argv[1])\nfor i in range(100): ledger.append(event, run=sys.argv[2], step=i)"
    children = [python(code, path, run) for run in ("a", "b")]
    for child in children:
        child.communicate(timeout=60)
        assert child.returncode == 0
    with Ledger(path) as ledger:
        assert ledger.verify() == 200
        entries = ledger.entries()
    for run in ("a", "b"):
        assert [e["step"] for e in entries if e["run"] == run] == list(range(100))


@pytest.mark.dist
def test_another_process_s_entries_are_counted(path: Path) -> None:
    with Ledger(path) as ledger:
        ledger.append(EVENT, run="a", step=0)
        assert ledger.events() == {EVENT: 1}
        with Ledger(path) as other:
            other.append(OTHER, run="b", step=0)
        assert ledger.events() == {EVENT: 1, OTHER: 1}
        assert ledger.append(EVENT, run="a", step=1) == 3


@pytest.mark.dist
def test_an_entry_outlives_a_kill_right_after_append(path: Path) -> None:
    code = "print(Ledger(sys.argv[1]).append(event, run='a', step=0), flush=True)\nos.kill(os.getpid(), 9)"
    for life in range(1, 4):
        child = python(code, path)
        output, _ = child.communicate(timeout=60)
        assert child.returncode == -signal.SIGKILL
        assert output == f"{life}\n"
    with Ledger(path) as ledger:
        assert ledger.verify() == 3


def test_a_forked_child_is_refused_and_does_no_harm(ledger: Ledger) -> None:
    ledger.append(EVENT, run="a", step=0)
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            ledger.append(EVENT, run="child", step=0)
        except LedgerError as error:
            os.write(write, str(error).encode())
        finally:
            ledger.close()
            os._exit(0)
    os.close(write)
    os.waitpid(child, 0)
    with os.fdopen(read) as pipe:
        assert "opened in another process" in pipe.read()
    assert ledger.append(EVENT, run="a", step=1) == 2
    assert ledger.verify() == 2


def test_an_export_holds_everything_and_repeats_byte_by_byte(ledger: Ledger, tmp_path: Path) -> None:
    ledger.append(EVENT, run="a", step=0, note="späť")
    ledger.append(EVENT, run="a", step=1, dataset="d", records=[1, 2, 3, 9])
    first, second = tmp_path / "one.json", tmp_path / "two.json"
    document = ledger.export(first)
    assert ledger.export(second) == ledger.export() == document == json.loads(first.read_text())
    assert first.read_bytes() == second.read_bytes()
    assert stat.S_IMODE(first.stat().st_mode) == 0o600
    assert (document["format"], document["schema"], document["head"]) == ("sfumato-ledger", "2", ledger.head)
    assert document["entries"] == ledger.entries()
    assert document["scopes"] == {ledger.entries()[1]["records"]: "1-3,9"}
    with pytest.raises(LedgerError, match="cannot be exported"):
        ledger.export(first)  # never overwrites


@pytest.mark.dist
def test_a_full_disk_writes_nothing_and_says_so(path: Path) -> None:
    code = """
import resource, signal
ledger = Ledger(sys.argv[1])
ledger.append(event, run="a", step=0)
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
size = os.path.getsize(sys.argv[1] + "-wal")
resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))
try:
    ledger.append(event, run="a", step=1)
except Exception as error:
    print(type(error).__name__, "nothing was recorded" in str(error))
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
print(ledger.append(event, run="a", step=2), ledger.verify())
"""
    output, _ = python(code, path).communicate(timeout=60)
    assert output.split() == ["LedgerError", "True", "2", "2"]
