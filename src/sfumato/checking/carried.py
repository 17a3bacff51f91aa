"""State: what the forward keeps of the records, in the model where it is published, or from one batch to the next."""

from typing import Any

from torch import nn

from sfumato.checking import rows
from sfumato.checking.explain import WHY_STATE
from sfumato.checking.report import Problem
from sfumato.checking.subject import Run, Subject
from sfumato.ghost.state import differences


def state(s: Subject) -> list[Problem]:
    """What two different batches leave behind differently, from the same start and the same seed.

    Then what only shows in the next batch: something out of sight remembers.
    """
    everyone = list(range(s.n))
    other = next((r for one in (s.pool.shifted(s.n - 1), s.n - 1) if (r := s.attempt([one] * s.n, state=True))), None)
    if other is None:
        return []
    after = s.run(everyone, state=True)
    found = _changed(s.first, other, s.tolerance)
    if found:
        unsteady = set(_changed(s.first, after, s.tolerance))
        if kept := [path for path in found if path not in unsteady]:
            return [_problem(s, path) for path in _grouped(kept)]
    if _same(s, s.first, after):
        return []
    s.run(everyone)
    return [_hidden(s)] if _same(s, s.first, s.run(everyone)) else []


def _same(s: Subject, a: Run, b: Run) -> bool:
    pairs = [(i, i) for i in range(s.n)]
    axes = {p: 0 for p, t in a.outputs.items() if t.dim() and len(t) == s.n}
    losses = rows.stays(a.loss[None], b.loss[None], 0, (1, 1), [(0, 0)], s.tolerance)
    return losses and rows.first_moved(a.outputs, b.outputs, axes, (s.n, s.n), pairs, s.tolerance) is None


def _hidden(s: Subject) -> Problem:
    return Problem(
        type(s.model).__name__,
        "What it computes for a batch depends on the batch before: something outside of the module remembers records.",
        WHY_STATE,
        "keep no values of records between batches (global variables, caches, memory banks, hidden states).",
    )


def _changed(a: Run, b: Run, tol: float) -> list[str]:
    if a.state is None or b.state is None:
        return []
    inside = differences(a.state[0], b.state[0], tol)
    outside = differences(a.state[1], b.state[1], tol)
    return inside + [f"criterion.{p}".rstrip(".") for p in outside if p not in inside]


def _grouped(paths: list[str]) -> list[str]:
    """One path for a list or dict of which many entries changed."""
    heads: dict[str, list[str]] = {}
    for path in paths:
        parts = path.split(".")
        while len(parts) > 1 and parts[-1].isdigit():
            parts.pop()
        heads.setdefault(".".join(parts), []).append(path)
    return list(heads)


def _problem(s: Subject, path: str) -> Problem:
    kind = _kind(s.model, path)
    return Problem(
        path,
        f"The forward writes values that depend on the records into this {kind}.",
        WHY_STATE,
        "do not update it during private training (running statistics, moving averages, memory banks, cached hidden "
        "states); return the value from the forward if you need it.",
    )


def _kind(model: nn.Module, path: str) -> str:
    named: dict[str, Any] = {n: "buffer" for n, _ in model.named_buffers()}
    named |= {n: "parameter" for n, _ in model.named_parameters()}
    return str(named.get(path, "attribute"))
