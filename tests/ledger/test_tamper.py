"""Whatever is done to the file of a closed ledger is found when it is opened; a copy behind the head as well."""

from __future__ import annotations

import json
import random
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from sfumato.accounting import Event, Ledger
from sfumato.accounting.ledger_file import GENESIS
from sfumato.accounting.ledger_seal import seal_of
from sfumato.errors import LedgerError

EVENT = Event("poisson-gaussian", 1.1, 0.01, "add-remove")
FILES = ("", "-wal", "-shm", ".seal")


def place(folder: Path, files: dict[str, bytes]) -> Path:
    """A ledger file with its companions, and no others."""
    path = folder / "ledger.db"
    for suffix in FILES:
        target = path.with_name(path.name + suffix)
        if suffix in files:
            target.write_bytes(files[suffix])
        else:
            target.unlink(missing_ok=True)
    return path


def taken(path: Path) -> dict[str, bytes]:
    files = {suffix: path.with_name(path.name + suffix) for suffix in FILES}
    return {suffix: file.read_bytes() for suffix, file in files.items() if file.exists()}


def refused(path: Path, head: str | None = None) -> bool:
    try:
        Ledger(path, head=head).close()
    except LedgerError:
        return True
    return False


def write(path: Path, first: int, last: int) -> str:
    with Ledger(path) as ledger:
        for step in range(first, last):
            ledger.append(EVENT, run="run-name", step=step, note="a note", group=["x", None][step % 2])
        ledger.append(EVENT, run="run-name", step=last, dataset="d", records=range(0, 500, 1 + last))
        return ledger.head


@pytest.fixture(scope="module")
def closed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    path = tmp_path_factory.mktemp("closed") / "ledger.db"
    write(path, 0, 5)
    write(path, 6, 9)
    files = taken(path)
    assert set(files) == {"", ".seal"}
    assert not refused(path)
    return files


def edited(good: bytes, at: int, change: int) -> bytes:
    bad = bytearray(good)
    bad[at] ^= change
    return bytes(bad)


def test_every_edit_of_one_byte_is_found(closed: dict[str, bytes], tmp_path: Path) -> None:
    """Seeded places over the whole file: header, free space, indices and entries alike."""
    rng, good = random.Random(4), closed[""]
    places = [*range(100), *(rng.randrange(len(good)) for _ in range(950))]
    missed = [
        at for at in places if not refused(place(tmp_path, closed | {"": edited(good, at, rng.randrange(1, 256))}))
    ]
    assert missed == []


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_an_edit_of_any_byte_is_found(closed: dict[str, bytes], tmp_path: Path) -> None:
    rng, good = random.Random(5), closed[""]
    for at in range(len(good)):
        assert refused(place(tmp_path, closed | {"": edited(good, at, rng.randrange(1, 256))})), at


def test_every_edit_of_the_seal_is_found(closed: dict[str, bytes], tmp_path: Path) -> None:
    seal = closed[".seal"]
    for at in range(len(seal)):
        assert refused(place(tmp_path, closed | {".seal": edited(seal, at, 1 + at % 255)})), at
    for bad in (b"", seal[:-1], seal + b" "):
        assert refused(place(tmp_path, closed | {".seal": bad}))


def test_every_truncation_and_every_addition_is_found(closed: dict[str, bytes], tmp_path: Path) -> None:
    rng, good = random.Random(6), closed[""]
    lengths = [0, 1, 100, len(good) - 1, *range(0, len(good), 4096), *(rng.randrange(len(good)) for _ in range(250))]
    assert all(refused(place(tmp_path, closed | {"": good[:length]})) for length in lengths)
    assert all(refused(place(tmp_path, closed | {"": good + bytes(n)})) for n in (1, 4096))


def test_without_its_seal_the_chain_still_finds_every_edit_of_what_entries_say(
    closed: dict[str, bytes], tmp_path: Path
) -> None:
    good = closed[""]
    with Ledger(place(tmp_path, closed)) as ledger:
        (numbers,) = ledger._store.execute("SELECT records FROM scopes").fetchone()
        fields = [b"run-name", b"a note", b"poisson-gaussian", ledger.head.encode(), b'"sample_rate":0.01']
        document = ledger.export()
    for text in fields:
        for offset in range(len(text)):
            bad = edited(good, good.rindex(text) + offset, 1 << offset % 8)
            assert refused(place(tmp_path, {"": bad})), (text, offset)
    for offset in range(len(numbers)):
        path = place(tmp_path, {"": edited(good, good.rindex(numbers.encode()) + offset, 1 << offset % 8)})
        if not refused(path):  # a bit that no decoder looks at: then the record numbers are what they were
            with Ledger(path) as ledger:
                assert ledger.export() == document
    assert not refused(place(tmp_path, {"": good}))


