"""The report says what the facts say, in numbers, words and marks."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest

from sfumato.report import (
    Data,
    EpochRow,
    Guarantee,
    LedgerFacts,
    Mechanism,
    RunFacts,
    StepRow,
    Training,
    plain_sentence,
    write,
)
from sfumato.report.assumptions import assumptions
from sfumato.report.words import at_least, at_most, attack_bounds, number
from sfumato.report.write import as_html, as_json

FACTS = RunFacts(
    guarantee=Guarantee(epsilon=2.0, lower=1.999, delta=1e-5, unit="record", adjacency="add-remove"),
    mechanism=Mechanism(1.5, 0.1, 0.01, 10.0, 20, 20, 10, "poisson", "secure", (("0.weight", "rule"),)),
    training=Training("mlp", 99, "sgd", 1.0, "constant", 0.9, 10, None, 2, "none", 7, "cpu", 1.5, False, False),
    data=Data("a <b>set</b>", 1000, 100, (3,), 2, ("Scaled by 2.",), ("Columns are public.",), ("no bounds",)),
    ledger=LedgerFacts("ledger.db", 20, "ab" * 32, False, 0, 0.0),
    accuracy=0.9,
    steps=tuple(StepRow(i, 1 + i // 11, i / 10, 1.0 / i, 0.5, 0.7) for i in range(1, 21)),
    epochs=(EpochRow(10, 1, 1.0, 0.8), EpochRow(20, 2, 2.0, 0.9)),
    epsilon_at=((1e-5, 2.0), (1e-6, 2.2)),
    private_metrics=True,
    versions=(("torch", "2"),),
    command="sfumato train",
    finished="2026-01-01",
)


def changed(facts: RunFacts, part: str, **values: object) -> RunFacts:
    return replace(facts, **{part: replace(getattr(facts, part), **values)})


def status(facts: RunFacts, name: str) -> str:
    (found,) = [a.status for a in assumptions(facts) if a.name == name]
    return found


def test_the_sentence_states_unit_adjacency_and_numbers() -> None:
    sentence = plain_sentence(FACTS.guarantee)
    for part in ("(2, 1e-5)", "adding or removing one record", "e^2 = 7.39"):
        assert part in sentence
    assert "replacing one user by an empty one" in plain_sentence(
        replace(FACTS.guarantee, unit="user", adjacency="zero-out")
    )
    assert plain_sentence(replace(FACTS.guarantee, epsilon=math.inf)).startswith("No privacy guarantee")


@pytest.mark.parametrize(
    ("part", "values", "name", "before", "after"),
    [
        ("mechanism", {"noise_level": "research"}, "The noise cannot be predicted", "checked", "unknown"),
        ("guarantee", {"delta": 0.01}, "δ is small enough", "checked", "unknown"),
        ("ledger", {"shared": True}, "Other trainings on these records", "unknown", "declared"),
        (
            "training", {"own_model": True},
            "The starting point does not depend on the training data", "checked", "declared",
        ),
    ],
)  # fmt: skip
def test_marks_follow_the_facts(part: str, values: dict, name: str, before: str, after: str) -> None:
    assert status(FACTS, name) == before
    assert status(changed(FACTS, part, **values), name) == after


def test_nothing_claims_what_cannot_be_known() -> None:
    assert status(FACTS, "Exact arithmetic") == "unknown"
    assert status(FACTS, "The size of the data set is public") == "declared"
    assert status(FACTS, "Hyperparameters were chosen without these records") == "unknown"


def test_attack_bounds_lie_between_guessing_and_certainty() -> None:
    for alpha, power in attack_bounds(FACTS.guarantee, [0.0, 0.001, 0.01, 0.1, 0.5, 1.0]):
        assert alpha <= power <= 1
    (_, half) = attack_bounds(replace(FACTS.guarantee, epsilon=0.0, delta=0.0), [0.5])[0]
    assert half == pytest.approx(0.5)


@pytest.mark.parametrize("epsilon", [2.0, math.inf])
@pytest.mark.parametrize("private_metrics", [True, False])
def test_both_files_are_written_and_well_formed(tmp_path: Path, epsilon: float, private_metrics: bool) -> None:
    facts = replace(changed(FACTS, "guarantee", epsilon=epsilon), private_metrics=private_metrics)
    write(facts, tmp_path)

    def refuse(constant: str) -> float:
        raise AssertionError(constant)

    content = json.loads((tmp_path / "report.json").read_text(), parse_constant=refuse)
    assert content["private"] is math.isfinite(epsilon)
    html = (tmp_path / "report.html").read_text()
    open_tags: list[str] = []

    class Balance(HTMLParser):
        def handle_starttag(self, tag: str, attrs: list) -> None:
            if tag not in ("meta", "link", "br"):
                open_tags.append(tag)

        def handle_startendtag(self, tag: str, attrs: list) -> None:
            pass

        def handle_endtag(self, tag: str) -> None:
            assert open_tags.pop() == tag

    Balance().feed(html)
    assert open_tags == []


def test_names_from_outside_are_escaped() -> None:
    assert "<b>set" not in as_html(FACTS)
    assert "&lt;b&gt;set" in as_html(FACTS)


def test_the_same_facts_give_the_same_bytes() -> None:
    assert as_html(FACTS) == as_html(FACTS)
    assert as_json(FACTS) == as_json(FACTS)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (3.0, "3"),
        (1e-5, "1e-5"),
        (2.71828, "2.718"),
        (math.inf, "∞"),
        (0.0, "0"),
        (12345.6, "12,346"),
        (6.96e-4, "6.96e-4"),
    ],
)
def test_numbers(value: float, text: str) -> None:
    assert number(value) == text


@pytest.mark.parametrize("value", [2.99999, 3.00001, 3.0, 0.1234567, 20.0855, 123456.7, 6.9e-7])
def test_bounds_are_never_rounded_the_wrong_way(value: float) -> None:
    above, below = (float(f(value).replace(",", "")) for f in (at_most, at_least))
    assert below <= value <= above
    assert above - below <= 2e-3 * value
