"""The peers' side of distillation: own models of any architecture, which answer with predictions on public inputs."""

from __future__ import annotations

import copy
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, get_args

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import Dataset

from sfumato.accounting import Ledger
from sfumato.clipping import Flat, chosen
from sfumato.errors import BudgetExceeded, ConfigurationError

from ..client.local import LocalTraining, Loss, plain
from ..client.participant import Client, Stream
from ..client.worker import Worker
from ..cohorts import Cohort, FixedCohort
from ..parameters.selection import All
from ..seeds import derive
from ..units import ClientLevel, LocalLevel, SampleLevel
from ..wire.messages import Arrays, Reply, Task
from ..wire.schema import Schema, digest
from .predictions import Distill, hash_of, learn, predictions_schema, probabilities, rows_of, scaled

Protected = SampleLevel | ClientLevel | LocalLevel


@dataclass(frozen=True, eq=False)
class Peer:
    """One participant: its own ``model``, copied and never sent, and its own records.

    Under SampleLevel the model it starts from, frozen parts included, must not have seen the peer's records: what the
    records did before cannot be told, nor charged. Under the other units any model will do.
    ``ledger``, ``epsilon``: as in :class:`Client`. ``local``: its own training, instead of the federation's.
    """

    model: nn.Module
    data: Dataset[Any] | Stream
    ledger: str | os.PathLike[str] | Ledger | None = None
    epsilon: float | None = None
    local: LocalTraining | None = None


class PeerWorker(Worker):
    """Answers ``predict`` for one peer, whose model it keeps from round to round.

    Guarantee: as :class:`Worker`. SampleLevel: the model is trained with DP-SGD, charged before, and predictions are
    computed from it and public inputs alone. LocalLevel: the matrix of predictions is one vector, clipped to C, noised,
    and charged before. ClientLevel: predictions for a trusted server. What a server asks can change neither.

    ``public``: (n, ...) inputs, the same on all sides (their hash is in :attr:`Task.base`); ``classes``: of them all.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        public: Tensor,
        classes: int,
        distill: Distill,
        unit: Protected,
        local: LocalTraining,
        loss: Loss,
        rounds: int,
        noise: str = "secure",
        seed: int = 0,
    ):
        if (found := probabilities(model, public[:2], 1.0).shape[1]) != classes:
            raise ConfigurationError(
                f"a peer's model tells {found} classes apart, and the student {classes}.", found=found, where="peers"
            )
        super().__init__(model, unit=unit, local=local, train=All(), loss=loss, rounds=rounds, noise=noise, seed=seed)
        self.public, self.classes, self.distill = public, classes, distill
        self._public, self._ready = hash_of(public), False

    def answer(self, task: Task, client: Client, update: Tensor | None = None) -> Reply:
        """As :meth:`Worker.answer`. A model trained with DP-SGD answers for free after its budget is spent."""
        reply = super().answer(task, client, update)
        trains = isinstance(self.unit, SampleLevel)
        if reply.error == "budget" and not (trains and client.fresh):
            client.done = True
        free = reply.error is None and trains and self._ready
        return replace(reply, done=client.done and not free)

    def _received(self, task: Task) -> tuple[Tensor, str]:
        """A peer goes on from its own model; the task's vector is what it may learn from."""
        return self.live.flat.clone(), digest(torch.from_numpy(np.ascontiguousarray(task.vector)), self._public)

    def _vector(self, task: Task, client: Client) -> tuple[Schema, Tensor | Arrays]:
        if task.kind != "predict":
            raise ConfigurationError(f"peers answer no {task.kind!r}.", found=task.kind, where="task")
        rows = self._rows(task, "queries")
        if "lessons" in task.settings:
            self._learn(task)
        if not isinstance(self.unit, SampleLevel):
            plain(self.live, client.records(task.round), self.local, self.loss, self._seed("order", task, client))
        elif not client.done:
            self._train_privately(task, client)
            self._ready = self._ready or not torch.equal(self.live.flat, self.live.base)
        if isinstance(self.unit, SampleLevel) and not self._ready:
            raise BudgetExceeded("the budget does not allow one step.", where="epsilon")
        found = probabilities(self.live.model, self.public[rows], self.distill.temperature)
        if self.distill.votes == "hard":
            found = F.one_hot(found.argmax(1), self.classes).float()
        schema = predictions_schema(len(rows), self.classes)
        return schema, self._protected(task, client, scaled(found), self._bound, None)

    def _learn(self, task: Task) -> None:
        """From the student's predictions, a function of what was released before."""
        rows = self._rows(task, "lessons")
        targets = torch.from_numpy(np.array(task.vector, dtype=np.float32)).view(len(rows), self.classes)
        self.live.model.train()
        optimizer = torch.optim.Adam(self.live.active, lr=self.distill.lr)
        generator = torch.Generator().manual_seed(derive(self.seed, "lessons", task.round))
        learn(self.live.model, optimizer, self.public[rows], targets, self.distill, generator)

    def _rows(self, task: Task, name: str) -> Tensor:
        numbers = [task.settings.get(key) for key in ("order", f"first of {name}", name)]
        if any(type(number) is not int or number < 0 for number in numbers) or not numbers[2]:
            raise ConfigurationError("the task names no public rows.", found=numbers, where="task.settings")
        order, first, count = (int(number) for number in numbers if number is not None)
        if count > len(self.public):
            raise ConfigurationError(f"there are no {count} public rows.", found=count, where="task.settings")
        return rows_of(order, first, count, len(self.public))


