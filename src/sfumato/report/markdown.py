"""The report as Markdown, and the part of it that goes into a model card."""

from __future__ import annotations

import html
import json
import math
import re
from collections.abc import Iterable

from .assumptions import assumptions
from .explain import explained, settings
from .facts import RunFacts
from .ranges import CONTEXT
from .words import at_least, at_most, coverage, not_covered, number, plain_sentence


def as_markdown(facts: RunFacts) -> str:
    """The whole report without its curves."""
    g, m = facts.guarantee, facts.mechanism
    lines = [
        "# Privacy report",
        f"{cell(facts.training.model)} trained on {cell(facts.data.name)}, {cell(facts.finished)}",
        f"**{cell(plain_sentence(g))}**",
        coverage(facts),
        *_warnings(facts),
        "## What this ε means",
        _list(f"**{topic}**: {cell(sentence)}" for topic, sentence in explained(g, facts.meaning)),
        "Values others chose:",
        _list(map(cell, settings())),
        CONTEXT,
        "## Assumptions",
        _table(("status", "assumption", ""), ((a.status, a.name, a.text) for a in assumptions(facts))),
        "## Not covered by the guarantee",
        _list(map(cell, not_covered(facts))),
        "## Mechanism",
        _table(
            ("", ""),
            (
                ("ε, certified", f"between {at_least(g.lower)} and {at_most(g.epsilon)} at δ = {number(g.delta)}"),
                ("neighbours", f"{g.adjacency}, one {g.unit}"),
                ("noise multiplier σ", number(m.noise_multiplier)),
                ("clipping norm C", number(m.max_grad_norm)),
                ("sampler", f"{m.sampler}, rate {number(m.sample_rate)}"),
                ("steps", f"{m.steps:,} of {m.planned_steps:,} planned"),
                ("noise source", m.noise_level),
                ("test accuracy", f"{100.0 * facts.accuracy:.2f} %"),
                ("ledger", f"{facts.ledger.path}, {facts.ledger.entries:,} entries, head {facts.ledger.head}"),
                ("command", facts.command),
            ),
        ),
    ]
    return "\n\n".join(lines) + "\n"


def as_card(facts: RunFacts) -> str:
    """A section for a model card: the guarantee in words, and as a YAML block for programs."""
    g, m = facts.guarantee, facts.mechanism
    block = {
        "private": math.isfinite(g.epsilon),
        "epsilon": g.epsilon if math.isfinite(g.epsilon) else None,
        "delta": g.delta,
        "unit": g.unit,
        "adjacency": g.adjacency,
        "trust_model": "central",
        "mechanism": "DP-SGD",
        "sampler": m.sampler,
        "sample_rate": m.sample_rate,
        "noise_multiplier": m.noise_multiplier,
        "max_grad_norm": m.max_grad_norm,
        "steps": m.steps,
        "advantage_at_most": facts.meaning.advantage,
        **{f"tpr_at_{100.0 * a:g}_percent_fpr_at_most": power for a, power in facts.meaning.detection},
        "epsilon_without_amplification": _finite(facts.meaning.unamplified),
        **{f"epsilon_for_{k}_together": _finite(value) for k, value in facts.meaning.groups},
        "ledger_head": facts.ledger.head,
        "library": f"sfumato {dict(facts.versions).get('sfumato', '')}".strip(),
    }
    lines = [
        "## Privacy",
        cell(plain_sentence(g)),
        coverage(facts),
        _list(f"**{topic}**: {cell(sentence)}" for topic, sentence in explained(g, facts.meaning)),
        "Not covered:",
        _list(map(cell, not_covered(facts))),
        "\n".join(["```yaml", "privacy:", *(f"  {k}: {json.dumps(v)}" for k, v in block.items()), "```"]),
    ]
    return "\n\n".join(lines) + "\n"


def cell(text: str) -> str:
    """Text from outside on one line, where it can be neither markup nor the end of a table's cell."""
    return re.sub(r"([\\`*_|\[\]])", r"\\\1", html.escape(" ".join(text.split()), quote=False))


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def _warnings(facts: RunFacts) -> list[str]:
    return ["## Warnings", _list(map(cell, facts.data.warnings))] if facts.data.warnings else []


def _list(items: Iterable[str]) -> str:
    return "\n".join(f"- {item}" for item in items)


def _table(head: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    body = [f"| {' | '.join(cell(value) for value in row)} |" for row in rows]
    return "\n".join([f"| {' | '.join(head)} |", f"|{'---|' * len(head)}", *body])
