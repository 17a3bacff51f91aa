"""Factored per-sample gradients: a closed set of records, and the operations on them as functions."""

from sfumato.terms.dense import materialize
from sfumato.terms.norms import Grams, inner, measured, sq_norms
from sfumato.terms.products import product, times
from sfumato.terms.sums import compact, double, keep, merge, select, spread, weighted_sum
from sfumato.terms.types import Conv, ConvSpec, Dense, Outer, Scatter, Stack, Term, batch_size, device
from sfumato.terms.units import joined

__all__ = [
    "Conv",
    "ConvSpec",
    "Dense",
    "Grams",
    "Outer",
    "Scatter",
    "Stack",
    "Term",
    "batch_size",
    "compact",
    "device",
    "double",
    "inner",
    "joined",
    "keep",
    "materialize",
    "measured",
    "merge",
    "product",
    "select",
    "spread",
    "sq_norms",
    "times",
    "weighted_sum",
]
