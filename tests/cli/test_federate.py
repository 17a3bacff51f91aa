"""``sfumato federate`` from data to run folder."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tests.cli.helpers import Run

import sfumato as sf
from sfumato import report
from sfumato.cli import federated_job, federated_outcome
from sfumato.cli.federated_books import file_name
from sfumato.cli.federated_recipes import FederatedRecipe, federated_recipe
from sfumato.cli.federated_settings import COHORTS, TRAINS, chosen
from sfumato.errors import ConfigurationError
from sfumato.models import build

QUICK = ["federate", "--data", "digits", "--clients", 4, "--rounds", 2, "--seed", 1]
FILES = {"model.safetensors", "metrics.jsonl", "report.html", "report.json"}
KEYS = {
    "epsilon", "delta", "accuracy", "rounds", "clients", "unit", "level", "report", "baseline_accuracy",
    "client_epsilon", "bytes_up", "bytes_down", "trust", "epsilon_without_amplification",
}  # fmt: skip


@pytest.fixture
def plain_report(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without curves, for tests that are about something else."""
    monkeypatch.setattr(report.federated, "federated_curves", lambda facts: [])
    for name in ("trade_off", "profile"):
        monkeypatch.setattr(federated_outcome, name, lambda events: ())


def rows(run: Path) -> list[dict]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line["kind"] == "round"]


def names(folder: Path) -> set[str]:
    return {entry.name for entry in folder.iterdir()}


def test_the_contract_and_what_the_ledgers_prove(sfumato: Run, tmp_path: Path) -> None:
    ran = sfumato(*QUICK, "--epsilon", 4, "--out", "run/", "--json")
    assert ran.code == 0, ran.err
    found = ran.json
    assert found.keys() >= KEYS
    assert 3.9 < found["epsilon"] <= 4.0
    assert (found["delta"], found["rounds"], found["clients"], found["unit"]) == (1e-5, 2, 4, "record")
    assert 0.8 < found["accuracy"] <= 1
    assert names(tmp_path) == {"run"}
    assert names(tmp_path / "run") == FILES | {"ledgers"}
    assert {n for n in names(tmp_path / "run" / "ledgers") if n.endswith(".db")} == {f"client-{i}.db" for i in range(4)}
    assert ran.err.count("round ") == 2
    assert "epsilon" in ran.err
    spent = []
    for path in sorted((tmp_path / "run" / "ledgers").glob("*.db")):
        with sf.Ledger(path) as ledger:
            assert ledger.verify() > 0
            spent.append(float(ledger.epsilon(delta=1e-5)))
    assert max(spent) == pytest.approx(found["epsilon"])
    assert found["client_epsilon"]["min"] == pytest.approx(min(spent))
    written = json.loads((tmp_path / "run" / "report.json").read_text())
    assert written["guarantee"]["epsilon"] == found["epsilon"]
    assert written["results"] == {
        "test_accuracy": found["accuracy"],
        "baseline_test_accuracy": found["baseline_accuracy"],
    }
    assert rows(tmp_path / "run")[-1]["epsilon"] == pytest.approx(found["epsilon"])
    assert rows(tmp_path / "run")[-1]["test_accuracy"] == found["accuracy"]


@pytest.mark.parametrize(
    ("unit", "adjacency"), [("client", "add-remove"), ("local", "replace-one"), ("distributed", "zero-out")]
)
def test_units_that_protect_clients(sfumato: Run, tmp_path: Path, unit: str, adjacency: str) -> None:
    ran = sfumato(*QUICK, "--unit", unit, "--epsilon", 4, "--json")
    assert ran.code == 0, ran.err
    found = ran.json
    assert (found["unit"], found["level"], found["adjacency"]) == ("client", unit, adjacency)
    assert 0 < found["epsilon"] <= 4.0
    assert found["noise_to_update"] > 0
    ledgers = "ledgers" if unit == "local" else "ledger.db"
    assert ledgers in names(tmp_path / "run")
    html = (tmp_path / "run" / "report.html").read_text()
    assert ("SIMULATED" in html) == (unit == "distributed")
    assert "one whole client" in html


@pytest.mark.usefixtures("plain_report")
def test_the_model_is_plain_and_complete(sfumato: Run, tmp_path: Path) -> None:
    sfumato(*QUICK, "--epsilon", 4, "--model", "mlp", "--train", "lora:2")
    model = build("mlp", (1, 8, 8), 10)
    model.load_state_dict(load_file(tmp_path / "run" / "model.safetensors"))


