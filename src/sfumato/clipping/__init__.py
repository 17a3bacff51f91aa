"""Squared per-sample norms to clip weights, and how the clip bound is chosen; nothing here draws noise."""

from sfumato.clipping.kinds import (
    Automatic,
    Clip,
    Flat,
    Grouped,
    PerLayer,
    chosen,
    group_of,
    groups_of,
    label,
    shares,
)
from sfumato.clipping.quantile import Quantile, gradient_multiplier, noisy_fraction, update
from sfumato.clipping.weighing import weights

__all__ = [
    "Automatic",
    "Clip",
    "Flat",
    "Grouped",
    "PerLayer",
    "Quantile",
    "chosen",
    "gradient_multiplier",
    "group_of",
    "groups_of",
    "label",
    "noisy_fraction",
    "shares",
    "update",
    "weights",
]
