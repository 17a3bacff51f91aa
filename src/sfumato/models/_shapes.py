"""Shapes that a stack of layers produces."""

from __future__ import annotations

import torch
from torch import nn

from ..errors import ConfigurationError


def require_image(name: str, input_shape: tuple[int, ...]) -> tuple[int, int, int]:
    """(channels, height, width), or a :class:`ConfigurationError` for records that are not images."""
    if len(input_shape) != 3:
        raise ConfigurationError(
            f"model {name} needs images (channels, height, width); these records have shape {input_shape}.",
            fix="use --model linear or --model mlp.",
        )
    channels, height, width = input_shape
    return channels, height, width


def flat_size(name: str, layers: nn.Module, input_shape: tuple[int, ...]) -> int:
    """Numbers per record that leave ``layers``; :class:`ConfigurationError` if the image is too small for them."""
    try:
        with torch.no_grad():
            return int(layers(torch.zeros(1, *input_shape)).numel())
    except RuntimeError:
        raise ConfigurationError(
            f"model {name} needs larger images than {input_shape}.", fix="use --model cnn, linear or mlp."
        ) from None
