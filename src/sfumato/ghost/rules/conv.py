"""Convolutions of one to three dimensions, transposed or not."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from torch import Tensor
from torch.nn import functional as F

from sfumato.errors import CoupledRecords
from sfumato.ghost.functions import ConvFn
from sfumato.ghost.rows import Rows
from sfumato.ghost.rules.table import RULES, NoRule
from sfumato.terms import ConvSpec

if TYPE_CHECKING:
    from sfumato.ghost.capture import Capture


def _tuple(value: int | Sequence[int], n: int) -> tuple[int, ...]:
    return (int(value),) * n if isinstance(value, int) else tuple(int(v) for v in value) * (n if len(value) == 1 else 1)


def _conv(c: "Capture", x: Tensor, weight: Tensor, bias: Tensor | None, spec: ConvSpec) -> Tensor:
    rows = c.tag(x)
    if not isinstance(rows, Rows) or c.tag(weight) is not None:
        raise NoRule("convolution", "the input carries no record axis")
    if weight.is_complex():
        raise NoRule("convolution", "complex weights")
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
        return _conv(
            c, input, weight, bias, ConvSpec(_tuple(stride, n), _tuple(padding, n), dilations, False, (0,) * n, groups)
        )

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
        spec = ConvSpec(
            _tuple(stride, n), _tuple(padding, n), _tuple(dilation, n), True, _tuple(output_padding, n), groups
        )
        return _conv(c, input, weight, bias, spec)

    return conv_transpose


for _n in (1, 2, 3):
    RULES[f"conv{_n}d"] = _conv_rule(_n)
    RULES[f"conv_transpose{_n}d"] = _conv_transpose_rule(_n)