@pytest.mark.usefixtures("plain_report")
def test_for_people_guarantee_trust_and_costs_in_words(sfumato: Run) -> None:
    ran = sfumato(*QUICK, "--unit", "client", "--epsilon", 4)
    assert ran.code == 0, ran.err
    for part in ("one client", "Who must be trusted: Every client trusts the server", "public model", "times as long"):
        assert part in ran.out, part


@pytest.mark.usefixtures("plain_report")
@pytest.mark.parametrize(
    "options",
    [
        ["--unit", "client", "--cohort", "poisson:0.5", "--train", "topk:0.1", "--server", "momentum"],
        ["--unit", "client", "--cohort", "fixed:3", "--allocation", "adaptive", "--compress", "quantize:8"],
        ["--unit", "client", "--cohort", "separated:2:2", "--train", "last:1", "--compress", "prune:0.2"],
        ["--allocation", "decaying", "--public-fraction", 0, "--server", "adam", "--server-lr", 0.01],
    ],
)
def test_choices_work_and_stay_within_the_budget(sfumato: Run, options: list) -> None:
    ran = sfumato(*QUICK, *options, "--epsilon", 4, "--json")
    assert ran.code == 0, ran.err
    assert 0 < ran.json["epsilon"] <= 4.0


@pytest.mark.usefixtures("plain_report")
def test_fewer_numbers_are_fewer_bytes(sfumato: Run) -> None:
    whole = sfumato(*QUICK, "--epsilon", 4, "--out", "a", "--json").json
    options = ["--compress", "quantize:8", "--train", "topk:0.1"]
    few = sfumato(*QUICK, "--epsilon", 4, "--out", "b", *options, "--json").json
    assert whole["bytes_up"] == 2 * 4 * 1930 * 4
    assert few["trained_numbers"] == 193
    assert few["bytes_up"] < 0.03 * whole["bytes_up"]


@pytest.mark.usefixtures("plain_report")
def test_without_noise_there_is_no_guarantee_and_it_is_said(sfumato: Run, tmp_path: Path) -> None:
    found = sfumato(*QUICK, "--noise-multiplier", 0, "--json").json
    assert (found["epsilon"], found["private"]) == (None, False)
    assert "No privacy guarantee" in (tmp_path / "run" / "report.html").read_text()


@pytest.mark.usefixtures("plain_report")
def test_shared_ledgers_add_up_over_runs_and_end_them(sfumato: Run, tmp_path: Path) -> None:
    options = ["--unit", "client", "--noise-multiplier", 3, "--ledger-dir", "books", "--epsilon", 3, "--json"]
    first = sfumato(*QUICK, *options, "--out", "a").json
    second = sfumato(*QUICK, *options, "--out", "b", "--rounds", 50).json
    assert first["epsilon"] < second["epsilon"] <= 3.0
    assert second["stopped"] == "budget"
    line = sfumato(*QUICK, *options, "--out", "c").failed(1)
    assert "does not pay for a single round" in line
    assert not (tmp_path / "c").exists()
    line = sfumato(*QUICK, *options, "--clients", 6, "--out", "d").failed(2)
    assert "other clients" in line


@pytest.mark.usefixtures("plain_report")
def test_ledgers_that_do_not_add_up_are_not_shared(sfumato: Run, tmp_path: Path) -> None:
    shared = ["--ledger-dir", tmp_path / "books", "--epsilon", 2, "--noise-multiplier", 30, "--json"]
    assert sfumato(*QUICK, "--unit", "sample", *shared, "--out", "a").code == 0
    for unit in ("client", "local", "distributed"):
        ran = sfumato(*QUICK, "--unit", unit, *shared, "--out", "b")
        assert (ran.code, "whose ledgers do not add up" in ran.err) == (2, True)
        assert not (tmp_path / "b").exists()
    shared[1] = tmp_path / "server"
    assert sfumato(*QUICK, "--unit", "client", *shared, "--out", "c").code == 0
    assert sfumato(*QUICK, "--unit", "distributed", *shared, "--out", "d").code == 0


@pytest.mark.usefixtures("plain_report")
def test_smaller_budgets_need_a_cohort_that_can_draw_less_often(sfumato: Run, tmp_path: Path) -> None:
    (tmp_path / "budgets.yaml").write_text("client-0: 1\n")
    ran = sfumato(*QUICK, "--unit", "client", "--epsilon", 2, "--budgets", "budgets.yaml", "--cohort", "fixed:2")
    assert (ran.code, "--cohort poisson:RATE" in ran.err) == (2, True)


