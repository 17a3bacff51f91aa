"""The criterion by itself: does what it sends into the rows of one record depend on the others?

The outputs are computed once and held fixed; their rows are taken alone, with others replaced, reordered. So the random
numbers and the rounding of the model take no part.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sfumato.checking import still
from sfumato.checking.batches import Records, substitute
from sfumato.checking.calling import loss_of
from sfumato.checking.independence import Movement, Verdict
from sfumato.checking.subject import TOLERANCE, Subject

Slopes = dict[str, Tensor]


@dataclass
class _Fixed:
    """Records and what the model made of them. ``layout``: rows of a record together, or step by step."""

    s: Subject
    records: Records
    output: Any
    axes: dict[str, int]
    inner: bool = False

    def slopes(self, rows: Sequence[int], seed: int = 0) -> Slopes | None:
        """Gradients of the summed loss by the rows of every output; None where the criterion fails."""
        leaves: dict[str, Tensor] = {}

        def tensor(t: Tensor, path: str) -> Tensor:
            axis = self.axes.get(f".{path}" if path else "")
            if axis is None:
                follows = t.dim() and t.shape[0] == self.records.count and not t.is_floating_point()
                return t.detach()[list(rows)] if follows else t.detach().clone()
            each = self._by_record(t.detach().movedim(axis, 0))[list(rows)]
            leaf = self._joined(each).movedim(0, axis).clone().requires_grad_()
            leaves[path] = leaf
            return leaf

        try:
            with self.s.quiet(seed), torch.enable_grad():
                loss = loss_of(self.s.criterion, substitute(self.output, tensor, lambda v: v), self.records.take(rows))
                found = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
        except Exception:  # noqa: BLE001  (the user's code on records they never put together)
            return None
        factor = len(rows) if self.s.reduction == "mean" else 1
        named = {p: g * factor for p, g in zip(leaves, found, strict=True) if g is not None}
        of = {p: self._by_record(g.movedim(self.axes[f".{p}" if p else ""], 0), len(rows)) for p, g in named.items()}
        return {p: g.flatten(1).double() for p, g in of.items()}

    def _by_record(self, x: Tensor, n: int | None = None) -> Tensor:
        n = self.records.count if n is None else n
        if self.inner:
            return x.reshape(-1, n, *x.shape[1:]).movedim(1, 0)
        return x.reshape(n, -1, *x.shape[1:])

    def _joined(self, each: Tensor) -> Tensor:
        return (each.movedim(0, 1) if self.inner else each).flatten(0, 1)


def judge_criterion(s: Subject, v: Verdict, whole: bool = True) -> Movement | None:
    """Sets ``v.compared`` where at least one comparison took place."""
    if s.criterion is None:
        return None
    fixed = _fixed(s, v, whole)
    if fixed is None:
        return None
    moved = _moved(fixed, v)
    if moved is not None and any(s_ != fixed.records.count for s_ in _sizes(fixed)):
        fixed.inner = True
        moved = moved if _moved(fixed, v) is not None else None
    return moved


def _sizes(fixed: _Fixed) -> list[int]:
    sizes = []

    def look(t: Tensor, path: str) -> Tensor:
        if (axis := fixed.axes.get(f".{path}" if path else "")) is not None:
            sizes.append(t.shape[axis])
        return t

    substitute(fixed.output, look, lambda v: v)
    return sizes


def _fixed(s: Subject, v: Verdict, whole: bool) -> _Fixed | None:
    """Of the whole batch where it runs, else of the chosen records."""
    for records in ([s.whole[0]] if s.whole and whole else []) + [s.pool.first(s.n)]:
        try:
            with s.quiet():
                output, _ = s.call(records.take(range(records.count)))
        except Exception:  # noqa: BLE001, S112
            continue
        if v.axes:
            return _Fixed(s, records, output, v.axes)
    return None


def _moved(f: _Fixed, v: Verdict) -> Movement | None:
    everyone = list(range(f.records.count))
    with still.Narrowest() as narrowest:
        base = f.slopes(everyone)
    if base is None or not base:
        return None
    tolerance = TOLERANCE[max(8, narrowest.bits)]
    other = f.slopes(everyone, seed=1)
    random = other is None or _unlike(base, other, [(i, i) for i in everyone], tolerance)
    for probe, rows, pairs in _probes(everyone, random):
        found = f.slopes(rows)
        if found is None or not (pairs := [(a, b) for a, b in pairs if _finite(base, a) and _finite(found, b)]):
            continue
        v.compared = True
        if _unlike(base, found, pairs, tolerance):
            factor = _factor(base, found, pairs, tolerance) if len(rows) == 1 else None
            return Movement(probe, everyone, rows, pairs, factor=factor, criterion=True)
    return None


def _probes(everyone: list[int], random: bool) -> list[tuple[str, list[int], list[tuple[int, int]]]]:
    n = len(everyone)
    probes = []
    for value in (0, 1):
        rows = [(i + 1) % n if i % 2 == value else i for i in everyone]
        probes.append(("other records of the batch were replaced", rows, [(i, i) for i in everyone if rows[i] == i]))
    if random:
        return probes
    alone = [("it was alone in the batch", [i], [(i, 0)]) for i in everyone[:16]]
    fewer = ("one other record was left out", everyone[1:], [(i, i - 1) for i in everyone[1:]])
    return [*alone, fewer, *probes]


def _finite(slopes: Slopes, i: int) -> bool:
    return all(bool(g[i].isfinite().all()) for g in slopes.values())


def _unlike(a: Slopes, b: Slopes, pairs: list[tuple[int, int]], tolerance: float) -> bool:
    left, right = [p[0] for p in pairs], [p[1] for p in pairs]
    for path in a.keys() | b.keys():
        x, y = (s[path][r] if path in s else torch.zeros(()) for s, r in ((a, left), (b, right)))
        if x.shape != y.shape and x.dim() and y.dim():
            continue  # padded to another length
        largest = max((float(t.abs().nan_to_num(0, 0, 0).max()) for t in (x, y) if t.numel()), default=0.0)
        if not bool(((x - y).nan_to_num(0, 0, 0).abs() <= tolerance * largest + 1e-300).all()):
            return True
    return False


def _factor(a: Slopes, b: Slopes, pairs: list[tuple[int, int]], tolerance: float) -> float | None:
    """The gradient in the batch is this many times the one alone, everywhere."""
    left, right = [p[0] for p in pairs], [p[1] for p in pairs]
    if a.keys() != b.keys():
        return None
    square = sum(float(b[p][right].square().sum()) for p in b)
    factor = sum(float((a[p][left] * b[p][right]).sum()) for p in b) / square if square > 0 else 0.0
    same = factor != 0 and not _unlike(a, {p: g * factor for p, g in b.items()}, pairs, max(tolerance, 1e-6))
    return factor if same else None