def test_a_copy_behind_the_head_is_refused_and_a_later_one_is_not(tmp_path: Path) -> None:
    path = tmp_path / "ledger.db"
    copies, heads = [], []
    for life in range(16):
        heads.append(write(path, 10 * life, 10 * life + 2))
        copies.append(taken(path))
    other = tmp_path / "other.db"
    write(other, 500, 501)
    for have, copy in enumerate(copies):
        place(tmp_path, copy)
        for want, head in enumerate(heads):
            assert refused(path, head) == (have < want)
        assert not refused(path, GENESIS)
        with Ledger(path) as ledger:
            assert [ledger.contains(head) for head in heads] == [want <= have for want in range(len(heads))]
            assert not ledger.contains("")
            ledger.require(ledger.head)
            with pytest.raises(LedgerError, match="another ledger or an older copy"):
                ledger.require("f" * 64)
    assert all(refused(other, head) for head in heads)


def test_a_ledger_that_is_gone_is_not_replaced_by_an_empty_one(tmp_path: Path) -> None:
    path = tmp_path / "ledger.db"
    with pytest.raises(LedgerError, match="one was there"):
        Ledger(path, head="a" * 64)
    assert not path.exists()
    head = write(path, 0, 1)
    path.unlink()
    with pytest.raises(LedgerError, match="its seal is there"):
        Ledger(path)
    seal_of(path).unlink()
    with pytest.raises(LedgerError, match="does not hold"), Ledger(path) as ledger:
        ledger.require(head)


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[dict[str, bytes], str]]:
    """A ledger whose process was killed: entries in the main file, more in the write-ahead log, no seal."""
    path = tmp_path_factory.mktemp("killed") / "ledger.db"
    write(path, 0, 3)
    code = (
        "import os, sys\nfrom sfumato.accounting import Event, Ledger\nledger = Ledger(sys.argv[1])\n"
        "event = Event('poisson-gaussian', 1.1, 0.01, 'add-remove')\n"
        "for step in range(3): ledger.append(event, run='b', step=step)\n"
        "print(ledger.head, flush=True)\nos.kill(os.getpid(), 9)"
    )
    child = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=False)
    yield taken(path), child.stdout.strip()
    shutil.rmtree(path.parent)


def test_a_log_that_was_cut_or_changed_loses_nothing_unnoticed(
    killed: tuple[dict[str, bytes], str], tmp_path: Path
) -> None:
    files, head = killed
    assert set(files) == {"", "-wal", "-shm"}
    del files["-shm"]
    assert not refused(place(tmp_path, files), head)
    log, rng = files["-wal"], random.Random(7)
    assert refused(place(tmp_path, {"": files[""]}), head)
    for length in (0, 10, 32, len(log) - 1, *(rng.randrange(len(log)) for _ in range(100))):
        assert refused(place(tmp_path, files | {"-wal": log[:length]}), head), length
    for at in (*range(56), *(rng.randrange(len(log)) for _ in range(250))):
        path = place(tmp_path, files | {"-wal": edited(log, at, rng.randrange(1, 256))})
        if not refused(path, head):  # the byte meant nothing: then nothing may be missing
            with Ledger(path) as ledger:
                assert ledger.verify() == 7, at


def test_the_seal_comes_and_goes_with_the_entries(tmp_path: Path) -> None:
    path = tmp_path / "ledger.db"
    Ledger(path).close()
    assert not seal_of(path).exists()  # nothing to protect
    write(path, 0, 1)
    sealed = seal_of(path).read_bytes()
    with Ledger(path) as ledger:
        ledger.events()
        assert seal_of(path).read_bytes() == sealed
        ledger.append(EVENT, run="b", step=0)
        assert not seal_of(path).exists()
        with Ledger(path) as other:
            other.append(EVENT, run="c", step=0)
        assert ledger.verify() == 4
        ledger.append(EVENT, run="b", step=1)
    assert seal_of(path).read_bytes() != sealed
    assert not refused(path)
    assert json.loads(seal_of(path).read_text())["size"] == path.stat().st_size


def test_closing_does_not_bless_what_was_changed_since_the_seal(tmp_path: Path, closed: dict[str, bytes]) -> None:
    path = place(tmp_path, closed)
    before = seal_of(path).stat().st_ino
    Ledger(path).close()
    assert seal_of(path).stat().st_ino == before
    ledger = Ledger(path)
    free = closed[""].index(bytes(64), 200)
    with path.open("r+b") as file:
        file.seek(free)
        file.write(b"\1")
    ledger.close()
    assert refused(path)


def test_a_seal_that_cannot_be_written_leaves_a_ledger_that_opens(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "ledger.db"
    with monkeypatch.context() as patch:

        def full(*_: object) -> None:
            raise OSError(28, "No space left on device")

        patch.setattr("sfumato.accounting.ledger_seal.os.replace", full)
        write(path, 0, 1)
    assert sorted(p.name for p in tmp_path.iterdir()) == [path.name]
    with Ledger(path) as ledger:
        assert ledger.verify() == 2