@pytest.mark.usefixtures("plain_report")
@pytest.mark.parametrize("unit", ["sample", "local"])
def test_clients_that_have_spent_everything_train_no_more(sfumato: Run, tmp_path: Path, unit: str) -> None:
    options = ["--unit", unit, "--ledger-dir", "books", "--epsilon", 2, "--json"]
    first = sfumato(*QUICK, *options, "--out", "a").json
    assert first["epsilon"] <= 2.0
    line = sfumato(*QUICK, *options, "--out", "b")
    assert line.code == 1, line.err
    assert "Nothing was trained" in line.err
    assert "b" not in names(tmp_path)
    with sf.Ledger(tmp_path / "books" / "client-0.db") as ledger:
        assert float(ledger.epsilon(delta=1e-5)) <= 2.0


@pytest.mark.usefixtures("plain_report")
@pytest.mark.parametrize("unit", ["sample", "client"])
def test_clients_with_smaller_budgets_stay_within_them(sfumato: Run, tmp_path: Path, unit: str) -> None:
    (tmp_path / "budgets.yaml").write_text("client-1: 1.5\nclient-3: 0.5\n")
    ran = sfumato(*QUICK, "--unit", unit, "--epsilon", 3, "--budgets", "budgets.yaml", "--json")
    assert ran.code == 0, ran.err
    spent = json.loads((tmp_path / "run" / "report.json").read_text())["client_epsilons"]
    assert set(spent) == {f"client-{i}" for i in range(4)}
    for client, limit in {"client-0": 3, "client-1": 1.5, "client-2": 3, "client-3": 0.5}.items():
        assert 0.9 * limit < spent[client] <= limit
    assert ran.json["epsilon"] == max(spent.values())


@pytest.mark.parametrize(
    ("text", "unit", "says"),
    [
        ("client-9: 1", "sample", "'client-9', which is no client"),
        ("client-1: 5", "sample", "at most 4"),
        ("client-1: yes", "sample", "no number"),
        ("- 1", "sample", "must map"),
        ("client-1: 1", "distributed", "one noise"),
    ],
)
def test_budgets_that_make_no_sense_are_refused(sfumato: Run, tmp_path: Path, text: str, unit: str, says: str) -> None:
    (tmp_path / "budgets.yaml").write_text(text)
    assert says in sfumato(*QUICK, "--epsilon", 4, "--unit", unit, "--budgets", "budgets.yaml").failed(2)
    assert names(tmp_path) == {"budgets.yaml"}


@pytest.mark.usefixtures("plain_report")
def test_repeatable_noise_is_called_so(sfumato: Run, tmp_path: Path) -> None:
    runs = [sfumato(*QUICK, "--epsilon", 4, "--noise", "research", "--out", out, "--json") for out in "ab"]
    assert runs[0].json["accuracy"] == runs[1].json["accuracy"]
    assert "not for private data" in runs[0].err
    one, other = (load_file(tmp_path / out / "model.safetensors") for out in "ab")
    assert all(bool((one[name] == other[name]).all()) for name in one)
    assert "not fit for production" in (tmp_path / "a" / "report.html").read_text()


