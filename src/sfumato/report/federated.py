"""Facts of a federation -> ``report.json`` and ``report.html``."""

from __future__ import annotations

import json
import math
import statistics
from dataclasses import asdict
from pathlib import Path

from .explain import explained
from .federated_assumptions import federated_assumptions
from .federated_curves import federated_curves
from .federated_facts import FederatedFacts
from .federated_words import TRUST, UNITS, costs, federated_coverage, federated_not_covered, noise_text, size, start
from .ranges import CONTEXT, SETTINGS
from .words import plain_sentence
from .write import HTML_NAME, JSON_NAME, meaning_json, page, strict

FEDERATED_SCHEMA = "federated-1"


def write_federated(facts: FederatedFacts, folder: Path) -> None:
    """Write both files into ``folder`` (existing). The HTML loads nothing from anywhere."""
    content = json.dumps(federated_json(facts), indent=2, ensure_ascii=False, allow_nan=False)
    (folder / JSON_NAME).write_text(content + "\n", encoding="utf-8")
    (folder / HTML_NAME).write_text(federated_html(facts), encoding="utf-8")


def federated_json(facts: FederatedFacts) -> dict[str, object]:
    """The report as plain data: strict JSON, infinity and NaN as null."""
    content = strict(
        {
            "schema": FEDERATED_SCHEMA,
            "private": math.isfinite(facts.guarantee.epsilon),
            "statement": plain_sentence(facts.guarantee),
            "unit": UNITS[facts.federation.level],
            "trust": TRUST[facts.federation.level],
            "covered": federated_coverage(facts),
            "not_covered": federated_not_covered(facts),
            "costs": costs(facts),
            "guarantee": asdict(facts.guarantee),
            "federation": asdict(facts.federation),
            "client_epsilons": dict(facts.client_epsilons),
            "client_epsilon": client_range(facts),
            "meaning": meaning_json(facts.meaning),
            "assumptions": [asdict(item) for item in federated_assumptions(facts)],
            "results": {"test_accuracy": facts.accuracy, "baseline_test_accuracy": facts.baseline},
            "training": asdict(facts.training),
            "data": asdict(facts.data),
            "ledgers": asdict(facts.ledgers),
            "epsilon_at_delta": [{"delta": delta, "epsilon": value} for delta, value in facts.epsilon_at],
            "rounds": [asdict(row) | {"rejected": dict(row.rejected)} for row in facts.rounds],
            "versions": dict(facts.versions),
            "command": facts.command,
            "finished": facts.finished,
        }
    )
    assert isinstance(content, dict)
    return content


def federated_html(facts: FederatedFacts) -> str:
    """One page with everything inline."""
    return page(
        "federated.html.j2",
        facts=facts,
        private=math.isfinite(facts.guarantee.epsilon),
        sentence=plain_sentence(facts.guarantee),
        unit=UNITS[facts.federation.level],
        trust=TRUST[facts.federation.level],
        coverage=federated_coverage(facts),
        costs=costs(facts),
        start=start(facts),
        explained=explained(facts.guarantee, facts.meaning),
        settings=SETTINGS,
        context=CONTEXT,
        not_covered=federated_not_covered(facts),
        assumptions=federated_assumptions(facts),
        curves=federated_curves(facts),
        clients=client_range(facts),
        noise=noise_text(facts.federation),
        up=size(facts.federation.bytes_up),
        down=size(facts.federation.bytes_down),
        rejected=_rejected(facts),
    )


def client_range(facts: FederatedFacts) -> dict[str, float]:
    """Least, median and largest ε over the clients."""
    values = [epsilon for _, epsilon in facts.client_epsilons]
    return {"min": min(values), "median": statistics.median(values), "max": max(values)}


def _rejected(facts: FederatedFacts) -> list[tuple[str, int]]:
    """((reason, how often over all rounds), …), most frequent first."""
    counts: dict[str, int] = {}
    for row in facts.rounds:
        for reason, count in row.rejected:
            counts[reason] = counts.get(reason, 0) + count
    return sorted(counts.items(), key=lambda pair: -pair[1])
