"""``sfumato sweep``: every trial charged to one ledger, and a curve that says so."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tests.cli.helpers import Run

import sfumato as sf
from sfumato.cli import trials
from sfumato.report.sweep import Trial, points

QUICK = ["sweep", "--data", "digits", "--epochs", 1, "--batch-size", 256, "--seed", 1, "--model", "linear"]
FILES = {"sweep.json", "sweep.html", "sweep.svg", "sweep.png", "ledger.db", "ledger.db.seal"}


def names(folder: Path) -> set[str]:
    return {entry.name for entry in folder.iterdir()}


def test_every_trial_is_charged_to_one_ledger(sfumato: Run, tmp_path: Path) -> None:
    ran = sfumato(*QUICK, "--noise-multipliers", "4,1", "--repeats", 2, "--json")
    assert ran.code == 0, ran.err
    found = ran.json
    assert names(tmp_path) == {"sweep"}
    assert names(tmp_path / "sweep") == FILES
    assert [t["noise_multiplier"] for t in found["trials"]] == [4, 1, 4, 1]
    assert [t["seed"] for t in found["trials"]] == [1, 1, 2, 2]
    with sf.Ledger(tmp_path / "sweep" / "ledger.db", head=found["head"]) as ledger:
        assert ledger.verify() == found["entries"] == sum(t["steps"] for t in found["trials"])
        assert float(ledger.epsilon(delta=1e-5)) == found["epsilon"]
    assert found["epsilon"] > max(t["epsilon"] for t in found["trials"])
    for trial in found["trials"]:
        alone = sf.accounting.epsilon(
            noise_multiplier=trial["noise_multiplier"], sample_rate=256 / 1437, steps=trial["steps"], delta=1e-5
        )
        assert trial["epsilon"] == pytest.approx(float(alone))
        assert 0 < trial["accuracy"] < 1
        assert trial["loss"] > 0
    assert [(p["noise_multiplier"], p["repeats"]) for p in found["curve"]] == [(1, 2), (4, 2)]
    assert (found["ended"], found["stopped_by_budget"]) == (None, False)
    written = json.loads((tmp_path / "sweep" / "sweep.json").read_text())
    assert written.items() <= found.items()


def test_the_page_says_what_all_trials_cost_and_needs_nothing(sfumato: Run, tmp_path: Path) -> None:
    ran = sfumato(*QUICK, "--noise-multipliers", "2,4", "--out", "s")
    assert ran.code == 0
    assert "All 2 trials together" in ran.out
    html = (tmp_path / "s" / "sweep.html").read_text()
    assert "All 2 trials together" in html
    assert html.count("<svg") == 1
    for loader in ("<script", "<link", "@import", "url(http", 'href="http', "src="):
        assert loader not in html
    assert (tmp_path / "s" / "sweep.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "s" / "sweep.svg").read_text().startswith("<?xml")


def test_targets_are_met_by_each_trial_alone(sfumato: Run) -> None:
    found = sfumato(*QUICK, "--epsilons", "1,4", "--json").json
    for trial in found["trials"]:
        assert 0.99 * trial["target_epsilon"] < trial["epsilon"] <= trial["target_epsilon"]


def test_the_budget_ends_the_sweep_before_it_is_exceeded(sfumato: Run, tmp_path: Path) -> None:
    ran = sfumato(*QUICK, "--epsilons", "0.5,1,2", "--repeats", 3, "--budget-epsilon", 1.6, "--json")
    assert ran.code == 0, ran.err
    found = ran.json
    assert found["stopped_by_budget"]
    assert "1.6" in found["ended"]
    assert [t["target_epsilon"] for t in found["trials"]] == [0.5, 1]
    assert found["epsilon"] <= 1.6
    assert found["planned"] == 9
    assert "Ended early" in (tmp_path / "sweep" / "sweep.html").read_text()
    assert all(t["steps"] == 6 for t in found["trials"])  # none was cut short


def test_a_budget_too_small_for_one_trial_spends_nothing(sfumato: Run, tmp_path: Path) -> None:
    line = sfumato(*QUICK, "--noise-multipliers", "1", "--budget-epsilon", 0.01, "--out", "new/s").failed(1)
    assert "--budget-epsilon" in line
    assert list(tmp_path.iterdir()) == []


def test_a_shared_ledger_counts_what_was_there(sfumato: Run, tmp_path: Path) -> None:
    first = sfumato(*QUICK, "--noise-multipliers", "2", "--ledger", "all.db", "--out", "a", "--json").json
    second = sfumato(*QUICK, "--noise-multipliers", "2", "--ledger", "all.db", "--out", "b", "--json").json
    assert (second["earlier_entries"], second["epsilon"] > first["epsilon"]) == (first["entries"], True)
    assert "earlier entries" in second["statement"]
    assert names(tmp_path / "b") == FILES - {"ledger.db", "ledger.db.seal"}
    spent = sfumato(*QUICK, "--noise-multipliers", "2", "--ledger", "all.db", "--out", "c", "--budget-epsilon", 0.5)
    assert "already spent" in spent.failed(1)


def interrupt_after(monkeypatch: pytest.MonkeyPatch, count: int, error: BaseException) -> None:
    real, done = trials.mean_loss, []

    def fail(*arguments: object) -> float:
        done.append(1)
        if len(done) > count:
            raise error
        return real(*arguments)

    monkeypatch.setattr(trials, "mean_loss", fail)


def test_an_interruption_keeps_what_was_paid_for(sfumato: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    interrupt_after(monkeypatch, 1, KeyboardInterrupt())
    ran = sfumato(*QUICK, "--noise-multipliers", "2,4,8", "--json")
    assert ran.code == 1
    assert len(ran.json["trials"]) == 1
    assert ran.json["ended"] == "interrupted."
    assert ran.json["entries"] == 2 * ran.json["trials"][0]["steps"]  # the trial that was cut short is charged too
    assert names(tmp_path / "sweep") == FILES


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError("disk full")])
def test_a_failure_keeps_the_ledger_alone(
    sfumato: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    interrupt_after(monkeypatch, 0, error)
    ran = sfumato(*QUICK, "--noise-multipliers", "2,4")
    assert ran.code == (1 if isinstance(error, KeyboardInterrupt) else 2)
    assert "sweep.spent-ledger.db" in ran.err
    assert names(tmp_path) <= {"sweep.spent-ledger.db", "sweep.spent-ledger.db.seal"}
    with sf.Ledger(tmp_path / "sweep.spent-ledger.db") as kept:
        assert kept.verify() == 6


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], "--noise-multipliers"),
        (["--noise-multipliers", "1", "--epsilons", "1"], "one of the two"),
        (["--noise-multipliers", ""], "separated by commas"),
        (["--noise-multipliers", "1,,2"], "separated by commas"),
        (["--noise-multipliers", "a"], "separated by commas"),
        (["--noise-multipliers", "0,1"], "greater than 0"),
        (["--noise-multipliers", "-1"], "greater than 0"),
        (["--noise-multipliers", "inf"], "finite"),
        (["--epsilons", "nan"], "finite"),
        (["--epsilons", "1,1.0"], "twice"),
        (["--epsilons", "1", "--repeats", 0], "--repeats"),
        (["--epsilons", "1", "--repeats", 10**9], "--repeats"),
        (["--epsilons", "1", "--budget-epsilon", 0], "--budget-epsilon"),
        (["--epsilons", "1", "--budget-epsilon", "nan"], "--budget-epsilon"),
        (["--epsilons", "1", "--delta", 1], "--delta"),
        (["--epsilons", "1", "--lr", -1], "--lr"),
        (["--epsilons", "1", "--data", "nowhere.csv"], "nowhere.csv"),
        (["--epsilons", "1", "--epsilon", 3], "--epsilon"),
    ],
)
def test_bad_options(sfumato: Run, tmp_path: Path, arguments: list, says: str) -> None:
    assert says in sfumato("sweep", *arguments).failed(2)
    assert list(tmp_path.iterdir()) == []


def test_an_out_in_use(sfumato: Run, tmp_path: Path) -> None:
    (tmp_path / "sweep").mkdir()
    (tmp_path / "sweep" / "mine").write_text("x")
    assert "not empty" in sfumato(*QUICK, "--noise-multipliers", "1").failed(2)


def test_points_are_means_over_repeats() -> None:
    made = [
        Trial(s, None, 2.0, a, loss, 3, 0, 1.0) for s, a, loss in ((2.0, 0.5, 1.0), (1.0, 0.9, 0.2), (2.0, 0.7, 3.0))
    ]
    low, high = points(made)
    assert (low["noise_multiplier"], low["accuracy"], low["repeats"]) == (1.0, 0.9, 1)
    assert (high["accuracy"], high["accuracy_low"], high["accuracy_high"], high["loss"]) == (0.6, 0.5, 0.7, 2.0)
