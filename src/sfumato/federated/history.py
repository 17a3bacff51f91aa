"""What a federation shows of itself: one line a round, and the result."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from torch import nn

from sfumato.accounting import Ledger

Stopped = Literal["rounds", "budget", "converged"]


@dataclass(frozen=True)
class Round:
    """One round of training.

    Public: ``number``, ``epsilon``, ``client_epsilons``, ``max_update_norm``, ``noise_std``, ``measure``,
    ``bytes_down`` per client. The others count who was drawn and who answered, and are for whoever runs the server:
    where the draw is a secret that amplifies (ClientLevel), the guarantee does not cover their publication. Under
    Distributed ``noise_std`` tells how many answered, too.

    ``cohort``: clients asked; ``rejected``: {reason: replies}. ``epsilon``: the largest over clients by now, and
    ``client_epsilons`` that of each; both upper bounds. ``max_update_norm``, ``noise_std``: C and the noise on the sum,
    where the server adds it. ``measure``: released accuracy on validation records.
    """

    number: int
    cohort: int
    accepted: int
    rejected: Mapping[str, int]
    epsilon: float
    client_epsilons: Mapping[str, float]
    max_update_norm: float | None
    noise_std: float | None
    bytes_up: int
    bytes_down: int
    seconds: float
    measure: float | None = None


@dataclass(frozen=True)
class Result:
    """``model`` is plain, and its state after the last round; ``epsilon`` the largest over clients.

    ``stopped``: "rounds" (all were done), "budget" (no client can pay for another) or "converged" (the measure did not
    improve). ``noise_multiplier``: of each round before ``allocation``; by client where they differ.
    """

    model: nn.Module
    rounds: tuple[Round, ...]
    stopped: Stopped
    epsilon: float
    delta: float
    unit: str
    adjacency: str
    client_epsilons: Mapping[str, float]
    ledger: Ledger | None
    client_ledgers: Mapping[str, Ledger]
    noise_multiplier: float | Mapping[str, float]
    bytes_up: int
    bytes_down: int
    seed: int
