# ruff: noqa: E501  (tables of one-line models)
"""Terms: every operation equals the same operation on the materialised gradient."""

from itertools import product

import pytest
import torch

from sfumato.terms import (
    Conv,
    ConvSpec,
    Dense,
    Outer,
    Scatter,
    batch_size,
    inner,
    keep,
    materialize,
    merge,
    select,
    sq_norms,
    weighted_sum,
)  # fmt: skip
from sfumato.terms.norms import measured

R = torch.randn
B = 3


def outer(rows=4, p=6, d=5, shape=None, records=B, dtype=torch.float64):
    return Outer(R(records, rows, p, dtype=dtype), R(records, rows, d, dtype=dtype), torch.Size(shape or (p, d)))


def scatter(rows=4, records=B, shape=(6, 5)):
    return Scatter(
        R(records, rows, shape[1], dtype=torch.float64), torch.randint(0, shape[0], (records, rows)), torch.Size(shape)
    )


def dense(shape=(6, 5), records=B):
    return Dense(R(records, *shape, dtype=torch.float64))


def conv(images=1, records=B, transposed=False, groups=1, stride=1, side=6):
    weight = R(4, 2 // groups if not transposed else 2, 3, dtype=torch.float64)
    spec = ConvSpec((stride,), (1,), (1,), transposed, (0,), groups)
    x = R(records * images, 4 if transposed else 2, side, dtype=torch.float64)
    out = torch.convolution(
        x, weight, None, spec.stride, spec.padding, spec.dilation, transposed, spec.output_padding, groups
    )
    return Conv(
        R(records, images, *out.shape[1:], dtype=torch.float64), x.view(records, images, *x.shape[1:]), weight, spec
    )


TERMS = {
    "outer": outer,
    "outer, one row": lambda: outer(rows=1),
    "outer, Gram": lambda: outer(rows=2, p=20, d=30),
    "outer, reshaped": lambda: outer(shape=(2, 3, 5)),
    "outer, no rows": lambda: outer(rows=0),
    "scatter": scatter,
    "scatter, many rows": lambda: scatter(rows=30),
    "scatter, no rows": lambda: scatter(rows=0),
    "dense": dense,
    "dense, scalar": lambda: dense(()),
    "conv": conv,
    "conv, two images": lambda: conv(images=2),
    "conv, stride": lambda: conv(stride=2),
    "conv, groups": lambda: conv(groups=2),
    "conv, transposed": lambda: conv(transposed=True),
}


def definition(term):
    """The per-sample gradient written out from the record's docstring, without the library."""
    if isinstance(term, Dense):
        return term.value
    if isinstance(term, Outer):
        return torch.einsum("btp,btd->bpd", term.left, term.right).reshape(term.left.shape[0], *term.shape)
    if isinstance(term, Scatter):
        out = torch.zeros(len(term.grad), *term.shape, dtype=term.grad.dtype)
        for b, t in product(range(term.grad.shape[0]), range(term.grad.shape[1])):
            out[b, term.index[b, t]] += term.grad[b, t]
        return out
    rows, s = [], term.spec
    for b in range(term.grad.shape[0]):
        weight = term.weight.clone().requires_grad_()
        out = torch.convolution(
            term.input[b], weight, None, s.stride, s.padding, s.dilation, s.transposed, s.output_padding, s.groups
        )
        rows.append(torch.autograd.grad((out * term.grad[b]).sum(), weight)[0])
    return torch.stack(rows)


def squares(x):
    return x.reshape(x.shape[0], -1).square().sum(1)


def near(got, want):
    torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("name", TERMS)
def test_one_term(name):
    term = TERMS[name]()
    want = definition(term)
    assert batch_size(term) == B
    assert want.shape[1:] == term.shape
    near(materialize(term), want)
    near(sq_norms([term]), squares(want))
    assert sq_norms([term]).dtype == torch.float64
    weights = torch.rand(B, dtype=torch.float64)
    near(weighted_sum(term, weights), torch.tensordot(weights, want, 1))
    assert weighted_sum(term, weights).shape == term.shape
    near(inner(term, term), squares(want))
    for chosen in (torch.tensor([True, False, True]), torch.tensor([2, 0]), torch.tensor([False] * B)):
        near(materialize(select(term, chosen)), want[chosen])
    for budget in (0, 10**9):
        near(materialize(keep(term, budget)), want)


PAIRS = {
    "outer": outer, "outer of other widths": lambda: outer(p=10, d=3, shape=(6, 5)), "outer, one row": lambda: outer(rows=1),
    "scatter": scatter, "scatter, longer": lambda: scatter(rows=7), "dense": dense,
}  # fmt: skip


@pytest.mark.parametrize(("left", "right"), list(product(PAIRS, PAIRS)))
def test_two_terms(left, right):
    s, t = PAIRS[left](), PAIRS[right]()
    a, b = definition(s), definition(t)
    near(inner(s, t), (a * b).reshape(B, -1).sum(1))
    near(sq_norms([s, t]), squares(a + b))
    merged = merge([s, t])
    near(sum(materialize(m) for m in merged), a + b)
    near(sq_norms(merged), squares(a + b))


def test_three_terms_and_cancellation():
    s, t, u = outer(), scatter(), dense()
    total = definition(s) + definition(t) + definition(u)
    near(sq_norms([s, t, u]), squares(total))
    opposite = Dense(-total)
    assert float(sq_norms([s, t, u, opposite]).max()) < 1e-10
    assert float(sq_norms([s, t, u, opposite]).min()) >= 0


def test_convolutions_merge():
    s = conv()
    t = Conv(torch.randn_like(s.grad), torch.randn_like(s.input), s.weight, s.spec)
    total = definition(s) + definition(t)
    near(sum(materialize(m) for m in merge([s, t])), total)
    near(sq_norms(merge([s, t])), squares(total))
    near(sq_norms([s, Dense(definition(t))]), squares(total))


def test_no_terms_and_no_records():
    assert sq_norms([]).numel() == 0
    for term in (outer(records=0), scatter(records=0), dense(records=0)):
        assert sq_norms([term]).shape == (0,)
        assert materialize(term).shape == (0, 6, 5)
        assert not weighted_sum(term, torch.zeros(0)).any()


def trusted_or_flagged(term, want):
    """A float32 norm is right, or below its floor: then the record is computed apart in float64."""
    sq, floor = measured([term])
    flagged = (sq < floor) | floor.isinf() | ~sq.isfinite()
    right = (sq - want).abs() <= 1e-5 * want + 1e-14
    assert (right | flagged).all()
    return flagged


@pytest.mark.parametrize("rows", [1, 2, 9, 64])
@pytest.mark.parametrize("exponent", [-38, -30, -20, 0, 15, 25, 37])
def test_float32_norms_do_not_under_or_overflow_unseen(rows, exponent):
    """Squares of float32 leave its range long before the gradients do."""
    term = outer(rows=rows, p=12, d=10, dtype=torch.float32)
    term = Outer(term.left * 10.0**exponent, term.right, term.shape)
    want = squares(definition(Outer(term.left.double(), term.right.double(), term.shape)))
    flagged = trusted_or_flagged(term, want)
    assert exponent != 0 or not flagged.any(), "an ordinary record must not be computed apart"


@pytest.mark.parametrize("nearly", [0.0, 1e-4, 1e-2])
@pytest.mark.parametrize("width", [4, 40])
def test_rows_that_cancel_are_flagged(width, nearly):
    left, right = R(B, 1, width).repeat(1, 2, 1), R(B, 2, width)
    left[:, 1] *= -1
    right[:, 1] = right[:, 0] + nearly * R(B, width)
    term = Outer(left, right, torch.Size((width, width)))
    want = squares(definition(Outer(left.double(), right.double(), term.shape)))
    assert trusted_or_flagged(term, want).all() == (nearly < 1e-2) or nearly == 1e-2


def test_terms_that_cancel_are_flagged():
    left, right = R(B, 2, 6), R(B, 2, 5)
    s = Outer(left, right, torch.Size((6, 5)))
    t = Dense(-definition(s) * (1 + 1e-5))
    sq, floor = measured([s, t])
    assert ((sq < floor) | floor.isinf()).all()


def test_weights_keep_their_records_apart():
    """A weight of zero removes a record, whatever the kind of term."""
    for build in TERMS.values():
        term = build()
        want = definition(term)[1]
        near(weighted_sum(term, torch.tensor([0.0, 1.0, 0.0], dtype=torch.float64)), want)
