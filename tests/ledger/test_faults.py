"""Faults that once lost, or could have lost, a recorded release: each is refused now, and the ledger stays whole."""

from __future__ import annotations

import copy
import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from sfumato.accounting import Event, Ledger
from sfumato.accounting.ledger_chain import Entry, canonical
from sfumato.accounting.ledger_file import GENESIS
from sfumato.accounting.ledger_scope import Records
from sfumato.accounting.ledger_seal import seal_of
from sfumato.errors import LedgerError

EVENT = Event("poisson-gaussian", 1.1, 0.01, "add-remove")


def opened_elsewhere(path: Path) -> int:
    """Entries that another process finds when it opens and closes the ledger."""
    code = (
        "import sys; from sfumato.accounting import Ledger\nwith Ledger(sys.argv[1]) as ledger: print(ledger.verify())"
    )
    done = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=True)
    return int(done.stdout)


def written(path: Path, steps: int = 3) -> Ledger:
    ledger = Ledger(path)
    for step in range(steps):
        ledger.append(EVENT, run="a", step=step)
    return ledger


def test_reading_the_file_in_this_process_drops_its_locks(tmp_path: Path) -> None:
    path = tmp_path / "ledger.db"
    ledger = written(path)
    path.read_bytes()  # closing the handle drops this process's POSIX locks, so that another may remove the log
    assert opened_elsewhere(path) == 3
    with pytest.raises(LedgerError, match="write-ahead log was removed"):
        ledger.append(EVENT, run="a", step=3)
    with pytest.raises(LedgerError, match="write-ahead log was removed"):
        ledger.spent()
    ledger.close()
    assert opened_elsewhere(path) == 3


@pytest.mark.parametrize("suffixes", [("-wal",), ("-shm",), ("-wal", "-shm")])
def test_side_files_removed_while_in_use(suffixes: tuple[str, ...], tmp_path: Path) -> None:
    path = tmp_path / "ledger.db"
    ledger = written(path)
    for suffix in suffixes:
        os.unlink(f"{path}{suffix}")
    with pytest.raises(LedgerError, match="write-ahead log was removed"):
        ledger.append(EVENT, run="a", step=3)
    ledger.close()
    ledger.close()


def test_a_log_removed_during_an_append_is_found_before_it_returns(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "ledger.db"
    ledger = written(path)
    execute = ledger._store.execute

    def removing(statement: str, values: tuple[Any, ...] = ()) -> Any:
        if statement.startswith("UPDATE meta"):
            os.unlink(f"{path}-wal")
        return execute(statement, values)

    monkeypatch.setattr(ledger._store, "execute", removing)
    with pytest.raises(LedgerError, match="write-ahead log was removed"):
        ledger.append(EVENT, run="a", step=3)
    ledger.close()


def test_a_log_that_was_replaced_is_not_copied_over_what_others_wrote(tmp_path: Path) -> None:
    path = tmp_path / "ledger.db"
    written(path).close()
    ledger = Ledger(path)
    ledger.append(EVENT, run="a", step=3)
    for suffix in ("-wal", "-shm"):
        os.unlink(f"{path}{suffix}")
    code = (
        "import sys; from sfumato.accounting import Event, Ledger\n"
        "with Ledger(sys.argv[1]) as ledger:\n"
        f"    for step in range(9): ledger.append({EVENT!r}, run='b', step=step)"
    )
    subprocess.run([sys.executable, "-c", code, str(path)], check=True)
    ledger.close()
    assert opened_elsewhere(path) == 12


@pytest.mark.parametrize("use", ["head", "append", "contains", "close"])
def test_a_signal_handler_inside_an_append_is_refused(
    use: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ledger = written(tmp_path / "ledger.db")
    execute, refused = ledger._store.execute, []
    uses = {
        "head": lambda: ledger.head,
        "append": lambda: ledger.append(EVENT, run="b", step=0),
        "contains": lambda: ledger.contains("x"),
        "close": ledger.close,
    }

    def interrupted(statement: str, values: tuple[Any, ...] = ()) -> Any:
        if statement.startswith("UPDATE meta") and not refused:
            with pytest.raises(LedgerError, match="code that was interrupted"):
                uses[use]()  # what a handler that runs here would do
            refused.append(use)
        return execute(statement, values)

    monkeypatch.setattr(ledger._store, "execute", interrupted)
    assert ledger.append(EVENT, run="a", step=3) == 4
    assert refused == [use]
    ledger.close()
    assert opened_elsewhere(tmp_path / "ledger.db") == 4


def test_a_hard_link_is_refused(tmp_path: Path) -> None:
    path, other = tmp_path / "ledger.db", tmp_path / "other.db"
    ledger = written(path)
    os.link(path, other)
    with pytest.raises(LedgerError, match="hard link"):
        ledger.append(EVENT, run="a", step=3)
    with pytest.raises(LedgerError, match="hard link"):
        Ledger(other)
    other.unlink()
    assert ledger.append(EVENT, run="a", step=3) == 4
    ledger.close()


def test_a_draft_left_by_a_kill_is_removed(tmp_path: Path) -> None:
    path = tmp_path / "ledger.db"
    written(path).close()
    os.link(path, tmp_path / ".ledger.db.ab12_xyz")
    with Ledger(path) as ledger:
        assert ledger.verify() == 3
    assert sorted(file.name for file in tmp_path.iterdir()) == ["ledger.db", "ledger.db.seal"]


def test_one_entry_is_sealed_too(tmp_path: Path) -> None:
    path = tmp_path / "ledger.db"
    written(path, 1).close()
    assert seal_of(path).exists()


@pytest.mark.parametrize(
    "changed",
    [{"count": 0.5}, {"count": 3.0}, {"count": "many"}, {"count": 2**62}, {"count": 0}, {"step": 0.5}, {"seq": 1.0},
     {"reservation": 1.0}, {"run": 1}, {"note": 2}, {"group": 3}],
)  # fmt: skip
def test_a_crafted_value_is_refused(changed: dict[str, Any]) -> None:
    with Ledger() as ledger:
        values: dict[str, Any] = {"seq": 1, "run": "a", "step": 0, "group": None, "dataset": None, "records": None,
                                  "note": "", "event": canonical(EVENT.to_json()), "count": 1,
                                  "reservation": None}  # fmt: skip
        row = tuple((values | changed).values())
        row = (*row, Entry(*row).chained(GENESIS))
        with pytest.raises(ValueError, match="entry 1"):
            ledger._chain.follow(row)
        assert ledger._chain.seq == 0
        good = tuple(values.values())
        ledger._chain.follow((*good, Entry(*good).chained(GENESIS)))


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, pickle.dumps])
def test_copies_would_count_apart(copied: Any) -> None:
    with Ledger() as ledger:
        reservation = ledger.reserve(EVENT, 5, run="a", step=0)
        for held in (ledger, reservation):
            with pytest.raises(LedgerError, match="cannot be copied"):
                copied(held)
        assert reservation.close() == 5
        assert ledger.events() == {}


