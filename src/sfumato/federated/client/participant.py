"""One participant: its data, its ledger and its own limit. Nothing here knows a server."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Subset, TensorDataset

from sfumato import _validate
from sfumato.accounting import Budget, Ledger
from sfumato.errors import ConfigurationError

Batch = tuple[Any, Any]


@dataclass(frozen=True)
class Stream:
    """Data that change from round to round: ``draw(round)`` gives the records of that round.

    ``round`` counts what the server asks, from 1: measures and a round that was lost in a crash have numbers of their
    own, so that it skips some; in one round it may be asked for twice and has to answer the same.
    ``disjoint`` declares that no record is in two rounds; rounds then compose in parallel within the client.
    """

    draw: Callable[[int], Dataset[Any]]
    disjoint: bool = True


class Client:
    """A participant.

    Args:
        id: its name in the federation; in its ledger, records under another name are others.
        data: its records, (input, target) pairs, or a :class:`Stream` of them.
        ledger: where it records what it spends (SampleLevel, LocalLevel): a path, an ``sf.Ledger``, None for memory.
        validation: records of its own that are never trained on, for measuring progress privately.
        epsilon: a limit of its own, below the federation's.
    """

    def __init__(
        self,
        id: str,
        data: Dataset[Any] | Stream,
        *,
        ledger: str | os.PathLike[str] | Ledger | None = None,
        validation: Dataset[Any] | None = None,
        epsilon: float | None = None,
    ):
        if not isinstance(id, str) or not id:
            raise ConfigurationError(f"id={id!r} is not a non-empty string.", found=id, where="id")
        if not isinstance(data, Stream) and (not hasattr(data, "__len__") or len(data) < 1):
            raise ConfigurationError(
                f"client {id!r} has no records, or an unknown number of them.",
                found=type(data).__name__,
                where="data",
                fix="leave it out, or give a map-style data set; for data that change, a Stream of them.",
            )
        if epsilon is not None:
            _validate.positive("epsilon", epsilon)
        self.id, self.data, self.validation, self.epsilon = id, data, validation, epsilon
        self._ledger = ledger
        self.done = False  # its budget allows nothing more
        self.share = 1.0  # of its budget, by what it has released

    @property
    def ledger(self) -> Ledger:
        """Opened when first asked for: a client that never answers needs none."""
        if not isinstance(self._ledger, Ledger):
            self._ledger = Ledger(self._ledger)
        return self._ledger

    def records(self, round: int) -> Dataset[Any]:
        """What it trains on in this round."""
        return self.data.draw(round) if isinstance(self.data, Stream) else self.data

    @property
    def fresh(self) -> bool:
        """Whether every round has records of its own, and so a budget of its own."""
        return isinstance(self.data, Stream) and self.data.disjoint

    def group(self, round: int) -> str:
        """The privacy group of these records in its ledger; validation records are a group apart."""
        return f"training, round {round}" if self.fresh else "training"

    def limit(self, budget: Budget | None, delta: float) -> Budget | None:
        """The smaller of the federation's limit and its own, which is for ``delta``."""
        if self.epsilon is None:
            return budget
        return Budget(self.epsilon if budget is None else min(self.epsilon, budget.epsilon), delta)

    def spent(self, delta: float) -> float:
        """ε of what its ledger holds already; one that is not there yet is not made."""
        if not isinstance(self._ledger, Ledger) and (self._ledger is None or not Path(self._ledger).exists()):
            return 0.0
        return float(self.ledger.epsilon(delta=delta))


def tensors(data: Any) -> tuple[Tensor, Tensor] | None:
    """All (inputs, targets) of a data set that holds them as two tensors; None otherwise."""
    if type(data) is Subset:
        held = tensors(data.dataset)
        rows = torch.as_tensor(data.indices)
        return None if held is None else (held[0][rows], held[1][rows])
    pair = data.tensors if type(data) is TensorDataset else (getattr(data, "x", None), getattr(data, "y", None))
    if len(pair) != 2:
        return None
    x, y = pair
    if not isinstance(x, Tensor) or not isinstance(y, Tensor):
        return None
    return (x, y) if len(x) == len(y) == len(data) else None


def batches(data: Any, batch_size: int, generator: torch.Generator) -> Iterator[Batch]:
    """One epoch in random order."""
    if (held := tensors(data)) is None:
        yield from DataLoader(data, batch_size, shuffle=True, generator=generator)
        return
    for rows in torch.randperm(len(held[1]), generator=generator).split(batch_size):
        yield held[0][rows], held[1][rows]
