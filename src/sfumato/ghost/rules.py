"""One rule for each operation in which a parameter meets records.

A rule has the signature of the torch function it stands for (after ``c``, the capture), so positional and keyword
calls bind alike. Operations without a rule of their own go through ``broadcast``: the parameter is spread, one copy
for each record, and the operation runs as it is. ``NoRule`` sends the module down the fallback ladder.
"""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional as F

from sfumato.errors import CoupledRecords, UnsupportedError
from sfumato.ghost import indexing
from sfumato.ghost.functions import ConvFn, EmbeddingFn, LinearFn, Use
from sfumato.ghost.rows import Rows
from sfumato.terms import ConvSpec

if TYPE_CHECKING:
    from sfumato.ghost.capture import Capture


class NoRule(Exception):
    """Internal: this operation needs a lower tier."""

    def __init__(self, operation: str, why: str):
        super().__init__(f"{operation}: {why}")
        self.operation, self.why = operation, why


RULES: dict[str, Callable[..., Any]] = {}


def rule(*names: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    def register(fn: Callable[..., Any]) -> Callable[..., Any]:
        for name in names:
            RULES[name] = fn
        return fn

    return register


def _tracked(c: "Capture", *values: object) -> bool:
    return any(c.target(v) is not None for v in values)


@rule("linear")
def linear(c: "Capture", input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    rows = c.tag(input)
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
        return linear(c, input, c.derive("unsqueeze", weight, 0)).squeeze(-1)
    use = c.use(rows, weight, bias)
    out: Tensor = LinearFn.apply(input, weight.detach(), None if bias is None else bias.detach(), c.tape.anchor, use)  # type: ignore[no-untyped-call]
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
    if not isinstance(rows, Rows) or weight.dim() < 2 or rows.axis >= tensor.dim() - 2:
        raise NoRule("matmul", "the record axis is a matrix axis")
    axis = rows.axis + max(weight.dim() - tensor.dim(), 0)
    copies = c.spread_along(weight, rows, max(tensor.dim(), weight.dim()), axis)
    out = torch.matmul(copies, tensor) if on_left else torch.matmul(tensor, copies)
    return c.tagged(out, rows.at(axis))


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


@rule("einsum")
def einsum(c: "Capture", *args: Any) -> Tensor:
    parsed = indexing.einsum_letters(args)
    if parsed is None:
        raise NoRule("einsum", "ellipsis or sublist form")
    inputs, output, operands = parsed
    tagged = {spec[r.axis]: r for spec, x in zip(inputs, operands, strict=True) if isinstance(r := c.tag(x), Rows)}
    if len(tagged) != 1:
        raise NoRule("einsum", "records on no axis or on two")
    letter, rows = next(iter(tagged.items()))
    if letter not in output:
        raise CoupledRecords(f"einsum {args[0]!r} sums over the record axis.", where=c.where())
    specs, values = [], []
    for spec, x in zip(inputs, operands, strict=True):
        if c.target(x) is not None:
            if letter in spec:
                raise NoRule("einsum", "a parameter already has the record axis")
            spec, x = letter + spec, c.spread_rows(x, rows)
        elif c.tag(x) is None and letter in spec:
            raise NoRule("einsum", "a constant has the record axis")
        specs.append(spec)
        values.append(x)
    return c.tagged(torch.einsum(f"{','.join(specs)}->{output}", *values), rows.at(output.index(letter)))


@rule("bilinear")
def bilinear(c: "Capture", input1: Tensor, input2: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    if input1.dim() != 2:
        raise NoRule("bilinear", "more than two axes")
    out: Tensor = c.call(torch.einsum, "bi,oij,bj->bo", input1, weight, input2)
    return out if bias is None else c.call(torch.add, out, bias)


def _tuple(value: int | Sequence[int], n: int) -> tuple[int, ...]:
    return (int(value),) * n if isinstance(value, int) else tuple(int(v) for v in value) * (n if len(value) == 1 else 1)


def _conv(c: "Capture", x: Tensor, weight: Tensor, bias: Tensor | None, spec: ConvSpec) -> Tensor:
    rows = c.tag(x)
    if not isinstance(rows, Rows) or c.tag(weight) is not None:
        raise NoRule("convolution", "the input carries no record axis")
    if x.dim() == weight.dim() - 1:  # an unbatched image
        raise NoRule("convolution", "unbatched image")
    if rows.axis != 0:
        raise CoupledRecords("convolution over the record axis mixes records.", where=c.where())
    use = c.use(rows, weight, bias)
    flat_bias = None if bias is None else bias.detach()
    out: Tensor = ConvFn.apply(x, weight.detach(), flat_bias, c.tape.anchor, spec, use)  # type: ignore[no-untyped-call]
    return c.tagged(out, rows)


def _conv_rule(n: int) -> Callable[..., Tensor]:
    def conv(
        c: "Capture",
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        stride: int | Sequence[int] = 1,
        padding: int | Sequence[int] | str = 0,
        dilation: int | Sequence[int] = 1,
        groups: int = 1,
    ) -> Tensor:
        dilations = _tuple(dilation, n)
        if isinstance(padding, str):
            if padding == "same":
                total = [d * (k - 1) for d, k in zip(dilations, weight.shape[2:], strict=True)]
                amounts = [v for t in reversed(total) for v in (t // 2, t - t // 2)]
                input = c.call(F.pad, input, amounts)
            padding = 0
        return _conv(c, input, weight, bias, ConvSpec(_tuple(stride, n), _tuple(padding, n), dilations, False, (0,) * n, groups))

    return conv


def _conv_transpose_rule(n: int) -> Callable[..., Tensor]:
    def conv_transpose(
        c: "Capture",
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        stride: int | Sequence[int] = 1,
        padding: int | Sequence[int] = 0,
        output_padding: int | Sequence[int] = 0,
        groups: int = 1,
        dilation: int | Sequence[int] = 1,
    ) -> Tensor:
        spec = ConvSpec(_tuple(stride, n), _tuple(padding, n), _tuple(dilation, n), True, _tuple(output_padding, n), groups)
        return _conv(c, input, weight, bias, spec)

    return conv_transpose


for _n in (1, 2, 3):
    RULES[f"conv{_n}d"] = _conv_rule(_n)
    RULES[f"conv_transpose{_n}d"] = _conv_transpose_rule(_n)


@rule("embedding")
def embedding(
    c: "Capture",
    input: Tensor,
    weight: Tensor,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Tensor:
    if max_norm is not None:
        raise UnsupportedError(
            f"Embedding with max_norm={max_norm} rewrites rows that the records use, without noise.",
            where=c.where(),
            fix="drop max_norm.",
        )
    if scale_grad_by_freq:
        raise CoupledRecords(
            "Embedding with scale_grad_by_freq=True scales one record's gradient by how often others use the word.",
            where=c.where(),
            fix="drop scale_grad_by_freq.",
        )
    rows = c.tag(input)
    if not isinstance(rows, Rows) or c.target(weight) is None:
        raise NoRule("embedding", "the index carries no record axis")
    pad = None if padding_idx is None or padding_idx < -weight.shape[0] else padding_idx % weight.shape[0]
    use = c.use(rows, weight, None)
    out: Tensor = EmbeddingFn.apply(input, weight.detach(), c.tape.anchor, pad, use)  # type: ignore[no-untyped-call]
    return c.tagged(out, rows)


def _affine(c: "Capture", x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    if weight is not None:
        x = c.call(torch.mul, x, weight)
    return x if bias is None else c.call(torch.add, x, bias)


@rule("layer_norm")
def layer_norm(
    c: "Capture",
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    cudnn_enable: bool = True,
) -> Tensor:
    return _affine(c, c.call(F.layer_norm, input, normalized_shape, None, None, eps), weight, bias)


@rule("rms_norm")
def rms_norm(
    c: "Capture", input: Tensor, normalized_shape: Sequence[int], weight: Tensor | None = None, eps: float | None = None
) -> Tensor:
    return _affine(c, c.call(F.rms_norm, input, normalized_shape, None, eps), weight, None)


def _per_channel(c: "Capture", p: Tensor | None, x: Tensor) -> Tensor | None:
    return None if p is None else c.derive("reshape", p, (-1, *[1] * (x.dim() - 2)))


@rule("group_norm")
def group_norm(
    c: "Capture",
    input: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    cudnn_enabled: bool = True,
) -> Tensor:
    x = c.call(F.group_norm, input, num_groups, None, None, eps)
    return _affine(c, x, _per_channel(c, weight, x), _per_channel(c, bias, x))


@rule("instance_norm")
def instance_norm(
    c: "Capture",
    input: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
    cudnn_enabled: bool = True,
) -> Tensor:
    x = c.call(F.instance_norm, input, running_mean, running_var, None, None, use_input_stats, momentum, eps)
    return _affine(c, x, _per_channel(c, weight, x), _per_channel(c, bias, x))


@rule("batch_norm")
def batch_norm(
    c: "Capture",
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    x = c.call(F.batch_norm, input, running_mean, running_var, None, None, False, momentum, eps)
    return _affine(c, x, _per_channel(c, weight, x), _per_channel(c, bias, x))


@rule("prelu")
def prelu(c: "Capture", input: Tensor, weight: Tensor) -> Tensor:
    shaped = weight if weight.numel() == 1 else c.derive("reshape", weight, (-1, *[1] * (input.dim() - 2)))
    negative = c.call(torch.mul, c.call(torch.clamp_max, input, 0), shaped)
    return c.call(torch.add, c.call(torch.clamp_min, input, 0), negative)


@rule("cat", "concat", "concatenate")
def cat(c: "Capture", tensors: Sequence[Tensor], dim: int = 0, *, axis: int | None = None) -> Tensor:
    return _joined(c, torch.cat, tensors, dim if axis is None else axis)


@rule("stack")
def stack(c: "Capture", tensors: Sequence[Tensor], dim: int = 0) -> Tensor:
    return _joined(c, torch.stack, tensors, dim)


def _joined(c: "Capture", op: Callable[..., Tensor], parts: Sequence[Tensor], dim: int) -> Tensor:
    rows = [r for p in parts if isinstance(r := c.tag(p), Rows)]
    if not rows or any(r.axis != rows[0].axis or not r.same_owners(rows[0]) for r in rows):
        raise NoRule("cat", "records on no axis or on different ones")
    if op is torch.cat and dim % parts[0].dim() == rows[0].axis:
        raise NoRule("cat", "a parameter would become a record of its own")
    joined = [c.as_rows(p, rows[0]) if c.target(p) is not None else p for p in parts]
    out: Tensor = c.call(op, joined, dim)
    return out


@rule("getitem")
def getitem(c: "Capture", input: Tensor, index: Any) -> Tensor:
    if isinstance(index, Tensor) and index.dtype == torch.long and input.dim() == 2 and c.tag(input) is None:
        return embedding(c, index, input)
    raise NoRule("getitem", "a parameter indexed by records")


@rule("setitem")
def setitem(c: "Capture", input: Tensor, index: Any, value: Tensor) -> None:
    if c.target(input) is not None:
        raise NoRule("setitem", "records written into a parameter")
    region = c.call(Tensor.__getitem__, input, index)
    rows = c.tag(region)
    if not isinstance(rows, Rows):
        raise NoRule("setitem", "the region written to carries no record axis")
    Tensor.__setitem__(input, index, c.align(value, rows, region.dim()))


@rule("dropout", "expand", "to")
def _no_records(c: "Capture", *args: Any, **kwargs: Any) -> Any:
    raise NoRule("dropout", "unexpected operand")


def broadcast(c: "Capture", name: str, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Any broadcasting elementwise operation: parameters are spread along the record axis of the result."""
    operands = list(indexing.tensors(args, kwargs))
    ndim = max(t.dim() for t in operands)
    found = [r.at(r.axis + ndim - t.dim()) for t in operands if isinstance(r := c.tag(t), Rows)]
    if len(found) < sum(c.tag(t) is not None for t in operands):
        mixed = next(t for t in operands if c.tag(t) is not None and not isinstance(c.tag(t), Rows))
        c.refuse_mixed(name, c.tag(mixed))
    if any(f.axis != found[0].axis or not f.same_owners(found[0]) for f in found) and c.records != 1:
        raise CoupledRecords(f"{name} combines different records of the batch.", where=c.where())
    rows = found[0]
    if name.endswith("_") and not name.startswith("_") and c.target(args[0]) is not None:
        raise NoRule(name, "records written into a parameter")

    def swap(value: Any) -> Any:
        if isinstance(value, Tensor) and c.target(value) is not None:
            return c.align(value, rows, ndim)
        return type(value)(swap(v) for v in value) if isinstance(value, (list, tuple)) else value

    out = func(*(swap(a) for a in args), **{k: swap(v) for k, v in kwargs.items()})
    return c.tagged(out, rows)


def _screen_instance_norm(
    c: "Capture",
    input: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    use_input_stats: bool = True,
    *rest: Any,
    **named: Any,
) -> None:
    if running_mean is not None and use_input_stats:
        raise UnsupportedError(
            "instance_norm with track_running_stats=True writes statistics of private records into a buffer, un-noised.",
            where=c.where(),
            fix="build it with track_running_stats=False.",
        )


def _screen_batch_norm(
    c: "Capture",
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    *rest: Any,
    **named: Any,
) -> None:
    if training or running_mean is None:
        raise CoupledRecords(
            "BatchNorm normalises each record by statistics of the whole batch, so clipping cannot bound one record's "
            "influence.",
            where=c.where(),
            fix="replace it by GroupNorm, or put the layer in eval() mode.",
        )


# Operations that are refused by their arguments, whether or not they hold parameters.
SCREENS: dict[str, Callable[..., None]] = {"batch_norm": _screen_batch_norm, "instance_norm": _screen_instance_norm}
