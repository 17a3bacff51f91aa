"""Parsing, exit codes, and the two sub-commands that do not train."""

from __future__ import annotations

import math
import subprocess
import sys

import pytest
from tests.cli.helpers import Run

from sfumato.accounting import Event, compose

EPSILON = "epsilon --noise-multiplier 1.1 --sample-rate 0.0042667 --steps 3516 --delta 1e-5".split()
CALIBRATE = "calibrate --epsilon 3 --delta 1e-5 --sample-rate 0.01 --steps 1000".split()
CALIBRATE_STEPS = "calibrate --epsilon 3 --delta 1e-5 --sample-rate 0.01 --noise-multiplier 1 --solve steps".split()
TPR = "calibrate --delta 1e-5 --sample-rate 0.01 --steps 1000 --tpr".split()


def test_epsilon_prints_one_json_object(sfumato: Run) -> None:
    ran = sfumato(*EPSILON, "--json")
    assert ran.code == 0
    assert ran.json["lower"] <= ran.json["epsilon"] <= ran.json["lower"] * 1.001
    assert (ran.json["delta"], ran.json["steps"], ran.json["private"]) == (1e-5, 3516, True)


def test_epsilon_for_people(sfumato: Run) -> None:
    ran = sfumato(*EPSILON)
    assert ran.code == 0
    assert ran.out.startswith("epsilon = ")


def test_epsilon_says_what_it_means(sfumato: Run) -> None:
    found = sfumato(*EPSILON, "--json").json
    assert set(found["tpr"]) == {"0.001", "0.01", "0.1"}
    assert 0.01 < found["tpr"]["0.01"] < 0.03
    assert 0 < found["advantage"] < 0.2
    assert found["amplified_by_sampling"]
    plain = sfumato(*EPSILON, "--sampling", "shuffle", "--json").json
    assert found["epsilon_without_amplification"] == plain["epsilon"]
    assert not plain["amplified_by_sampling"]
    assert list(found["group_epsilon"]) == ["2", "5", "10"]
    assert found["epsilon"] < found["group_epsilon"]["2"] < found["group_epsilon"]["10"]
    text = sfumato(*EPSILON).out
    for part in ("Attacks:", "Advantage:", "Sampling:", "Groups:", "Scale:", "NIST SP 800-226", "US Census 2020"):
        assert part in text


@pytest.mark.parametrize(
    ("sampling", "adjacency", "event"),
    [
        ([], "add-remove", Event("poisson-gaussian", 1.1, 0.1, "add-remove")),
        (["--adjacency", "replace-one"], "replace-one", Event("poisson-gaussian", 1.1, 0.1, "replace-one")),
        (["--sampling", "shuffle"], "zero-out", Event("gaussian", 1.1, 1.0, "zero-out", sampler="shuffle")),
        (
            ["--sampling", "cyclic", "--cycle", 10],
            "add-remove",
            Event("poisson-gaussian", 1.1, 0.1, "add-remove", sampler="cyclic"),
        ),
        (
            ["--sampling", "truncated-poisson", "--dataset-size", 1000, "--max-batch-size", 120],
            "zero-out",
            Event(
                "truncated-poisson-gaussian", 1.1, 0.1, "zero-out", sampler="truncated-poisson", dataset_size=1000,
                cap=120,
            ),
        ),
        (
            ["--sampling", "fixed-size", "--dataset-size", 1000, "--adjacency", "replace-one"],
            "replace-one",
            Event(
                "fixed-size-gaussian", 1.1, 0.1, "replace-one", sampler="fixed-size", dataset_size=1000, cap=100
            ),
        ),
    ],
)  # fmt: skip
def test_each_sampling_is_charged_as_what_it_is(sfumato: Run, sampling: list, adjacency: str, event: Event) -> None:
    ran = sfumato(
        "epsilon", "--noise-multiplier", 1.1, "--sample-rate", 0.1, "--steps", 95, "--delta", 1e-5, *sampling, "--json"
    )
    assert ran.code == 0, ran.err
    times = 10 if event.sampler in ("shuffle", "cyclic") else 95  # 95 steps of 10 an epoch touch a record 10 times
    assert ran.json["epsilon"] == pytest.approx(float(compose({event: times}, delta=1e-5)), rel=1e-6)
    assert ran.json["adjacency"] == adjacency


