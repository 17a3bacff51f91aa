"""Averages of released parameters: post-processing, so they cost no privacy."""

from __future__ import annotations

from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from .settings import parse_averaging


class Average:
    """Follows ``model`` after each release; :attr:`model` is what to evaluate and to save.

    Create it before the model is made private: it keeps a plain copy.
    """

    def __init__(self, model: nn.Module, averaging: str):
        kind, value = parse_averaging(averaging)
        self._live = model
        self._start = 1.0 - value if kind == "last" else 0.0
        self._copy: AveragedModel | None = None
        if kind == "ema":
            self._copy = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(value), use_buffers=True)
        elif kind == "last":
            self._copy = AveragedModel(model, use_buffers=False)

    def update(self, done: float) -> None:
        """Take in the current parameters; ``done`` is the part of the planned steps that has been released."""
        if self._copy is not None and done >= self._start:
            self._copy.update_parameters(self._live)

    @property
    def model(self) -> nn.Module:
        """The average, or the model itself while there is none."""
        if self._copy is None or int(self._copy.n_averaged) == 0:
            return self._live
        return self._copy.module
