"""weighted_sum, merge, keep and select: how terms become one clipped gradient."""

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from sfumato.terms.dense import conv_weight_grad, materialize, unfolds
from sfumato.terms.pixels import suits
from sfumato.terms.products import crossed
from sfumato.terms.types import Conv, Dense, Outer, Scatter, Stack, Term, batch_size, each_part

_COMPACT_ELEMENTS = 1 << 23


def weighted_sum(term: Term, weights: Tensor) -> Tensor:
    """Σ_b weights[b]·G_b, shape term.shape, in the dtype of the term. weights: (B,)."""
    match term:
        case Dense(value):
            w = weights.to(value.dtype)
            return torch.tensordot(w, value, 1)
        case Outer(left, right, shape):
            w = weights.to(left.dtype)[:, None, None]
            if left.shape[2] <= right.shape[2]:
                left = left * w
            else:
                right = right * w
            return crossed(left.flatten(0, 1), right.flatten(0, 1)).reshape(shape)
        case Scatter(grad, index, shape):
            scaled = grad * weights.to(grad.dtype)[:, None, None]
            return grad.new_zeros(shape).index_add_(0, index.reshape(-1), scaled.flatten(0, 1))
        case Conv(grad, x):
            if grad.shape[0] * grad.shape[1] == 0:
                return grad.new_zeros(term.shape)
            w = weights.to(grad.dtype).reshape(-1, *[1] * (grad.dim() - 1))
            return conv_weight_grad((grad * w).flatten(0, 1), x.flatten(0, 1), term)
        case Stack(parts, shape):
            first = next(iter(parts.values()))[0]
            out = _float_of(first, shape)
            for (start, rows), terms in parts.items():
                for t in terms:
                    out[start : start + rows] += weighted_sum(t, weights).reshape(rows, *shape[1:])
            return out


def _float_of(term: Term, shape: torch.Size) -> Tensor:
    """Zeros of that shape, with the dtype and device of a term."""
    match term:
        case Outer(left=x) | Conv(grad=x) | Scatter(grad=x) | Dense(value=x):
            return x.new_zeros(shape)
        case Stack(parts):
            return _float_of(next(iter(parts.values()))[0], shape)


def _stacked(stacks: Sequence[Stack]) -> list[Term]:
    """One stack; slices that overlap without being the same have cross terms, so they become dense."""
    parts: dict[tuple[int, int], list[Term]] = {}
    for stack in stacks:
        for key, terms in stack.parts.items():
            parts.setdefault(key, []).extend(terms)
    ends = sorted(parts)
    if any(a + n > b for (a, n), (b, _) in pairwise(ends)):
        return [Dense(materialize(s)) for s in stacks]
    return [Stack({k: tuple(merge(_of_one_shape(parts[k]))) for k in ends}, stacks[0].shape)]


def _of_one_shape(terms: list[Term]) -> list[Term]:
    """A slice with its axis and one without (w[0:1], w[0]) differ in shape only."""
    if len({t.shape for t in terms}) == 1:
        return terms
    return [Dense(materialize(t).reshape(batch_size(t), -1)) for t in terms]


def merge(terms: Sequence[Term]) -> list[Term]:
    """At most one term of each kind: reuse of a weight becomes more rows, so cross terms are exact for free."""
    outers = [t for t in terms if isinstance(t, Outer)]
    scatters = [t for t in terms if isinstance(t, Scatter)]
    denses = [t for t in terms if isinstance(t, Dense)]
    stacks = _stacked(found) if (found := [t for t in terms if isinstance(t, Stack)]) else []
    denses += [t for t in stacks if isinstance(t, Dense)]
    convs = [t for t in terms if isinstance(t, Conv)]
    out: list[Term] = [t for t in stacks if isinstance(t, Stack)]
    while outers:
        first = outers[0]
        same = [t for t in outers if t.left.shape[2] == first.left.shape[2]]
        outers = [t for t in outers if t.left.shape[2] != first.left.shape[2]]
        left, right = torch.cat([t.left for t in same], 1), torch.cat([t.right for t in same], 1)
        out.append(first if len(same) == 1 else Outer(left, right, first.shape))
    if scatters:
        grad, index = torch.cat([t.grad for t in scatters], 1), torch.cat([t.index for t in scatters], 1)
        out.append(scatters[0] if len(scatters) == 1 else Scatter(grad, index, scatters[0].shape))
    if len(convs) > 1:  # different images of one kernel: rare, and their cross term has no factored form
        denses += [Dense(materialize(t)) for t in convs]
    else:
        out += convs
    if denses:
        out.append(denses[0] if len(denses) == 1 else Dense(torch.stack([t.value for t in denses]).sum(0)))
    return out


def compact(term: Term) -> Term:
    """The term as the dense gradient where that is no bigger than its factors: they can be freed at once.

    Above _COMPACT_ELEMENTS fresh memory costs more in page faults than the second product that it saves.
    """
    if isinstance(term, Outer):
        (records, rows, p), d = term.left.shape, term.right.shape[2]
        if rows > 1 and 4 * p * d <= 5 * rows * (p + d) and records * p * d <= _COMPACT_ELEMENTS:
            return Dense(materialize(term))
    return term


def keep(term: Term, budget: int) -> Term:
    """The term, materialised when that saves a second pass over it and fits ``budget`` elements."""
    if not isinstance(term, Conv) or (suits(term) and not unfolds(term)):
        return term
    records = term.grad.shape[0]
    return Dense(materialize(term)) if records * term.weight.numel() <= budget else term


def double(term: Term) -> Term:
    """The term with float64 factors."""
    match term:
        case Stack():
            return each_part(term, double)
        case Dense(value):
            return Dense(value.double())
        case Outer(left, right, shape):
            return Outer(left.double(), right.double(), shape)
        case Scatter(grad, index, shape):
            return Scatter(grad.double(), index, shape)
        case Conv(grad, x, weight, spec):
            return Conv(grad.double(), x.double(), weight.double(), spec)


def select(term: Term, records: Tensor | slice) -> Term:
    """The term restricted to some records (boolean mask, indices or a slice)."""
    match term:
        case Stack():
            return each_part(term, lambda t: select(t, records))
        case Dense(value):
            return Dense(value[records])
        case Outer(left, right, shape):
            return Outer(left[records], right[records], shape)
        case Scatter(grad, index, shape):
            return Scatter(grad[records], index[records], shape)
        case Conv(grad, x, weight, spec):
            return Conv(grad[records], x[records], weight, spec)


def spread(term: Term, ids: Tensor, records: int) -> Term:
    """The term of some records as one of all ``records``: zero for the others."""

    def put(x: Tensor) -> Tensor:
        return x.new_zeros(records, *x.shape[1:]).index_copy_(0, ids.to(x.device), x)

    match term:
        case Stack():
            return each_part(term, lambda t: spread(t, ids, records))
        case Dense(value):
            return Dense(put(value))
        case Outer(left, right, shape):
            return Outer(put(left), put(right), shape)
        case Scatter(grad, index, shape):
            return Scatter(put(grad), put(index), shape)
        case Conv(grad, x, weight, spec):
            return Conv(put(grad), put(x), weight, spec)