def test_no_noise_is_null_and_not_private(sfumato: Run) -> None:
    ran = sfumato(*EPSILON, "--noise-multiplier", 0, "--json")
    assert (ran.code, ran.json["epsilon"], ran.json["private"]) == (0, None, False)


def test_calibrate_lands_on_the_safe_side(sfumato: Run) -> None:
    found = sfumato(*CALIBRATE, "--json").json
    assert 2.99 < found["epsilon"] <= 3.0
    again = sfumato(
        "epsilon", "--noise-multiplier", found["noise_multiplier"], "--sample-rate", 0.01, "--steps", 1000,
        "--delta", 1e-5, "--json",
    )  # fmt: skip
    assert math.isclose(again.json["epsilon"], found["epsilon"])


CLOSER = ["--delta", 1e-5, "--json"]


def described(found: dict, *sampling: object) -> list:
    flags = ("noise_multiplier", "sample_rate", "steps")
    given = [part for name in flags for part in ("--" + name.replace("_", "-"), repr(found[name]))]
    return ["epsilon", *given, *sampling, *CLOSER]


SIZED = ["--sampling", "truncated-poisson", "--dataset-size", 500, "--max-batch-size", 30]


def test_noise_is_found_for_every_sampling(sfumato: Run) -> None:
    for sampling in (SIZED, ["--sampling", "fixed-size", "--dataset-size", 500], ["--adjacency", "replace-one"]):
        found = sfumato("calibrate", "--epsilon", 2, "--sample-rate", 0.02, "--steps", 50, *sampling, *CLOSER).json
        assert 1.99 < found["epsilon"] <= 2.0
        again = sfumato(*described(found, *sampling)).json
        assert again["epsilon"] == pytest.approx(found["epsilon"])


@pytest.mark.parametrize(
    ("target", "sampling"),
    [
        ("epsilon", []),
        ("epsilon", ["--sampling", "shuffle"]),
        ("epsilon", ["--sampling", "cyclic", "--cycle", 7]),
        ("advantage", []),
        ("tpr", []),
        ("tpr", ["--sampling", "shuffle"]),
    ],
)
@pytest.mark.parametrize("solve", ["noise", "steps", "rate"])
def test_calibration_reaches_each_target_from_below(sfumato: Run, sampling: list, target: str, solve: str) -> None:
    goal = {"epsilon": 3.0, "advantage": 0.4, "tpr": 0.1}[target]
    known = {"noise": ("--noise-multiplier", 1.5), "rate": ("--sample-rate", 0.02), "steps": ("--steps", 700)}
    given = [part for name, pair in known.items() if name != solve for part in pair]
    ran = sfumato("calibrate", f"--{target}", goal, "--solve", solve, *given, *sampling, *CLOSER)
    assert ran.code == 0, ran.err
    again = sfumato(*described(ran.json, *sampling)).json
    reached = again["tpr"]["0.01"] if target == "tpr" else again[target]
    assert reached <= goal
    assert again["epsilon"] == pytest.approx(ran.json["epsilon"])
    if solve == "noise":
        assert reached >= 0.99 * goal
    elif solve == "steps" or not sampling:
        worse = dict(ran.json)
        step = 50 if "shuffle" in sampling else 7  # the next step in which a record can take part
        worse |= {"steps": worse["steps"] + step} if solve == "steps" else {"sample_rate": 1.01 * worse["sample_rate"]}
        beyond = sfumato(*described(worse, *sampling)).json
        assert (beyond["tpr"]["0.01"] if target == "tpr" else beyond[target]) > goal


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], "train,sweep,epsilon"),
        (["fly"], "fly"),
        (["epsilon", "--delta", "1e-5"], "--noise-multiplier"),
        ([*EPSILON, "--delta", "0"], "delta"),
        ([*EPSILON, "--delta", "1"], "delta"),
        ([*EPSILON, "--sample-rate", "1.5"], "sample_rate"),
        ([*EPSILON, "--noise-multiplier", "-1"], "noise_multiplier"),
        ([*EPSILON, "--noise-multiplier", "nan"], "--noise-multiplier"),
        ([*EPSILON, "--steps", "1.5"], "--steps: expected a whole number, got '1.5'"),
        ([*EPSILON, "--stepz", "3"], "--stepz"),
        ([*CALIBRATE, "--epsilon", "0"], "epsilon"),
        ([*CALIBRATE, "--epsilon", "-3"], "epsilon"),
        ([*EPSILON, "--sampling", "bucketed"], "bucketed"),
        ([*EPSILON, "--adjacency", "edit"], "edit"),
        ([*EPSILON, "--sampling", "shuffle", "--adjacency", "add-remove"], "--adjacency add-remove"),
        ([*EPSILON, "--sampling", "cyclic"], "needs --cycle"),
        ([*EPSILON, "--sampling", "cyclic", "--cycle", "0"], "--cycle"),
        ([*EPSILON, "--cycle", "3"], "means nothing"),
        ([*EPSILON, "--sampling", "truncated-poisson", "--dataset-size", "100"], "--max-batch-size"),
        ([*EPSILON, "--sampling", "truncated-poisson", "--dataset-size", "9", "--max-batch-size", "10"], "cap"),
        ([*CALIBRATE, "--advantage", "0.1"], "one target"),
        ([*CALIBRATE, "--tpr", "0.1"], "one target"),
        ([*CALIBRATE, "--fpr", "0.1"], "--fpr goes with --tpr"),
        ([*CALIBRATE, "--noise-multiplier", "1"], "--noise-multiplier is what --solve noise finds"),
        ([*CALIBRATE, "--solve", "steps"], "--noise-multiplier is missing"),
        (["calibrate", "--epsilon", "1", "--delta", "1e-5", "--steps", "3"], "--sample-rate is missing"),
        (["calibrate", "--delta", "1e-5", "--steps", "3", "--sample-rate", "0.1"], "one target"),
        ([*CALIBRATE_STEPS, "--sampling", "fixed-size", "--dataset-size", "100"], "--solve steps"),
        ([*TPR, "1.5"], "--tpr"),
        ([*TPR, "0.005"], "--fpr must lie"),
        ([*CALIBRATE, "--solve", "lr"], "lr"),
        ([*CALIBRATE, "--epsilon", "three"], "--epsilon: expected a number, got 'three'"),
    ],
)
@pytest.mark.parametrize("flags", [[], ["--json"]])
def test_bad_usage_is_one_line_and_exit_code_2(sfumato: Run, arguments: list[str], flags: list[str], says: str) -> None:
    assert says in sfumato(*arguments, *(flags if arguments else [])).failed(2)


