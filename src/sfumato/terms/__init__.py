"""Factored per-sample gradients: a closed set of records, and the operations on them as functions."""

from sfumato.terms.dense import materialize
from sfumato.terms.norms import Grams, inner, measured, sq_norms
from sfumato.terms.sums import compact, double, keep, merge, select, weighted_sum
from sfumato.terms.types import Conv, ConvSpec, Dense, Outer, Scatter, Term, batch_size, device

__all__ = [
    "Conv",
    "ConvSpec",
    "Dense",
    "Grams",
    "Outer",
    "Scatter",
    "Term",
    "batch_size",
    "compact",
    "device",
    "double",
    "inner",
    "keep",
    "materialize",
    "measured",
    "merge",
    "select",
    "sq_norms",
    "weighted_sum",
]
