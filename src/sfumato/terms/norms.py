"""inner and sq_norms: scalar products of per-sample gradients, float64 results, never materialised where avoidable."""

from collections.abc import Iterable
from itertools import combinations

import torch
from torch import Tensor

from sfumato.terms.dense import conv_weight_grad, materialize, unfolds
from sfumato.terms.pixels import measured_by_pixels, suits
from sfumato.terms.types import Conv, Dense, Outer, Scatter, Stack, Term, batch_size

Grams = dict[tuple[object, ...], list[Tensor]]

_CHUNK_ELEMENTS = 1 << 24
_BLOCK = 512
_BLOCK_ROWS = 32
_LARGE = 1e30


def sq_norms(terms: Iterable[Term], grams: Grams | None = None) -> Tensor:
    """Squared norms (B,), float64, of the sum of the terms of one parameter, cross terms included."""
    return measured(terms, grams)[0]


def measured(terms: Iterable[Term], grams: Grams | None = None) -> tuple[Tensor, Tensor]:
    """(squared norms, floor), both (B,) float64: a squared norm below its floor is not to be trusted.

    The floor is the squared size of the parts that cancelled, over 64 times their number: rounding of that order is in
    the norm and in every sum that the record takes part in. It is infinite where factors leave the range in which
    float32 products keep their precision. Such records must be computed apart, in float64.
    """
    terms = list(terms)
    grams = {} if grams is None else grams
    if not terms:
        return torch.zeros(0, dtype=torch.float64), torch.zeros(0, dtype=torch.float64)
    parts = [_measured(t, grams) for t in terms]
    sq = torch.stack([p[0] for p in parts]).sum(0)
    floor = torch.stack([p[1] for p in parts]).sum(0)
    if len(terms) > 1:
        floor = torch.maximum(floor, sq / 64)
        for s, t in combinations(terms, 2):
            sq = sq + 2 * inner(s, t)
        sq = torch.where(sq.isfinite(), sq.clamp_min(0), float("inf"))  # -inf must not become a norm of 0
    return sq, torch.where(sq > _LARGE, float("inf"), floor)


def _square(x: Tensor) -> Tensor:
    """Σ x² per leading index, as float64.

    Blocks are summed in the dtype of x and joined in float64. Where float32 squares may under- or overflow (hostile
    records), the record is squared again in float64: a norm rounded to zero would let it through unclipped.
    """
    flat = x.flatten(1) if x.dim() > 1 else x.unsqueeze(1)
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


def _measured(term: Term, grams: Grams) -> tuple[Tensor, Tensor]:
    match term:
        case Stack(parts):
            each = [measured(terms, grams) for terms in parts.values()]
            sq = torch.stack([p[0] for p in each]).sum(0)
            lost = torch.stack([(p[0] < p[1]) | (p[1] == float("inf")) for p in each]).any(0)
            return sq, torch.where(lost, float("inf"), 0.0)
        case Dense(value):
            sq = _square(value)
            return sq, torch.zeros_like(sq)
        case Outer(left, right):
            if left.shape[1] != 1:
                return _outer(term, grams)
            a, b = _square(left), _square(right)
            sq = a * b
            return sq, torch.where(torch.maximum(a, b) > _LARGE, float("inf"), 0.0)
        case Scatter(grad, index, shape):
            sq = _scatter(grad, index, shape[0])
            mass = torch.linalg.vector_norm(grad, dim=2).double().sum(1).square()
            return sq, mass / (64 * max(1, grad.shape[1]))
        case Conv():
            if batch_size(term) and not unfolds(term) and suits(term):
                sq, mass, largest = measured_by_pixels(term)
                floor = mass.square() / (64 * max(1, term.grad[0, 0, 0].numel()))
                return sq, torch.where(sq.isfinite() & (largest <= _LARGE), floor, float("inf"))
            if unfolds(term) or batch_size(term) == 0:
                sq = _square(materialize(term))
            else:
                norms = [
                    torch.linalg.vector_norm(conv_weight_grad(g, x, term), dtype=torch.float64)
                    for g, x in zip(term.grad, term.input, strict=True)
                ]
                sq = torch.stack(norms).square_()
            return sq, torch.zeros_like(sq)


def gram(x: Tensor, grams: Grams) -> list[Tensor]:
    """The lower triangle of x xᵀ per record, in blocks: off-diagonal ones (count twice), the diagonal ones last.

    Half the products of the full (B, T, T) matrix; layers that share an input (Q, K, V) share it.
    """
    key = (x.data_ptr(), x.shape, x.stride(), x.dtype)
    if key not in grams:
        records, rows, width = x.shape
        blocks, parts = [], 1
        while rows % 2 == 0 and rows > _BLOCK_ROWS:
            rows //= 2
            halves = x.reshape(records * parts, 2, rows, width)
            blocks.append(torch.bmm(halves[:, 0], halves[:, 1].mT))
            parts *= 2
        last = x.reshape(records * parts, rows, width)
        grams[key] = [*blocks, torch.bmm(last, last.mT)]
    return grams[key]


def _outer(term: Outer, grams: Grams) -> tuple[Tensor, Tensor]:
    left, right = term.left, term.right
    records, rows, p = left.shape
    d = right.shape[2]
    if rows == 0 or records == 0:
        nothing = torch.zeros(records, dtype=torch.float64, device=left.device)
        return nothing, nothing
    if rows * (p + d) >= 2 * p * d:  # the triangle costs half of T²(p + d)
        chunk = max(1, _CHUNK_ELEMENTS // (p * d))
        parts = [_square(torch.bmm(a.mT, b)) for a, b in zip(left.split(chunk), right.split(chunk), strict=True)]
        sq = torch.cat(parts)
        sizes_l, sizes_r = torch.linalg.vector_norm(left, dim=2), torch.linalg.vector_norm(right, dim=2)
    else:
        lefts, rights = gram(left, grams), gram(right, grams)
        sq = torch.zeros(records, dtype=torch.float64, device=left.device)
        for k, (a, b) in enumerate(zip(lefts, rights, strict=True)):
            twice = 2.0 if k < len(lefts) - 1 else 1.0
            sq += twice * (a * b).reshape(records, -1).sum(1, dtype=torch.float64)
        # row norms are the diagonals of the Grams
        sizes_l, sizes_r = (g[-1].diagonal(dim1=1, dim2=2).reshape(records, rows).sqrt() for g in (lefts, rights))
    sizes_l, sizes_r = sizes_l.double(), sizes_r.double()
    floor = (sizes_l * sizes_r).sum(1).square() / (64 * rows)
    big = torch.maximum(sizes_l.amax(1), sizes_r.amax(1)).square() > _LARGE
    floor = torch.where(big | ~sq.isfinite(), float("inf"), floor)
    return sq, floor


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
        case (Scatter(), Outer()) if t.factors == tuple(s.shape):
            # Σ_{t,s} <grad_t, right_s> · left_s[index_t]: gather, never vocabulary × width
            picked = t.left.gather(2, s.index.unsqueeze(1).expand(-1, t.left.shape[1], -1))  # (B, S, T)
            return (picked * torch.bmm(t.right, s.grad.mT)).sum((1, 2), dtype=torch.float64)
        case (Outer(), Scatter()) if s.factors == tuple(t.shape):
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
    if x.dim() == 1:
        return x.double() * y.double()
    return (x.flatten(1) * y.flatten(1)).sum(1, dtype=torch.float64)