def test_options_from_yaml_take_the_names_of_the_flags(sfumato: Run, tmp_path) -> None:
    (tmp_path / "c.yaml").write_text("noise-multiplier: 1.1\nsample_rate: 0.01\nsteps: 100\ndelta: 1e-5\n")
    from_file = sfumato("epsilon", "--config", "c.yaml", "--json")
    assert from_file.code == 0, from_file.err
    assert from_file.json["steps"] == 100
    flag_wins = sfumato("epsilon", "--config", "c.yaml", "--steps", 200, "--json").json
    assert flag_wins["steps"] == 200


@pytest.mark.parametrize(
    ("text", "says"),
    [("steps: [1", "config"), ("stepz: 3\n", "stepz"), ("steps: many\n", "--steps"), ("- 1\n", "")],
)
def test_bad_yaml_is_bad_usage(sfumato: Run, tmp_path, text: str, says: str) -> None:
    (tmp_path / "c.yaml").write_text(text)
    assert says in sfumato(*EPSILON, "--config", "c.yaml").failed(2)


def test_missing_yaml_is_bad_usage(sfumato: Run) -> None:
    assert "nowhere.yaml" in sfumato(*EPSILON, "--config", "nowhere.yaml").failed(2)


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["train", "--help"], ["epsilon", "--help"]])
def test_help_is_not_an_error(sfumato: Run, arguments: list[str]) -> None:
    ran = sfumato(*arguments)
    assert ran.code == 0
    assert "sfumato" in ran.out


@pytest.mark.parametrize("arguments", [["--help"], EPSILON, CALIBRATE, ["train", "--epsilon", "-1"]])
def test_no_torch_where_none_is_needed(arguments: list[str]) -> None:
    code = f"import sys; from sfumato.cli import main; main({arguments!r}); sys.exit('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
