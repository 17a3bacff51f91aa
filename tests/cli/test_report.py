"""The report says what the facts say, in numbers, words and marks."""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest

from sfumato.errors import DataError
from sfumato.report import (
    Data,
    EpochRow,
    Guarantee,
    LedgerFacts,
    Meaning,
    Mechanism,
    RunFacts,
    StepRow,
    Training,
    as_card,
    as_markdown,
    plain_sentence,
    plain_text,
    read_metrics,
    read_report,
    write,
)
from sfumato.report.assumptions import assumptions
from sfumato.report.ranges import SETTINGS, tier
from sfumato.report.words import at_least, at_most, number
from sfumato.report.write import as_html, as_json

FACTS = RunFacts(
    guarantee=Guarantee(epsilon=2.0, lower=1.999, delta=1e-5, unit="record", adjacency="add-remove"),
    meaning=Meaning(0.4, ((0.001, 0.007), (0.01, 0.05), (0.1, 0.3)), 9.0, ((2, 4.5), (5, 12.0), (10, math.inf))),
    mechanism=Mechanism(1.5, 0.1, 0.01, 10.0, 20, 20, 10, "poisson", "secure", (("0.weight", "rule"),)),
    training=Training("mlp", 99, "sgd", 1.0, "constant", 0.9, 10, None, 2, "none", 7, "cpu", 1.5, False, False),
    data=Data("a <b>set</b>", 1000, 100, (3,), 2, ("Scaled by 2.",), ("Columns are public.",), ("no bounds",)),
    ledger=LedgerFacts("ledger.db", 20, "ab" * 32, False, 0, 0.0),
    accuracy=0.9,
    steps=tuple(StepRow(i, 1 + i // 11, i / 10, 1.0 / i, 0.5, 0.7) for i in range(1, 21)),
    epochs=(EpochRow(10, 1, 1.0, 0.8), EpochRow(20, 2, 2.0, 0.9)),
    epsilon_at=((1e-5, 2.0), (1e-6, 2.2)),
    trade_off=((0.0, 1e-5), (0.25, 0.6), (1.0, 1.0)),
    private_metrics=True,
    versions=(("torch", "2"),),
    command="sfumato train",
    finished="2026-01-01",
)

NOT_PRIVATE = replace(
    FACTS,
    guarantee=replace(FACTS.guarantee, epsilon=math.inf, lower=math.inf),
    meaning=Meaning(1.0, ((0.01, 1.0),), math.inf, ((2, math.inf),)),
    epsilon_at=(),
    trade_off=(),
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


def test_the_meaning_is_said_in_words_with_every_number() -> None:
    said = plain_text(FACTS.guarantee, FACTS.meaning)
    for part in ("5 % of those used at 1 % false alarms", "0.7 % at 0.1 %", "30 % at 10 %", "at most 40 %", "ε = 9."):
        assert part in said, part
    assert "ε = 4.5 for 2, 12 for 5 (same δ = 1e-5); they have no known bound for 10." in said
    assert "No amplification" in plain_text(FACTS.guarantee, replace(FACTS.meaning, unamplified=None))
    assert "which of two records" in plain_text(replace(FACTS.guarantee, adjacency="replace-one"), FACTS.meaning)


@pytest.mark.parametrize(
    ("epsilon", "says"), [(1.0, "strong"), (1.01, "reasonable"), (10.01, "weak"), (math.inf, "no ")]
)
def test_the_scale_has_its_steps_where_its_source_has_them(epsilon: float, says: str) -> None:
    assert tier(epsilon).startswith(says)


def test_every_published_value_has_a_source_with_a_year() -> None:
    for setting in SETTINGS:
        assert re.search(r"\b20[12]\d\b", setting.source), setting


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


def test_markdown_from_outside_is_no_markup() -> None:
    hostile = changed(FACTS, "data", name="a | <script>alert(1)</script>\n# b `c` [d](e)")
    text = as_markdown(hostile)
    assert "<script" not in text
    assert "\n# b" not in text
    assert r"a \| &lt;script&gt;" in text
    assert r"\[d\](e)" in text


def test_the_card_is_one_yaml_block_and_words() -> None:
    import yaml

    text = as_card(replace(FACTS, guarantee=replace(FACTS.guarantee, unit='us"er: x')))
    (block,) = re.findall(r"```yaml\n(.*?)```", text, re.DOTALL)
    found = yaml.safe_load(block)["privacy"]
    assert (found["epsilon"], float(found["delta"]), found["unit"]) == (2.0, 1e-5, 'us"er: x')
    assert (found["tpr_at_1_percent_fpr_at_most"], found["epsilon_for_10_together"]) == (0.05, None)
    assert found["ledger_head"] == "ab" * 32
    assert (
        yaml.safe_load(re.findall(r"```yaml\n(.*?)```", as_card(NOT_PRIVATE), re.DOTALL)[0])["privacy"]["private"]
        is False
    )


def test_what_was_written_is_read_again(tmp_path: Path) -> None:
    for facts in (FACTS, NOT_PRIVATE, replace(FACTS, private_metrics=False)):
        (tmp_path / "report.json").write_text(json.dumps(as_json(facts)))
        found = read_report(tmp_path / "report.json")
        assert replace(found, meaning=facts.meaning, trade_off=facts.trade_off, epsilon_at=facts.epsilon_at) == facts


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("guarantee", None),
        ("guarantee.delta", 0.0),
        ("guarantee.delta", None),
        ("guarantee.delta", "1e-5"),
        ("guarantee.epsilon", True),
        ("guarantee.epsilon", "∞"),
        ("guarantee.adjacency", "other"),
        ("guarantee.unit", 3),
        ("mechanism.steps", 1.5),
        ("mechanism.steps", -1),
        ("mechanism.steps", 10**400),
        ("mechanism.tiers", ["rule"]),
        ("mechanism.noise_multiplier", math.nan),
        ("mechanism.noise_multiplier", 10**400),
        ("training.own_model", "yes"),
        ("data.train_records", 0),
        ("data.warnings", "one"),
        ("data.record_shape", ["x"]),
        ("ledger.head", "../../etc/passwd"),
        ("ledger.earlier_entries", 21),
        ("results.test_accuracy", 1.5),
        ("curves.steps", [{"step": 1}]),
        ("curves.epochs", 7),
        ("versions", []),
        ("schema", 1),
    ],
)
def test_a_report_with_a_wrong_field_is_refused(tmp_path: Path, path: str, value: object) -> None:
    file = tmp_path / "report.json"
    document = as_json(FACTS)
    *parents, last = path.split(".")
    place = document
    for name in parents:
        place = place[name]
    place[last] = value
    file.write_text(json.dumps(document))
    with pytest.raises(DataError):
        read_report(file)
    del place[last]
    file.write_text(json.dumps(document))
    with pytest.raises(DataError):
        read_report(file)


@pytest.mark.parametrize("text", ["", "{", "[]", "3", "null", '{"schema": 2}', "[" * 100_000, "\xff"])
def test_a_report_that_is_something_else_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "report.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(DataError):
        read_report(tmp_path / "report.json")
    (tmp_path / "metrics.jsonl").write_bytes(text.encode("latin-1") + b"\n{}")
    with pytest.raises(DataError):
        read_metrics(tmp_path / "metrics.jsonl")


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
