"""The report of a federation says what the facts say."""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest

from sfumato.report import (
    TRUST,
    Data,
    FederatedFacts,
    FederatedTraining,
    Federation,
    Guarantee,
    Ledgers,
    Meaning,
    RoundRow,
    client_range,
    costs,
    federated_html,
    federated_json,
    write_federated,
)
from sfumato.report.federated_assumptions import federated_assumptions
from sfumato.report.federated_words import federated_not_covered, size


def row(number: int, **values: object) -> RoundRow:
    plain = RoundRow(
        round=number, cohort=10, accepted=9, rejected=(("late", 1),), epsilon=0.4 * number, client_min=0.2 * number,
        client_median=0.3 * number, client_max=0.4 * number, max_update_norm=1.0, noise_std=2.0, bytes_up=40_000,
        bytes_down=50_000, seconds=0.1, measure=None, test_accuracy=0.8 + 0.01 * number,
    )  # fmt: skip
    return replace(plain, **values)


FACTS = FederatedFacts(
    guarantee=Guarantee(epsilon=4.0, lower=3.999, delta=1e-5, unit="client", adjacency="add-remove"),
    meaning=Meaning(0.4, ((0.001, 0.007), (0.01, 0.05), (0.1, 0.3)), 9.0, ((2, 8.5), (5, 30.0), (10, math.inf))),
    federation=Federation(
        level="client", clients=20, partition="20 simulated <b>clients</b>.", natural=False, public_records=142,
        rounds=10,
        planned_rounds=10, stopped="rounds", cohort="poisson:0.5", server="average", train="all", compression="none",
        allocation="uniform", local="1 epoch", norm=1.0, noise_multiplier=(1.5, 1.5), noise_level="secure",
        numbers=1930, parameters=1930, bytes_up=400_000, bytes_down=500_000, noise_to_update=6.6, amplified=True,
    ),
    training=FederatedTraining("energy", 7, "cpu", 12.5, False),
    data=Data("digits", 1295, 360, (1, 8, 8), 10, ("Scaled.",), (), ("a warning",)),
    ledgers=Ledgers("ledger.db", 1, 10, "ab" * 32),
    accuracy=0.9,
    baseline=0.85,
    client_epsilons=tuple((f"client-{i:02}", 2.0 + i / 8) for i in range(20)),
    rounds=tuple(row(i) for i in range(1, 11)),
    epsilon_at=((1e-5, 4.0), (1e-6, 4.4)),
    trade_off=((0.0, 1e-5), (0.25, 0.6), (1.0, 1.0)),
    versions=(("torch", "2"),),
    command="sfumato federate",
    finished="2026-01-01",
)  # fmt: skip


def level(name: str, **federation: object) -> FederatedFacts:
    unit = "record" if name == "sample" else "client"
    return replace(
        FACTS,
        guarantee=replace(FACTS.guarantee, unit=unit),
        federation=replace(FACTS.federation, level=name, **federation),
    )


class Balanced(HTMLParser):
    VOID = ("meta", "link", "br", "hr", "img", "path", "use", "rect")

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: list) -> None:
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in self.VOID:
            assert self.open.pop() == tag


@pytest.mark.parametrize("name", ["sample", "client", "local", "distributed"])
def test_the_page_is_whole_and_says_whom_to_trust(name: str) -> None:
    html = federated_html(level(name))
    parser = Balanced()
    parser.feed(html)
    assert parser.open == []
    assert TRUST[name].split(",")[0].split(":")[0] in html
    assert html.count("<svg") == 6
    assert "<b>clients</b>" not in html
    assert not re.search(r"""(?:src|href)=["']?https?:""", html)


