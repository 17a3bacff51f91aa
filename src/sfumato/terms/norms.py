"""inner and sq_norms: scalar products of per-sample gradients, float64 results, never materialised where avoidable."""

from collections.abc import Iterable
from itertools import combinations

import torch
from torch import Tensor

from sfumato.terms.dense import conv_weight_grad, materialize, unfolds
from sfumato.terms.types import Conv, Dense, Outer, Scatter, Term, batch_size

Grams = dict[tuple[object, ...], Tensor]

# Records whose Gram norm cancels below this share of Σ|l||r| are recomputed densely in float64: a norm that is
# rounded down would let the record exceed the bound.
_CANCELLATION = 1e-4
_CHUNK_ELEMENTS = 1 << 24
_BLOCK = 512


def sq_norms(terms: Iterable[Term], grams: Grams | None = None) -> Tensor:
    """Squared norms (B,), float64, of the sum of the terms of one parameter, cross terms included."""
    terms = list(terms)
    grams = {} if grams is None else grams
    total = sum(_sq_norm(t, grams) for t in terms) + sum(2 * inner(s, t) for s, t in combinations(terms, 2))
    return total.clamp_min_(0) if isinstance(total, Tensor) else torch.zeros(0, dtype=torch.float64)


def _square(x: Tensor) -> Tensor:
    """Σ x² per leading index, as float64.

    Blocks are summed in the dtype of x and joined in float64. Where float32 squares may under- or overflow (hostile
    records), the record is squared again in float64: a norm rounded to zero would let it through unclipped.
    """
    flat = x.reshape(x.shape[0], -1)
    if x.dtype == torch.float64 or flat.numel() == 0:
        return torch.linalg.vector_norm(flat, dim=1, dtype=torch.float64).square_()
    whole = flat.shape[1] - flat.shape[1] % _BLOCK
    if whole:
        blocks = torch.linalg.vector_norm(flat[:, :whole].reshape(flat.shape[0], -1, _BLOCK), dim=2)
        sq = blocks.double().square_().sum(1)
        if whole < flat.shape[1]:
            sq += torch.linalg.vector_norm(flat[:, whole:], dim=1).double().square_()
    else:
        sq = torch.linalg.vector_norm(flat, dim=1).double().square_()
    extreme = ~((sq > 1e-24) & (sq < 1e30))
    if bool(extreme.any()):
        sq[extreme] = torch.linalg.vector_norm(flat[extreme], dim=1, dtype=torch.float64).square_()
    return sq


def _sq_norm(term: Term, grams: Grams) -> Tensor:
    match term:
        case Dense(value):
            return _square(value)
        case Outer(left, right):
            return _outer(term, grams) if left.shape[1] != 1 else _square(left) * _square(right)
        case Scatter(grad, index, shape):
            return _scatter(grad, index, shape[0])
        case Conv():
            if unfolds(term) or batch_size(term) == 0:
                return _square(materialize(term))
            norms = [
                torch.linalg.vector_norm(conv_weight_grad(g, x, term), dtype=torch.float64)
                for g, x in zip(term.grad, term.input, strict=True)
            ]
            return torch.stack(norms).square_()


def gram(x: Tensor, grams: Grams) -> Tensor:
    """x xᵀ per record (B, T, T); layers that share an input (Q, K, V) share it."""
    key = (x.data_ptr(), x.shape, x.stride(), x.dtype)
    if key not in grams:
        grams[key] = torch.bmm(x, x.mT)
    return grams[key]


def _outer(term: Outer, grams: Grams) -> Tensor:
    left, right = term.left, term.right
    records, rows, p = left.shape
    d = right.shape[2]
    if rows == 0 or records == 0:
        return torch.zeros(records, dtype=torch.float64, device=left.device)
    if rows * (p + d) >= p * d:
        chunk = max(1, _CHUNK_ELEMENTS // (p * d))
        parts = [_square(torch.bmm(a.mT, b)) for a, b in zip(left.split(chunk), right.split(chunk), strict=True)]
        return torch.cat(parts)
    sq = (gram(left, grams) * gram(right, grams)).sum(dim=(1, 2), dtype=torch.float64)
    if left.dtype == torch.float64:
        return sq
    rows_l = torch.linalg.vector_norm(left, dim=2, dtype=torch.float64)
    rows_r = torch.linalg.vector_norm(right, dim=2, dtype=torch.float64)
    doubtful = ~(sq >= _CANCELLATION * (rows_l * rows_r).sum(1).square())
    if bool(doubtful.any()):
        for b in doubtful.nonzero().flatten().tolist():
            sq[b] = (left[b].double().mT @ right[b].double()).square().sum()
    return sq


def _scatter(grad: Tensor, index: Tensor, rows: int) -> Tensor:
    """Rows with the same id within a record add up before they are squared."""
    records = index.shape[0]
    out = torch.zeros(records, dtype=torch.float64, device=grad.device)
    if index.numel() == 0:
        return out
    offset = torch.arange(records, device=index.device).unsqueeze(1) * rows
    keys, inverse = torch.unique(index + offset, return_inverse=True)
    summed = grad.new_zeros(keys.numel(), grad.shape[2]).index_add_(0, inverse.reshape(-1), grad.flatten(0, 1))
    return out.index_add_(0, torch.div(keys, rows, rounding_mode="floor"), _square(summed))


def inner(s: Term, t: Term) -> Tensor:
    """<S_b, T_b> per record, shape (B,), float64."""
    match s, t:
        case Dense(), Dense():
            return _dot(s.value, t.value)
        case Outer(), Outer() if s.left.shape[2] == t.left.shape[2]:
            return (torch.bmm(s.left, t.left.mT) * torch.bmm(s.right, t.right.mT)).sum((1, 2), dtype=torch.float64)
        case (Scatter(), Outer()) if t.shape == s.shape:
            # Σ_{t,s} <grad_t, right_s> · left_s[index_t]: gather, never vocabulary × width
            picked = t.left.gather(2, s.index.unsqueeze(1).expand(-1, t.left.shape[1], -1))  # (B, S, T)
            return (picked * torch.bmm(t.right, s.grad.mT)).sum((1, 2), dtype=torch.float64)
        case Outer(), Scatter():
            return inner(t, s)
        case Scatter(), Scatter():
            same = s.index.unsqueeze(2) == t.index.unsqueeze(1)
            return (torch.bmm(s.grad, t.grad.mT) * same).sum((1, 2), dtype=torch.float64)
        case Dense(value), Scatter(grad, index):
            picked = value.gather(1, index.unsqueeze(2).expand(-1, -1, value.shape[2]))
            return _dot(picked, grad)
        case Scatter(), Dense():
            return inner(t, s)
        case _:
            return _dot(materialize(s), materialize(t))


def _dot(x: Tensor, y: Tensor) -> Tensor:
    return (x.reshape(x.shape[0], -1) * y.reshape(y.shape[0], -1)).sum(1, dtype=torch.float64)
