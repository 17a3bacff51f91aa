"""FederatedTrainer: rounds of local training, each charged before it is asked for, until rounds or budgets end."""

from __future__ import annotations

import copy
import os
import secrets
import time
from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import Dataset

from sfumato import _validate
from sfumato.accounting import Ledger
from sfumato.clipping import Flat, Quantile, chosen, update
from sfumato.errors import ConfigurationError, LedgerError
from sfumato.schedules import factor

from . import allocation as allocating
from . import checkpoint as checkpoints
from .allocation import Adaptive, Allocation, Uniform
from .client.live import frozen_digest
from .client.local import LocalTraining, Loss
from .client.participant import Client, Stream
from .client.worker import Worker
from .cohorts import Cohort, PoissonCohort, Terms, event_of
from .cohorts import checked as checked_cohort
from .contributions import Bound, weights_of
from .enrolment import exchange_for, participants, server_ledger, with_own_limits
from .exchange import Answer, Exhausted, Question
from .history import Result, Round, Stopped
from .parameters.lora import merge
from .parameters.scores import scores_from_public, scores_from_released
from .parameters.selection import All, TopK, Train, choose, prepare
from .server import Average, ServerOptimizer, advance
from .server import checked as checked_server
from .settings import Settings
from .transport import InProcess, Transport
from .units import UNITS, ClientLevel, Distributed, LocalLevel, SampleLevel, Unit, privacy_unit
from .validation import MEASURE, Validation, share
from .vectorized import Vectorized
from .wire.compression import Codec
from .wire.narrowing import counts_schema, narrowed, positions, scores_schema
from .wire.schema import Schema


