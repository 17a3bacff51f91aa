"""A client's side of every question: one live model, any number of participants, no server objects."""

from __future__ import annotations

import logging
from collections.abc import Sequence, Sized
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import default_collate

from sfumato import _validate
from sfumato.accounting import Budget, Event, noise_multiplier
from sfumato.errors import BudgetExceeded, ConfigurationError, SfumatoError, UnsupportedError
from sfumato.noise import Research, Secure

from ..contributions import Bound
from ..parameters.scores import client_score
from ..parameters.selection import Train, Trained, prepare
from ..secure import masked
from ..seeds import derive, stream
from ..units import Distributed, LocalLevel, SampleLevel, Unit, budgets
from ..validation import MEASURE, Validation, correct
from ..wire.compression import Codec, encode
from ..wire.messages import Arrays, Reply, Task
from ..wire.narrowing import counts_schema, narrowed, scores_schema
from ..wire.schema import Schema, digest
from .live import Live
from .local import LocalTraining, Loss, plain, private, step_event
from .participant import Client, Stream, tensors

LOG = logging.getLogger("sfumato")
REHEARSED = 5  # clients that are tried before the first round


class Worker:
    """Answers tasks for clients, one at a time.

    Guarantee: what an answer holds is what ``unit`` allows to leave the client. SampleLevel and LocalLevel: it is
    differentially private, and the client's ledger held its cost before it was made. ClientLevel: an update for a
    trusted server. Distributed: a clipped, noised and masked vector of integers.

    Args:
        model: made ready in place for ``train``; the worker keeps it.
        loss: ``loss(model(x), y)``, the mean over records.
        declared: clients in a cohort, for which shares of noise are made (Distributed).
        rounds: most rounds that a client takes part in; with ``unit.epsilon`` its noise is calibrated to them.
        factors: noise of each of these rounds relative to the calibrated one, if they differ.
        least: smallest factor that the server may ask for, if not the smallest of these.
        adaptive: the server chooses factors on the way, so rounds are charged by the Rényi odometer.
        noise: "secure", or "research" with a ``seed``.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        unit: Unit,
        local: LocalTraining,
        train: Train | Trained,
        loss: Loss,
        rounds: int,
        declared: int = 1,
        factors: tuple[float, ...] | None = None,
        adaptive: bool = False,
        least: float | None = None,
        compression: Codec | None = None,
        validation: Validation | None = None,
        count_noise: float | None = None,
        noise: str = "secure",
        seed: int = 0,
    ):
        _validate.one_of("noise", noise, ("secure", "research"))
        self.unit, self.local, self.loss, self.compression = unit, local, loss, compression
        self.declared = _validate.count("declared", declared)
        self.rounds, self.adaptive = _validate.count("rounds", rounds), adaptive
        self._factors = factors or (1.0,) * rounds
        self._least = min(self._factors) if least is None else _validate.positive("least", least)
        self.validation, self.count_noise = validation, count_noise
        self.noise, self.seed = noise, seed
        self.live = Live(model, train if isinstance(train, Trained) else prepare(model, train))
        self._schema = self.live.trained.schema
        self._checked = False  # the check of the first batch is of the model, which is the same for all clients
        self._base: tuple[object, Tensor, str] | None = None
        self._calibrated: dict[tuple[int, bool, Budget], float] = {}

    @property
    def seed_model(self) -> bool:
        """Whether PyTorch's own random numbers (dropout) are fixed too."""
        return self.noise == "research"

    # -- answering ------------------------------------------------------------------------------------------------

    def answer(self, task: Task, client: Client, update: Tensor | None = None) -> Reply:
        """The reply of ``client``. A failure of the client is a reply with ``error``, which names the kind only.

        ``update``: (k,), what plain training has come to already (:class:`.vectorized.Vectorized`); None: train.
        Raises ``ConfigurationError`` and ``UnsupportedError``: the set-up is wrong, for every client.
        """
        vector, base = self._received(task)
        names = (client.id, task.run, task.round, task.nonce, base)
        try:
            self.live.load(vector)
            client.share = self._share(task, client)
            codec = self.compression if task.kind == "train" else None
            with torch.random.fork_rng(devices=[], enabled=self.seed_model):
                if self.seed_model:
                    # Not torch.manual_seed, which also seeds accelerators, at the price of a stack trace for each.
                    torch.default_generator.manual_seed(derive(self.seed, "torch", task.round, client.id))
                schema, found = self._vector(task, client) if update is None else self._trained(task, client, update)
            if isinstance(found, Tensor):
                generator = None if codec is None else self._generator("codec", task, client)
                found = encode(codec, found, generator, task.round, copy=False)
        except BudgetExceeded:
            # What measuring may spend is a group apart, and so are the records of the next round of a stream.
            renewed = client.fresh and isinstance(self.unit, SampleLevel)
            client.done = client.done or (task.kind in ("train", "predict") and not renewed)
            return Reply(*names, task.schema, error="budget", done=client.done, epsilon=self._spent(client))
        except (ConfigurationError, UnsupportedError):
            raise
        except Exception as error:  # noqa: BLE001
            # A client's failure must not end the round, nor may its message leave the client.
            LOG.warning("client %s failed in round %d: %s", client.id, task.round, error)
            try:  # what was charged before it failed stays charged
                spent = self._spent(client)
            except Exception:  # noqa: BLE001
                spent = None
            return Reply(*names, task.schema, error=type(error).__name__, epsilon=spent)
        return Reply(*names, schema.digest, found, done=client.done, epsilon=self._spent(client))

    def load(self, task: Task) -> None:
        """Start from the model of ``task``."""
        self.live.load(self._received(task)[0])

    def order(self, task: Task, client: Client) -> int:
        """The seed of the order in which plain training takes the records."""
        return self._seed("order", task, client)

    def _vector(self, task: Task, client: Client) -> tuple[Schema, Tensor | Arrays]:
        match task.kind, self.unit:
            case "train", SampleLevel():
                self._train_privately(task, client)
                return self._schema, self.live.update()
            case "train", _:
                plain(self.live, client.records(task.round), self.local, self.loss, self.order(task, client))
                return self._trained(task, client, self.live.update())
            case "measure", _:
                return MEASURE, self._measure(task, client)
            case "count", SampleLevel():
                found = self._count(task, client)
                return counts_schema(len(found)), found
            case "score", unit if not isinstance(unit, SampleLevel):
                score = client_score(self.live.model, client.records(task.round), self.loss, norm=self._bound)
                schema = scores_schema(self.live.trained.schema)
                return schema, self._protected(task, client, score.float(), self._bound, None)
        raise ConfigurationError(
            f"clients do not answer {task.kind!r} under {type(self.unit).__name__}.",
            found=task.kind,
            where="task",
            fix="rank by released updates, TopK(by='released')." if task.kind == "score" else None,
        )

    def _trained(self, task: Task, client: Client, update: Tensor) -> tuple[Schema, Tensor | Arrays]:
        if task.kind != "train" or isinstance(self.unit, SampleLevel):
            raise ConfigurationError(
                f"an update from elsewhere is no answer to {task.kind!r} under {type(self.unit).__name__}.",
                found=task.kind,
                where="update",
            )
        return self._schema, self._protected(task, client, update, self._bound, None)

    # -- what may leave -------------------------------------------------------------------------------------------

    @property
    def _bound(self) -> float:
        return 1.0 if isinstance(self.unit, SampleLevel) else self.unit.max_update_norm

    def _protected(self, task: Task, client: Client, vector: Tensor, bound: float, z: float | None) -> Tensor | Arrays:
        """Under LocalLevel the clipped and noised vector, charged before; under Distributed the masked message, with a
        share of the noise in it; otherwise the vector itself.

        ``z``: None for the noise multiplier of a round.
        """
        if isinstance(self.unit, Distributed):
            z = self.noise_of(client, task.round) * self._factor(task) if z is None else z
            origin = self._origin(task, client)
            return masked.encoded(self.unit, task, client.id, vector, bound, z, origin, most=self.declared)
        if not isinstance(self.unit, LocalLevel):
            return vector
        budget = self._budget(client)
        if z is None:
            z = self.noise_of(client, task.round) * self._factor(task)
        event = Event("gaussian", z, 1.0, "replace-one", "client", adaptive=self.adaptive)
        client.ledger.append(event, run=task.run, step=task.round, note=f"noise: {self.noise}", budget=budget)
        schema = Schema((("vector", (len(vector),)),))
        factors, _ = Bound(bound).factors(vector, schema)
        clipped = vector.double() * factors[0] if factors[0] > 0 else torch.zeros_like(vector, dtype=torch.float64)
        origin = self._origin(task, client)
        return clipped.float() + origin.normal(vector.shape, std=z * bound)

    def _train_privately(self, task: Task, client: Client) -> None:
        assert isinstance(self.unit, SampleLevel)
        sigma = self.noise_of(client, task.round) * self._factor(task)
        stopped = private(
            self.live,
            client,
            self.local,
            self.loss,
            self.unit,
            round=task.round,
            noise_multiplier=sigma,
            adaptive=self.adaptive,
            budget=self._budget(client),
            origin=self._origin(task, client),
            check=not self._checked,
        )
        client.done = stopped and not client.fresh
        self._checked = True

    def _measure(self, task: Task, client: Client) -> Tensor | Arrays:
        """(correct, records) on validation records; a record adds a vector of norm <= √2, a client one of norm <= 1."""
        assert self.validation is not None
        counts = torch.zeros(2)
        if client.validation is not None:
            held = tensors(client.validation)
            if held is None:
                raise ConfigurationError("validation records must be two tensors.", found=client.id, where="validation")
            counts = torch.tensor([float(correct(self.live.model, *held)), float(len(held[1]))])
        z = self.validation.noise_multiplier
        if not isinstance(self.unit, SampleLevel):
            return self._protected(task, client, counts / counts.norm().clamp_min(1.0), 1.0, z)
        self._charge_records(task, client, z, "validation")
        return counts + self._origin(task, client).normal((2,), std=z * 2**0.5)

    def _count(self, task: Task, client: Client) -> Tensor:
        """Records by class, noised: one record changes one count by 1."""
        held = tensors(client.records(task.round))
        classes = _validate.count("classes", task.settings.get("classes"))
        if held is None or held[1].dtype != torch.int64 or held[1].ndim != 1:  # else a record counts more than once
            raise ConfigurationError("counting needs a class number (int64) for each record.", where="allocation")
        counts = torch.bincount(held[1].clamp(0, classes - 1), minlength=classes).float()
        assert self.count_noise is not None
        self._charge_records(task, client, self.count_noise, client.group(task.round))
        return counts + self._origin(task, client).normal((classes,), std=self.count_noise)

    def _charge_records(self, task: Task, client: Client, z: float, group: str) -> None:
        client.ledger.append(
            Event("gaussian", z, 1.0, "add-remove", "record"),
            run=task.run,
            step=task.round,
            dataset=f"client {client.id}",
            group=group,
            note=f"noise: {self.noise}",
            budget=self._budget(client),
        )

    # -- numbers --------------------------------------------------------------------------------------------------

    def noise_of(self, client: Client, round: int = 1) -> float:
        """The noise multiplier of this client: the given one, or the least that lasts for all rounds.

        ``round``: where data change (:class:`.participant.Stream`), the one whose number of records decides.
        """
        if self.unit.noise_multiplier is not None:
            return self.unit.noise_multiplier
        if isinstance(self.unit, Distributed):
            return masked.lasting_noise(
                self.unit,
                self.live.trained.schema.size,
                self.declared,
                self._factors,
                self.validation,
                adaptive=self.adaptive,
            )
        budget = self._budget(client)
        assert budget is not None
        data = client.records(round) if isinstance(self.unit, SampleLevel) else None
        size = 0 if data is None else len(cast(Sized, data))
        alone = isinstance(client.data, Stream) and client.data.disjoint
        key = size, alone, budget
        if key not in self._calibrated:
            rounds = list(self._factors)
            spent: dict[Event, int] = {}
            if isinstance(self.unit, SampleLevel):
                event = step_event(self.local, size, 1.0, adaptive=self.adaptive)
                # Rounds on records of their own are not added up: the one with the least noise decides.
                rounds = [f for f in ([min(rounds)] if alone else rounds) for _ in range(self.local.count(size))]
                if self.count_noise is not None:
                    spent[Event("gaussian", self.count_noise, 1.0, "add-remove", "record")] = 1
            else:
                event = Event("gaussian", 1.0, 1.0, "replace-one", "client", adaptive=self.adaptive)
                if self.validation is not None and (times := self.validation.times(self.rounds)):
                    z = self.validation.noise_multiplier
                    spent[Event("gaussian", z, 1.0, "replace-one", "client", adaptive=self.adaptive)] = times
            self._calibrated[key] = noise_multiplier(
                target_epsilon=budget.epsilon, target_delta=budget.delta, event=event, factors=rounds, spent=spent
            )
        return self._calibrated[key]

    def rehearse(self, clients: Sequence[Client]) -> None:
        """Refuse a set-up that fails for every client, before anything is charged: nothing of this is kept or sent."""
        self._check_budget(clients[0])
        failed: Exception | None = None
        for client in [c for c in clients if not isinstance(c.data, Stream)][:REHEARSED]:
            data: Any = client.data
            try:
                pair = range(min(2, self.local.batch_size))  # some layers cannot train on one record alone
                x, y = default_collate([data[i % len(data)] for i in pair])
                with torch.random.fork_rng(devices=[]):
                    found = self.loss(self.live.model(x), y)
                if not isinstance(found, Tensor) or found.numel() != 1 or not found.requires_grad:
                    raise TypeError(f"the loss is {type(found).__name__}, not one number with a gradient")
                return
            except SfumatoError:
                raise
            except Exception as error:  # noqa: BLE001 (the model, the loss and the data set are the user's)
                failed = error
        if failed is not None:
            raise ConfigurationError(
                "loss(model(x), y) fails for the first record of every client that was tried: "
                f"{type(failed).__name__}: {failed}",
                found=type(failed).__name__,
                where="loss",
                fix="records must be (input, target) pairs that the model and the loss take.",
            ) from failed

    def _check_budget(self, client: Client) -> None:
        """Refuse a plan whose measures leave nothing for the rounds (LocalLevel)."""
        if isinstance(self.unit, LocalLevel):
            try:
                self.noise_of(client)
            except BudgetExceeded as error:
                raise ConfigurationError(
                    f"the measures of progress alone cost more than the budget of client {client.id!r}.",
                    found=self.validation,
                    where="validation",
                    fix="measure less often, with more noise, or on public records.",
                ) from error

    def _budget(self, client: Client) -> Budget | None:
        """The smallest of the federation's limit, the client's own, and the share that its counts earned it."""
        budget = client.limit(budgets(self.unit, (client.id,))[client.id], self.unit.delta)
        if budget is None or client.share == 1.0:
            return budget
        return Budget(budget.epsilon * client.share, budget.delta)

    def _factor(self, task: Task) -> float:
        """This round's noise relative to the calibrated one: public, from the task, and never below the plan."""
        found = _validate.positive("noise_factor", task.settings.get("noise_factor", 1.0))
        if found < self._least * (1.0 - 1e-9):
            raise ConfigurationError(
                f"the server asks for {found:.3g} times the noise agreed on; {self._least:.3g} is the least.",
                found=found,
                where="task.settings",
                fix="give server and clients the same allocation.",
            )
        return found

    def _share(self, task: Task, client: Client) -> float:
        found = _validate.positive("share", task.settings.get(f"share of {client.id}", 1.0))
        return min(1.0, found)  # a client never spends more because a server says so

    def _spent(self, client: Client) -> float | None:
        if isinstance(self.unit, SampleLevel | LocalLevel):
            return float(client.ledger.epsilon(delta=self.unit.delta))
        return None

    def _received(self, task: Task) -> tuple[Tensor, str]:
        """The task's vector and its hash, computed once for all clients of one worker."""
        if self._base is None or self._base[0] is not task:
            index = None if task.index is None else torch.from_numpy(np.ascontiguousarray(task.index))
            held = self.live.index
            if not (index is held or (index is not None and held is not None and torch.equal(index, held))):
                self.live.narrow(index)
                self._schema = narrowed(self.live.trained.schema, index)
            raw = np.ascontiguousarray(task.vector)
            if raw.dtype != np.float32 or raw.shape != self.live.flat.shape:
                raise ConfigurationError(
                    f"the global model is {raw.dtype} of shape {raw.shape}, and this client has {len(self.live.flat)} "
                    "numbers.",
                    found=raw.shape,
                    where="task.vector",
                    fix="give server and clients the same model and the same train=.",
                )
            vector = torch.from_numpy(raw)
            self._base = task, vector, digest(vector, self.live.frozen)
        return self._base[1], self._base[2]

    def _origin(self, task: Task, client: Client) -> Secure | Research:
        return stream(self.noise, self.seed, task.kind, task.round, client.id)

    def _seed(self, purpose: str, task: Task, client: Client) -> int:
        return derive(self.seed, purpose, task.kind, task.round, client.id)

    def _generator(self, purpose: str, task: Task, client: Client) -> torch.Generator:
        return torch.Generator().manual_seed(self._seed(purpose, task, client))
