"""Clients that say exactly what a test wants, and small federations of real ones."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

from sfumato.federated.transport import Transport
from sfumato.federated.wire.messages import Reply, Task

Says = Callable[[Task, str], Any]


class Scripted(Transport):
    """``says[client](task, client)`` is a reply, several of them, an exception to raise, or None for no reply."""

    def __init__(self, says: Mapping[str, Says]) -> None:
        self.says = dict(says)
        self.tasks: list[Task] = []
        self.asked: list[tuple[str, ...]] = []
        self.before: Callable[[Task, Sequence[str]], None] | None = None

    def clients(self) -> Sequence[str]:
        """Everybody."""
        return tuple(self.says)

    def ask(self, task: Task, ids: Sequence[str], *, deadline: float | None) -> Iterator[Reply]:
        """Whatever the script says, in order."""
        self.tasks.append(task)
        self.asked.append(tuple(ids))
        if self.before is not None:
            self.before(task, ids)
        for name in ids:
            found = self.says[name](task, name)
            yield from found if isinstance(found, list) else [] if found is None else [found]

    def close(self) -> None:
        """Nothing is open."""


def reply(task: Task, client: str, vector: Any = None, **changes: Any) -> Reply:
    """An honest reply with this vector (float32), then with ``changes``."""
    arrays = {} if vector is None else {"values": np.asarray(vector, dtype=np.float32)}
    honest = Reply(client, task.run, task.round, task.nonce, task.base, task.schema, arrays)
    return replace(honest, **changes)


def constant(vector: Any) -> Says:
    """A client that always answers this."""
    return lambda task, client: reply(task, client, vector)


def records(n: int = 20, d: int = 3, classes: int = 2, seed: int = 0) -> TensorDataset:
    """(x, y) with something to learn in them."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(n, d, generator=g)
    w = torch.randn(d, classes, generator=torch.Generator().manual_seed(99))
    return TensorDataset(x, (x @ w + 0.3 * torch.randn(n, classes, generator=g)).argmax(1))


def federation(k: int = 4, **kwargs: Any) -> dict[str, TensorDataset]:
    """k clients with different records."""
    return {f"c{i}": records(seed=i, **kwargs) for i in range(k)}


def linear(d: int = 3, classes: int = 2) -> nn.Module:
    """A small model, always the same."""
    with torch.random.fork_rng():
        torch.manual_seed(5)
        return nn.Linear(d, classes)


@pytest.fixture
def fed() -> SimpleNamespace:
    """The helpers above."""
    return SimpleNamespace(
        Scripted=Scripted, reply=reply, constant=constant, records=records, federation=federation, linear=linear
    )
