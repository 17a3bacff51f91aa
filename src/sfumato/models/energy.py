"""Pixels and oriented edge energy, under one trained linear layer: for very small images."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import ConfigurationError
from ._shapes import flat_size, require_image
from .dense import linear
from .features import Features
from .filters import morlet_bank

ORIENTATIONS = 8
FILTER_SIZE = 5


def energy(input_shape: tuple[int, ...], classes: int) -> nn.Module:
    """1,930 trained parameters for 8 x 8 grey images and 10 classes."""
    channels, height, width = require_image("energy", input_shape)
    if channels != 1 or min(height, width) < 4:
        raise ConfigurationError(
            f"model energy needs grey images of 4 x 4 or more; these have shape {input_shape}.",
            fix="use --model cnn, linear or mlp.",
        )
    features = OrientedEnergy(ORIENTATIONS)
    return Features(features, linear((flat_size("energy", features, input_shape),), classes))


class OrientedEnergy(nn.Module):
    """(B, 1, h, w) -> (B, h w + L h/2 w/2): standardised pixels, and pooled, standardised moduli of Morlet responses.

    Both are standardised within each record, so no statistic crosses records.
    """

    filters: Tensor

    def __init__(self, orientations: int):
        super().__init__()
        self.orientations = orientations
        self.register_buffer("filters", morlet_bank(0, orientations, FILTER_SIZE))

    def forward(self, x: Tensor) -> Tensor:
        y = F.conv2d(x, self.filters, padding=FILTER_SIZE // 2)
        y = y.view(len(x), self.orientations, 2, *x.shape[2:])
        y = F.avg_pool2d((y.square().sum(2) + 1e-12).sqrt(), 4, 2, padding=1)
        pixels, moduli = F.layer_norm(x, x.shape[1:]), F.group_norm(y, 1)
        return torch.cat([pixels.flatten(1), moduli.flatten(1)], 1)
