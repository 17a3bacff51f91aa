"""Defaults per data set: the one place where hyperparameters live.

Every recipe was chosen on a held-out part of the training records, never on the test records; how, and what it
reaches, stands in the README.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType


@dataclass(frozen=True)
class Recipe:
    """``averaging``: "none", "ema:DECAY" or "last:FRACTION" of the released parameters, free post-processing;
    ``lr_schedule``: "constant", "linear" or "cosine" (both to zero) over the planned steps."""

    model: str
    epochs: int
    batch_size: int
    lr: float
    max_grad_norm: float
    optimizer: str = "sgd"
    momentum: float = 0.9
    lr_schedule: str = "constant"
    averaging: str = "none"
    max_physical_batch_size: int | None = None


GENERAL = Recipe(
    model="mlp", epochs=30, batch_size=256, lr=1.0, max_grad_norm=1.0, lr_schedule="linear",
    max_physical_batch_size=4096,
)  # fmt: skip
RECIPES: Mapping[str, Recipe] = MappingProxyType(
    {
        "digits": Recipe(model="energy", epochs=28, batch_size=512, lr=0.2, max_grad_norm=1.0),
        "fashion-mnist": Recipe(
            model="scattering", epochs=37, batch_size=8192, lr=12.0, max_grad_norm=0.1, averaging="last:0.3"
        ),
    }
)
GENERAL_IMAGES = Recipe(
    model="cnn", epochs=30, batch_size=256, lr=1.0, max_grad_norm=1.0, lr_schedule="linear",
    max_physical_batch_size=1024,
)  # fmt: skip


def recipe_for(name: str, input_shape: tuple[int, ...]) -> Recipe:
    """The recipe of a known data set, or the general one for images or for rows."""
    return RECIPES.get(name, GENERAL_IMAGES if len(input_shape) == 3 else GENERAL)
