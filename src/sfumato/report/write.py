"""Facts -> ``report.json`` and ``report.html``."""

from __future__ import annotations

import json
import math
from dataclasses import asdict
from pathlib import Path

from .assumptions import assumptions
from .curves import curves
from .facts import RunFacts
from .words import at_least, at_most, attack_bounds, coverage, not_covered, number, plain_sentence

JSON_NAME = "report.json"
HTML_NAME = "report.html"
SCHEMA = 1


def write(facts: RunFacts, folder: Path) -> None:
    """Write both files into ``folder`` (existing). The HTML loads nothing from anywhere."""
    (folder / JSON_NAME).write_text(json.dumps(as_json(facts), indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    (folder / HTML_NAME).write_text(as_html(facts), encoding="utf-8")


def as_json(facts: RunFacts) -> dict[str, object]:
    """The report as plain data: strict JSON, infinity and NaN as null."""
    private = math.isfinite(facts.guarantee.epsilon)
    content: dict[str, object] = {
        "schema": SCHEMA,
        "private": private,
        "statement": plain_sentence(facts.guarantee),
        "covered": coverage(facts),
        "not_covered": not_covered(facts),
        "guarantee": asdict(facts.guarantee),
        "mechanism": asdict(facts.mechanism) | {"tiers": dict(facts.mechanism.tiers)},
        "attack_bounds": [
            {"false_alarm_rate": alpha, "detection_rate_at_most": power}
            for alpha, power in attack_bounds(facts.guarantee)
        ],
        "assumptions": [asdict(item) for item in assumptions(facts)],
        "results": {"test_accuracy": facts.accuracy},
        "training": asdict(facts.training),
        "data": asdict(facts.data),
        "ledger": asdict(facts.ledger),
        "epsilon_at_delta": [{"delta": delta, "epsilon": value} for delta, value in facts.epsilon_at],
        "curves": {
            "not_covered_by_the_guarantee": ["loss", "train_accuracy", "clip_rate", "test_accuracy"],
            "steps": [{k: v for k, v in asdict(row).items() if v is not None} for row in facts.steps],
            "epochs": [asdict(row) for row in facts.epochs],
        },
        "versions": dict(facts.versions),
        "command": facts.command,
        "finished": facts.finished,
    }
    cleaned = strict(content)
    assert isinstance(cleaned, dict)
    return cleaned


def as_html(facts: RunFacts) -> str:
    """One page with everything inline."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("sfumato.report", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"number": number, "at_most": at_most, "at_least": at_least}
    return environment.get_template("template.html.j2").render(
        facts=facts,
        private=math.isfinite(facts.guarantee.epsilon),
        sentence=plain_sentence(facts.guarantee),
        coverage=coverage(facts),
        bounds=attack_bounds(facts.guarantee),
        not_covered=not_covered(facts),
        assumptions=assumptions(facts),
        curves=curves(facts),
    )


def strict(value: object) -> object:
    """The same data without NaN and infinity, which JSON cannot hold."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: strict(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [strict(item) for item in value]
    return value
