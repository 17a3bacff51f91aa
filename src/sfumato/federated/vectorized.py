"""The clients of one process, many at a time. A small network spends its time between operations and not in them, so
that a step for a hundred clients at once costs little more than a step for a few."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

import torch
from torch.utils.data import TensorDataset

from sfumato import _validate
from sfumato.errors import ConfigurationError

from .client.live import Live
from .client.local import LocalTraining, Loss, plain
from .client.participant import Client, Stream, tensors
from .client.stacked import Records, activations, train
from .client.worker import Worker
from .transport import InProcess
from .units import SampleLevel
from .wire.messages import Reply, Task

LOG = logging.getLogger("sfumato")
PROBED = 4  # clients whose records are used to find out whether training them together is exact
LARGEST = 1 << 15  # trained numbers; above, memory traffic takes more time than operations save
CLOSE = 1e-3  # of the largest number of an update; what rounding does is far below, what is wrong far above


class Vectorized:
    """:class:`.transport.InProcess` for small models.

    Guarantee: replies are those of ``InProcess(worker, clients)`` up to rounding (batches, order and seeds are the
    same), and what leaves a client is bounded, noised and charged by the same code, client by client.

    It is for records held as two tensors, a model without dropout that gives one tensor, and a loss that is the mean
    over records. On first use some records are trained on both ways; where the results differ, or ``torch.vmap`` cannot
    do it, a warning says so, and ``InProcess`` does everything. It also does clients whose records are no tensors.
    Clients of unequal size are padded, and padding weighs 0.

    Args:
        memory: bytes that the stacked models, gradients, activations and records may take; more clients at once.

    Raises ``ConfigurationError`` under SampleLevel.
    """

    def __init__(self, worker: Worker, clients: Mapping[str, Client], *, memory: int = 1 << 26):
        if isinstance(worker.unit, SampleLevel):
            raise ConfigurationError(
                "vectorize=True is for plain local training; DP-SGD draws and charges batches client by client.",
                found=worker.unit,
                where="vectorize",
                fix="leave vectorize out.",
            )
        self.worker, self.memory = worker, _validate.count("memory", memory)
        self._loop, self._clients = InProcess(worker, clients), dict(clients)
        self._probed: dict[object, int | None] = {}

    def clients(self) -> Sequence[str]:
        """The ids that were given."""
        return self._loop.clients()

    def close(self) -> None:
        """Nothing is open."""

    def ask(self, task: Task, ids: Sequence[str], *, deadline: float | None) -> Iterator[Reply]:
        """See :class:`.transport.Transport`. Who is trained together is never late: a client with many records would
        decide whether the others are heard. Clients trained alone have a clock each, as in ``InProcess``.
        """
        alone = list(ids)
        if task.kind == "train":
            alone = []
            for chunk in self._chunks(task, ids, alone):
                yield from self._together(task, chunk, alone)
        yield from self._loop.ask(task, alone, deadline=deadline)

    def _chunks(self, task: Task, ids: Sequence[str], alone: list[str]) -> Iterator[dict[str, Records]]:
        """Clients to be trained together, the largest first; the others are added to ``alone``."""
        waiting: dict[object, dict[str, Records]] = {}
        for name in sorted(ids, key=self._size, reverse=True):
            records = self._records(task, self._clients[name])
            if records is None:
                alone.append(name)
                continue
            kind = records.kind, None if task.index is None else task.index.tobytes()
            chunk = waiting.setdefault(kind, {})
            chunk[name] = records
            if kind not in self._probed and len(chunk) == PROBED:
                self._probed[kind] = self._probe(task, list(chunk.values()))
            if kind in self._probed and len(chunk) >= self._most(kind, next(iter(chunk.values()))):
                yield waiting.pop(kind)
        for left, chunk in waiting.items():
            if left not in self._probed and len(chunk) > 1:
                self._probed[left] = self._probe(task, list(chunk.values()))
            yield chunk

    def _together(self, task: Task, chunk: dict[str, Records], alone: list[str]) -> Iterator[Reply]:
        first = next(iter(chunk.values()))
        if len(chunk) == 1 or self._probed[first.kind, None if task.index is None else task.index.tobytes()] is None:
            alone += chunk
            return
        self.worker.load(task)
        try:
            updates = train(self.worker.live, list(chunk.values()), self.worker.local, self.worker.loss)
        except Exception as error:  # noqa: BLE001  # the fault of one client, and the loop says of which
            LOG.warning("vectorize: %d clients are trained one by one: %s", len(chunk), error)
            alone += chunk
            return
        for name, update in zip(chunk, updates, strict=True):
            yield self.worker.answer(task, self._clients[name], update)

    def _size(self, name: str) -> int:
        data = self._clients[name].data
        return 0 if isinstance(data, Stream) else len(data)

    def _records(self, task: Task, client: Client) -> Records | None:
        try:
            held = tensors(client.records(task.round))
        except Exception:  # noqa: BLE001  # it happens again in the loop, which reports it
            return None
        return None if held is None or len(held[1]) == 0 else Records(*held, self.worker.order(task, client))

    def _most(self, kind: object, largest: Records) -> int:
        """How many clients fit into the memory."""
        taken = self._probed[kind]
        if taken is None:
            return 1
        local = self.worker.local
        places = local.count(len(largest)) * min(local.batch_size, len(largest))
        return max(1, self.memory // (taken + largest.x.nbytes + largest.y.nbytes + 24 * places))

    def _probe(self, task: Task, some: Sequence[Records]) -> int | None:
        """Bytes for one client, without its records; None if clients cannot be trained together."""
        self.worker.load(task)
        if (size := sum(p.numel() for p in self.worker.live.active)) > LARGEST:
            LOG.info("vectorize: clients are trained one by one, which is faster for %d numbers", size)
            return None
        try:
            taken = probe(self.worker.live, some[:PROBED], self.worker.local, self.worker.loss)
        except Exception as error:  # noqa: BLE001  # whatever vmap cannot do, or a client's records
            LOG.warning("vectorize: clients are trained one by one, for vmap cannot do it: %s", error)
            return None
        if taken is None:
            LOG.warning(
                "vectorize: clients are trained one by one, for together the result is another: the loss is not the "
                "mean over records, or a record's output depends on other records."
            )
        return taken


def probe(live: Live, some: Sequence[Records], local: LocalTraining, loss: Loss) -> int | None:
    """Train on records of ``some`` clients both ways: bytes for one client, or None where the results differ."""
    share = -(-local.batch_size // len(some))
    x, y = torch.cat([c.x[:share] for c in some]), torch.cat([c.y[:share] for c in some])
    x = x.nan_to_num(0.0, 0.0, 0.0)  # one client's broken records must not decide for all
    short = replace(local, epochs=None, steps=2, batch_size=max(2, len(y)))
    whole, half = Records(x, y, 0), Records(x[: -(-len(y) // 2)], y[: -(-len(y) // 2)], 1)
    base = live.flat.clone()
    wanted = {}
    for records in (whole, half):
        live.load(base)
        plain(live, TensorDataset(records.x, records.y), short, loss, records.seed)
        wanted[records] = live.update()
    live.load(base)
    kept = 0
    for pair in ((whole, whole), (half, whole)):  # of one size, and padded
        found, kept = activations(live, pair, short, loss)
        for update, records in zip(found, pair, strict=True):
            if not bool((update - wanted[records]).abs().max() <= CLOSE * wanted[records].abs().max()):
                return None
    state = sum(p.numel() * p.element_size() for p in live.active)
    return state * (5 if local.momentum else 4) + 2 * kept
