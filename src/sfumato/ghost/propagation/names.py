"""Operation names: which are pointwise, which of those are linear, and the types that rules share."""

from collections.abc import Callable
from functools import cache
from typing import Any

import torch

from sfumato.ghost.rows import Tag

Lookup = Callable[[object], Tag | None]


Args = tuple[Any, ...]


Kwargs = dict[str, Any]


Rule = Callable[[str, Lookup, int, Args, Kwargs, Any], Any]


LIKE = {"zeros_like", "ones_like", "empty_like", "full_like", "rand_like", "randn_like", "randint_like"}
LIKE |= {"new_zeros", "new_ones", "new_empty", "new_full"}


_POINTWISE = set(
    "dropout alpha_dropout relu relu6 gelu silu elu leaky_relu hardtanh mish softplus hardswish hardsigmoid "
    "logsigmoid celu selu rrelu softsign tanhshrink threshold softshrink hardshrink to type type_as float double "
    "half bfloat16 long int bool contiguous clone detach data real cpu cuda masked_fill where nan_to_num "
    "requires_grad bernoulli positive rsub float_power fill zero copy div truediv floordiv floor_divide mod "
    "remainder iadd isub imul itruediv ne eq lt gt le ge and or xor invert neg abs pow rpow rtruediv radd rmul clip "
    "normal uniform feature_alpha_dropout dropout1d dropout2d dropout3d real imag polar complex conj "
    "resolve_conj resolve_neg isclose multiply divide subtract negative absolute greater greater_equal less less_equal "
    "not_equal log_sigmoid rdiv rfloordiv rmod".split()
)


ELEMENTWISE_LOSS = set(
    "mse_loss l1_loss smooth_l1_loss huber_loss binary_cross_entropy binary_cross_entropy_with_logits kl_div "
    "poisson_nll_loss gaussian_nll_loss soft_margin_loss".split()
)


# Linear in all their operands; in one operand at a time; and the latter whichever operand it is.
SUMMING = {"add", "sub", "rsub", "radd", "iadd", "isub", "neg", "sum", "stack", "cat", "view", "reshape", "squeeze"}
SUMMING |= {"to", "float", "double", "clone", "detach", "contiguous", "data", "mean", "unsqueeze", "copy"}
SCALES_EITHER = {"mul", "rmul", "imul"}
SCALINGS = SCALES_EITHER | {"div", "truediv", "itruediv"}


def clean(name: str) -> str:
    """``add_``, ``__radd__`` and ``add`` are one operation."""
    return name.strip("_")


@cache
def is_pointwise(name: str) -> bool:
    """One output element depends on the aligned input elements only."""
    if name in _POINTWISE:
        return True
    packet = getattr(torch.ops.aten, name, None)
    if packet is None or not hasattr(packet, "overloads"):
        return False
    return any(torch.Tag.pointwise in getattr(packet, o).tags for o in packet.overloads())
