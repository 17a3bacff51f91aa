"""From a bundle of terms to norms over all parameters and to clipped sums: used by the step and by ``record``."""

from collections.abc import Iterable

import torch
from torch import Tensor

from sfumato.ghost.pullback import Bundle
from sfumato.terms import Dense, Grams, keep, select, sq_norms, weighted_sum

# Elements of per-sample gradients that may be kept instead of computed twice (1 GiB of float32 at most in all).
KEEP_ELEMENTS = 1 << 27


def wide_dtype(parameters: Iterable[Tensor]) -> torch.dtype:
    """Float64 if every parameter has it, else float32: never half precision."""
    return torch.float64 if all(p.dtype == torch.float64 for p in parameters) else torch.float32


def total_sq_norms(bundle: Bundle, records: int) -> Tensor:
    """Squared norm of each record's whole gradient (B,), float64. May materialise terms of the bundle in place."""
    grams: Grams = {}
    budget = KEEP_ELEMENTS
    total: Tensor | None = None
    for name, terms in bundle.items():
        kept = [keep(t, budget) for t in terms]
        budget -= sum(k.value.numel() for k, t in zip(kept, terms, strict=True) if isinstance(k, Dense) and k is not t)
        bundle[name] = kept
        sq = sq_norms(kept, grams)
        total = sq if total is None else total + sq.to(total.device)
    return torch.zeros(records, dtype=torch.float64) if total is None else total


def clipped(bundle: Bundle, weights: Tensor, finite: Tensor) -> dict[str, Tensor]:
    """{name: Σ_b weights[b]·G_b}. Records that are not ``finite`` are left out: 0·inf would be NaN."""
    everything = bool(finite.all())
    out: dict[str, Tensor] = {}
    for name, terms in bundle.items():
        parts = []
        for term in terms:
            if everything:
                parts.append(weighted_sum(term, weights))
            else:
                parts.append(weighted_sum(select(term, finite), weights[finite]))
        out[name] = parts[0] if len(parts) == 1 else torch.stack(parts).sum(0)
    return out
