"""Factored per-sample gradients: a closed set of records, and the operations on them as functions."""

from sfumato.terms.dense import materialize
from sfumato.terms.norms import Grams, inner, sq_norms
from sfumato.terms.sums import keep, merge, select, weighted_sum
from sfumato.terms.types import Conv, ConvSpec, Dense, Outer, Scatter, Term, batch_size

__all__ = [
    "Conv",
    "ConvSpec",
    "Dense",
    "Grams",
    "Outer",
    "Scatter",
    "Term",
    "batch_size",
    "inner",
    "keep",
    "materialize",
    "merge",
    "select",
    "sq_norms",
    "weighted_sum",
]
