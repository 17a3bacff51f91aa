"""One question to one cohort, and what is released of the answers: drawn, charged, asked, checked, clipped, noised.

The order is the guarantee. A server keeps the ledger of ClientLevel and Distributed; under SampleLevel and LocalLevel
each client has charged what it sends, and everything here is post-processing.
"""

from __future__ import annotations

import logging
import secrets
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType

import numpy as np
import torch
from torch import Tensor

from sfumato.accounting import Event, Reservation
from sfumato.clipping import gradient_multiplier
from sfumato.errors import BudgetExceeded

from .accounts import Accounts
from .client.participant import Client
from .cohorts import Cohort, Drawn, History, PoissonCohort, Terms, draw, event_of
from .contributions import Bound, Rejected, Sum, check_envelope, well_formed
from .secure import masked
from .secure.encoding import Residues
from .secure.secure_sum import Void
from .seeds import derive, stream
from .transport import Transport
from .units import Distributed, Unit
from .wire.compression import Codec
from .wire.messages import Kind, Reply, Scalar, Task
from .wire.schema import Schema, digest

LOG = logging.getLogger("sfumato")


@dataclass(frozen=True)
class Question:
    """What is asked, and how its answers are bounded.

    bound: C of one client's answer; under SampleLevel a limit against broken clients, or None. noise_multiplier: of the
    sum (ClientLevel, Distributed). count_noise: also release how many were within C, with this much noise; the two
    together cost ``noise_multiplier``.
    """

    kind: Kind
    schema: Schema
    bound: Bound | None
    noise_multiplier: float | None = None
    count_noise: float | None = None
    adaptive: bool = False
    codec: Codec | None = None
    settings: Mapping[str, Scalar] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Answer:
    """What came of a question: ``vector`` (d,) float32 is the released mean, None if nothing was released.

    ``replies``: of SampleLevel and LocalLevel clients, on request, each private by itself.
    """

    vector: Tensor | None
    asked: int
    accepted: int
    rejected: Mapping[str, int]
    bound: float | None
    noise_std: float | None
    fraction: float | None
    bytes_up: int
    bytes_down: int
    replies: Mapping[str, Tensor] = field(default_factory=dict)


class Exhausted(Exception):
    """No client's budget allows the question."""


