"""From a bundle of terms to norms over all parameters and to clipped sums: used by the step and by ``record``."""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from sfumato.clipping import flat_weights
from sfumato.ghost.functions import full_precision
from sfumato.ghost.pullback import Bundle, Parts
from sfumato.terms import Dense, Grams, Term, device, double, keep, materialize, measured, select, weighted_sum

# Elements of per-sample gradients that may be kept instead of computed twice (1 GiB of float32 at most in all).
KEEP_ELEMENTS = 1 << 27
# A sum of n clipped gradients that agree is n·C long, and float32 rounds it by n·C·2^-24 at every step.
BLOCK_RECORDS = 256


def wide_dtype(parameters: Iterable[Tensor]) -> torch.dtype:
    """Float64 if every parameter has it, else float32: never half precision."""
    return torch.float64 if all(p.dtype == torch.float64 for p in parameters) else torch.float32


@dataclass(frozen=True, slots=True)
class Norms:
    """Squared norms of whole per-sample gradients (B,), float64, and the records computed apart in float64."""

    sq: Tensor
    apart: Tensor  # (B,) bool: shared float32 sums would round by more than the clip bound allows


@torch.no_grad()
@full_precision()
def total_norms(parts: Parts, records: int) -> Norms:
    """Norms over all parameters. May materialise terms of the bundles in place."""
    whole = Norms(torch.zeros(records, dtype=torch.float64), torch.zeros(records, dtype=torch.bool))
    for ids, bundle in parts:
        part = _norms(bundle, records if ids is None else ids.numel())
        if ids is None:
            return part
        at = ids.to(part.sq.device)
        whole = Norms(
            whole.sq.to(at.device).index_copy(0, at, part.sq), whole.apart.to(at.device).index_copy(0, at, part.apart)
        )
    return whole


def _norms(bundle: Bundle, records: int) -> Norms:
    grams: Grams = {}
    budget = KEEP_ELEMENTS
    sq = torch.zeros(records, dtype=torch.float64)
    apart = torch.zeros(records, dtype=torch.bool)
    for name, terms in bundle.items():
        kept = [keep(t, budget) for t in terms]
        budget -= sum(k.value.numel() for k, t in zip(kept, terms, strict=True) if isinstance(k, Dense) and k is not t)
        bundle[name] = kept
        part, floor = measured(kept, grams)
        sq, apart = sq.to(part.device) + part, apart.to(part.device) | (part < floor) | (floor == float("inf"))
    for b in apart.nonzero().flatten().tolist():
        sq[b] = sum(g.square().sum() for g in _alone(bundle, b).values())
    return Norms(sq, apart & sq.isfinite())


def _alone(bundle: Bundle, record: int) -> dict[str, Tensor]:
    """One record's whole gradient in float64: what is measured is then exactly what is summed."""
    one = torch.tensor([record])
    out = {}
    for name, terms in bundle.items():
        parts = [materialize(double(select(t, one.to(device(t)))))[0] for t in terms]
        out[name] = torch.stack(parts).sum(0)
    return out


@torch.no_grad()
@full_precision()
def clipped(
    parts: Parts, norms: Norms, max_grad_norm: float, dtype: torch.dtype, scale: float = 1.0, unit: float = 1.0
) -> tuple[dict[str, Tensor], Tensor]:
    """({name: unit·Σ_b w_b·scale·G_b}, w): w_b·scale·‖G_b‖ <= max_grad_norm; gradients are ``scale`` times the terms'.

    ``unit`` is the public factor of the release (one over the expected batch size), taken along to save a pass.
    Records of weight 0 are left out, not multiplied by zero: 0·inf is NaN.
    """
    weights = flat_weights(norms.sq * scale**2, max_grad_norm, dtype)
    out: dict[str, Tensor] = {}
    for ids, bundle in parts:
        at = slice(None) if ids is None else ids.to(weights.device)
        for name, total in _summed(bundle, weights[at], norms.apart[at], scale * unit).items():
            out[name] = out[name] + total if name in out else total
    return out, weights


def _summed(bundle: Bundle, weights: Tensor, apart: Tensor, factor: float) -> dict[str, Tensor]:
    together = (weights > 0) & ~apart
    everything = bool(together.all())
    factors = (weights if everything else weights[together]) * factor
    out: dict[str, Tensor] = {}
    for name, terms in bundle.items():
        chosen = terms if everything else [select(t, together.to(device(t))) for t in terms]
        parts = [_in_blocks(t, factors.to(device(t))) for t in chosen]
        out[name] = parts[0] if len(parts) == 1 else torch.stack(parts).sum(0)
    for b in (apart & (weights > 0)).nonzero().flatten().tolist():
        for name, gradient in _alone(bundle, b).items():
            out[name] = out[name] + (gradient * (weights[b] * factor)).to(out[name].dtype)
    return out


def _in_blocks(term: Term, factors: Tensor) -> Tensor:
    """``weighted_sum``, of so few records at a time that float32 still sees what one of them adds."""
    if len(factors) <= BLOCK_RECORDS:
        return weighted_sum(term, factors)
    total: Tensor | None = None
    for start in range(0, len(factors), BLOCK_RECORDS):
        rows = slice(start, start + BLOCK_RECORDS)
        part = weighted_sum(select(term, rows), factors[rows])
        total = part.double() if total is None else total.add_(part)
    return total.to(part.dtype)  # type: ignore[union-attr]
