"""Gradients of large models, small enough to keep many of them: a signed count sketch for each parameter.

A sketch is linear, and two gradients that differ have sketches that differ by about as much: each of its 4096 numbers
is a sum of entries with random signs. Small parameters are kept whole.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

_WIDTH = 4096
Sketch = dict[str, Tensor]  # float64, one vector a parameter


class Sketcher:
    """Makes them, with the same signs for the same size."""

    def __init__(self) -> None:
        self._signs: dict[int, Tensor] = {}

    def __call__(self, gradients: Mapping[str, Tensor | None], factor: float = 1.0) -> Sketch:
        return {n: self.one(g) * factor for n, g in gradients.items() if g is not None}

    def one(self, gradient: Tensor) -> Tensor:
        g = (gradient.to_dense() if gradient.layout != torch.strided else gradient).detach().flatten()
        if g.numel() <= _WIDTH:
            return g.double().cpu()
        rows = g.numel() // _WIDTH
        folded = self._sign(rows).to(g) @ g[: rows * _WIDTH].view(rows, _WIDTH)
        return torch.cat([folded, g[rows * _WIDTH :]]).double().cpu()

    def _sign(self, rows: int) -> Tensor:
        if rows not in self._signs:
            generator = torch.Generator().manual_seed(rows)
            self._signs[rows] = torch.randint(0, 2, (rows,), generator=generator) * 2 - 1
        return self._signs[rows]


def total(sketches: list[Sketch]) -> Sketch:
    """Their sum."""
    names = dict.fromkeys(n for s in sketches for n in s)
    return {n: torch.stack([s[n] for s in sketches if n in s]).sum(0) for n in names}


def scaled(sketch: Sketch, factor: float) -> Sketch:
    """A multiple."""
    return {n: v * factor for n, v in sketch.items()}


def finite(sketch: Sketch) -> bool:
    """Whether it holds no NaN and no infinity."""
    return all(bool(v.isfinite().all()) for v in sketch.values())


def unequal(a: Sketch, b: Sketch, scale: Mapping[str, float], tolerance: float) -> list[str]:
    """Parameters whose gradients differ by more than rounding.

    ``scale``: the size of what was added up for each parameter. A gradient that is zero in theory (the bias of a key
    in attention) holds nothing but rounding, so some of the largest parameter's scale is allowed everywhere.
    """
    floor = 1e-2 * max(scale.values(), default=0.0)
    zero = torch.zeros(())
    names = dict.fromkeys([*a, *b])
    return [
        n
        for n in names
        if float((a.get(n, zero) - b.get(n, zero)).norm()) > tolerance * (scale.get(n, 0.0) + floor) + 1e-300
    ]


def scales(sketches: list[Sketch]) -> dict[str, float]:
    """{parameter: sum of the norms}: how large the numbers were that a sum was made of."""
    names = dict.fromkeys(n for s in sketches for n in s)
    return {n: sum(float(s[n].norm()) for s in sketches if n in s) for n in names}
