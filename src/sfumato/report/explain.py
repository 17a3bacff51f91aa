"""What the guarantee means, in sentences that every front page shares: command line, HTML, Markdown."""

from __future__ import annotations

import math

from .facts import Guarantee, Meaning
from .ranges import CONTEXT, SETTINGS, TIERS, tier
from .words import at_most, number

_QUESTION = {
    "add-remove": "whether one {unit} was used",
    "zero-out": "whether one {unit} was used or an empty one",
    "replace-one": "which of two {unit}s was used",
}


def explained(guarantee: Guarantee, meaning: Meaning) -> list[tuple[str, str]]:
    """((topic, sentence), …): attacks, advantage, sampling, groups and the usual values."""
    attacks, sampling = _attacks(guarantee, meaning), _sampling(guarantee, meaning)
    return [*attacks, *sampling, *_groups(guarantee, meaning), _usual(guarantee)]


def settings() -> list[str]:
    """One line for each published value, with its source."""
    return [f"{s.name}: ε = {s.epsilon} ({s.unit}; {s.source})" for s in SETTINGS]


def plain_text(guarantee: Guarantee, meaning: Meaning) -> str:
    """The same for a terminal."""
    lines = [f"{topic}: {sentence}" for topic, sentence in explained(guarantee, meaning)]
    return "\n".join([*lines, "Values others chose:", *(f"  {line}" for line in settings()), CONTEXT])


def percent(share: float) -> str:
    """A share that is an upper bound, in percent, never rounded down."""
    return f"{at_most(100.0 * share)} %"


def attack_sentence(guarantee: Guarantee, meaning: Meaning) -> str:
    """What the best attacker achieves at each false-alarm rate, 1 % first."""
    question = _QUESTION[guarantee.adjacency].format(unit=guarantee.unit)
    first, *others = sorted(meaning.detection, key=lambda pair: abs(pair[0] - 0.01))
    rest = ", ".join(f"{percent(power)} at {number(100.0 * alarms)} %" for alarms, power in sorted(others))
    return (
        f"Someone who knows everything but {question} and sees all that was released finds at most "
        f"{percent(first[1])} of those used at {number(100.0 * first[0])} % false alarms"
        + (f" ({rest})." if rest else ".")
    )


def _attacks(guarantee: Guarantee, meaning: Meaning) -> list[tuple[str, str]]:
    return [
        ("Attacks", f"{attack_sentence(guarantee, meaning)} Guessing finds as many as it raises false alarms."),
        (
            "Advantage",
            f"Detection exceeds false alarms by at most {percent(meaning.advantage)} for any attack (0 %: nothing is "
            "learnt; 100 %: certainty).",
        ),
    ]


def _sampling(guarantee: Guarantee, meaning: Meaning) -> list[tuple[str, str]]:
    if meaning.unamplified is None:
        return [("Sampling", "No amplification by sampling is counted on.")]
    return [
        (
            "Sampling",
            f"ε = {at_most(guarantee.epsilon)} holds because each step drew its records at random and in secret. In "
            "shuffled or fixed batches, each record once an epoch, the same noise would give "
            f"ε = {at_most(meaning.unamplified)}.",
        )
    ]


def _groups(guarantee: Guarantee, meaning: Meaning) -> list[tuple[str, str]]:
    if not meaning.groups:
        return []
    found = ", ".join(f"{at_most(value)} for {k}" for k, value in meaning.groups if math.isfinite(value))
    unknown = " or ".join(str(k) for k, value in meaning.groups if not math.isfinite(value))
    have = f"have ε = {found} (same δ = {number(guarantee.delta)})" if found else ""
    lack = f"have no known bound for {unknown}" if unknown else ""
    said = "; they ".join(part for part in (have, lack) if part)
    example = ", such as all of one person," if guarantee.unit == "record" else ""
    return [("Groups", f"Several {guarantee.unit}s together{example} {said}.")]


def _usual(guarantee: Guarantee) -> tuple[str, str]:
    value = "ε is infinite" if not math.isfinite(guarantee.epsilon) else f"ε = {at_most(guarantee.epsilon)}"
    return "Scale", f"{value}: {tier(guarantee.epsilon)}, for machine learning with a small δ ({TIERS})."