class FederatedTrainer:
    """Federated averaging with differential privacy.

    Guarantee: everything that leaves the trust boundary of ``privacy`` (its class says where that is) is (ε, δ)-DP for
    one record of any client (SampleLevel) or one client, for each client with the ε that its ledger shows; no round is
    asked for that some client cannot pay. Clients are assumed to hold different records.

    Args:
        model: the global model to start from: public, and left unchanged.
        clients: {id: data set, or Client}, all in this process; or give a ``transport``.
        privacy: ``SampleLevel``, ``ClientLevel``, ``LocalLevel`` or ``Distributed``.
        local: what clients do in a round.
        rounds: most rounds.
        cohort: who is asked; by default everybody, every round.
        server: ``Average``, ``Momentum`` or ``Adam``, on released updates.
        train: what is trained: ``All``, ``LastLayers``, ``Named``, ``LoRA`` or ``TopK``.
        compression: of updates: ``Quantize`` or ``Prune``.
        allocation: of the budget over rounds: ``Uniform()``, a schedule from ``sf.schedules`` (factors of the noise by
            round), or ``Adaptive()``.
        validation: measure progress, and end when there is none.
        weights: {client: weight in [0, 1]}, public and fixed; 1 by default.
        loss: ``loss(model(x), y)``, the mean over records.
        public: public records, for ``TopK(by="public")``.
        classes: number of classes, for ``Adaptive(clients=True)``.
        noise: "secure", or "research" (seeded, not private).
        seed: of everything that is not secret: local order, rounding; all of it with ``noise="research"``.
        ledger: of the server: a path, an ``sf.Ledger``, None for memory.
        client_ledgers: a folder for the clients' ledgers; None for memory.
        checkpoint: a file to write after every round, and to go on from if it exists.
        deadline: seconds that clients have to answer.
        workers: live models in this process.
        on_round: called with each :class:`Round`.

    Raises ``ConfigurationError`` and ``UnsupportedError`` before anything is asked or charged.
    """

    def __init__(
        self,
        *,
        model: nn.Module,
        privacy: Unit,
        clients: Mapping[str, Dataset[Any] | Stream | Client] | None = None,
        transport: Transport | None = None,
        local: LocalTraining | None = None,
        rounds: int = 20,
        cohort: Cohort | None = None,
        server: ServerOptimizer | None = None,
        train: Train | None = None,
        compression: Codec | None = None,
        allocation: Allocation | None = None,
        validation: Validation | None = None,
        weights: Mapping[str, float] | None = None,
        loss: Loss = F.cross_entropy,
        public: Dataset[Any] | None = None,
        classes: int | None = None,
        noise: Literal["secure", "research"] = "secure",
        seed: int | None = None,
        ledger: str | os.PathLike[str] | Ledger | None = None,
        client_ledgers: str | os.PathLike[str] | None = None,
        checkpoint: str | os.PathLike[str] | None = None,
        deadline: float | None = None,
        workers: int = 1,
        vectorize: bool = False,
        on_round: Callable[[Round], object] | None = None,
    ):
        if not isinstance(privacy, UNITS):
            raise ConfigurationError(
                f"privacy={privacy!r} is no unit of privacy.",
                found=privacy,
                where="privacy",
                fix="SampleLevel, ClientLevel, LocalLevel or Distributed.",
            )
        if (clients is None) == (transport is None):
            raise ConfigurationError("give clients=, or the transport= that reaches them.", where="clients")
        _validate.one_of("noise", noise, ("secure", "research"))
        if deadline is not None:
            _validate.positive("deadline", deadline)
        held = None if clients is None else participants(clients, client_ledgers)
        self.settings = Settings(
            unit=privacy if held is None else with_own_limits(privacy, held),
            local=LocalTraining() if local is None else local,
            rounds=_validate.count("rounds", rounds),
            cohort=checked_cohort(PoissonCohort() if cohort is None else cohort),
            server=checked_server(Average() if server is None else server),
            train=All() if train is None else train,
            compression=compression,
            allocation=allocating.checked(Uniform() if allocation is None else allocation),
            validation=validation,
            loss=loss,
            public=public,
            classes=classes,
            noise=noise,
            seed=secrets.randbits(63) if seed is None else seed,
            weighted=weights is not None,
        )
        self._model = copy.deepcopy(model)
        self._everything = prepare(self._model, self.settings.train)
        if transport is None:
            assert held is not None
            worker = self.worker(copy.deepcopy(model), len(held))
            worker.rehearse(list(held.values()))
            transport = Vectorized(worker, held) if vectorize else InProcess(worker, held, workers=workers)
        self.transport, self._clients = transport, held or {}
        enrolled = tuple(transport.clients())
        if len(set(enrolled)) != len(enrolled) or not enrolled:
            raise ConfigurationError(f"{len(enrolled)} clients are enrolled, under other than distinct names.")
        self.ledger = server_ledger(privacy, ledger)
        self._exchange, self.noise_multiplier = exchange_for(
            self.settings,
            transport,
            self._clients,
            self.ledger,
            weights=weights_of(None if weights is None else dict(weights), enrolled),
            size=self._everything.schema.size,
            run=secrets.token_hex(16),
            frozen=frozen_digest(self._model, self._everything),
            deadline=deadline,
        )
        self._checkpoint, self._on_round = checkpoint, on_round
        self._state = self._started()

    def worker(self, model: nn.Module, population: int) -> Worker:
        """The clients' side of this federation, of ``population`` clients; it takes ``model`` over."""
        return self.settings.worker(model, population)

    @property
    def model(self) -> nn.Module:
        """A plain copy of the global model as it stands: released, so it may be looked at in ``on_round``."""
        self._everything.write(self._model, self._state.vector)
        return merge(copy.deepcopy(self._model))

    # -- training -------------------------------------------------------------------------------------------------

    def fit(self) -> Result:
        """Train until the rounds are done, no client can pay, or the measure has converged."""
        state = self._state = self._resumed() or self._started()
        stopped: Stopped = "rounds"
        rounds = [checkpoints.round_of(row) for row in state.history]
        try:
            self._prepare_run(state)
            while state.rounds < self.settings.rounds:
                if self.settings.validation is not None and self.settings.validation.converged(state.measures):
                    stopped = "converged"
                    break
                rounds.append(self._round(state))
                self._save(state, rounds)
                if self._on_round is not None:
                    self._on_round(rounds[-1])
        except Exhausted:
            stopped = "budget"
        return self._result(state, tuple(rounds), stopped)

    def _prepare_run(self, state: checkpoints.State) -> None:
        """What is paid for once, before the first round: shares of clients, and what is trained."""
        if state.rounds or state.prepared:
            return
        if self.settings.shared:
            assert isinstance(self.settings.allocation, Adaptive)
            assert self.settings.classes is not None
            question = Question(
                "count", counts_schema(self.settings.classes), None, settings={"classes": self.settings.classes}
            )
            answer = self._exchange.ask(question, state.vector, keep=True)
            state.shares = dict.fromkeys(self.transport.clients(), self.settings.allocation.least)
            state.shares |= allocating.shares(self.settings.allocation, answer.replies)
        if isinstance(self.settings.train, TopK) and self.settings.train.by != "released":
            state.index = self._chosen(self._scores(state))
        state.prepared = True

    def _scores(self, state: checkpoints.State) -> Tensor:
        assert isinstance(self.settings.train, TopK)
        if self.settings.train.by == "public":
            assert self.settings.public is not None
            return scores_from_public(
                self._model, self.settings.public, self.settings.loss, granularity=self.settings.train.granularity
            )
        question = self._question(state, "score", scores_schema(self._everything.schema))
        answer = self._exchange.ask(question, state.vector)
        return torch.zeros(len(self._everything.names)) if answer.vector is None else answer.vector

    def _chosen(self, scores: Tensor) -> Tensor:
        assert isinstance(self.settings.train, TopK)
        chosen_ = choose(self.settings.train, scores, self._everything, copy.deepcopy(self._model))
        return positions(self._everything, chosen_)

    def _question(self, state: checkpoints.State, kind: Literal["train", "score"], schema: Schema) -> Question:
        settings: dict[str, Any] = {"noise_factor": self._factor(state, kind)}
        settings |= {f"share of {client}": value for client, value in state.shares.items()}
        codec = self.settings.compression if kind == "train" else None
        adaptive = self.settings.adaptive
        if not isinstance(self.settings.unit, ClientLevel | Distributed):
            limit = self.settings.unit.max_update_norm if isinstance(self.settings.unit, SampleLevel) else None
            bound = Bound(limit) if limit is not None and kind == "train" else None
            return Question(kind, schema, bound, adaptive=adaptive, codec=codec, settings=settings)
        z = self.noise_multiplier * self._factor(state, kind)
        clip, count = Flat(), None
        if isinstance(self.settings.unit, ClientLevel) and kind == "train":
            clip = chosen(self.settings.unit.clipping)  # type: ignore[assignment]
            count = self.settings.count_noise(len(self.transport.clients()))
        bound = Bound(self._bound(state) if kind == "train" else self.settings.unit.max_update_norm, clip)
        return Question(kind, schema, bound, z, count, adaptive, codec, settings)

    def _factor(self, state: checkpoints.State, kind: str) -> float:
        if kind != "train":
            return 1.0
        return state.factor if self.settings.adaptive else self.settings.factors[state.rounds]

    def _bound(self, state: checkpoints.State) -> float:
        assert isinstance(self.settings.unit, ClientLevel | Distributed)
        schedule = self.settings.unit.clip_schedule if isinstance(self.settings.unit, ClientLevel) else None
        if isinstance(schedule, Quantile):
            return self.settings.unit.max_update_norm if state.bound is None else state.bound
        return self.settings.unit.max_update_norm * (1.0 if schedule is None else factor(schedule, state.rounds))

    def _round(self, state: checkpoints.State) -> Round:
        began = time.monotonic()
        question = self._question(state, "train", narrowed(self._everything.schema, state.index))
        answer = self._exchange.ask(question, state.vector, state.index)
        if answer.vector is not None:
            self._move(state, answer)
        state.rounds += 1
        measure, more = self._measured(state)
        waiting = isinstance(self.settings.train, TopK) and self.settings.train.by == "released" and state.index is None
        if waiting and answer.vector is not None:
            assert isinstance(self.settings.train, TopK)
            scores = scores_from_released(
                [answer.vector], self._everything.schema, granularity=self.settings.train.granularity
            )
            state.index = self._chosen(scores)
            state.optimizer.clear()
        state.number = self._exchange.number
        epsilons = self._exchange.all_epsilons(heard=answer.accepted == answer.asked)
        return Round(
            number=state.rounds,
            cohort=answer.asked,
            accepted=answer.accepted,
            rejected={
                **answer.rejected,
                **({f"measure: {why}": n for why, n in more.rejected.items()} if more else {}),
            },
            epsilon=max(epsilons.values()),
            client_epsilons=epsilons,
            max_update_norm=answer.bound,
            noise_std=answer.noise_std,
            bytes_up=answer.bytes_up + (more.bytes_up if more else 0),
            bytes_down=answer.bytes_down + (more.bytes_down if more else 0),
            seconds=time.monotonic() - began,
            measure=measure,
        )

    def _move(self, state: checkpoints.State, answer: Answer) -> None:
        assert answer.vector is not None
        part = state.vector if state.index is None else state.vector[state.index]
        advance(self.settings.server, state.optimizer, part, answer.vector)
        if state.index is not None:
            state.vector[state.index] = part
        if answer.fraction is not None:
            assert isinstance(self.settings.unit, ClientLevel)
            assert isinstance(self.settings.unit.clip_schedule, Quantile)
            state.bound = update(self.settings.unit.clip_schedule, self._bound(state), answer.fraction, state.rounds)

    def _measured(self, state: checkpoints.State) -> tuple[float | None, Answer | None]:
        if self.settings.validation is None or state.rounds % self.settings.validation.every:
            return None, None
        answer = None
        if self.settings.validation.public is not None:
            self._everything.write(self._model, state.vector)
            found = self.settings.validation.accuracy(self._model)
        else:
            z = self.settings.validation.noise_multiplier
            private = isinstance(self.settings.unit, ClientLevel | Distributed)
            question = Question(
                "measure",
                MEASURE,
                Bound(1.0) if private else None,
                z if private else None,
                adaptive=self.settings.adaptive,
            )
            try:
                answer = self._exchange.ask(question, state.vector, state.index)
            except Exhausted:
                return None, None
            if answer.vector is None:
                return None, answer
            found = share(answer.vector)
        state.measures.append(found)
        if isinstance(self.settings.allocation, Adaptive) and allocating.stalled(
            self.settings.allocation, state.measures
        ):
            state.factor = max(self.settings.allocation.lowest, state.factor * self.settings.allocation.factor)
        return found, answer

    # -- state ----------------------------------------------------------------------------------------------------

    def _started(self) -> checkpoints.State:
        vector = self._everything.read(self._model).clone()
        return checkpoints.State(run=self._exchange.run, vector=vector, schema=self._everything.schema.digest)

    def _resumed(self) -> checkpoints.State | None:
        if self._checkpoint is None or (state := checkpoints.load(self._checkpoint)) is None:
            return None
        held = dict(self._exchange.epsilons)
        checkpoints.restore(state, self._exchange, self.ledger, self._everything.schema, str(self._checkpoint))
        for name in self._clients:
            if self.ledger is None and held[name] < state.epsilons.get(name, 0.0) * (1.0 - 1e-9):
                raise LedgerError(
                    f"the ledger of client {name!r} holds less than it had spent by {self._checkpoint}.",
                    found=held[name],
                    where=name,
                    fix="give the client_ledgers of that run; one that is gone cannot be replaced.",
                )
        return state

    def _save(self, state: checkpoints.State, rounds: list[Round]) -> None:
        if self._checkpoint is None:
            return
        checkpoints.note(state, self._exchange, self.ledger, rounds)
        checkpoints.save(self._checkpoint, state)

    def _result(self, state: checkpoints.State, rounds: tuple[Round, ...], stopped: Stopped) -> Result:
        epsilons = self._exchange.all_epsilons()
        match self.settings.unit:
            case ClientLevel():
                adjacency = event_of(self.settings.cohort, Terms(1.0), len(epsilons)).adjacency
            case unit:
                adjacency = _ADJACENCY[type(unit)]
        return Result(
            model=self.model,
            rounds=rounds,
            stopped=stopped,
            epsilon=max(epsilons.values()),
            delta=self.settings.unit.delta,
            unit=privacy_unit(self.settings.unit),
            adjacency=adjacency,
            client_epsilons=epsilons,
            ledger=self.ledger,
            client_ledgers={name: c.ledger for name, c in self._clients.items()} if self.ledger is None else {},
            noise_multiplier=self.noise_multiplier,
            bytes_up=sum(r.bytes_up for r in rounds),
            bytes_down=sum(r.bytes_down for r in rounds),
            seed=self.settings.seed,
        )


_ADJACENCY = {SampleLevel: "add-remove", LocalLevel: "replace-one", Distributed: "zero-out"}
