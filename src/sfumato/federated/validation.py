"""Progress on validation records, measured privately: one more vector that is summed and charged like an update."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from sfumato import _validate
from sfumato.errors import ConfigurationError

from .client.participant import tensors
from .wire.schema import Schema

MEASURE = Schema((("correct", ()), ("records", ())))
CHUNK = 4096


@dataclass(frozen=True)
class Validation:
    """Accuracy of the global model every ``every`` rounds, and when to stop because of it.

    Training ends when no measure of the last ``patience`` was more than ``min_delta`` above the best one before.

    Args:
        noise_multiplier: of the measure. Correct answers and records are released together with this much noise, in
            units of √2 a record (SampleLevel; validation records are a privacy group apart, which pays for nothing
            else) or of a client's whole vote (the other units; it is charged beside the rounds).
        public: measured on public records instead, which costs nothing.
    """

    noise_multiplier: float = 5.0
    every: int = 1
    patience: int | None = 5
    min_delta: float = 0.0
    public: Dataset[tuple[Tensor, Tensor]] | None = None

    def __post_init__(self) -> None:
        _validate.positive("noise_multiplier", self.noise_multiplier)
        _validate.count("every", self.every)
        if self.patience is not None:
            _validate.count("patience", self.patience)
        _validate.non_negative("min_delta", self.min_delta)
        if self.public is not None and tensors(self.public) is None:
            raise ConfigurationError("public validation records must be two tensors.", where="public")

    def times(self, rounds: int) -> int:
        """Charged measures in so many rounds."""
        return 0 if self.public is not None else rounds // self.every

    def accuracy(self, model: nn.Module) -> float:
        """Share of the public records that ``model`` classifies right."""
        held = tensors(self.public)
        assert held is not None
        return correct(model, *held) / len(held[1])

    def converged(self, measures: Sequence[float]) -> bool:
        """Whether these measures, oldest first, say that training may end."""
        if self.patience is None or len(measures) <= self.patience:
            return False
        return max(measures[-self.patience :]) <= max(measures[: -self.patience]) + self.min_delta


def correct(model: nn.Module, x: Tensor, y: Tensor) -> int:
    """Records that the model classifies right, in evaluation mode.

    Raises ``ConfigurationError`` unless the model gives scores of classes, (n, K), itself or as ``logits``, and ``y``
    (n,) their numbers: whatever else is compared, the share would mean nothing.
    """
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            parts = zip(x.split(CHUNK), y.split(CHUNK), strict=True)
            return sum(int((_scores(model(a), b).argmax(-1) == b).sum()) for a, b in parts)
    finally:
        model.train(training)


def _scores(found: object, y: Tensor) -> Tensor:
    scores = found if isinstance(found, Tensor) else getattr(found, "logits", None)
    # With more than one answer a record, or (n,) against (n, 1), one record would move the count by more than 1.
    shaped = isinstance(scores, Tensor) and scores.ndim == 2 and y.shape == (len(scores),)
    if not isinstance(scores, Tensor) or not shaped or y.is_floating_point():
        raise ConfigurationError(
            "progress is measured as the share of records that are classified right, which needs scores (n, K) from "
            f"the model and class numbers (n,); got {type(found).__name__} and targets {tuple(y.shape)} of {y.dtype}.",
            where="validation",
            fix="leave validation out, or measure in on_round.",
        )
    return scores


def share(released: Tensor) -> float:
    """Accuracy from the released (correct, records); noise may make it leave [0, 1], or leave nothing to divide by."""
    right, records = released.double().tolist()
    return min(1.0, max(0.0, right / records)) if records > 0 else 0.0
