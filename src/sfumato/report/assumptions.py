"""What the guarantee rests on, each item marked: checked by the library, declared by the user, or unknown."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from .facts import RunFacts
from .words import number

Status = Literal["checked", "declared", "unknown"]


@dataclass(frozen=True)
class Assumption:
    """``status``: "checked" at run time, "declared" by the user and taken on trust, or "unknown"."""

    name: str
    status: Status
    text: str


def assumptions(facts: RunFacts) -> list[Assumption]:
    """Every assumption of the guarantee, strongest knowledge first."""
    found = [*_mechanism(facts), *_model(facts), *_data(facts), *_scope(facts)]
    return sorted(found, key=lambda a: ("checked", "declared", "unknown").index(a.status))


def _mechanism(facts: RunFacts) -> list[Assumption]:
    m, ledger = facts.mechanism, facts.ledger
    secure = m.noise_level == "secure"
    return [
        Assumption(
            "Sampling matches the accounting",
            "checked",
            f"The library drew every batch itself: each record takes part in a step with probability "
            f"{number(m.sample_rate)}, independently of all others. Sampler, noise and accounting come from one plan."
            if m.sampler == "poisson"
            else f"The library drew every batch itself ({m.sampler}); no amplification by sampling is claimed.",
        ),
        Assumption(
            "Each record's influence is bounded",
            "checked",
            f"At every step each record's gradient was clipped to norm {number(m.max_grad_norm)} over all trainable "
            "parameters; a gradient that bypassed clipping would have stopped the run.",
        ),
        Assumption(
            "Charged before release",
            "checked",
            f"{ledger.entries:,} ledger entries, each written to disk before its gradient was released; "
            f"the hash chain was verified and ends in {ledger.head[:16]}.",
        ),
        Assumption(
            "The noise cannot be predicted",
            "checked" if secure else "unknown",
            "AES-256 in counter mode, keyed by the operating system; no seed reaches noise or record selection."
            if secure
            else f"Noise level '{m.noise_level}': a research generator, not fit for production.",
        ),
        Assumption(
            "Exact arithmetic",
            "unknown",
            "The accounting assumes real numbers. Attacks that exploit floating-point rounding are not guaranteed "
            "against.",
        ),
    ]


def _model(facts: RunFacts) -> list[Assumption]:
    tiers = sorted({tier for _, tier in facts.mechanism.tiers})
    return [
        Assumption(
            "Records do not mix inside the model",
            "checked",
            "Every operation on a trainable parameter was captured with its batch axis while the model ran"
            + (f" (tier: {', '.join(tiers)})." if tiers else "."),
        ),
        *(
            [
                Assumption(
                    "The model's code carries nothing between records",
                    "declared",
                    "Truth values, sizes and whole numbers that Python reads off a batch, and lists or attributes that "
                    "the model keeps, are not followed.",
                )
            ]
            if facts.training.own_model
            else []
        ),
        Assumption(
            "The starting point does not depend on the training data",
            "declared" if facts.training.own_model else "checked",
            "The model came from user code; pre-trained weights are outside this guarantee."
            if facts.training.own_model
            else f"Built-in model, initialised from seed {facts.training.seed}.",
        ),
        Assumption(
            "The loss treats each record by itself",
            "declared",
            "The engine is told that the loss is the mean over the records drawn, and cannot check it: otherwise one "
            "record may move a step by up to 2 C. Here the loss is the command's own cross-entropy, a plain mean.",
        ),
        Assumption(
            "Last model, not best model",
            "checked",
            "The model saved is the last (or a fixed average); no selection by accuracy took place.",
        ),
    ]


def _data(facts: RunFacts) -> list[Assumption]:
    data, guarantee = facts.data, facts.guarantee
    found = [Assumption("Preprocessing", "checked", text) for text in data.checked]
    found += [Assumption("Preprocessing", "declared", text) for text in data.declared]
    found += [
        Assumption(
            "The size of the data set is public",
            "declared",
            f"The number of training records ({data.train_records:,}) sets the sampling rate and is not protected.",
        ),
        Assumption(
            "One person, one record",
            "declared",
            f"The unit protected is one {guarantee.unit}. Someone with k records is protected with a weaker guarantee.",
        ),
        Assumption(
            "Test records are separate",
            "declared",
            f"{data.test_records:,} test records were never drawn for training; that no training record is repeated "
            "among them is not checked.",
        ),
    ]
    limit = 1.0 / data.train_records
    if math.isfinite(guarantee.epsilon):
        small = guarantee.delta < limit
        found.append(
            Assumption(
                "δ is small enough",
                "checked" if small else "unknown",
                f"δ = {number(guarantee.delta)} is below 1/n = {number(limit)}."
                if small
                else f"δ = {number(guarantee.delta)} is not below 1/n = {number(limit)}: the guarantee would allow "
                "publishing a record at random. Choose a smaller --delta.",
            )
        )
    return found


def _scope(facts: RunFacts) -> list[Assumption]:
    ledger = facts.ledger
    return [
        Assumption(
            "Other trainings on these records",
            "declared" if ledger.shared else "unknown",
            f"ε includes the {ledger.earlier_entries:,} earlier entries of the shared ledger; that every training on "
            "these records is in it is taken on trust."
            if ledger.shared
            else "Not known to this run. Pass one --ledger to all runs on the same records to add them up.",
        ),
        Assumption(
            "Hyperparameters were chosen without these records",
            "unknown",
            "A search on the same records spends budget that this report does not see. The default recipes of digits "
            "and Fashion-MNIST were themselves chosen on training records.",
        ),
    ]
