"""Private distillation: peers with models of any architecture teach a student by predictions on public inputs."""

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

from sfumato import _validate
from sfumato.accounting import Ledger
from sfumato.clipping import Flat
from sfumato.errors import ConfigurationError

from ..client.local import LocalTraining, Loss
from ..client.participant import Client
from ..cohorts import Cohort, PoissonCohort, Terms, checked, event_of, participations
from ..contributions import Bound, weights_of
from ..enrolment import exchange_for, participants, server_ledger, with_own_limits
from ..exchange import Exhausted, Question
from ..history import Result, Round
from ..seeds import derive
from ..settings import Settings
from ..transport import Transport
from ..units import ClientLevel, LocalLevel, SampleLevel, privacy_unit
from .peers import Peer, Peers, PeerWorker, Protected, client_of, protected, unamplified
from .predictions import Distill, hash_of, inputs, learn, predictions_schema, probabilities, rows_of, unscaled


class FederatedDistillation:
    """FedMD (Li & Wang 2019) and FedDF (Lin et al. 2020) with differential privacy; models never leave their peers.

    Each round peers train on their own records and predict the same ``queries`` public inputs; the student learns from
    the released mean. A peer's predictions are one vector, in units in which certainty of every query has norm 1.

    Guarantee: the student, and everything sent to peers, is (ε, δ)-DP for each peer's ε in ``client_epsilons``.
    SampleLevel: for one record of one peer; it trains with DP-SGD and its predictions cost no more. ClientLevel: for a
    whole peer, its model and records; its being there or not changes the sum of predictions by at most C, whatever it
    sends, and every query batch is charged before it is asked. LocalLevel: for replacing all that a peer holds; it
    clips, charges and noises its predictions itself. That a peer's model remembers earlier rounds is covered: the coin
    of one peer moves no other peer (Poisson), or who was drawn counts as known.

    Args:
        model: the student: public, and left unchanged.
        peers: {id: Peer}, all in this process; or give a ``transport`` that reaches a :meth:`worker` each.
        public: (n, ...) inputs without labels, public.
        privacy: ``SampleLevel``, ``ClientLevel`` or ``LocalLevel``; C, ``max_update_norm``, is at most 1 here.
        local: what peers do in a round before they predict.
        distill: how the student learns.
        queries: public inputs asked in a round; all are asked before one is asked again. More of them share one C:
            noise on each grows with their root.
        feedback: send the student's predictions back on the last round's inputs, for peers to learn from (FedMD).
        weights, loss, noise, seed, ledger, client_ledgers, deadline, on_round: as in ``FederatedTrainer``.

    Raises ``ConfigurationError`` and ``UnsupportedError`` before anything is asked or charged.
    """

    def __init__(
        self,
        *,
        model: nn.Module,
        public: Tensor,
        privacy: Protected,
        peers: Mapping[str, Peer] | None = None,
        transport: Transport | None = None,
        local: LocalTraining | None = None,
        rounds: int = 5,
        distill: Distill | None = None,
        queries: int = 100,
        feedback: bool = False,
        cohort: Cohort | None = None,
        weights: Mapping[str, float] | None = None,
        loss: Loss = F.cross_entropy,
        noise: Literal["secure", "research"] = "secure",
        seed: int | None = None,
        ledger: str | os.PathLike[str] | Ledger | None = None,
        client_ledgers: str | os.PathLike[str] | None = None,
        deadline: float | None = None,
        on_round: Callable[[Round], object] | None = None,
    ):
        if (peers is None) == (transport is None):
            raise ConfigurationError("give peers=, or the transport= that reaches them.", where="peers")
        _validate.one_of("noise", noise, ("secure", "research"))
        self.unit, self.rounds, self.noise = protected(privacy), _validate.count("rounds", rounds), noise
        self.cohort = unamplified(checked(PoissonCohort() if cohort is None else cohort))
        self.local, self.distill = local or LocalTraining(), distill or Distill()
        self.loss, self.feedback, self._on_round = loss, feedback, on_round
        self.seed = secrets.randbits(63) if seed is None else seed
        self.public, self.queries = inputs(public, queries), queries
        self._student = copy.deepcopy(model)
        self.classes = probabilities(self._student, self.public[:2], 1.0).shape[1]
        self._clients: dict[str, Client] = {}
        if peers is not None:
            self._clients = participants({name: client_of(name, peer) for name, peer in peers.items()}, client_ledgers)
            self.unit = protected(with_own_limits(self.unit, self._clients))
            transport = Peers({name: self.worker(peer, len(peers)) for name, peer in peers.items()}, self._clients)
        assert transport is not None
        self.transport = transport
        enrolled = tuple(transport.clients())
        if len(set(enrolled)) != len(enrolled) or not enrolled:
            raise ConfigurationError(f"{len(enrolled)} peers are enrolled, under other than distinct names.")
        self.ledger = server_ledger(self.unit, ledger)
        self._exchange, self.noise_multiplier = exchange_for(
            Settings(
                unit=self.unit,
                local=self.local,
                rounds=self.rounds,
                cohort=self.cohort,
                loss=loss,
                noise=noise,
                seed=self.seed,
                weighted=weights is not None,
            ),
            transport,
            self._clients,
            self.ledger,
            weights=weights_of(None if weights is None else dict(weights), enrolled),
            size=queries * self.classes,
            run=secrets.token_hex(16),
            frozen=hash_of(self.public),
            deadline=None if deadline is None else _validate.positive("deadline", deadline),
        )
        self._asked, self._released = list[Tensor](), list[Tensor]()
        self._optimizer = torch.optim.Adam(self._student.parameters(), lr=self.distill.lr)

    # -- set-up ---------------------------------------------------------------------------------------------------

    def worker(self, peer: Peer, population: int) -> PeerWorker:
        """One peer's side of this federation of ``population`` peers."""
        return PeerWorker(
            copy.deepcopy(peer.model),
            public=self.public,
            classes=self.classes,
            distill=self.distill,
            unit=self.unit,
            local=peer.local or self.local,
            loss=self.loss,
            rounds=participations(self.cohort, self.rounds, population, amplified=False),
            noise=self.noise,
            seed=self.seed,
        )

    def peer_model(self, name: str) -> nn.Module:
        """A copy of a peer's model, for this peer: only under SampleLevel may others see it."""
        assert isinstance(self.transport, Peers)
        return self.transport.model(name)

    # -- rounds ---------------------------------------------------------------------------------------------------

    def fit(self) -> Result:
        """Distil until the rounds are done, or no peer can pay; ``Result.model`` is the student."""
        stopped: Literal["rounds", "budget"] = "rounds"
        rounds: list[Round] = []
        try:
            for number in range(1, self.rounds + 1):
                rounds.append(self._round(number))
                if self._on_round is not None:
                    self._on_round(rounds[-1])
        except Exhausted:
            stopped = "budget"
        epsilons = self._exchange.all_epsilons()
        adjacency = {SampleLevel: "add-remove", LocalLevel: "replace-one"}.get(type(self.unit))
        return Result(
            model=copy.deepcopy(self._student),
            rounds=tuple(rounds),
            stopped=stopped,
            epsilon=max(epsilons.values()),
            delta=self.unit.delta,
            unit=privacy_unit(self.unit),
            adjacency=adjacency or event_of(self.cohort, Terms(1.0), len(epsilons)).adjacency,
            client_epsilons=epsilons,
            ledger=self.ledger,
            client_ledgers={name: c.ledger for name, c in self._clients.items()} if self.ledger is None else {},
            noise_multiplier=self._noise(),
            bytes_up=sum(r.bytes_up for r in rounds),
            bytes_down=sum(r.bytes_down for r in rounds),
            seed=self.seed,
        )

    def _noise(self) -> float | dict[str, float]:
        if isinstance(self.transport, Peers) and not isinstance(self.unit, ClientLevel):
            return self.transport.noise()
        return self.noise_multiplier

    def _round(self, number: int) -> Round:
        began = time.monotonic()
        first, order = (number - 1) * self.queries, derive(self.seed, "queries")
        settings: dict[str, Any] = {"order": order, "first of queries": first, "queries": self.queries}
        lessons = torch.zeros(1)
        if self.feedback and self._released and number > 1:
            settings |= {"first of lessons": first - self.queries, "lessons": self.queries}
            rows = rows_of(order, first - self.queries, self.queries, len(self.public))
            lessons = probabilities(self._student, self.public[rows], self.distill.temperature).reshape(-1)
        answer = self._exchange.ask(self._question(settings), lessons)
        if answer.vector is not None:
            self._asked.append(rows_of(order, first, self.queries, len(self.public)))
            self._released.append(unscaled(answer.vector, self.classes))
            self._distil(number)
        epsilons = self._exchange.all_epsilons()
        return Round(
            number=number,
            cohort=answer.asked,
            accepted=answer.accepted,
            rejected=answer.rejected,
            epsilon=max(epsilons.values()),
            client_epsilons=epsilons,
            max_update_norm=answer.bound if isinstance(self.unit, ClientLevel) else None,
            noise_std=answer.noise_std,
            bytes_up=answer.bytes_up,
            bytes_down=answer.bytes_down,
            seconds=time.monotonic() - began,
        )

    def _question(self, settings: Mapping[str, Any]) -> Question:
        schema = predictions_schema(self.queries, self.classes)
        match self.unit:
            case ClientLevel(max_update_norm=bound):
                return Question("predict", schema, Bound(bound, Flat()), self.noise_multiplier, settings=settings)
            case SampleLevel():  # no part of the guarantee: no honest peer is longer
                return Question("predict", schema, Bound(1.0), settings=settings)
            case _:
                return Question("predict", schema, None, settings=settings)

    def _distil(self, number: int) -> None:
        """All that was released so far is learnt from again; an input that was asked twice counts twice."""
        rows, targets = torch.cat(self._asked), torch.cat(self._released)
        seeded = self.noise == "research"
        self._student.train()
        with torch.random.fork_rng(devices=[], enabled=seeded):
            if seeded:
                torch.manual_seed(derive(self.seed, "torch", number, "student"))
            generator = torch.Generator().manual_seed(derive(self.seed, "distil", number))
            learn(self._student, self._optimizer, self.public[rows], targets, self.distill, generator)