@pytest.mark.usefixtures("plain_report")
def test_a_failure_leaves_only_the_ledgers(sfumato: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*arguments: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(federated_job, "write_federated", broken)
    for unit, kept in (("sample", "run.spent-ledgers"), ("client", "run.spent-ledger.db")):
        ran = sfumato(*QUICK, "--epsilon", 4, "--unit", unit)
        assert ran.code == 2
        assert "disk full" in ran.err
        assert kept in ran.err
        assert not (tmp_path / "run").exists()
        assert kept in {n for n in names(tmp_path) if not n.endswith(".seal")}


@pytest.mark.usefixtures("plain_report")
def test_clients_that_all_fail_are_an_error(sfumato: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    class Broken(federated_job.FederatedTrainer):
        def __init__(self, **values: object):
            # Two records are what is tried before anything is charged.
            loss = torch.nn.functional.cross_entropy
            values |= {"loss": lambda output, y: loss(output, y) if len(y) <= 2 else output.nonsense}
            super().__init__(**values)

    monkeypatch.setattr(federated_job, "FederatedTrainer", Broken)
    ran = sfumato(*QUICK, "--epsilon", 4)
    assert ran.code == 2
    assert "no answer of any client counted: client error (8)" in ran.err


@pytest.mark.usefixtures("plain_report")
def test_a_table_with_a_client_column(sfumato: Run, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    age, clinic = rng.integers(20, 80, 600), rng.integers(0, 15, 600)
    sick = (age + rng.normal(0, 8, 600) > 50).astype(int)
    lines = ["age,clinic,sick", *(f"{a},clinic {c},{s}" for a, c, s in zip(age, clinic, sick, strict=True))]
    (tmp_path / "clinics.csv").write_text("\n".join(lines) + "\n")
    (tmp_path / "bounds.yaml").write_text("age: [0, 100]\n")
    ran = sfumato(
        "federate", "--data", "clinics.csv", "--label", "sick", "--client-column", "clinic", "--bounds", "bounds.yaml",
        "--epsilon", 4, "--rounds", 5, "--noise", "research", "--seed", 1, "--json",
    )  # fmt: skip
    assert ran.code == 0, ran.err
    assert ran.json["clients"] == 15
    assert ran.json["public_records"] == 0  # of somebody's own data nothing is public unless they say so
    assert ran.json["accuracy"] > 0.7
    assert (tmp_path / "run" / "ledgers").is_dir()
    html = (tmp_path / "run" / "report.html").read_text()
    assert "untrained model that the rounds began from" in html
    assert "records of these clients that were held out" in html


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ([], "--epsilon"),
        (["--epsilon", -1], "--epsilon"),
        (["--epsilon", 4, "--delta", 2], "--delta"),
        (["--epsilon", 4, "--cohort", "fixed"], "--cohort must be"),
        (["--epsilon", 4, "--cohort", "poisson:1.5"], "RATE must be in (0, 1]"),
        (["--epsilon", 4, "--train", "topk:0"], "FRACTION"),
        (["--epsilon", 4, "--compress", "quantize:8.5"], "BITS"),
        (["--epsilon", 4, "--compress", "quantize:3"], "bits"),
        (["--epsilon", 4, "--unit", "client", "--max-grad-norm", 1], "means nothing with --unit client"),
        (["--epsilon", 4, "--max-dropout", 0.2], "means nothing with --unit sample"),
        (["--epsilon", 4, "--noise", "research"], "--seed"),
        (["--epsilon", 4, "--clients", 5000], "cannot be divided"),
        (["--epsilon", 4, "--client-column", "clinic"], "--client-column"),
        (["--epsilon", 4, "--public-fraction", 0, "--allocation", "adaptive"], "public records"),
        (["--noise-multiplier", 0, "--epsilon", 1], "no --epsilon can hold"),
    ],
)
def test_mistakes_are_one_line_and_leave_nothing(sfumato: Run, tmp_path: Path, options: list, says: str) -> None:
    assert says in sfumato("federate", "--data", "digits", *options).failed(2)
    assert names(tmp_path) == set()


def test_choices_are_read_strictly() -> None:
    assert chosen("--cohort", "separated:3:2", COHORTS).counts == (3, 2)
    assert chosen("--train", "topk:0.25", TRAINS).numbers == (0.25,)
    for text in ("", "all:1", "topk", "topk:x", "topk:nan", "last:0", "last:inf"):
        with pytest.raises(ConfigurationError, match="--train"):
            chosen("--train", text, TRAINS)


def test_ids_make_safe_and_distinct_file_names() -> None:
    ids = ["a", "../../etc/passwd", "a/b", ".", "..", "x" * 300, "x" * 301, "Schule Süd", "CON:"]
    found = [file_name(name) for name in ids]
    assert len(set(found)) == len(ids)
    assert all("/" not in name and not name.startswith(".") and len(name) < 200 for name in found)


def test_recipes_take_longer_steps_where_there_is_less_noise() -> None:
    def recipe(level: str, **values: float) -> FederatedRecipe:
        return federated_recipe("digits", (1, 8, 8), level, **({"clients": 50, "records": 600, "epsilon": 2} | values))

    for level in ("client", "distributed", "local"):
        assert recipe(level, clients=20).norm < recipe(level).norm
        assert recipe(level, epsilon=1).norm < recipe(level).norm
    assert recipe("sample", clients=100).lr < recipe("sample").lr < recipe("sample", records=1200).lr
    assert recipe("sample", records=10**9).lr == 5.0
    for shape, model in (((7,), "mlp"), ((3, 32, 32), "cnn")):
        found = federated_recipe("a.csv", shape, "sample", clients=3, records=900, epsilon=None)
        assert found.model == model


@pytest.mark.slow
def test_the_default_reaches_its_accuracy(sfumato: Run) -> None:
    found = sfumato("federate", "--data", "digits", "--clients", 20, "--epsilon", 4, "--json").json
    assert found["epsilon"] <= 4.0
    assert found["accuracy"] >= 0.93
