"""Parsing, exit codes, and the two sub-commands that do not train."""

from __future__ import annotations

import math
import subprocess
import sys

import pytest
from tests.cli.helpers import Run

EPSILON = "epsilon --noise-multiplier 1.1 --sample-rate 0.0042667 --steps 3516 --delta 1e-5".split()
CALIBRATE = "calibrate --epsilon 3 --delta 1e-5 --sample-rate 0.01 --steps 1000".split()


def test_epsilon_prints_one_json_object(sfumato: Run) -> None:
    ran = sfumato(*EPSILON, "--json")
    assert ran.code == 0
    assert ran.json["lower"] <= ran.json["epsilon"] <= ran.json["lower"] * 1.001
    assert (ran.json["delta"], ran.json["steps"], ran.json["private"]) == (1e-5, 3516, True)


def test_epsilon_for_people(sfumato: Run) -> None:
    ran = sfumato(*EPSILON)
    assert ran.code == 0
    assert ran.out.startswith("epsilon = ")


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


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], "train,epsilon,calibrate"),
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
