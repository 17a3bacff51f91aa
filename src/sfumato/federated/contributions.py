"""From a reply to what it adds to the sum: checked in a fixed order, then clipped. Everything fails closed."""

from __future__ import annotations

import math
import sys
from collections import Counter
from collections.abc import Container, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from sfumato.clipping import Clip, Flat, groups_of, weights
from sfumato.errors import ConfigurationError, DataError

from .wire.compression import Codec, decode, nbytes
from .wire.messages import Reply, Task
from .wire.schema import Schema

BLOCK = 1 << 16  # a float64 copy of a whole vector costs more than all that is computed with it


class Rejected(Exception):
    """This reply contributes nothing; ``reason`` is one of a few words, and names no client."""

    def __init__(self, reason: str) -> None:
        self.reason = reason
        super().__init__(reason)


def vector_of(reply: Reply, task: Task, cohort: Container[str], schema: Schema, codec: Codec | None) -> Tensor:
    """The (d,) float32 vector that ``reply`` brings, all finite.

    Checks in this order: the client is in the cohort; run, round and nonce are those of the task (late and replayed
    replies are not); it started from the same base; it means the same parameters; the payload is exactly what the codec
    sends; every number is finite. Raises :class:`Rejected` at the first that fails.
    """
    check_envelope(reply, task, cohort)
    try:
        vector = decode(codec, reply.arrays, schema.size, task.round, copy=False)
    except DataError:
        raise Rejected("malformed") from None
    if not np.isfinite(vector.numpy()).all():
        raise Rejected("not finite")
    return vector


def well_formed(reply: object) -> bool:
    """Whether the fields of a reply have the types that they should; what they say is checked afterwards."""
    if not isinstance(reply, Reply) or type(reply.round) is not int:
        return False
    named = (reply.client, reply.run, reply.nonce, reply.base, reply.schema)
    return all(type(text) is str for text in named) and (reply.error is None or type(reply.error) is str)


def check_envelope(reply: Reply, task: Task, cohort: Container[str]) -> None:
    """All of :func:`vector_of` but the payload."""
    if not well_formed(reply) or reply.client not in cohort:
        raise Rejected("unknown client")
    if (reply.run, reply.round, reply.nonce) != (task.run, task.round, task.nonce):
        raise Rejected("other round")
    if reply.error is not None:
        raise Rejected("budget" if reply.error == "budget" else "client error")
    if reply.base != task.base:
        raise Rejected("other base")
    if reply.schema != task.schema:
        raise Rejected("other schema")


@dataclass(frozen=True)
class Bound:
    """C and how it is shared out: ‖clipped vector‖ <= ``max_norm``, whatever came in."""

    max_norm: float
    clip: Clip = field(default_factory=Flat)

    def factors(self, vector: Tensor, schema: Schema, scale: float = 1.0) -> tuple[Tensor, Tensor]:
        """(clip weight of each tensor of ``schema``, their squared norms), float64; all weights 0 if not finite.

        ``scale`` in (0, 1] lowers the bound for this vector.
        """
        group, _ = groups_of(self.clip, [name for name, _ in schema.entries])
        count = max(group) + 1
        if count == 1:
            squares = torch.tensor([[_square(vector)]], dtype=torch.float64)
        else:
            sizes = [math.prod(shape) for _, shape in schema.entries]
            parts = [_square(p) for p in vector.split(sizes)]
            squares = torch.zeros(count, 1, dtype=torch.float64)
            squares.index_add_(0, torch.tensor(group), torch.tensor(parts, dtype=torch.float64)[:, None])
        found = weights(self.clip, squares, self.max_norm * scale, torch.float64)[:, 0]
        return found[list(group)], squares[:, 0]