def test_large_record_numbers_need_no_table_of_their_size(tmp_path: Path) -> None:
    high, other = [1_999_999_999], [5, 1_000_000_000, 2**31 - 1]
    with Ledger(tmp_path / "ledger.db") as ledger:
        for records, count in ((high, 3), (other, 4), (high + other[:1], 2)):
            ledger.append(EVENT, run="a", step=0, dataset="d", records=records, count=count)
    with Ledger(tmp_path / "ledger.db") as ledger:
        assert ledger.events() == {EVENT: 6}
        asked = {(5,): 6, (6,): 0, (1_999_999_999,): 5, (2**31 - 1, 7): 4, (1_000_000_000,): 4, (2**31 - 2,): 0}
        for numbers, count in asked.items():
            assert ledger.events(dataset="d", records=list(numbers)).get(EVENT, 0) == count
        ledger.append(EVENT, run="b", step=0, dataset="d", records=Records([5]), count=10)
        assert ledger.events() == {EVENT: 16}


def test_an_edit_behind_an_open_ledger_is_not_sealed(tmp_path: Path) -> None:
    path = tmp_path / "ledger.db"
    written(path).close()
    code = (
        "import sys; path = sys.argv[1]; content = open(path, 'rb').read(); at = content.index(bytes(64), 4096) + 30\n"
        "file = open(path, 'r+b'); file.seek(at); file.write(b'x'); file.close()"
    )
    with Ledger(path) as ledger:
        subprocess.run([sys.executable, "-c", code, str(path)], check=True)
        with pytest.raises(LedgerError, match="changed after it was closed"):
            ledger.append(EVENT, run="a", step=3)
    with pytest.raises(LedgerError, match="changed after it was closed"):
        Ledger(path)


def test_a_pipe_in_place_of_the_seal_is_refused_at_once(tmp_path: Path) -> None:
    path = tmp_path / "ledger.db"
    written(path).close()
    seal_of(path).unlink()
    os.mkfifo(seal_of(path))
    with pytest.raises(LedgerError, match="changed after it was closed"):
        Ledger(path)


def test_a_forked_child_does_not_wait_for_the_reservation(monkeypatch: pytest.MonkeyPatch) -> None:
    with Ledger() as ledger:
        reservation = ledger.reserve(EVENT, 5, run="a", step=0)
        with reservation._lock, monkeypatch.context() as child:  # held at the fork, and nobody there to release it
            child.setattr(reservation, "_pid", -1)
            with pytest.raises(LedgerError, match="No reserved release"):
                reservation.use()
