"""From a bundle of terms to norms over all parameters and to clipped sums: used by the step and by ``record``."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from sfumato.clipping import Clip, Flat, weights
from sfumato.errors import PrivacyError
from sfumato.ghost.functions import full_precision
from sfumato.ghost.pullback import Bundle, Parts
from sfumato.terms import Dense, Grams, Term, device, double, keep, materialize, measured, select, weighted_sum

# Elements of per-sample gradients that may be kept instead of computed twice (1 GiB of float32 at most in all).
KEEP_ELEMENTS = 1 << 27
# A sum of n clipped gradients that agree is n·C long, and float32 rounds it by n·C·2^-24 at every step.
BLOCK_RECORDS = 256
FLAT = Flat()


def wide_dtype(parameters: Iterable[Tensor]) -> torch.dtype:
    """Float64 if every parameter has it, else float32: never half precision."""
    return torch.float64 if all(p.dtype == torch.float64 for p in parameters) else torch.float32


@dataclass(frozen=True, slots=True)
class Norms:
    """Squared norms (G, B) of per-sample gradients by group of parameters, float64; and what is computed apart."""

    sq: Tensor
    apart: Tensor  # (B,) bool, records in float64: shared float32 sums would round by more than the clip bound allows
    group_of: Mapping[str, int] | None = None

    @property
    def total(self) -> Tensor:
        """Squared norms of whole per-sample gradients (B,)."""
        return self.sq.sum(0)

    def group(self, name: str) -> int:
        """The row of ``sq`` that a parameter is in."""
        if self.group_of is None:
            return 0
        if name not in self.group_of:
            raise PrivacyError(
                f"{name} is in no group of parameters, so no bound holds for its gradient.",
                where=name,
                fix="unfreeze and add parameters before the forward.",
            )
        return self.group_of[name]


@dataclass(frozen=True, slots=True)
class Weighed:
    """How the records of a pass were clipped, without padding: un-noised facts, not covered by the guarantee."""

    weights: Tensor  # (B,) the smallest weight of each over the groups; 0: left out
    norms: Tensor  # (B,) norms of whole gradients, before clipping


@torch.no_grad()
@full_precision()
def total_norms(parts: Parts, records: int, group_of: Mapping[str, int] | None = None) -> Norms:
    """Norms over all parameters, or over those of each group. May materialise terms of the bundles in place.

    ``group_of``: the group, from 0, of every trainable parameter; None: all are in one.
    """
    groups = 1 if not group_of else max(group_of.values()) + 1
    whole = _none(groups, records, group_of)
    for ids, bundle in parts:
        part = _norms(bundle, whole if ids is None else _none(groups, ids.numel(), group_of))
        if ids is None:
            return part
        at = ids.to(part.sq.device)
        whole = Norms(
            whole.sq.to(at.device).index_copy(1, at, part.sq),
            whole.apart.to(at.device).index_copy(0, at, part.apart),
            group_of,
        )
    return whole


def _none(groups: int, records: int, group_of: Mapping[str, int] | None) -> Norms:
    return Norms(torch.zeros(groups, records, dtype=torch.float64), torch.zeros(records, dtype=torch.bool), group_of)


def _norms(bundle: Bundle, none: Norms) -> Norms:
    """The norms of one bundle, added to ``none``."""
    grams: Grams = {}
    budget = KEEP_ELEMENTS
    sq, apart = none.sq, none.apart
    for name, terms in bundle.items():
        kept = [keep(t, budget) for t in terms]
        budget -= sum(k.value.numel() for k, t in zip(kept, terms, strict=True) if isinstance(k, Dense) and k is not t)
        bundle[name] = kept
        part, floor = measured(kept, grams)
        sq, apart = sq.to(part.device), apart.to(part.device) | (part < floor) | (floor == float("inf"))
        sq[none.group(name)] += part
    for b in apart.nonzero().flatten().tolist():
        sq[:, b] = 0.0
        for name, gradient in _alone(bundle, b).items():
            sq[none.group(name), b] += gradient.square().sum()
    return Norms(sq, apart & sq.isfinite().all(0), none.group_of)


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
    parts: Parts,
    norms: Norms,
    max_grad_norm: float,
    dtype: torch.dtype,
    scale: float = 1.0,
    unit: float = 1.0,
    *,
    clip: Clip = FLAT,
    mask: Tensor | None = None,
) -> tuple[dict[str, Tensor], Weighed]:
    """({name: unit·Σ_b w_b·scale·G_b}, how records were clipped); gradients are ``scale`` times the terms'.

    Guarantee: the clipped gradient of a record, w_b·scale·G_b with the weight of each group, is ``max_grad_norm`` long
    at most. ``unit`` is the public factor of the release (one over the expected batch size), taken along to save a
    pass. ``mask`` (B,) bool: padding. It and records of weight 0 are left out, not multiplied by zero: 0·inf is NaN.
    """
    found = weights(clip, norms.sq * scale**2, max_grad_norm, dtype)
    facts = Weighed(found.amin(0), norms.total.sqrt() * scale)
    if mask is not None:
        real = ~mask.to(found.device)
        found, facts = found * real, Weighed(facts.weights[real], facts.norms[real])
    out: dict[str, Tensor] = {}
    for ids, bundle in parts:
        at = slice(None) if ids is None else ids.to(found.device)
        for name, total in _summed(bundle, found[:, at], norms.apart[at], scale * unit, norms.group).items():
            out[name] = out[name] + total if name in out else total
    return out, facts


def _summed(
    bundle: Bundle, weights: Tensor, apart: Tensor, factor: float, group: Callable[[str], int]
) -> dict[str, Tensor]:
    used = (weights > 0).all(0)
    together = used & ~apart
    everything = bool(together.all())
    factors = (weights if everything else weights[:, together]) * factor
    out: dict[str, Tensor] = {}
    for name, terms in bundle.items():
        chosen = terms if everything else [select(t, together.to(device(t))) for t in terms]
        own = factors[group(name)]
        parts = [_in_blocks(t, own.to(device(t))) for t in chosen]
        out[name] = parts[0] if len(parts) == 1 else torch.stack(parts).sum(0)
    for b in (apart & used).nonzero().flatten().tolist():
        for name, gradient in _alone(bundle, b).items():
            out[name] = out[name] + (gradient * (weights[group(name), b] * factor)).to(out[name].dtype)
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
