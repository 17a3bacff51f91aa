"""Linear maps: linear, matrix products, einsum, bilinear."""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional as F

from sfumato.errors import CoupledRecords
from sfumato.ghost import copies, indexing
from sfumato.ghost.functions import LinearFn
from sfumato.ghost.propagation import routing
from sfumato.ghost.rows import Rows
from sfumato.ghost.rules.elementwise import broadcast
from sfumato.ghost.rules.table import NoRule, rule

if TYPE_CHECKING:
    from sfumato.ghost.capture import Capture


def _tracked(c: "Capture", *values: object) -> bool:
    return any(c.target(v) is not None for v in values)


@rule("linear")
def linear(c: "Capture", input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    rows = c.tag(input)
    if bias is not None and bias.dim() > 1:
        return c.call(torch.add, c.call(F.linear, input, weight), bias)
    if not isinstance(rows, Rows):
        if rows is None and c.tag(weight) is None and bias is not None:
            return broadcast(c, "add", torch.add, (F.linear(input, weight), bias), {})
        raise NoRule("linear", "the input carries no record axis")
    if c.target(input) is not None or c.tag(weight) is not None:
        raise NoRule("linear", "the weight depends on the records")
    if rows.axis == input.dim() - 1:
        raise CoupledRecords("linear contracts the record axis, so every output mixes all records.", where=c.where())
    if weight.dim() == 1:
        if bias is not None:
            raise NoRule("linear", "vector weight with bias")
        out: Tensor = c.call(Tensor.squeeze, linear(c, input, c.derive("unsqueeze", weight, 0)), -1)
        return out
    use = c.use(rows, weight, bias)
    out = LinearFn.apply(input, weight.detach(), None if bias is None else bias.detach(), c.tape.anchor, use)  # type: ignore[no-untyped-call]
    return c.tagged(out, rows)


@rule("matmul", "mm", "mv", "bmm")
def matmul(c: "Capture", input: Tensor, other: Tensor) -> Tensor:
    if c.target(other) is not None and c.target(input) is None and other.dim() == 2 and input.dim() >= 2:
        return linear(c, input, c.derive("t", other))
    if c.target(other) is not None and c.target(input) is None and other.dim() == 1:
        out = linear(c, input, c.derive("unsqueeze", other, 0))
        return c.call(Tensor.squeeze, out, -1)
    if c.target(input) is not None and c.target(other) is None and input.dim() == 2 and other.dim() == 2:
        flipped = linear(c, c.call(Tensor.t, other), input)
        return c.call(Tensor.t, flipped)
    if _tracked(c, input) and _tracked(c, other):
        raise NoRule("matmul", "two parameters and records at once")
    # A batched product: the parameter is spread along the broadcast batch axes.
    tensor, on_left = (other, True) if c.target(input) is not None else (input, False)
    weight = input if on_left else other
    rows = c.tag(tensor)
    if isinstance(rows, Rows) and weight.dim() == tensor.dim() == 3 and rows.axis == (2 if on_left else 1):
        return _blocks(c, input, other, on_left)
    if not isinstance(rows, Rows) or weight.dim() < 2 or rows.axis >= tensor.dim() - 2:
        raise NoRule("matmul", "the record axis is a matrix axis")
    axis = rows.axis + max(weight.dim() - tensor.dim(), 0)
    each = copies.align(c, weight, rows.at(axis), max(tensor.dim(), weight.dim()))
    out = torch.matmul(each, tensor) if on_left else torch.matmul(tensor, each)
    return c.tagged(out, rows.at(axis))


def _blocks(c: "Capture", left: Tensor, right: Tensor, on_left: bool) -> Tensor:
    """A product for each slice of a stack of matrices, the records in every one (block-diagonal maps)."""
    if on_left:
        turned = _blocks(c, c.call(Tensor.transpose, right, 1, 2), c.derive("transpose", left, 1, 2), False)
        return c.call(Tensor.transpose, turned, 1, 2)
    count = max(left.shape[0], right.shape[0])
    xs, weights = (list(c.call(Tensor.unbind, t, 0)) * (count // max(1, t.shape[0])) for t in (left, right))
    out: Tensor = c.call(torch.stack, [c.call(torch.matmul, x, w) for x, w in zip(xs, weights, strict=True)])
    return out


@rule("rmatmul")
def rmatmul(c: "Capture", input: Tensor, other: Tensor) -> Tensor:
    return matmul(c, other, input)


@rule("addmm", "baddbmm", "addmv")
def addmm(c: "Capture", input: Tensor, mat1: Tensor, mat2: Tensor, *, beta: float = 1, alpha: float = 1) -> Tensor:
    product = c.call(torch.matmul, mat1, mat2)
    if alpha != 1:
        product = c.call(torch.mul, product, alpha)
    addend = input if beta == 1 else c.call(torch.mul, input, beta)
    out: Tensor = c.call(torch.add, product, addend)
    return out


def _size(letter: str, spec: str, x: Tensor) -> int:
    return x.shape[spec.index(letter)] if letter in spec else -1


@rule("einsum")
def einsum(c: "Capture", *args: Any) -> Tensor:
    parsed = indexing.einsum_letters(args)
    if parsed is None:
        raise NoRule("einsum", "sublist form")
    inputs, output, operands = parsed
    found = [(spec[r.axis], r) for spec, x in zip(inputs, operands, strict=True) if isinstance(r := c.tag(x), Rows)]
    tagged = dict(found)
    if len(tagged) != 1 or any(not r.same_owners(found[0][1]) for _, r in found):
        raise NoRule("einsum", "records on no axis or on two")
    letter, rows = next(((k, r) for k, r in found if r.arranged), found[0])
    if letter not in output:
        raise CoupledRecords(f"einsum {args[0]!r} sums over the record axis.", where=c.where())
    specs, values = [], []
    for spec, x in zip(inputs, operands, strict=True):
        if c.target(x) is not None:
            if letter in spec and x.shape[spec.index(letter)] != 1:
                x = copies.as_rows(c, x, rows.at(spec.index(letter)))
            else:
                x = x if letter not in spec else c.derive("squeeze", x, spec.index(letter))
                spec, x = letter + spec.replace(letter, ""), copies.spread_rows(c, x, rows)
        elif c.tag(x) is None and rows.arranged and not routing.indifferent(x, _size(letter, spec, x)):
            raise CoupledRecords("einsum joins constants to arranged rows by their place.", where=c.where())
        specs.append(spec)
        values.append(x)
    return c.tagged(torch.einsum(f"{','.join(specs)}->{output}", *values), rows.at(output.index(letter)))


@rule("bilinear")
def bilinear(c: "Capture", input1: Tensor, input2: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    pairs = c.call(torch.mul, c.call(Tensor.unsqueeze, input1, -1), c.call(Tensor.unsqueeze, input2, -2))
    flat = c.call(Tensor.flatten, pairs, -2)
    out: Tensor = c.call(F.linear, flat, c.call(Tensor.flatten, weight, 1), bias)
    return out
