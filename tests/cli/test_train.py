"""``sfumato train`` from data to run folder."""

from __future__ import annotations

import json
import logging
import math
import re
from pathlib import Path

import pytest
from safetensors.torch import load_file
from tests.cli.helpers import Run

import sfumato as sf
from sfumato.models import build

QUICK = ["train", "--data", "digits", "--epochs", 2, "--batch-size", 256, "--seed", 1]
FILES = {"model.safetensors", "ledger.db", "ledger.db.seal", "metrics.jsonl", "report.html", "report.json"}


def rows(run: Path, kind: str) -> list[dict]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line["kind"] == kind]


def names(folder: Path) -> set[str]:
    return {entry.name for entry in folder.iterdir()}


def test_the_contract(sfumato: Run, tmp_path: Path) -> None:
    ran = sfumato(*QUICK, "--epsilon", 3, "--out", "run/", "--json")
    assert ran.code == 0, ran.err
    assert 2.97 < ran.json["epsilon"] <= 3.0
    assert (ran.json["delta"], ran.json["steps"]) == (1e-5, 12)
    assert 0.5 < ran.json["accuracy"] <= 1
    assert Path(ran.json["report"]) == tmp_path / "run" / "report.html"
    assert names(tmp_path) == {"run"}
    assert names(tmp_path / "run") == FILES


def test_the_ledger_and_the_report_say_what_was_printed(sfumato: Run, tmp_path: Path) -> None:
    ran = sfumato(*QUICK, "--epsilon", 3, "--out", "run", "--json")
    with sf.Ledger(tmp_path / "run" / "ledger.db") as ledger:
        assert ledger.verify() == ran.json["steps"]
        assert float(ledger.epsilon(delta=1e-5)) == pytest.approx(ran.json["epsilon"])
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert report["guarantee"]["epsilon"] == ran.json["epsilon"]
    assert report["results"]["test_accuracy"] == ran.json["accuracy"]
    assert report["mechanism"]["noise_multiplier"] == ran.json["noise_multiplier"]
    assert {a["status"] for a in report["assumptions"]} == {"checked", "declared", "unknown"}
    assert rows(tmp_path / "run", "epoch")[-1]["epsilon"] == ran.json["epsilon"]


def test_the_model_is_plain_and_complete(sfumato: Run, tmp_path: Path) -> None:
    sfumato(*QUICK, "--epsilon", 3, "--model", "cnn", "--averaging", "none")
    model = build("cnn", (1, 8, 8), 10)
    model.load_state_dict(load_file(tmp_path / "run" / "model.safetensors"))


def test_for_people_the_guarantee_in_words(sfumato: Run) -> None:
    ran = sfumato(*QUICK, "--epsilon", 3)
    assert ran.code == 0
    assert re.search(r"Training was \((3|2\.9\d*), 1e-5\)-differentially private", ran.out)
    assert "adding or removing one record" in ran.out


def test_noise_multiplier_without_a_budget(sfumato: Run) -> None:
    found = sfumato(*QUICK, "--noise-multiplier", 2, "--json").json
    assert found["noise_multiplier"] == 2
    expected = sf.accounting.epsilon(noise_multiplier=2.0, sample_rate=256 / 1437, steps=12, delta=1e-5)
    assert found["epsilon"] == pytest.approx(float(expected))


def test_no_noise_is_allowed_and_said_to_be_not_private(sfumato: Run, tmp_path: Path) -> None:
    found = sfumato(*QUICK, "--noise-multiplier", 0, "--json").json
    assert (found["epsilon"], found["private"]) == (None, False)
    html = (tmp_path / "run" / "report.html").read_text()
    assert "No privacy guarantee" in html


def test_the_budget_ends_the_run(sfumato: Run) -> None:
    found = sfumato(*QUICK, "--epochs", 50, "--noise-multiplier", 2, "--epsilon", 2.5, "--json").json
    assert found["stopped_by_budget"]
    assert found["epsilon"] <= 2.5
    one_more = sf.accounting.epsilon(noise_multiplier=2.0, sample_rate=256 / 1437, steps=found["steps"] + 1, delta=1e-5)
    assert float(one_more) > 2.5


