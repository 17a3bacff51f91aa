"""A noise sweep: accuracy and loss against σ, as ``sweep.json``, one page, and the curve as SVG and PNG."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .curves import AMBER, STYLE, VIOLET
from .words import at_most, number
from .write import page, strict

if TYPE_CHECKING:
    from matplotlib.figure import Figure

HTML_NAME, JSON_NAME, SVG_NAME, PNG_NAME = "sweep.html", "sweep.json", "sweep.svg", "sweep.png"
SCHEMA = 1
MOST_LABELS = 8


@dataclass(frozen=True)
class Trial:
    """One training. ``epsilon``: of this trial alone; ``loss``, ``accuracy``: of test records, without noise."""

    noise_multiplier: float
    target_epsilon: float | None
    epsilon: float
    accuracy: float
    loss: float
    steps: int
    seed: int
    seconds: float


@dataclass(frozen=True)
class SweepFacts:
    """``epsilon``: of all trials and of what a shared ledger held before; ``ended``: why early, or None."""

    trials: tuple[Trial, ...]
    planned: int
    ended: str | None
    epsilon: float
    lower: float
    delta: float
    budget: float | None
    model: str
    data: str
    train_records: int
    test_records: int
    sample_rate: float
    ledger: str
    entries: int
    head: str
    earlier_entries: int
    command: str
    finished: str


def write_sweep(facts: SweepFacts, folder: Path) -> None:
    """Write all four files into ``folder`` (existing)."""
    import matplotlib

    with matplotlib.rc_context(STYLE):
        figure = _figure(facts.trials)
        svg = _saved(figure, "svg", transparent=True).decode()
        (folder / PNG_NAME).write_bytes(_saved(figure, "png", dpi=160, facecolor="white"))
    (folder / SVG_NAME).write_text(svg, encoding="utf-8")
    (folder / JSON_NAME).write_text(
        json.dumps(sweep_json(facts), indent=2, ensure_ascii=False) + "\n", encoding="utf-8"
    )
    html = page("sweep.html.j2", facts=facts, points=points(facts.trials), statement=statement(facts), svg=_inline(svg))
    (folder / HTML_NAME).write_text(html, encoding="utf-8")


def sweep_json(facts: SweepFacts) -> dict[str, Any]:
    """The sweep as plain data: strict JSON, infinity and NaN as null."""
    content = strict({"schema": SCHEMA, "statement": statement(facts), **asdict(facts), "curve": points(facts.trials)})
    assert isinstance(content, dict)
    return content


def statement(facts: SweepFacts) -> str:
    """What looking at all trials costs."""
    n = len(facts.trials)
    earlier = f" and the {facts.earlier_entries:,} earlier entries of the ledger" if facts.earlier_entries else ""
    return (
        f"All {n} trial{'s' if n > 1 else ''} together{earlier}: ε = {at_most(facts.epsilon)} at "
        f"δ = {number(facts.delta)}, by sequential composition in one ledger. That covers publishing all the models, "
        "or any choice among them. The ε of one trial alone holds only for a model that is chosen without a look at "
        "the others, and published without them."
    )


def points(trials: Sequence[Trial]) -> list[dict[str, float]]:
    """One point for each σ: means over its repeats, and the range of the accuracy."""
    by_noise: dict[float, list[Trial]] = {}
    for trial in trials:
        by_noise.setdefault(trial.noise_multiplier, []).append(trial)
    return [
        {
            "noise_multiplier": sigma,
            "epsilon": max(t.epsilon for t in own),
            "accuracy": sum(t.accuracy for t in own) / len(own),
            "accuracy_low": min(t.accuracy for t in own),
            "accuracy_high": max(t.accuracy for t in own),
            "loss": sum(t.loss for t in own) / len(own),
            "repeats": len(own),
        }
        for sigma, own in sorted(by_noise.items())
    ]


def _figure(trials: Sequence[Trial]) -> Figure:
    from matplotlib.figure import Figure
    from matplotlib.ticker import NullLocator

    curve = points(trials)
    sigmas = [p["noise_multiplier"] for p in curve]
    named = curve[:: math.ceil(len(curve) / MOST_LABELS)]
    figure = Figure(figsize=(9.6, 3.6), layout="constrained")
    for axes, name, scale, label, color in zip(
        figure.subplots(1, 2),
        ("accuracy", "loss"),
        (100.0, 1.0),
        ("test accuracy in %", "test loss"),
        (VIOLET, AMBER),
        strict=True,
    ):
        for trial in trials:
            axes.scatter(
                trial.noise_multiplier, scale * getattr(trial, name), s=16, color=color, alpha=0.35, linewidths=0
            )
        axes.plot(sigmas, [scale * p[name] for p in curve], color=color, linewidth=2, marker="o", markersize=4)
        axes.set(xscale="log", xlabel="noise multiplier σ (below it, ε of one trial alone)", ylabel=label)
        axes.set_xticks(
            [p["noise_multiplier"] for p in named],
            [f"{p['noise_multiplier']:.3g}\nε {at_most(p['epsilon'])}" for p in named],
        )
        axes.xaxis.set_minor_locator(NullLocator())
        axes.margins(x=0.08, y=0.12)
    return figure


def _saved(figure: Figure, kind: str, **options: Any) -> bytes:
    out = io.BytesIO()
    stripped: Mapping[str, Any] = {"Date": None, "Creator": None} if kind == "svg" else {"Software": None}
    figure.savefig(out, format=kind, metadata=dict(stripped), **options)
    return out.getvalue()


def _inline(svg: str) -> str:
    return svg[svg.index("<svg") :]
