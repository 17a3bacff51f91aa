"""Normalisation layers: the statistics run as they are, the affine part is elementwise."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional as F

from sfumato.errors import CoupledRecords, UnsupportedError
from sfumato.ghost.rules.table import SCREENS, rule

if TYPE_CHECKING:
    from sfumato.ghost.capture import Capture


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
            "instance_norm with track_running_stats=True writes statistics of private records into a buffer, "
            "un-noised.",
            where=c.where(),
            fix="build it with track_running_stats=False (sf.fix switches it off).",
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
            fix="replace it by GroupNorm (sf.fix does so), or put the layer in eval() mode.",
        )


SCREENS["batch_norm"] = _screen_batch_norm
SCREENS["instance_norm"] = _screen_instance_norm
