"""Defaults of a federation, by whose privacy is protected: the one place where its hyperparameters live.

Those of digits were chosen on a held-out part of the training records, over several divisions, never on the test
records. Bounds and learning rates follow the numbers of clients and records and the budget, which are all public.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType

# Steps are as long as the noise allows: it is shorter with more clients, with more records and with a larger ε.
NORM = 0.0008  # of an update, per client and ε, when a server sums
LOCAL_NORM = 0.0005  # per ε and √clients, when every client adds its own noise
LEARNING_RATE = 0.0043  # under sample level, per ε, record and 1/√clients


@dataclass(frozen=True)
class FederatedRecipe:
    """``norm``: bound on a record's gradient (sample) or on a client's update; ``batch_size``: at a client;
    ``pretrain_steps``: on the public part, before the first round, at learning rate ``pretrain_lr``."""

    model: str
    rounds: int
    cohort: str
    server: str
    server_lr: float
    local_epochs: int
    batch_size: int
    lr: float
    norm: float
    pretrain_steps: int = 300
    pretrain_lr: float = 0.03


_SAMPLE = FederatedRecipe(
    model="mlp", rounds=10, cohort="poisson:1", server="average", server_lr=1.0, local_epochs=1, batch_size=64,
    lr=2.0, norm=0.3,
)  # fmt: skip
_CLIENT = FederatedRecipe(
    model="mlp", rounds=20, cohort="poisson:1", server="average", server_lr=1.0, local_epochs=1, batch_size=8,
    lr=0.5, norm=0.8,
)  # fmt: skip
GENERAL: Mapping[str, FederatedRecipe] = MappingProxyType(
    {
        "sample": _SAMPLE,
        "client": _CLIENT,
        "local": replace(_CLIENT, rounds=3),
        "distributed": _CLIENT,
    }
)
MODELS: Mapping[str, str] = MappingProxyType({"digits": "energy", "fashion-mnist": "scattering"})


def federated_recipe(
    name: str, input_shape: tuple[int, ...], level: str, *, clients: int, records: int, epsilon: float | None
) -> FederatedRecipe:
    """The recipe of a level, with the model that goes with the data, and with steps that go with the noise."""
    found, spent = GENERAL[level], 1.0 if epsilon is None else epsilon
    if name == "digits":
        found = replace(found, pretrain_lr=0.01, lr=5.0 if level == "sample" else found.lr)
    if level == "sample":
        found = replace(found, lr=min(found.lr, LEARNING_RATE * spent * records / math.sqrt(clients)))
    else:
        share = LOCAL_NORM * math.sqrt(clients) if level == "local" else NORM * clients
        found = replace(found, norm=min(found.norm, share * spent))
    if name in MODELS:
        return replace(found, model=MODELS[name])
    return replace(found, model="cnn") if len(input_shape) == 3 else found
