"""Facts -> ``report.json`` and ``report.html``."""

from __future__ import annotations

import json
import math
from dataclasses import asdict
from pathlib import Path

from .assumptions import assumptions
from .curves import curves
from .explain import explained, percent
from .facts import Meaning, RunFacts
from .ranges import CONTEXT, SETTINGS
from .words import at_least, at_most, coverage, not_covered, number, plain_sentence

JSON_NAME = "report.json"
HTML_NAME = "report.html"
SCHEMA = 2


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
            {"false_alarm_rate": alpha, "detection_rate_at_most": power} for alpha, power in facts.meaning.detection
        ],
        "meaning": meaning_json(facts.meaning),
        "usual_values": [asdict(setting) for setting in SETTINGS],
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
        "private_metrics": facts.private_metrics,
        "versions": dict(facts.versions),
        "command": facts.command,
        "finished": facts.finished,
    }
    cleaned = strict(content)
    assert isinstance(cleaned, dict)
    return cleaned


def meaning_json(meaning: Meaning) -> dict[str, object]:
    """Plain data with the keys that the command line prints as well; infinity as null."""
    cleaned = strict(
        {
            "advantage": meaning.advantage,
            "tpr": {f"{alarms:g}": power for alarms, power in meaning.detection},
            "amplified_by_sampling": meaning.unamplified is not None,
            "epsilon_without_amplification": meaning.unamplified,
            "group_epsilon": {str(k): value for k, value in meaning.groups},
        }
    )
    assert isinstance(cleaned, dict)
    return cleaned


def as_html(facts: RunFacts) -> str:
    """One page with everything inline."""
    return page(
        "template.html.j2",
        facts=facts,
        private=math.isfinite(facts.guarantee.epsilon),
        sentence=plain_sentence(facts.guarantee),
        coverage=coverage(facts),
        explained=explained(facts.guarantee, facts.meaning),
        settings=SETTINGS,
        context=CONTEXT,
        not_covered=not_covered(facts),
        assumptions=assumptions(facts),
        curves=curves(facts),
    )


def page(template: str, **values: object) -> str:
    """A template of this package filled in; what comes from outside is escaped."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("sfumato.report", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"number": number, "at_most": at_most, "at_least": at_least, "percent": percent}
    return environment.get_template(template).render(**values)


def strict(value: object) -> object:
    """The same data without NaN and infinity, which JSON cannot hold."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: strict(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [strict(item) for item in value]
    return value
