"""Rows of outputs: which axis holds the records, and whether the rows of given records are the same in two runs."""

from collections.abc import Sequence

import torch
from torch import Tensor

Pairs = Sequence[tuple[int, int]]  # (position in the first run, position in the second) of the same record


def record_axes(
    outputs: dict[str, Tensor], n: int, fewer: dict[str, Tensor] | None, less: int, batch_dim: int
) -> dict[str, int]:
    """{path: axis} for outputs with one row, or block of rows, for each record.

    The axis is the one whose size follows the number of records (``fewer``: outputs for ``less`` of them). Without that
    run it is the first of ``batch_dim`` and 0 that has n entries.
    """
    axes = {}
    for path, out in outputs.items():
        if fewer is not None:
            other = fewer.get(path)
            if other is None or other.dim() != out.dim():
                continue
            fits = [a for a in range(out.dim()) if out.shape[a] != other.shape[a]]
            fits = [a for a in fits if out.shape[a] % n == 0 and other.shape[a] == out.shape[a] // n * less]
        else:
            fits = [a for a in (batch_dim, 0) if out.dim() > a and out.shape[a] == n]
        if len(fits) == 1 or (fits and fewer is None):
            axes[path] = fits[0]
    return axes


def first_moved(
    a: dict[str, Tensor], b: dict[str, Tensor], axes: dict[str, int], sizes: tuple[int, int], pairs: Pairs, tol: float
) -> str | None:
    """The first output in which a record that is in both runs came out differently."""
    for path, axis in axes.items():
        if path in a and path in b and not stays(a[path], b[path], axis, sizes, pairs, tol):
            return path
    return None


def stays(a: Tensor, b: Tensor, axis: int, sizes: tuple[int, int], pairs: Pairs, tol: float) -> bool:
    """Blocks of rows may lie record by record, or step by step with the records inside; either will do."""
    a, b = a.movedim(axis, 0), b.movedim(axis, 0)
    if a.shape[1:] != b.shape[1:] or len(a) * sizes[1] != len(b) * sizes[0] or len(a) == 0 or not pairs:
        return True  # padded to another length: nothing to compare here
    left, right = [p[0] for p in pairs], [p[1] for p in pairs]
    several = len(a) != sizes[0]
    for inner in (False, True) if several else (False,):
        x, y = _by_record(a, sizes[0], inner)[left], _by_record(b, sizes[1], inner)[right]
        if _close(x, y, tol):
            return True
    return False


def _by_record(x: Tensor, n: int, inner: bool) -> Tensor:
    x = x.double() if x.is_floating_point() else x
    if inner:
        x = x.reshape(-1, n, *x.shape[1:]).movedim(1, 0)
    return x.reshape(n, -1)


def _close(x: Tensor, y: Tensor, tol: float) -> bool:
    """Relative to each record's own largest value, or a thousandth of the largest of all."""
    same_holes = torch.equal(x.isnan(), y.isnan()) and torch.equal(x.isinf(), y.isinf())
    x, y = (torch.where(t.isfinite(), t, torch.zeros_like(t)) for t in (x, y))
    scale = torch.maximum(x.abs().amax(1, keepdim=True), 1e-3 * x.abs().max()) if x.numel() else x
    return same_holes and bool(((x - y).abs() <= tol * scale + 1e-300).all())


def distance(a: dict[str, Tensor], b: dict[str, Tensor], axes: dict[str, int], n: int, i: int) -> float:
    """How far record i of the first run is from the second run, which holds it alone; relative to its largest value."""
    most = 0.0
    for path, axis in axes.items():
        x, y = a[path].movedim(axis, 0), b[path].movedim(axis, 0) if path in b else a[path][:0]
        if len(x) == 0 or len(y) * n != len(x) or x.shape[1:] != y.shape[1:]:
            continue
        y = y.double().flatten().nan_to_num(0, 0, 0)
        rows = [_by_record(x, n, inner)[i].double().nan_to_num(0, 0, 0) for inner in (False, True)]
        largest = float(y.abs().max()) if y.numel() else 0.0
        most = max(most, min(float((r - y).abs().max()) for r in rows) / largest if largest else 0.0)
    return most
