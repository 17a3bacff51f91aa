"""A small convolutional network for images of any size from 4 x 4."""

from __future__ import annotations

from torch import nn

from ._shapes import flat_size, require_image

WIDTHS = (16, 32)
GROUPS = 4


def cnn(input_shape: tuple[int, ...], classes: int) -> nn.Module:
    """Convolution, group norm, ReLU, pooling, twice, then one linear layer.

    Group norm works within a record; batch norm would couple the records and void the guarantee.
    """
    channels, _, _ = require_image("cnn", input_shape)
    layers: list[nn.Module] = []
    for width in WIDTHS:
        layers += [nn.Conv2d(channels, width, 3, padding=1), nn.GroupNorm(GROUPS, width), nn.ReLU(), nn.MaxPool2d(2)]
        channels = width
    features = nn.Sequential(*layers, nn.Flatten())
    return nn.Sequential(*features, nn.Linear(flat_size("cnn", features, input_shape), classes))