def test_physical_batches_change_neither_steps_nor_epsilon(sfumato: Run) -> None:
    whole = sfumato(*QUICK, "--noise-multiplier", 2, "--out", "a", "--json").json
    split = sfumato(*QUICK, "--noise-multiplier", 2, "--out", "b", "--max-physical-batch-size", 50, "--json").json
    assert (whole["steps"], whole["epsilon"]) == (split["steps"], split["epsilon"])


def test_metrics_say_that_they_are_not_covered(sfumato: Run, tmp_path: Path) -> None:
    sfumato(*QUICK, "--epsilon", 3)
    (note,) = rows(tmp_path / "run", "note")
    assert "NOT covered" in note["note"]
    steps = rows(tmp_path / "run", "step")
    assert len(steps) == 12
    assert {"loss", "train_accuracy", "clip_rate"} <= steps[0].keys()
    assert all(0 <= row["clip_rate"] <= 1 for row in steps)
    epsilons = [row["epsilon"] for row in steps if "epsilon" in row]
    assert epsilons == sorted(epsilons)


def test_private_metrics_can_be_left_out(sfumato: Run, tmp_path: Path) -> None:
    ran = sfumato(*QUICK, "--epsilon", 3, "--no-private-metrics", "--json")
    assert ran.code == 0
    everything = (tmp_path / "run" / "metrics.jsonl").read_text() + (tmp_path / "run" / "report.json").read_text()
    for row in rows(tmp_path / "run", "step"):
        assert not {"loss", "train_accuracy", "clip_rate"} & row.keys()
    assert '"loss":' not in everything
    assert "loss " not in ran.err
    assert "Training loss</h3>" not in (tmp_path / "run" / "report.html").read_text()


def test_the_report_needs_nothing_from_elsewhere(sfumato: Run, tmp_path: Path) -> None:
    sfumato(*QUICK, "--epsilon", 3)
    html = (tmp_path / "run" / "report.html").read_text()
    assert html.count("<svg") == 6
    for loader in (r'src=["\']', r"<script", r"<link", r"@import", r"url\(http", r'href=["\']http'):
        assert not re.search(loader, html), loader
    for words in ("add-remove", "checked", "declared", "unknown", "not covered", "Poisson", "poisson"):
        assert words in html or words == "Poisson"


def test_the_seed_fixes_the_start_but_not_the_noise(sfumato: Run, tmp_path: Path) -> None:
    for out in ("a", "b"):
        sfumato(*QUICK, "--epsilon", 3, "--model", "mlp", "--out", out)
    a, b = (load_file(tmp_path / out / "model.safetensors") for out in ("a", "b"))
    assert any((a[name] != b[name]).any() for name in a)


