"""Bad input, spent budgets, failures on the way: one line, the right exit code, nothing half-written."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.cli.helpers import Run

import sfumato as sf
from sfumato.cli import fitting, job, loop
from sfumato.errors import PrivacyError

TRAIN = ["train", "--epochs", 2]
PRIVATE = [*TRAIN, "--epsilon", 3]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], "--epsilon"),
        (["--epsilon", 0], "--epsilon"),
        (["--epsilon", -1], "--epsilon"),
        (["--epsilon", "nan"], "--epsilon"),
        (["--epsilon", "inf"], "--epsilon"),
        (["--epsilon", 3, "--delta", 0], "--delta"),
        (["--epsilon", 3, "--delta", 1], "--delta"),
        (["--epsilon", 3, "--delta", 1.5], "--delta"),
        (["--epsilon", 3, "--delta", "nan"], "--delta"),
        (["--noise-multiplier", -1], "--noise-multiplier"),
        (["--noise-multiplier", 0, "--epsilon", 3], "--noise-multiplier 0"),
        (["--epsilon", 3, "--epochs", 0], "--epochs"),
        (["--epsilon", 3, "--batch-size", 0], "--batch-size"),
        (["--epsilon", 3, "--batch-size", 5000], "1437 training records"),
        (["--epsilon", 3, "--lr", 0], "--lr"),
        (["--epsilon", 3, "--momentum", 1], "--momentum"),
        (["--epsilon", 3, "--max-grad-norm", "inf"], "--max-grad-norm"),
        (["--epsilon", 3, "--max-physical-batch-size", 0], "--max-physical-batch-size"),
        (["--epsilon", 3, "--averaging", "ema:2"], "--averaging"),
        (["--epsilon", 3, "--averaging", "sometimes"], "--averaging"),
        (["--epsilon", 3, "--optimizer", "lbfgs"], "lbfgs"),
        (["--epsilon", 3, "--seed", -1], "--seed"),
        (["--epsilon", 3, "--model", "resnet"], "unknown model 'resnet'"),
        (["--epsilon", 3, "--model", "no.such:thing"], "no.such:thing"),
        (["--epsilon", 3, "--model", "math:sqrt"], "math:sqrt"),
        (["--epsilon", 3, "--model", "papernot"], "larger images"),
        (["--epsilon", 3, "--data", "nowhere.csv"], "nowhere.csv"),
        (["--epsilon", 3, "--label", "y"], "--label"),
        (["--epsilon", 3, "--image-size", 8], "--image-size"),
        (["--epsilon", 3, "--test-fraction", 1], "--test-fraction"),
        (["--epsilon", 3, "--ledger", "nowhere/l.db"], "--ledger"),
        (["--epsilon", 3, "--epslon", 3], "--epslon"),
    ],
)
@pytest.mark.parametrize("flags", [[], ["--json"]])
def test_bad_options(sfumato: Run, tmp_path: Path, arguments: list, flags: list, says: str) -> None:
    assert says in sfumato(*TRAIN, *arguments, *flags).failed(2)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("body", "says"),
    [
        ("nn.Sequential(nn.Flatten(), nn.Linear(64, 7))", "shape (2, 10)"),
        ("nn.Sequential(nn.Flatten(), nn.Linear(64, 10), nn.Unflatten(1, (2, 5)))", "shape (2, 10)"),
        ("nn.Sequential(nn.Flatten(), nn.Linear(63, 10))", "fails on records of shape (1, 8, 8)"),
        ("nn.Flatten()", "(2, 64)"),
        ("nn.Sequential(nn.Flatten(), nn.Linear(64, 10)).requires_grad_(False)", "no trainable parameter"),
        ("nn.Sequential(nn.BatchNorm2d(1), nn.Flatten(), nn.Linear(64, 10))", "BatchNorm"),
        ("1 / 0", "ZeroDivisionError"),
        ("'not a module'", "not a torch.nn.Module"),
    ],
)
def test_bad_models(sfumato: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, body: str, says: str) -> None:
    (tmp_path / "code").mkdir()
    (tmp_path / "code" / "my_net.py").write_text(f"from torch import nn\ndef net():\n    return {body}\n")
    monkeypatch.syspath_prepend(tmp_path / "code")
    monkeypatch.delitem(__import__("sys").modules, "my_net", raising=False)
    assert says in sfumato(*PRIVATE, "--model", "my_net:net").failed(2)
    assert [p.name for p in tmp_path.iterdir()] == ["code"]


@pytest.mark.parametrize(
    ("change", "label", "says"),
    [
        (lambda text: text, "lable", "no column 'lable'"),
        (lambda text: text.replace("Rome", "", 1), "label", "missing"),
        (lambda text: text.replace("Rome", "NaN", 1), "label", "missing"),
        (lambda text: text, "income", "fractions"),
        (lambda text: "", "label", "cannot be read"),
        (lambda text: text.splitlines()[0] + "\n", "label", "no records"),
        (lambda text: 'a,b\n"1,2\n3,4,5,6', "b", "cannot be read"),
        (lambda text: text.replace("young", "old"), "label", "1 classes"),
    ],
)
def test_bad_tables(sfumato: Run, tmp_path: Path, table: Path, change, label: str, says: str) -> None:
    table.write_text(change(table.read_text()))
    assert says in sfumato(*PRIVATE, "--data", table, "--label", label).failed(2)
    assert list(tmp_path.iterdir()) == []


def test_a_table_needs_a_label(sfumato: Run, table: Path) -> None:
    assert "--label" in sfumato(*PRIVATE, "--data", table).failed(2)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("age: [120, 0]", "low < high"),
        ("age: 3", "age"),
        ("salary: [0, 1]", "salary"),
        ("age: [0", "cannot be read"),
        ("- age", "must map"),
    ],
)
def test_bad_bounds(sfumato: Run, tmp_path: Path, table: Path, text: str, says: str) -> None:
    bounds = table.with_name("b.yaml")
    bounds.write_text(text)
    assert says in sfumato(*PRIVATE, "--data", table, "--label", "label", "--bounds", bounds).failed(2)
    assert list(tmp_path.iterdir()) == []


def test_damaged_idx(sfumato: Run, idx: Path) -> None:
    labels = idx / "t10k-labels-idx1-ubyte"
    labels.write_bytes(labels.read_bytes()[:-3])
    assert "truncated" in sfumato(*PRIVATE, "--data", idx).failed(2)
    labels.unlink()
    assert "t10k-labels" in sfumato(*PRIVATE, "--data", idx).failed(2)


def test_damaged_images(sfumato: Run, pictures: Path, tmp_path: Path) -> None:
    (pictures / "dark" / "0.png").write_bytes(b"not a picture")
    assert "0.png" in sfumato(*PRIVATE, "--data", pictures).failed(2)
    assert list(tmp_path.iterdir()) == []


def test_out_that_is_in_use(sfumato: Run, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "precious.txt").write_text("mine")
    assert "not empty" in sfumato(*PRIVATE, "--out", "run").failed(2)
    assert (tmp_path / "run" / "precious.txt").read_text() == "mine"
    assert "not a folder" in sfumato(*PRIVATE, "--out", "run/precious.txt").failed(2)


def test_an_empty_out_is_used(sfumato: Run, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    assert sfumato(*PRIVATE, "--out", "run", "--json").code == 0
    assert (tmp_path / "run" / "report.json").exists()


def test_a_budget_too_small_for_one_step(sfumato: Run, tmp_path: Path) -> None:
    line = sfumato(*TRAIN, "--noise-multiplier", 0.3, "--epsilon", 0.01, "--out", "new/run").failed(1)
    assert "single step" in line
    assert list(tmp_path.iterdir()) == []


def test_a_spent_ledger(sfumato: Run, tmp_path: Path) -> None:
    with sf.Ledger(tmp_path / "l.db") as ledger:
        event = sf.accounting.Event("gaussian", 0.5, 1.0, "zero-out", sampler="shuffle")
        ledger.append(event, run="earlier", step=0)
    assert "already spent" in sfumato(*PRIVATE, "--ledger", "l.db").failed(1)
    assert not (tmp_path / "run").exists()


def test_a_file_that_is_no_ledger(sfumato: Run, tmp_path: Path) -> None:
    (tmp_path / "l.db").write_text("hello, this is not a data base at all" * 100)
    sfumato(*PRIVATE, "--ledger", "l.db").failed(2)
    assert [p.name for p in tmp_path.iterdir()] == ["l.db"]


@pytest.mark.parametrize("ledger", [None, "shared.db"])
@pytest.mark.parametrize(
    ("error", "code"),
    [(PrivacyError("something was wrong"), 1), (OSError("disk full"), 2), (KeyboardInterrupt(), 1)],
)
def test_failing_before_a_release_leaves_nothing(
    sfumato: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException, code: int, ledger: str | None
) -> None:
    def fail(**_: object) -> None:
        raise error

    monkeypatch.setattr(fitting, "train", fail)
    sfumato(*PRIVATE, "--out", "new/run", *(["--ledger", ledger] if ledger else [])).failed(code)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("error", "code"),
    [(PrivacyError("something was wrong"), 1), (OSError("disk full"), 2), (KeyboardInterrupt(), 1)],
)
def test_failing_after_a_release_keeps_the_ledger_alone(
    sfumato: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException, code: int
) -> None:
    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr(loop, "accuracy", fail)
    ran = sfumato(*PRIVATE, "--out", "run")
    assert ran.code == code
    assert "run.spent-ledger.db" in ran.err
    assert {p.name for p in tmp_path.iterdir()} == {"run.spent-ledger.db", "run.spent-ledger.db.seal"}
    with sf.Ledger(tmp_path / "run.spent-ledger.db") as kept:
        assert kept.verify() > 0
        spent = float(kept.epsilon(delta=1e-5))
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    more = sfumato(*PRIVATE, "--ledger", "run.spent-ledger.db", "--json")
    assert spent < more.json["epsilon"] <= 3


def test_a_bug_is_not_hidden_but_leaves_no_folder(
    sfumato: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(job, "write", fail)
    with pytest.raises(ZeroDivisionError):
        sfumato(*PRIVATE)
    assert {p.name for p in tmp_path.iterdir()} == {"run.spent-ledger.db", "run.spent-ledger.db.seal"}


def test_a_killed_run_is_remembered(sfumato: Run, tmp_path: Path) -> None:
    (tmp_path / ".run.partial-abc").mkdir()
    (tmp_path / ".run.partial-abc" / "ledger.db").touch()
    ran = sfumato(*PRIVATE, "--json")
    assert ran.code == 0
    assert "killed run" in ran.err
