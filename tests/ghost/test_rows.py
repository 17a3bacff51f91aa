"""Rows: which record a position belongs to, through reshapes and regroupings, against an explicit owner map."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sfumato.ghost.rows import Rows, Unknown, by_record, from_owner, owners, through_reshape


def label(rows, shape, records):
    """A tensor whose every element is the record that owns it."""
    vector = owners(rows, records, torch.device("cpu"))
    return vector.view(-1, *[1] * (len(shape) - rows.axis - 1)).expand(shape).contiguous()


def regular(draw_outer, records, inner, lead, tail):
    shape = torch.Size((*lead, draw_outer * records * inner, *tail))
    return Rows(len(lead), draw_outer, inner), shape


sizes = st.lists(st.integers(1, 3), max_size=2)


@st.composite
def tagged(draw):
    records = draw(st.integers(2, 4))
    rows, shape = regular(draw(st.integers(1, 3)), records, draw(st.integers(1, 3)), draw(sizes), draw(sizes))
    return records, rows, shape


@st.composite
def factorised(draw, number):
    """Any shape with ``number`` elements."""
    shape = []
    while number > 1 and len(shape) < 5:
        divisor = draw(st.sampled_from([k for k in range(1, number + 1) if number % k == 0]))
        shape.append(divisor)
        number //= divisor
    return (*shape, number) if number > 1 or not shape else tuple(shape)


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_a_reshape_is_followed_or_unknown(data):
    """Whatever the answer, every element still has the record that it had before; T == B and ones included."""
    records, rows, shape = data.draw(tagged())
    out = torch.Size(data.draw(factorised(math.prod(shape))))
    tag = through_reshape(rows, shape, out, records)
    if isinstance(tag, Unknown):
        return
    assert torch.equal(label(tag, out, records), label(rows, shape, records).reshape(out))


@settings(max_examples=200, deadline=None)
@given(tagged())
def test_flattening_and_back_is_never_unknown(example):
    records, rows, shape = example
    flat = torch.Size((math.prod(shape),))
    tag = through_reshape(rows, shape, flat, records)
    assert isinstance(tag, Rows)
    back = through_reshape(tag, flat, shape, records)
    assert isinstance(back, Rows)
    assert torch.equal(label(back, shape, records), label(rows, shape, records))


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_by_record_collects_exactly_the_rows_of_each_record(data):
    records, rows, shape = data.draw(tagged())
    explicit = data.draw(st.booleans())
    if explicit:
        rows = Rows(
            rows.axis,
            owner=torch.tensor(
                data.draw(st.lists(st.integers(0, records - 1), min_size=shape[rows.axis], max_size=shape[rows.axis]))
            ),
        )
    features = data.draw(st.integers(0, len(shape) - rows.axis - 1))
    x = torch.arange(1.0, 1 + math.prod(shape)).view(shape)
    grouped = by_record(x, rows, records, features)
    assert grouped.shape[0] == records
    assert grouped.shape[2:] == shape[len(shape) - features :]
    owner = label(rows, shape, records)
    for b in range(records):
        mine = grouped[b].flatten()
        assert torch.equal(mine[mine != 0].sort().values, x[owner == b].sort().values)


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_two_regroupings_stay_aligned(data):
    """Gradient rows and input rows of one layer meet position by position, whatever their widths."""
    records, rows, shape = data.draw(tagged())
    lead = shape[: rows.axis + 1]
    left, right = torch.randn(*lead, 3, dtype=torch.float64), torch.randn(*lead, 2, dtype=torch.float64)
    if data.draw(st.booleans()):
        rows = Rows(rows.axis, owner=torch.randint(0, records, (lead[-1],)))
    got = torch.einsum("btp,btd->bpd", by_record(left, rows, records, 1), by_record(right, rows, records, 1))
    owner = label(rows, torch.Size(lead), records).flatten()
    for b in range(records):
        want = left.reshape(-1, 3)[owner == b].T @ right.reshape(-1, 2)[owner == b]
        torch.testing.assert_close(got[b], want)


def test_the_identity_owner_is_plain():
    assert from_owner(1, torch.arange(4), 4).plain
    assert not from_owner(1, torch.tensor([0, 1, 3, 2]), 4).plain
    assert not from_owner(1, torch.arange(3), 4).plain


@pytest.mark.parametrize("shape", [(0, 5), (0, 3, 5)])
def test_no_records(shape):
    x = torch.zeros(shape)
    assert by_record(x, Rows(0), 0, 1).shape[0] == 0


def test_same_owners():
    a, b = torch.tensor([0, 0, 1]), torch.tensor([0, 1, 1])
    assert Rows(0, owner=a).same_owners(Rows(1, owner=a.clone()))
    assert not Rows(0, owner=a).same_owners(Rows(0, owner=b))
    assert not Rows(0, 2).same_owners(Rows(0, 1, 2))
    assert not Rows(0).same_owners(Rows(0, owner=a))
