"""From the tape to per-parameter terms: derived tensors are pulled back to the parameters they came from."""

import torch
from torch import Tensor

from sfumato.ghost.functions import full_precision, wide
from sfumato.ghost.tape import Tape
from sfumato.ghost.targets import Derived, Param, Target, settle, shape_of
from sfumato.terms import Dense, Scatter, Term, device, joined, materialize, merge, select, spread

_CHUNK_ELEMENTS = 1 << 25

Bundle = dict[str, list[Term]]
Parts = list[tuple[Tensor | None, Bundle]]  # (the records that it is about, by position; None: all of them)


@full_precision()
def collect(tape: Tape, parameters: dict[str, Tensor]) -> Parts:
    """The per-sample gradients of the pass that is completing. No record is in two parts."""
    parts = [(ids, bundle) for ids, bundle in _collected(tape, None, parameters) if bundle]
    records = tape.records or 0
    ids = torch.cat([torch.arange(records) if i is None else i for i, _ in parts]) if parts else torch.empty(0)
    if len(parts) < 2 or ids.unique().numel() == ids.numel():
        return parts
    whole: Bundle = {}
    for i, bundle in parts:
        for name, terms in bundle.items():
            whole.setdefault(name, []).extend(terms if i is None else [spread(t, i, records) for t in terms])
    return [(None, {name: merge(terms) for name, terms in whole.items()})]


def by_unit(parts: Parts, unit: Tensor, units: int) -> Parts:
    """The gradients of units that own several records: record b belongs to unit[b].

    Units of about one size make a part: a unit is padded to the largest beside it, so to twice its rows at most.
    """
    size = torch.bincount(unit, minlength=units).clamp(min=1).double().log2().ceil()
    out: Parts = []
    for each in size.unique():
        own = (size == each).nonzero()[:, 0]
        number = torch.full((units,), -1).index_copy_(0, own, torch.arange(len(own)))
        whole: Bundle = {}
        for ids, bundle in parts:
            place = number[unit if ids is None else unit[ids.to(unit.device)]]
            here = place >= 0
            for name, terms in bundle.items():
                chosen = terms if bool(here.all()) else [select(t, here.to(device(t))) for t in terms]
                whole.setdefault(name, []).extend(joined(t, place[here], len(own)) for t in chosen)
        out.append((own, {name: merge(terms) for name, terms in whole.items()}))
    return out


def _collected(tape: Tape, ids: Tensor | None, parameters: dict[str, Tensor]) -> Parts:
    """The bundle of a tape, then those of its branches."""
    parts: Parts = [(ids, _bundle(tape, parameters))]
    for positions, branch in tape.branches:
        parts += _collected(branch, positions if ids is None else ids[positions], parameters)
    return parts


def _bundle(tape: Tape, parameters: dict[str, Tensor]) -> Bundle:
    """{parameter name: merged terms}. Parameters that the loss did not reach are absent."""
    terms, row_grads = tape.take()
    records = tape.records or 0
    for derived, axis, grad, owner in row_grads:
        terms.extend(_from_rows(derived, axis, grad, owner, records))
    by_name: dict[str, list[Term]] = {}
    by_derived: dict[Derived, list[Term]] = {}
    for target, term in (_looked_up(*settle(*pair)) for pair in terms):
        if isinstance(target, Param):
            by_name.setdefault(target.name, []).append(term)
        else:
            by_derived.setdefault(target, []).append(term)
    for derived, found in by_derived.items():
        dense = sum(materialize(t) for t in merge(found))
        if isinstance(dense, Tensor):
            for name, grad in _pull(derived, dense, parameters).items():
                by_name.setdefault(name, []).append(Dense(grad))
    return {name: merge(found) for name, found in by_name.items()}


def _looked_up(target: Target, term: Term) -> tuple[Target, Term]:
    """A dense gradient of base[index] is a scatter into the base (position embeddings)."""
    if isinstance(target, Derived) and target.index is not None and target.base is not None and isinstance(term, Dense):
        records, width = term.value.shape[0], term.value.shape[-1]
        index = target.index.reshape(1, -1).expand(records, -1)
        return target.base, Scatter(term.value.reshape(records, -1, width), index, shape_of(target.base))
    return target, term


def _pull(derived: Derived, grads: Tensor, parameters: dict[str, Tensor]) -> dict[str, Tensor]:
    """Per-sample gradients (B, *derived.shape) to {name: (B, *parameter.shape)} through autograd's own graph."""
    names = [n for n in derived.names if n in parameters]
    inputs = [parameters[n] for n in names]
    chunk = max(1, _CHUNK_ELEMENTS // max(1, sum(p.numel() for p in inputs) + derived.tensor.numel()))
    parts = [
        torch.autograd.grad(
            derived.tensor,
            inputs,
            g.to(derived.tensor.dtype),
            retain_graph=True,
            is_grads_batched=True,
            allow_unused=True,
        )
        for g in grads.split(chunk)
        if g.shape[0]
    ]
    columns = list(zip(*parts, strict=True)) if parts else []
    return {
        name: wide(torch.cat(column)) for name, column in zip(names, columns, strict=False) if column[0] is not None
    }


def _from_rows(
    derived: Derived, axis: int, grad: Tensor, owner: Tensor | None, records: int
) -> list[tuple[Target, Term]]:
    if derived.base is not None and derived.index is not None and axis == 0 and owner is None:
        width = grad.shape[-1]
        rows = grad.reshape(records, -1, width)
        return [(derived.base, Scatter(rows, derived.index.reshape(records, -1), shape_of(derived.base)))]
    if derived.base is not None and axis in derived.copies and owner is None:
        # Every row is a copy of the base: the record's gradient for the base is its own row's.
        per_record = grad.movedim(axis, 0).unsqueeze(axis + 1)
        return [settle(derived.base, Dense(_sum_to(per_record, shape_of(derived.base))))]
    owner = torch.arange(records, device=grad.device) if owner is None else owner
    full = grad.new_zeros(records, *grad.shape)
    rows = torch.arange(owner.numel(), device=grad.device)
    full.movedim(axis + 1, 1)[owner, rows] = grad.movedim(axis, 0)
    return [settle(derived, Dense(full))]


def _sum_to(x: Tensor, shape: torch.Size) -> Tensor:
    """Undo a broadcast per record: x (B, *broadcast of shape) to (B, *shape)."""
    extra = x.dim() - 1 - len(shape)
    if extra:
        x = x.sum(tuple(range(1, 1 + extra)))
    axes = tuple(i + 1 for i, size in enumerate(shape) if size == 1 and x.shape[i + 1] != 1)
    return x.sum(axes, keepdim=True) if axes else x