@dataclass
class Sum:
    """The running sum of one round, float64: order of arrival does not matter to 1e-15.

    Guarantee: each client adds at most once, a vector of norm at most ``bound.max_norm`` times its weight, which is in
    [0, 1]; so one client changes :attr:`total` by at most C, whatever it sent.
    ``votes``: Σ s·w·(1[within its bound] − ½) over who was counted, for a client of weight w and scale s: it moves by
    at most ½ for the same share of C by which ``total`` moves, so that both are paid for together.
    """

    schema: Schema
    bound: Bound | None
    total: Tensor = field(init=False)
    votes: float = 0.0
    weight: float = 0.0
    bytes: int = 0
    accepted: set[str] = field(default_factory=set)
    rejected: Counter[str] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        self.total = torch.zeros(self.schema.size, dtype=torch.float64)

    def add(
        self,
        reply: Reply,
        task: Task,
        cohort: Container[str],
        codec: Codec | None,
        *,
        weight: float = 1.0,
        scale: float = 1.0,
    ) -> bool:
        """Count ``reply`` in, or the reason why it is not; whether it was. ``scale``: lowers the bound for it."""
        if not (0.0 <= weight <= 1.0 and 0.0 < scale <= 1.0):
            raise ConfigurationError(f"weight={weight!r} and scale={scale!r} are not in [0, 1].", where="weights")
        try:
            vector = vector_of(reply, task, cohort, self.schema, codec)
            if reply.client in self.accepted:
                raise Rejected("second reply")
            self._add(vector, weight, scale)
        except Rejected as outcome:
            self.rejected[outcome.reason] += 1
            return False
        self.accepted.add(reply.client)
        self.weight += weight
        self.bytes += nbytes(reply.arrays)
        return True

    def _add(self, vector: Tensor, weight: float, scale: float) -> None:
        if self.bound is None:
            _accumulate(self.total, vector, weight)
            return
        if isinstance(self.bound.clip, Flat):
            square, bound = _square(vector), self.bound.max_norm * scale
            if (factor := _flat(square, bound)) == 0.0:
                raise Rejected("not finite")
            self.votes += weight * scale * ((square <= bound**2) - 0.5)
            _accumulate(self.total, vector, factor * weight)
            return
        factors, squares = self.bound.factors(vector, self.schema, scale)
        if not bool((factors > 0).all()):
            raise Rejected("not finite")
        within = bool(squares.sum() <= (self.bound.max_norm * scale) ** 2)
        self.votes += weight * scale * (within - 0.5)
        sizes = [math.prod(shape) for _, shape in self.schema.entries]
        pieces = zip(self.total.split(sizes), vector.split(sizes), factors.tolist(), strict=True)
        for total, piece, factor in pieces:
            _accumulate(total, piece, factor * weight)


def _flat(square: float, bound: float) -> float:
    """:func:`sfumato.clipping.weights` of one vector under :class:`Flat`, up to the last bit.

    For a small model its dozen tensor operations cost as much as a step of training.
    """
    eps, tiny = sys.float_info.epsilon, sys.float_info.min
    found = min(1.0, bound * (1 - 32 * eps) / max(math.sqrt(square), tiny))
    return found if math.isfinite(square) and found > tiny * 2.0**24 else 0.0


def _square(vector: Tensor) -> float:
    """‖vector‖², in float64; without BLAS, whose threads would fight with those of PyTorch."""
    numbers, found = vector.numpy(), 0.0
    for start in range(0, len(numbers), BLOCK):
        block = numbers[start : start + BLOCK].astype(np.float64)
        block *= block
        found += float(block.sum())
    return found


def _accumulate(total: Tensor, vector: Tensor, factor: float) -> None:
    into, numbers = total.numpy(), vector.numpy()
    for start in range(0, len(numbers), BLOCK):
        block = numbers[start : start + BLOCK].astype(np.float64)
        block *= factor
        into[start : start + BLOCK] += block


def weights_of(weights: dict[str, float] | None, clients: Sequence[str]) -> dict[str, float]:
    """{client: weight in [0, 1]}, fixed in advance and public; 1 for everyone by default."""
    if weights is None:
        return dict.fromkeys(clients, 1.0)
    found = {}
    for client in clients:
        value = weights.get(client)
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0.0 <= value <= 1.0:
            raise ConfigurationError(
                f"weights[{client!r}]={value!r} is not in [0, 1]: a larger one would move the sum by more than C.",
                found=value,
                where="weights",
                fix="divide all weights by the largest, once and for all; they are public.",
            )
        found[client] = float(value)
    if not any(found.values()):
        raise ConfigurationError("all weights are 0: nothing would be learned.", found=found, where="weights")
    return found
