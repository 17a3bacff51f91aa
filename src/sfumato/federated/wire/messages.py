"""What crosses the wire: a task from the server to a client, and its reply. Plain data, the same on every transport."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

Kind = Literal["train", "score", "measure", "count", "predict"]
KINDS: tuple[str, ...] = get_args(Kind)
Scalar = bool | int | float | str
Arrays = Mapping[str, NDArray[Any]]


@dataclass(frozen=True, eq=False)
class Task:
    """One question to one cohort.

    Args:
        run, round, nonce: name this question; a reply repeats them, so late and replayed replies are recognised. The
            three together are used once, also after a restart of the server.
        kind: ``train`` (answer: an update of the trained parameters), ``score`` (how much each parameter tensor
            matters), ``measure`` (correct answers on the client's validation records, and how many there are),
            ``count`` (records by class) or ``predict`` (class scores for public inputs).
        base: hash of ``vector`` (:func:`.schema.digest`).
        schema: hash of the :class:`.schema.Schema` of the answer.
        vector: (d,) float32, the candidate parameters of the global model: a client needs to remember nothing.
        index: positions of ``vector`` that are trained, (k,) int64, sorted; None: all. The answer has k numbers then.
        settings: public numbers of this round, the same for the whole cohort.
    """

    run: str
    round: int
    nonce: str
    kind: Kind
    base: str
    schema: str
    vector: NDArray[np.float32]
    index: NDArray[np.int64] | None = None
    settings: Mapping[str, Scalar] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Reply:
    """A client's answer, unchecked: ``arrays`` is what its codec sent; ``error`` says why there is none.

    ``done``: the client's own budget allows no further answer. ``epsilon``: what it has spent by its own ledger, a
    function of public numbers; None where the server keeps the only ledger. Losses, norms and record
    counts are not sent: no mechanism pays for them.
    """

    client: str
    run: str
    round: int
    nonce: str
    base: str
    schema: str
    arrays: Arrays = field(default_factory=dict)
    error: str | None = None
    done: bool = False
    epsilon: float | None = None
