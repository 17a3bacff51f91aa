"""What a report is made from: plain, frozen records, filled by whoever ran the training."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Guarantee:
    """``epsilon``: certified upper bound (``inf``: no guarantee), ``lower``: certified lower bound of the true ε."""

    epsilon: float
    lower: float
    delta: float
    unit: str
    adjacency: str


@dataclass(frozen=True)
class Meaning:
    """What (ε, δ) rules out; every number is an upper bound.

    ``advantage``: of any membership attack, detection less false alarms; ``detection``: ((false-alarm rate, highest
    detection rate), …) of any attack, from the whole δ(ε) curve. ``unamplified``: ε of the same releases if nobody
    gained from random batches (each record once an epoch), None where no sampling is counted on. ``groups``: ((k, ε),
    …) for k units together at the same δ.
    """

    advantage: float
    detection: tuple[tuple[float, float], ...]
    unamplified: float | None
    groups: tuple[tuple[int, float], ...]


@dataclass(frozen=True)
class Mechanism:
    """The plan that sampler, noise and accounting event were all derived from.

    ``noise_multiplier``: standard deviation of the noise on the clipped sum over ``max_grad_norm``;
    ``sample_rate``: chance of each record to be in one step; ``steps``: releases made, ``planned_steps``: intended.
    """

    noise_multiplier: float
    max_grad_norm: float
    sample_rate: float
    expected_batch_size: float
    steps: int
    planned_steps: int
    steps_per_epoch: int
    sampler: str
    noise_level: str
    tiers: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Training:
    """How the model was trained; ``seconds``: wall time of training, evaluation included."""

    model: str
    parameters: int
    optimizer: str
    lr: float
    lr_schedule: str
    momentum: float
    batch_size: int
    max_physical_batch_size: int | None
    epochs: int
    averaging: str
    seed: int
    device: str
    seconds: float
    stopped_by_budget: bool
    own_model: bool


@dataclass(frozen=True)
class Data:
    """``checked`` and ``declared``: sentences about preprocessing; ``warnings``: what limits trust or accuracy."""

    name: str
    train_records: int
    test_records: int
    record_shape: tuple[int, ...]
    classes: int
    checked: tuple[str, ...]
    declared: tuple[str, ...]
    warnings: tuple[str, ...]


@dataclass(frozen=True)
class LedgerFacts:
    """``shared``: the ledger was given and may hold other runs; ``earlier_epsilon``: spent before this run."""

    path: str
    entries: int
    head: str
    shared: bool
    earlier_entries: int
    earlier_epsilon: float


@dataclass(frozen=True)
class StepRow:
    """One release. ``loss``, ``train_accuracy``, ``clip_rate``: un-noised, None where they were left out."""

    step: int
    epoch: int
    epsilon: float | None
    loss: float | None
    train_accuracy: float | None
    clip_rate: float | None


@dataclass(frozen=True)
class EpochRow:
    """ε and test accuracy of the model as they stood after ``step`` releases."""

    step: int
    epoch: int
    epsilon: float
    test_accuracy: float


@dataclass(frozen=True)
class RunFacts:
    """Everything one report needs.

    ``epsilon_at``: ((δ, ε), …) of the same run for other δ; ``trade_off``: ((false-alarm rate, highest detection
    rate), …), the whole curve. Both are empty where nothing is guaranteed.
    """

    guarantee: Guarantee
    meaning: Meaning
    mechanism: Mechanism
    training: Training
    data: Data
    ledger: LedgerFacts
    accuracy: float
    steps: tuple[StepRow, ...]
    epochs: tuple[EpochRow, ...]
    epsilon_at: tuple[tuple[float, float], ...]
    trade_off: tuple[tuple[float, float], ...]
    private_metrics: bool
    versions: tuple[tuple[str, str], ...]
    command: str
    finished: str
