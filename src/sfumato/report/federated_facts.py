"""What the report of a federation is made from: plain, frozen records."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from .facts import Data, Guarantee, Meaning

Level = Literal["sample", "client", "local", "distributed"]


@dataclass(frozen=True)
class RoundRow:
    """One round. ``cohort``: asked, ``accepted``: whose reply counted, ``rejected``: ((reason, count), …).

    ``epsilon``: largest over all clients so far; ``client_*``: over the enrolled clients; ``noise_std``: of each number
    of the released sum; ``measure``: validation accuracy that was paid for; ``test_accuracy``: of common test records.
    """

    round: int
    cohort: int
    accepted: int
    rejected: tuple[tuple[str, int], ...]
    epsilon: float
    client_min: float
    client_median: float
    client_max: float
    max_update_norm: float | None
    noise_std: float | None
    bytes_up: int
    bytes_down: int
    seconds: float
    measure: float | None
    test_accuracy: float | None


@dataclass(frozen=True)
class Federation:
    """Who took part, how they were asked and what they sent.

    ``level``: whose privacy is protected and who adds the noise; ``cohort``, ``server``, ``train``, ``compression``,
    ``allocation``: as on the command line; ``norm``: bound on one record's gradient or one client's update;
    ``noise_multiplier``: (least, largest) over clients; ``numbers``: sent by a client in a round; ``noise_to_update``:
    expected length of the noise on a mean update over the longest update there can be, None where clients' own steps
    are noised.
    """

    level: Level
    clients: int
    partition: str
    natural: bool
    public_records: int
    rounds: int
    planned_rounds: int
    stopped: str
    cohort: str
    server: str
    train: str
    compression: str
    allocation: str
    local: str
    norm: float
    noise_multiplier: tuple[float, float]
    noise_level: str
    numbers: int
    parameters: int
    bytes_up: int
    bytes_down: int
    noise_to_update: float | None
    amplified: bool


@dataclass(frozen=True)
class FederatedTraining:
    """``own_model``: whether the model came from user code; ``seconds``: wall time, evaluation included."""

    model: str
    seed: int
    device: str
    seconds: float
    own_model: bool


@dataclass(frozen=True)
class Ledgers:
    """``path``: the file, or the folder of one file for each client; ``head``: of the ledger that proves ε."""

    path: str
    files: int
    entries: int
    head: str


@dataclass(frozen=True)
class FederatedFacts:
    """Everything one report needs.

    ``guarantee``: of the client that spent most; ``meaning``, ``trade_off``, ``epsilon_at``: as in ``RunFacts``, the
    worst of each number over clients, the curves empty where nothing is guaranteed; ``accuracy``: of the result on
    common test records, ``baseline``: of the model that the rounds began from, which public records alone made;
    ``client_epsilons``: ((client, ε), …).
    """

    guarantee: Guarantee
    meaning: Meaning
    federation: Federation
    training: FederatedTraining
    data: Data
    ledgers: Ledgers
    accuracy: float
    baseline: float
    client_epsilons: tuple[tuple[str, float], ...]
    rounds: tuple[RoundRow, ...]
    epsilon_at: tuple[tuple[float, float], ...]
    trade_off: tuple[tuple[float, float], ...]
    versions: tuple[tuple[str, str], ...]
    command: str
    finished: str
