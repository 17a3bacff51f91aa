"""A finished run -> the facts of its report and the result that is printed."""

from __future__ import annotations

import math
import shlex
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from ..accounting import compose
from ..report import (
    HTML_NAME,
    Data,
    Guarantee,
    LedgerFacts,
    Mechanism,
    RunFacts,
    Training,
    attack_sentence,
    meaning,
    meaning_json,
    plain_sentence,
    profile,
    trade_off,
)
from .fitting import Fitted
from .result import Result, finite
from .settings import Settings
from .spending import Spending


def facts_of(
    *,
    done: Fitted,
    record_shape: tuple[int, ...],
    settings: Settings,
    spending: Spending,
    device: torch.device,
    argv: Sequence[str],
    out: Path,
) -> RunFacts:
    """Everything the report states, taken from the run itself; the ledger's chain is verified here."""
    engine, data, metrics, planned_steps = done.engine, done.data, done.metrics, done.planned_steps
    plan, recipe = engine.plan, settings.recipe
    entries = spending.verify()
    ledger = spending.open(out)
    spent = ledger.events()
    bound = compose(spent, delta=settings.delta)
    private = math.isfinite(bound)
    return RunFacts(
        guarantee=Guarantee(
            epsilon=float(bound),
            lower=float(bound.lower),
            delta=settings.delta,
            unit=plan.event.unit,
            adjacency=plan.adjacency,
        ),
        meaning=meaning(spent, delta=settings.delta),
        mechanism=Mechanism(
            noise_multiplier=plan.noise_multiplier,
            max_grad_norm=plan.max_grad_norm,
            sample_rate=plan.sample_rate,
            expected_batch_size=float(plan.expected_batch_size),
            steps=engine.steps,
            planned_steps=planned_steps,
            steps_per_epoch=plan.steps_per_epoch,
            sampler=plan.event.sampler,
            noise_level=plan.noise_level,
            tiers=tuple(engine.tiers.items()),
        ),
        training=Training(
            model=recipe.model,
            parameters=sum(p.numel() for p in done.model.parameters() if p.requires_grad),
            optimizer=recipe.optimizer,
            lr=recipe.lr,
            lr_schedule=recipe.lr_schedule,
            momentum=recipe.momentum,
            batch_size=recipe.batch_size,
            max_physical_batch_size=recipe.max_physical_batch_size,
            epochs=recipe.epochs,
            averaging=recipe.averaging,
            seed=settings.seed,
            device=str(device),
            seconds=done.seconds,
            stopped_by_budget=engine.stopped and engine.steps < planned_steps,
            own_model=":" in recipe.model,
        ),
        data=Data(
            name=data.name,
            train_records=len(data.train),
            test_records=len(data.test),
            record_shape=record_shape,
            classes=len(data.classes),
            checked=data.checked,
            declared=data.declared,
            warnings=data.warnings,
        ),
        ledger=LedgerFacts(
            path=str(spending.path) if spending.shared else spending.path.name,
            entries=entries,
            head=str(ledger.head),
            shared=spending.shared,
            earlier_entries=spending.earlier_entries,
            earlier_epsilon=float(compose(spending.earlier, delta=settings.delta)),
        ),
        accuracy=metrics.epochs[-1].test_accuracy,
        steps=tuple(metrics.steps),
        epochs=tuple(metrics.epochs),
        epsilon_at=profile(spent) if private else (),
        trade_off=trade_off(spent) if private else (),
        private_metrics=settings.private_metrics,
        versions=versions(),
        command=shlex.join(["sfumato", *argv]),
        finished=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
    )


def result_of(facts: RunFacts, folder: Path, model_name: str) -> Result:
    """The JSON object and the short summary for people."""
    guarantee, mechanism = facts.guarantee, facts.mechanism
    report = folder / HTML_NAME
    data = {
        "epsilon": finite(guarantee.epsilon),
        "delta": guarantee.delta,
        "accuracy": facts.accuracy,
        "steps": mechanism.steps,
        "report": str(report),
        "private": math.isfinite(guarantee.epsilon),
        **meaning_json(facts.meaning),
        "noise_multiplier": mechanism.noise_multiplier,
        "sample_rate": mechanism.sample_rate,
        "max_grad_norm": mechanism.max_grad_norm,
        "stopped_by_budget": facts.training.stopped_by_budget,
        "seconds": round(facts.training.seconds, 3),
        "seed": facts.training.seed,
        "model": str(folder / model_name),
        "out": str(folder),
    }
    stopped = ", ended by the budget" if facts.training.stopped_by_budget else ""
    text = (
        f"{facts.training.model} on {facts.data.name}: test accuracy {100 * facts.accuracy:.2f} % after "
        f"{mechanism.steps:,} steps{stopped} ({facts.training.seconds:.1f} s, sigma {mechanism.noise_multiplier:.4g})\n"
        f"{plain_sentence(guarantee)}\n"
        f"{attack_sentence(guarantee, facts.meaning)}\n"
        f"report: {report}"
    )
    return Result(data, text)


def versions() -> tuple[tuple[str, str], ...]:
    """((package, version), …) of what a result depends on."""
    found = []
    for name in ("sfumato", "torch", "numpy", "scipy", "cryptography"):
        try:
            found.append((name, version(name)))
        except PackageNotFoundError:
            continue
    return tuple(found)