class Exchange:
    """The server's end of a federation: who is enrolled, what they spent, which round it is.

    Guarantee (ClientLevel): adding or removing one client changes what is summed by at most C; the noise is z·C for
    that same C, for the cohort that was declared and not for the replies; the ledger held the event before any client
    was asked. Run, round and nonce name a question once, also after a restart.
    """

    def __init__(
        self,
        transport: Transport,
        *,
        unit: Unit,
        cohort: Cohort,
        weights: Mapping[str, float],
        accounts: Accounts | None,
        terms: Mapping[str, Terms],
        scales: Mapping[str, float],
        noise: str,
        seed: int,
        deadline: float | None,
        run: str,
        frozen: str = "",
        here: Mapping[str, Client] | None = None,
    ):
        self.frozen, self._here = frozen, dict(here or {})
        self.transport, self.unit, self.cohort, self.run = transport, unit, cohort, run
        self.accounts, self.noise, self.seed, self.deadline = accounts, noise, seed, deadline
        self._weights, self._terms, self._scales = weights, terms, scales
        self.number = 0
        self.history = History()
        self.done: set[str] = set()
        self.epsilons: dict[str, float] = dict.fromkeys(transport.clients(), 0.0)
        self.epsilons = self.all_epsilons()  # what clients spent before counts, also of those who are never asked

    # -- who ------------------------------------------------------------------------------------------------------

    def live(self, question: Question) -> list[str]:
        """Clients whose budget allows the question."""
        enrolled = [c for c in self.transport.clients() if c not in self.done]
        if self.accounts is None:
            return enrolled
        if isinstance(self.unit, Distributed):
            masked_event = self._masked_event(question, self._declared(len(enrolled)))
            return self.accounts.affordable(enrolled, lambda _: masked_event)
        terms, population = self._noised(question), len(enrolled)
        events: dict[Terms, Event] = {}

        def event(client: str) -> Event:
            own = terms[client]
            if own not in events:
                events[own] = event_of(self.cohort, own, population, adaptive=question.adaptive)
            return events[own]

        while True:  # a smaller population is drawn from at a higher rate, which more of them may not afford
            found = self.accounts.affordable(enrolled, event)
            if len(found) == population:
                return found
            enrolled, population = found, len(found)
            events.clear()
            if not found:
                return []

    def _noised(self, question: Question) -> Mapping[str, Terms]:
        z = question.noise_multiplier or 0.0
        return {c: Terms(z / self._scales[c], self._terms[c].rate) for c in self._terms}

    def _declared(self, enrolled: int) -> int:
        return enrolled if isinstance(self.cohort, PoissonCohort) else min(self.cohort.size, enrolled)

    def _masked_event(self, question: Question, clients: int) -> Event:
        assert isinstance(self.unit, Distributed)
        assert question.bound is not None
        assert question.noise_multiplier is not None
        plan = masked.plan_of(
            self.unit, question.schema.size, max(1, clients), question.bound.max_norm, question.noise_multiplier
        )
        return replace(plan.event(), adaptive=question.adaptive)

    # -- one round ------------------------------------------------------------------------------------------------

    def ask(self, question: Question, vector: Tensor, index: Tensor | None = None, *, keep: bool = False) -> Answer:
        """Raises :class:`Exhausted` before anything is charged if no client can pay."""
        live, rested = self.live(question), dict(self.history.last)
        if not live:
            raise Exhausted
        number = self.number = self.number + 1
        drawn = draw(
            self.cohort,
            live,
            self._noised(question),
            self._weights,
            number=number,
            history=self.history,
            uniform=stream(self.noise, self.seed, "cohort", number).uniform,
            adaptive=question.adaptive,
        )
        settings = dict(question.settings)
        if isinstance(self.unit, Distributed):
            charges = ((self._masked_event(question, len(drawn.ids)), drawn.ids),) if drawn.ids else ()
            drawn = replace(drawn, charges=charges)
            settings |= masked.settings(drawn.ids, derive(self.seed, "rotation", question.kind, number))
        try:
            reserved = self._charge(question, drawn, number)
        except BudgetExceeded:  # others charge the same ledger: nobody was asked, so that all is drawn again
            if self.accounts is None or not self.accounts.refresh():
                raise Exhausted from None
            self.history.last = rested
            return self.ask(question, vector, index, keep=keep)
        task = Task(
            run=self.run,
            round=number,
            nonce=secrets.token_hex(16),
            kind=question.kind,
            base=digest(vector, self.frozen),
            schema=question.schema.digest,
            vector=vector.numpy().astype(np.float32),
            index=None if index is None else index.numpy(),
            settings=MappingProxyType(settings),
        )
        if isinstance(self.unit, Distributed):
            answer = self._collect_masked(question, task, drawn, reserved)
        else:
            answer = self._collect(question, task, drawn, keep)
        if drawn.ids and not answer.accepted:  # for whoever runs the server
            LOG.warning(
                "round %d: none of the clients asked gave a usable answer (%s)",
                number,
                dict(answer.rejected) or "silence",
            )
        return answer

    def _charge(self, question: Question, drawn: Drawn, number: int) -> list[Reservation]:
        if self.accounts is None:
            return []
        note, reserve = f"noise: {self.noise}; {question.kind}", isinstance(self.unit, Distributed)
        return self.accounts.charge(drawn.charges, number, note, reserve=reserve)

    def _heard_from(self, task: Task, drawn: Drawn) -> Iterator[Reply]:
        """Replies that are at least of the right type: a hostile one must not end the round."""
        for reply in self.transport.ask(task, drawn.ids, deadline=self.deadline):
            if well_formed(reply):
                yield reply

    def _collect_masked(self, question: Question, task: Task, drawn: Drawn, reserved: Sequence[Reservation]) -> Answer:
        """The sum of masked messages; with too few of them nothing is unmasked, and the charge is given back."""
        assert isinstance(self.unit, Distributed)
        assert question.bound is not None
        assert question.noise_multiplier is not None
        size, bound, z = question.schema.size, question.bound.max_norm, question.noise_multiplier
        messages: dict[str, Residues] = {}
        rejected: Counter[str] = Counter()
        for reply in self._heard_from(task, drawn):
            try:
                check_envelope(reply, task, frozenset(drawn.ids))
                message = masked.message_of(self.unit, task, size, bound, z, reply.arrays)
                if reply.client in messages:
                    raise Rejected("second reply")
                messages[reply.client] = message
            except Rejected as outcome:
                rejected[outcome.reason] += 1
        vector, std = None, None
        try:
            if drawn.ids:
                total, std = masked.total(self.unit, task, size, bound, z, messages)
                for reservation in reserved:
                    reservation.use()
                vector = total / len(messages)
        except Void:
            rejected["void"] += 1
            for reservation in reserved:
                reservation.close()
            assert self.accounts is not None
            self.accounts.forget(drawn.charges)
        up = sum(message.nbytes for message in messages.values())
        down = (task.vector.nbytes + (0 if task.index is None else task.index.nbytes)) * len(drawn.ids)
        return Answer(
            vector, len(drawn.ids), len(messages), MappingProxyType(dict(rejected)), bound, std, None, up, down
        )

    def _collect(self, question: Question, task: Task, drawn: Drawn, keep: bool) -> Answer:
        total = Sum(question.schema, question.bound)
        cohort, replies = frozenset(drawn.ids), {}
        for reply in self._heard_from(task, drawn):
            client = reply.client if reply.client in cohort else None
            weight, scale = (1.0, 1.0) if client is None else (self._weights[client], self._scales[client])
            before = total.total.clone() if keep else None
            heard = total.add(reply, task, cohort, question.codec, weight=weight, scale=scale)
            if client is not None and (reply.nonce, reply.round) == (task.nonce, task.round):
                self._heard(client, reply.epsilon, reply.done)
            if before is not None and heard and weight > 0:
                replies[reply.client] = (total.total - before) / weight
        down = (task.vector.nbytes + (0 if task.index is None else task.index.nbytes)) * len(drawn.ids)
        vector, std, fraction = self._release(question, total, drawn, task.round)
        bound = None if question.bound is None else question.bound.max_norm
        counts = MappingProxyType(dict(total.rejected))
        return Answer(
            vector, len(drawn.ids), len(total.accepted), counts, bound, std, fraction, total.bytes, down, replies
        )

    def _heard(self, client: str, epsilon: object, done: object) -> None:
        """What a client says of its own ledger; it can only end its own part."""
        if done is True:
            self.done.add(client)
        if isinstance(epsilon, float) and epsilon >= self.epsilons[client]:
            self.epsilons[client] = epsilon

    def _release(
        self, question: Question, total: Sum, drawn: Drawn, number: int
    ) -> tuple[Tensor | None, float | None, float | None]:
        if self.accounts is None:
            mean = (total.total / total.weight).float() if total.weight > 0 else None
            return mean, None, None
        assert question.bound is not None
        assert question.noise_multiplier is not None
        origin = stream(self.noise, self.seed, question.kind, number, "server")
        z, count_noise = question.noise_multiplier, question.count_noise
        fraction = None
        if count_noise is not None:
            drawn_noise = float(origin.normal((1,), std=count_noise, dtype=torch.float64))
            expected = drawn.expected * self._share_of_votes()
            fraction = (total.votes + drawn_noise) / expected + 0.5 if expected > 0 else None
            z = gradient_multiplier(z, count_noise)
        std = z * question.bound.max_norm
        # Rounding comes after the noise: that of a long sum would be one more thing a client moves.
        noised = total.total + origin.normal((len(total.total),), std=std)
        return ((noised / drawn.expected).float() if drawn.expected > 0 else None), std, fraction

    def _share_of_votes(self) -> float:
        """How much a mean vote on the bound weighs, over what a mean update does: public."""
        chances = {c: weight * self._terms[c].rate for c, weight in self._weights.items()}
        return sum(chance * self._scales[c] for c, chance in chances.items()) / sum(chances.values())

    # -- what it cost ---------------------------------------------------------------------------------------------

    def epsilon(self, client: str) -> float:
        """What this client has spent so far."""
        if self.accounts is not None:
            return self.accounts.epsilon(client, self.unit.delta)
        return self.epsilons[client]

    def all_epsilons(self, *, heard: bool = False) -> dict[str, float]:
        """{client: what it has spent so far}, for everyone who is enrolled.

        ``heard``: all who were asked have said so. A client that is late has charged its ledger all the same.
        """
        found = {client: self.epsilon(client) for client in self.transport.clients()}
        if self.accounts is None and not heard:
            found |= {name: max(found[name], client.spent(self.unit.delta)) for name, client in self._here.items()}
        return found


__all__ = ["Answer", "Exchange", "Exhausted", "Question"]