def test_both_files_hold_the_same_numbers(tmp_path: Path) -> None:
    write_federated(FACTS, tmp_path)
    found = json.loads((tmp_path / "report.json").read_text(), parse_constant=lambda text: pytest.fail(text))
    assert found["schema"] == "federated-1"
    assert found["guarantee"]["epsilon"] == 4.0
    assert found["results"] == {"test_accuracy": 0.9, "baseline_test_accuracy": 0.85}
    assert found["client_epsilon"] == {"min": 2.0, "median": 3.1875, "max": 4.375}
    assert found["meaning"]["epsilon_without_amplification"] == 9.0
    assert len(found["rounds"]) == 10
    assert found["rounds"][0]["rejected"] == {"late": 1}
    html = (tmp_path / "report.html").read_text()
    for text in ("late: 10", "90.00 %", "85.00 %", "least 2, median 3.188, largest 4.375", "a warning"):
        assert text in html, text


def test_masks_that_are_simulated_are_called_so() -> None:
    (found,) = [a for a in federated_assumptions(level("distributed")) if a.name == "The server sees the sum alone"]
    assert found.status == "unknown"
    assert "SIMULATED" in federated_html(level("distributed"))
    assert "SIMULATED" not in federated_html(level("client"))


def test_a_result_that_is_worse_than_the_public_model_is_called_so() -> None:
    assert "+5.00 points" in costs(FACTS)[0]
    worse = costs(replace(FACTS, accuracy=0.8))[0]
    assert "NOT better (-5.00 points)" in worse
    assert "use that one" in worse


def test_what_a_secret_draw_must_not_show_is_named() -> None:
    assert any("draw being secret" in text for text in federated_not_covered(FACTS))
    assert not any("draw being secret" in text for text in federated_not_covered(level("client", amplified=False)))
    assert not any("draw being secret" in text for text in federated_not_covered(level("sample")))


def test_amplification_is_told_with_what_it_is_without() -> None:
    assert any("would give ε = 9." in text for text in costs(FACTS))
    plain = replace(FACTS, meaning=replace(FACTS.meaning, unamplified=None))
    assert "No amplification by sampling is counted on." in costs(plain)


@pytest.mark.parametrize(
    ("facts", "name", "status"),
    [
        (FACTS, "The server is honest", "declared"),
        (FACTS, "δ is small enough", "checked"),
        (replace(FACTS, guarantee=replace(FACTS.guarantee, delta=0.1)), "δ is small enough", "unknown"),
        (FACTS, "The noise cannot be predicted", "checked"),
        (level("client", noise_level="research"), "The noise cannot be predicted", "unknown"),
        (FACTS, "Clients hold different people's records", "checked"),
        (level("client", natural=True), "Clients hold different people's records", "declared"),
        (FACTS, "The public part is public", "declared"),
        (FACTS, "Exact arithmetic", "unknown"),
    ],
)
def test_marks_follow_the_facts(facts: FederatedFacts, name: str, status: str) -> None:
    assert [a.status for a in federated_assumptions(facts) if a.name == name] == [status]


def test_without_noise_nothing_is_claimed() -> None:
    free = replace(
        FACTS,
        guarantee=replace(FACTS.guarantee, epsilon=math.inf, lower=math.inf),
        meaning=Meaning(1.0, ((0.01, 1.0),), math.inf, ((2, math.inf),)),
        client_epsilons=(("a", math.inf), ("b", math.inf)),
        rounds=(row(1, epsilon=math.inf, client_min=math.inf, client_median=math.inf, client_max=math.inf),),
        epsilon_at=(),
        trade_off=(),
    )
    found = federated_json(free)
    assert found["private"] is False
    assert found["client_epsilon"] == {"min": None, "median": None, "max": None}
    assert "No privacy guarantee" in federated_html(free)


def test_rounds_without_evaluation_or_answers_are_drawn() -> None:
    sparse = replace(FACTS, rounds=(row(1, cohort=0, accepted=0, rejected=(), test_accuracy=None),))
    assert federated_html(sparse).count("<svg") == 5
    assert client_range(sparse)["max"] == 4.375


@pytest.mark.parametrize(
    ("count", "text"), [(0, "0 bytes"), (999, "999 bytes"), (1500, "1.5 kB"), (2.5e6, "2.5 MB"), (3e12, "3,000.0 GB")]
)
def test_sizes(count: float, text: str) -> None:
    assert size(count) == text