def test_yaml_equals_flags(sfumato: Run, tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text(
        "data: digits\nepochs: 2\nbatch-size: 256\nseed: 1\nnoise-multiplier: 2\nmax_grad_norm: 0.5\n"
        "no-private-metrics: true\n"
    )
    found = sfumato("train", "--config", "c.yaml", "--json")
    assert found.code == 0, found.err
    assert (found.json["noise_multiplier"], found.json["max_grad_norm"]) == (2, 0.5)


@pytest.mark.parametrize("averaging", ["none", "ema:0.9", "last:0.5"])
@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
def test_recipes_can_be_overridden(sfumato: Run, averaging: str, schedule: str) -> None:
    ran = sfumato(*QUICK, "--epsilon", 8, "--averaging", averaging, "--lr-schedule", schedule, "--json")
    assert ran.code == 0, ran.err


def test_adam(sfumato: Run) -> None:
    assert sfumato(*QUICK, "--epsilon", 8, "--optimizer", "adam", "--lr", 0.01, "--json").json["accuracy"] > 0.3


def test_what_user_code_prints_stays_out_of_the_result(sfumato: Run, tmp_path: Path) -> None:
    (tmp_path / "chatty_net.py").write_text(
        "from torch import nn\n"
        "def net(input_shape, classes):\n"
        "    print('hello')\n"
        "    return nn.Sequential(nn.Flatten(), nn.Linear(64, classes))\n"
    )
    ran = sfumato(*QUICK, "--epsilon", 3, "--model", "chatty_net:net", "--json")
    assert ran.code == 0, ran.err
    assert ran.json["epsilon"] <= 3
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    (start,) = [a for a in report["assumptions"] if a["name"].startswith("The starting point")]
    assert start["status"] == "declared"


def test_frozen_features_are_saved_with_the_head(sfumato: Run, tmp_path: Path) -> None:
    (tmp_path / "feature_net.py").write_text(
        "from torch import nn\n"
        "from sfumato.models import Features\n"
        "def net(classes):\n"
        "    return Features(nn.Sequential(nn.Flatten(), nn.Linear(64, 20), nn.ReLU()), nn.Linear(20, classes))\n"
    )
    ran = sfumato(*QUICK, "--epsilon", 8, "--model", "feature_net:net", "--averaging", "last:0.5", "--json")
    assert ran.code == 0, ran.err
    assert {"features.1.weight", "head.weight"} <= load_file(tmp_path / "run" / "model.safetensors").keys()
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert (report["training"]["parameters"], report["data"]["record_shape"]) == (210, [1, 8, 8])


def test_verbose_shows_the_log_of_the_library_on_standard_error(sfumato: Run, tmp_path: Path) -> None:
    (tmp_path / "logging_net.py").write_text(
        "import logging\n"
        "from torch import nn\n"
        "def net(classes):\n"
        "    logging.getLogger('sfumato.test').info('epsilon so far')\n"
        "    return nn.Sequential(nn.Flatten(), nn.Linear(64, classes))\n"
    )
    options = [*QUICK, "--epsilon", 3, "--epochs", 1, "--model", "logging_net:net", "--json"]
    before = logging.getLogger("sfumato").level, list(logging.getLogger("sfumato").handlers)
    loud = sfumato(*options, "--verbose", "--out", "loud")
    assert "sfumato.test: epsilon so far" in loud.err
    assert loud.json["steps"] == 6
    assert "so far" not in sfumato(*options, "--out", "quiet").err
    assert (logging.getLogger("sfumato").level, logging.getLogger("sfumato").handlers) == before


def test_tables(sfumato: Run, table: Path, tmp_path: Path) -> None:
    (tmp_path / "b.yaml").write_text("age: [0, 120]\ntown: [Rome, Pisa, Siena]\n")
    ran = sfumato(
        "train", "--data", table, "--label", "label", "--bounds", "b.yaml", "--epsilon", 8, "--epochs", 3, "--json"
    )
    assert ran.code == 0, ran.err
    assert "income" in ran.err  # no bounds: said aloud, and in the report
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert "income" in report["data"]["warnings"][0]
    assert report["data"]["train_records"] == 160


def test_idx_folders(sfumato: Run, idx: Path, tmp_path: Path) -> None:
    ran = sfumato("train", "--data", idx, "--epsilon", 8, "--epochs", 1, "--batch-size", 30, "--json")
    assert ran.code == 0, ran.err
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert report["data"]["name"] == "fashion-mnist"


def test_image_folders(sfumato: Run, pictures: Path) -> None:
    ran = sfumato("train", "--data", pictures, "--epsilon", 8, "--epochs", 2, "--batch-size", 8, "--json")
    assert ran.code == 0, ran.err


def test_a_shared_ledger_adds_up_and_then_refuses(sfumato: Run, tmp_path: Path) -> None:
    first = sfumato(*QUICK, "--epsilon", 2, "--ledger", "all.db", "--out", "a", "--json").json
    second = sfumato(*QUICK, "--epsilon", 4, "--ledger", "all.db", "--out", "b", "--json").json
    assert first["epsilon"] < 2.001 < second["epsilon"] <= 4
    assert names(tmp_path / "b") == FILES - {"ledger.db", "ledger.db.seal"}
    third = sfumato(*QUICK, "--epsilon", 2, "--ledger", "all.db", "--out", "c", "--json")
    assert "already spent" in third.failed(1)
    assert not (tmp_path / "c").exists()
    with sf.Ledger(tmp_path / "all.db") as ledger:
        assert ledger.verify() == first["steps"] + second["steps"]


@pytest.mark.slow
def test_digits_recipe(sfumato: Run) -> None:
    found = sorted(
        sfumato("train", "--epsilon", 3, "--seed", seed, "--out", f"run{seed}", "--json").json["accuracy"]
        for seed in range(5)
    )
    assert found[2] >= 0.93, found
    assert not any(math.isnan(a) for a in found)
