"""Curves as inline SVG, drawn without any display."""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from .facts import RunFacts

if TYPE_CHECKING:
    from matplotlib.axes import Axes

INK, GRID = "#475569", "#e2e8f0"
TEAL, VIOLET, AMBER, ROSE = "#0f766e", "#6d28d9", "#b45309", "#be123c"
STYLE: dict[Any, Any] = {  # matplotlib types the keys as one long Literal
    "svg.fonttype": "none",  # text stays text: small, sharp, searchable
    "svg.hashsalt": "sfumato",  # the same run draws the same bytes
    "font.family": "sans-serif",
    "font.size": 10,
    "axes.edgecolor": "#cbd5e1",
    "axes.labelcolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.color": INK,
    "ytick.color": INK,
    "axes.grid": True,
    "grid.color": GRID,
    "grid.linewidth": 0.8,
    "legend.frameon": False,
}
MAX_POINTS = 400


@dataclass(frozen=True)
class Curve:
    """``svg``: markup to embed; ``covered``: whether the guarantee covers what is drawn."""

    title: str
    note: str
    svg: str
    covered: bool


def curves(facts: RunFacts) -> list[Curve]:
    """ε, accuracy, loss and clip rate over the steps, then ε for other δ; what was left out is not drawn."""
    import matplotlib

    with matplotlib.rc_context(STYLE):
        found = [_epsilon(facts), _accuracy(facts)]
        if facts.private_metrics:
            found += [_loss(facts), _clip_rate(facts)]
        found += [_profile(facts), attack(facts.trade_off, facts.guarantee.unit)]
    return [curve for curve in found if curve is not None]


def _epsilon(facts: RunFacts) -> Curve | None:
    known = {r.step: r.epsilon for r in facts.steps if r.epsilon is not None}
    known |= {r.step: r.epsilon for r in facts.epochs}
    points = sorted((step, value) for step, value in known.items() if math.isfinite(value))
    if not points:
        return None
    steps, values = zip(*points, strict=True)

    def draw(axes: Axes) -> None:
        axes.plot(steps, values, color=TEAL, linewidth=2)
        axes.fill_between(steps, values, color=TEAL, alpha=0.08, linewidth=0)
        axes.set(xlabel="step", ylabel="ε spent", ylim=(0, None), xlim=(0, None))

    return Curve("Privacy spent", f"Certified ε at δ = {facts.guarantee.delta:g}.", svg(draw), True)


def _accuracy(facts: RunFacts) -> Curve | None:
    test = [(r.step, 100 * r.test_accuracy) for r in facts.epochs]
    train = [(r.step, 100 * r.train_accuracy) for r in facts.steps if r.train_accuracy is not None]
    if not test:
        return None

    def draw(axes: Axes) -> None:
        if train:
            _smoothed(axes, train, AMBER, "training batch (not covered)")
        axes.plot(*zip(*test, strict=True), color=VIOLET, linewidth=2, marker="o", markersize=3.5, label="test records")
        axes.set(xlabel="step", ylabel="accuracy in %", xlim=(0, None))
        axes.legend(loc="lower right")

    note = "Test accuracy is computed from test records, which this guarantee is not about."
    return Curve("Accuracy", note, svg(draw), False)


def _loss(facts: RunFacts) -> Curve | None:
    points = [(r.step, r.loss) for r in facts.steps if r.loss is not None]
    if not points:
        return None

    def draw(axes: Axes) -> None:
        _smoothed(axes, points, ROSE, None)
        axes.set(xlabel="step", ylabel="training loss", xlim=(0, None))

    return Curve("Training loss", "Computed from private records without noise.", svg(draw), False)


def _clip_rate(facts: RunFacts) -> Curve | None:
    points = [(r.step, 100 * r.clip_rate) for r in facts.steps if r.clip_rate is not None]
    if not points:
        return None

    def draw(axes: Axes) -> None:
        _smoothed(axes, points, AMBER, None)
        axes.set(xlabel="step", ylabel="records clipped in %", ylim=(0, 103), xlim=(0, None))

    return Curve("Clip rate", "Computed from private records without noise.", svg(draw), False)


def _profile(facts: RunFacts) -> Curve | None:
    points = [(d, e) for d, e in facts.epsilon_at if math.isfinite(e)]
    if len(points) < 2:
        return None

    def draw(axes: Axes) -> None:
        deltas, values = zip(*sorted(points), strict=True)
        axes.plot(deltas, values, color=TEAL, linewidth=2, marker="o", markersize=3.5)
        axes.axvline(facts.guarantee.delta, color=INK, linewidth=1, linestyle=":")
        axes.set(xlabel="δ", ylabel="ε", xscale="log", ylim=(0, None))

    return Curve("The same run at other δ", "ε and δ trade off; the dotted line is this report's δ.", svg(draw), True)


def attack(trade_off: Sequence[tuple[float, float]], unit: str) -> Curve | None:
    """Detection against false alarms of any attacker; None where nothing is guaranteed."""
    if not trade_off:
        return None

    def draw(axes: Axes) -> None:
        alarms, found = zip(*((100 * a, 100 * p) for a, p in trade_off), strict=True)
        axes.plot(alarms, found, color=TEAL, linewidth=2, label="at most")
        axes.plot([0, 100], [0, 100], color=INK, linewidth=1, linestyle=":", label="guessing")
        axes.set(xlabel="false alarms in %", ylabel="members found in %", xlim=(0, 100), ylim=(0, 102))
        axes.legend(loc="lower right")

    note = f"Membership of one {unit}, everything else known."
    return Curve("What any attacker can find", note, svg(draw), True)


def _smoothed(axes: Axes, points: Sequence[tuple[int, float]], color: str, label: str | None) -> None:
    """Raw values faint, a centred moving average on top; thinned for long runs."""
    stride, reach = max(1, len(points) // MAX_POINTS), len(points) // 60
    values = [value for _, value in points]
    smooth = []
    for i in range(len(values)):
        width = min(reach, i, len(values) - 1 - i)  # narrower at the ends, so that they are not pulled inwards
        smooth.append(sum(values[i - width : i + width + 1]) / (2 * width + 1))
    steps = [step for step, _ in points][::stride]
    axes.plot(steps, values[::stride], color=color, linewidth=0.8, alpha=0.3)
    axes.plot(steps, smooth[::stride], color=color, linewidth=1.8, label=label)


def svg(draw: Callable[[Axes], None]) -> str:
    """Markup of one small figure, to put into a page."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.2, 3.0), layout="constrained")
    draw(figure.subplots())
    out = io.StringIO()
    figure.savefig(out, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = out.getvalue()
    return text[text.index("<svg") :]  # without the XML prologue, which HTML does not allow inside a page
