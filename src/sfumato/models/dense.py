"""Models without convolutions: any record shape is flattened."""

from __future__ import annotations

import math

from torch import nn

HIDDEN = (128, 64)


def linear(input_shape: tuple[int, ...], classes: int) -> nn.Module:
    """Multinomial logistic regression, started at zero: the convex problem needs no random start."""
    layer = nn.Linear(math.prod(input_shape), classes)
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return nn.Sequential(nn.Flatten(), layer)


def mlp(input_shape: tuple[int, ...], classes: int) -> nn.Module:
    """Two hidden layers with tanh, which bounds activations and so gradients (Papernot et al. 2021)."""
    sizes = (math.prod(input_shape), *HIDDEN)
    layers: list[nn.Module] = [nn.Flatten()]
    for width, following in zip(sizes, HIDDEN, strict=False):
        layers += [nn.Linear(width, following), nn.Tanh()]
    return nn.Sequential(*layers, nn.Linear(HIDDEN[-1], classes))
