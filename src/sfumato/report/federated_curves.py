"""Curves of a federation as inline SVG."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from .curves import AMBER, INK, STYLE, TEAL, VIOLET, Curve, attack, svg
from .federated_facts import FederatedFacts
from .federated_words import start

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis

BINS = 20
MARKED = 40  # more rounds than that are drawn without markers


def federated_curves(facts: FederatedFacts) -> list[Curve]:
    """Accuracy against ε, ε of the clients, ε and cohorts over the rounds, and what an attacker can find."""
    import matplotlib

    with matplotlib.rc_context(STYLE):
        found = [_accuracy(facts), _histogram(facts), _epsilon(facts), _cohorts(facts), _bytes(facts)]
        found.append(attack(facts.trade_off, facts.guarantee.unit))
    return [curve for curve in found if curve is not None]


def _accuracy(facts: FederatedFacts) -> Curve | None:
    points = [
        (row.epsilon, 100 * row.test_accuracy)
        for row in facts.rounds
        if row.test_accuracy is not None and math.isfinite(row.epsilon)
    ]
    if not points:
        return None

    def draw(axes: Axes) -> None:
        spent, reached = zip((0.0, 100 * facts.baseline), *points, strict=True)
        marker = "o" if len(spent) <= MARKED else None
        axes.plot(spent, reached, color=VIOLET, linewidth=2, marker=marker, markersize=3.5, label="after each round")
        axes.axhline(100 * facts.baseline, color=INK, linewidth=1, linestyle=":", label=f"{start(facts)} alone")
        axes.set(xlabel="ε spent (largest over clients)", ylabel="test accuracy in %", xlim=(0, None))
        axes.legend(loc="best")

    return Curve("Accuracy against ε", "Computed from the common test records, without noise.", svg(draw), False)


def _histogram(facts: FederatedFacts) -> Curve | None:
    values = [epsilon for _, epsilon in facts.client_epsilons if math.isfinite(epsilon)]
    if not values:
        return None

    def draw(axes: Axes) -> None:
        low, high = min(values), max(values)
        reach = max(high - low, 0.02 * max(high, 1e-9))
        edges = (max(0.0, (low + high - reach) / 2), (low + high + reach) / 2)
        counts, _, _ = axes.hist(values, bins=BINS, range=edges, color=TEAL, alpha=0.85)
        axes.axvline(high, color=INK, linewidth=1, linestyle=":", label="largest: this report's ε")
        axes.set(
            xlabel=f"ε of a client at δ = {facts.guarantee.delta:g}", ylabel="clients", ylim=(0, 1.3 * max(counts))
        )
        axes.set_axisbelow(True)
        axes.ticklabel_format(axis="x", useOffset=False)
        _whole(axes.yaxis)
        axes.legend(loc="upper left")

    where = "the server's ledger" if facts.federation.level in ("client", "distributed") else "a ledger of its own"
    return Curve("ε of each client", f"What each client has spent, from {where}.", svg(draw), True)


def _epsilon(facts: FederatedFacts) -> Curve | None:
    rows = [row for row in facts.rounds if math.isfinite(row.client_max)]
    if not rows:
        return None

    def draw(axes: Axes) -> None:
        at = [row.round for row in rows]
        axes.fill_between(
            at, [r.client_min for r in rows], [r.client_max for r in rows], color=TEAL, alpha=0.15, linewidth=0,
            label="least to largest client",
        )  # fmt: skip
        axes.plot(at, [r.client_median for r in rows], color=AMBER, linewidth=1.5, label="median client")
        axes.plot(at, [r.epsilon for r in rows], color=TEAL, linewidth=2, label="certified for all")
        axes.set(xlabel="round", ylabel="ε spent", ylim=(0, None))
        _whole(axes.xaxis)
        axes.legend(loc="lower right")

    return Curve("Privacy spent", f"Certified upper bounds at δ = {facts.guarantee.delta:g}.", svg(draw), True)


def _cohorts(facts: FederatedFacts) -> Curve | None:
    if not facts.rounds:
        return None

    def draw(axes: Axes) -> None:
        at = [row.round for row in facts.rounds]
        accepted = [row.accepted for row in facts.rounds]
        missing = [max(0, row.cohort - row.accepted) for row in facts.rounds]
        axes.bar(at, accepted, color=TEAL, alpha=0.85, width=0.8, label="answer counted")
        axes.set_axisbelow(True)
        if any(missing):
            axes.bar(at, missing, bottom=accepted, color=AMBER, alpha=0.7, width=0.8, label="no valid answer")
        axes.set(xlabel="round", ylabel="clients asked", ylim=(0, 1.25 * max(1, *(row.cohort for row in facts.rounds))))
        _whole(axes.xaxis)
        _whole(axes.yaxis)
        axes.legend(loc="upper left", ncols=2)

    note = "For whoever runs the server; noise and divisor do not depend on who answered."
    return Curve("Cohorts", note, svg(draw), False)


def _bytes(facts: FederatedFacts) -> Curve | None:
    if not facts.rounds:
        return None

    def draw(axes: Axes) -> None:
        at = [row.round for row in facts.rounds]
        up = down = 0.0
        ups, downs = [], []
        for row in facts.rounds:
            up, down = up + row.bytes_up / 1e6, down + row.bytes_down / 1e6
            ups.append(up)
            downs.append(down)
        axes.plot(at, ups, color=VIOLET, linewidth=2, label="clients to server")
        axes.plot(at, downs, color=AMBER, linewidth=2, label="server to clients")
        axes.set(xlabel="round", ylabel="MB, total", ylim=(0, None))
        _whole(axes.xaxis)
        axes.legend(loc="upper left")

    return Curve("Traffic", "Payload of the messages, without headers of a network.", svg(draw), False)


def _whole(axis: Axis) -> None:
    """Ticks at whole numbers only."""
    from matplotlib.ticker import MaxNLocator

    axis.set_major_locator(MaxNLocator(integer=True))
