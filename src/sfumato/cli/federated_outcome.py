"""A finished federation -> the facts of its report and the result that is printed."""

from __future__ import annotations

import math
import shlex
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

from ..accounting import compose
from ..data import FederatedData
from ..report import (
    HTML_NAME,
    TRUST,
    Data,
    FederatedFacts,
    FederatedTraining,
    Federation,
    Guarantee,
    Ledgers,
    attack_sentence,
    client_range,
    costs,
    envelope,
    largest_meaning,
    meaning,
    meaning_json,
    plain_sentence,
    profile,
    trade_off,
)
from ..report.words import at_most
from .federated_books import Proof
from .federated_settings import FederatedSettings
from .outcome import versions
from .result import Result, finite

if TYPE_CHECKING:
    from .federated_job import Federated


def facts_of(
    done: Federated, *, settings: FederatedSettings, data: FederatedData, proof: Proof, argv: Sequence[str]
) -> FederatedFacts:
    """Everything the report states; ``data`` as it was loaded. ε is the largest over the clients."""
    result, recipe = done.result, settings.recipe
    bound = compose(proof.worst, delta=result.delta)
    private = math.isfinite(result.epsilon)
    asked = max(1.0, sum(row.cohort for row in done.metrics.rows) / len(done.metrics.rows))
    return FederatedFacts(
        guarantee=Guarantee(
            epsilon=result.epsilon,
            lower=min(float(bound.lower), result.epsilon),
            delta=result.delta,
            unit=result.unit,
            adjacency=next((event.adjacency for event in proof.worst), result.adjacency),
        ),
        meaning=largest_meaning([meaning(events, delta=result.delta) for events in proof.everyone], result.epsilon),
        federation=Federation(
            level=settings.level,
            clients=len(data.clients),
            partition=data.partition,
            natural=data.natural,
            public_records=0 if data.public is None else len(data.public),
            rounds=len(result.rounds),
            planned_rounds=recipe.rounds,
            stopped=result.stopped,
            cohort=settings.cohort.text,
            server=f"{recipe.server}, learning rate {recipe.server_lr:g}",
            train=settings.train.text,
            compression=settings.codec.text,
            allocation=settings.allocation,
            local=f"{recipe.local_epochs} epochs of SGD a round, batches of {recipe.batch_size}, learning rate "
            f"{recipe.lr:g}",
            norm=recipe.norm,
            noise_multiplier=proof.noise,
            noise_level=settings.noise,
            numbers=done.numbers,
            parameters=done.parameters,
            bytes_up=result.bytes_up,
            bytes_down=result.bytes_down,
            noise_to_update=_noise_to_update(settings.level, proof.noise[1], done.numbers, asked),
            amplified=any(event.sample_rate < 1.0 for event in proof.worst),
        ),
        training=FederatedTraining(recipe.model, settings.seed, "cpu", done.seconds, ":" in recipe.model),
        data=Data(
            name=data.data.name,
            train_records=sum(len(own) for own in data.clients.values()),
            test_records=len(data.data.test),
            record_shape=data.data.input_shape,
            classes=len(data.data.classes),
            checked=done.data.data.checked,
            declared=data.data.declared,
            warnings=data.data.warnings,
        ),
        ledgers=Ledgers(proof.path, proof.files, proof.entries, proof.head),
        accuracy=done.accuracy,
        baseline=done.baseline,
        client_epsilons=tuple(sorted(result.client_epsilons.items())),
        rounds=tuple(done.metrics.rows),
        epsilon_at=_epsilon_at(proof, result.epsilon, result.delta) if private else (),
        trade_off=envelope([trade_off(events) for events in proof.everyone]) if private else (),
        versions=versions(),
        command=shlex.join(["sfumato", *argv]),
        finished=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
    )


def federated_result(facts: FederatedFacts, folder: Path, model_name: str) -> Result:
    """The JSON object and the short summary for people."""
    guarantee, f = facts.guarantee, facts.federation
    report, clients = folder / HTML_NAME, client_range(facts)
    data = {
        "epsilon": finite(guarantee.epsilon),
        "delta": guarantee.delta,
        "accuracy": facts.accuracy,
        "rounds": f.rounds,
        "clients": f.clients,
        "unit": guarantee.unit,
        "level": f.level,
        "adjacency": guarantee.adjacency,
        "report": str(report),
        "private": math.isfinite(guarantee.epsilon),
        "baseline_accuracy": facts.baseline,
        "client_epsilon": {name: finite(value) for name, value in clients.items()},
        "bytes_up": f.bytes_up,
        "bytes_down": f.bytes_down,
        "stopped": f.stopped,
        **meaning_json(facts.meaning),
        "noise_multiplier": finite(f.noise_multiplier[1]),
        "noise": f.noise_level,
        "noise_to_update": None if f.noise_to_update is None else finite(f.noise_to_update),
        "trained_numbers": f.numbers,
        "public_records": f.public_records,
        "trust": TRUST[f.level],
        "seconds": round(facts.training.seconds, 3),
        "seed": facts.training.seed,
        "model": str(folder / model_name),
        "out": str(folder),
    }
    ended = {"rounds": "", "budget": ", ended by the budget", "converged": ", ended early"}[f.stopped]
    text = "\n".join(
        [
            f"{facts.training.model} on {facts.data.name}, {f.clients:,} clients ({f.level} level): test accuracy "
            f"{100 * facts.accuracy:.2f} % after {f.rounds:,} rounds{ended} ({facts.training.seconds:.1f} s)",
            plain_sentence(guarantee),
            f"Spent by clients: least {at_most(clients['min'])}, median {at_most(clients['median'])}, largest "
            f"{at_most(clients['max'])}.",
            attack_sentence(guarantee, facts.meaning),
            f"Who must be trusted: {TRUST[f.level]}",
            *costs(facts),
            f"report: {report}",
        ]
    )
    return Result(data, text)


def _epsilon_at(proof: Proof, epsilon: float, delta: float) -> tuple[tuple[float, float], ...]:
    """((δ, ε), …) for every client; ``epsilon`` holds for all at ``delta``, and so for every larger δ."""
    found = envelope([profile(events) for events in proof.everyone])
    return tuple((at, min(value, epsilon) if at >= delta else value) for at, value in found)


def _noise_to_update(level: str, noise: float, numbers: int, asked: float) -> float | None:
    """Expected length of the noise on a round's mean over the longest update: z√d/m, or z√(d/m) if each client adds."""
    if level == "sample":
        return None
    return noise * math.sqrt(numbers) / (math.sqrt(asked) if level == "local" else asked)