class Peers:
    """All peers in this process, each with its own worker, one after the other: a :class:`.transport.Transport`."""

    def __init__(self, workers: Mapping[str, PeerWorker], clients: Mapping[str, Client]):
        self._workers, self._clients = dict(workers), dict(clients)

    def clients(self) -> Sequence[str]:
        """The ids that were given."""
        return tuple(self._clients)

    def ask(self, task: Task, ids: Sequence[str], *, deadline: float | None) -> Iterator[Reply]:
        """See :class:`.transport.Transport`."""
        for name in ids:
            began = time.monotonic()
            reply = self._workers[name].answer(task, self._clients[name])
            if deadline is None or time.monotonic() - began <= deadline:  # of each peer, as if all worked at once
                yield reply

    def close(self) -> None:
        """Nothing is open."""

    def noise(self) -> dict[str, float]:
        """The noise multiplier of each peer."""
        return {name: self._workers[name].noise_of(client) for name, client in self._clients.items()}

    def model(self, name: str) -> nn.Module:
        """A copy of a peer's model."""
        return copy.deepcopy(self._workers[name].live.model)


def client_of(name: str, peer: object) -> Dataset[Any] | Stream | Client:
    """What takes part under this name."""
    if not isinstance(peer, Peer):
        raise ConfigurationError(f"peers[{name!r}] is not a Peer.", found=type(peer).__name__, where="peers")
    if peer.ledger is None and peer.epsilon is None:
        return peer.data
    return Client(name, peer.data, ledger=peer.ledger, epsilon=peer.epsilon)


def protected(unit: object) -> Protected:
    """Refuse a unit under which predictions would have no guarantee."""
    if not isinstance(unit, get_args(Protected)):
        raise ConfigurationError(
            f"privacy={unit!r}: predictions and votes that nothing noises have no guarantee, for one peer decides a "
            "label; and sums of masked predictions are not implemented.",
            found=unit,
            where="privacy",
            fix="SampleLevel, ClientLevel or LocalLevel.",
        )
    assert isinstance(unit, SampleLevel | ClientLevel | LocalLevel)
    if unit.noise_multiplier == 0.0:
        raise ConfigurationError(
            "noise_multiplier=0: the predictions themselves would be released.",
            found=0.0,
            where="noise_multiplier",
            fix="leave it out, and give epsilon=.",
        )
    if isinstance(unit, SampleLevel):
        return unit
    if unit.max_update_norm > 1.0:
        raise ConfigurationError(
            f"max_update_norm={unit.max_update_norm}: predictions are never longer than 1, so this only adds noise.",
            found=unit.max_update_norm,
            where="max_update_norm",
            fix="at most 1; a smaller bound clips those who are sure of themselves.",
        )
    if isinstance(unit, ClientLevel) and (
        unit.clip_schedule is not None or not isinstance(chosen(unit.clipping), Flat)
    ):
        raise ConfigurationError(
            "predictions are one vector with one fixed bound.",
            found=unit.clip_schedule or unit.clipping,
            where="clipping",
            fix="clipping='flat', without a clip_schedule.",
        )
    return unit


def unamplified(cohort: Cohort) -> Cohort:
    """Refuse a draw whose amplification does not hold for peers that remember."""
    if isinstance(cohort, FixedCohort) and cohort.amplification:
        raise ConfigurationError(
            "peers remember the rounds that they were drawn for, and a draw of a fixed size ties one peer's rounds to "
            "those of the others: the proof of amplification does not cover it.",
            found=cohort,
            where="cohort",
            fix="PoissonCohort, or FixedCohort(size) without amplification.",
        )
    return cohort
