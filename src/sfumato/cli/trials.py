"""The trials of a sweep, from options to a published folder."""

from __future__ import annotations

import math
import shlex
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from ..accounting import Event, compose, noise_multiplier
from ..data import DataSet
from ..errors import BudgetExceeded
from ..report.sweep import HTML_NAME, SweepFacts, Trial, statement, sweep_json, write_sweep
from .fitting import built, check_packages, device_for, fitted, load_data, warn
from .job import abandon, leftovers
from .loop import mean_loss
from .result import Result
from .run_folder import RunFolder, check_free
from .settings import Settings
from .spending import Spending

if TYPE_CHECKING:
    from jsonargparse import Namespace


def run_sweep(options: Namespace, argv: Sequence[str], values: Sequence[float], *, targets: bool) -> Result:
    """Train every trial that the budget pays for, then report and publish.

    An interruption after a trial ends the sweep with what it has. On any other failure ``--out`` does not exist, and
    a ledger that holds releases is kept beside it. Raises typed errors.
    """
    check_packages()
    out = Path(options.out)
    check_free(out)
    data, settings = load_data(options)
    warn("sweep", *data.warnings, *leftovers(out))
    device = device_for(settings.device)
    settings = replace(settings, epsilon=options.budget_epsilon, private_metrics=False)
    spending = Spending(settings.ledger)
    folder: RunFolder | None = None
    try:
        spending.refuse_spent(settings.epsilon, settings.delta)
        folder = RunFolder(out)
        spending.open(folder.path)
        plan = list(_planned(settings, data, values, options.repeats, targets=targets))
        trials, ended = _all(plan, settings, data, device, spending, folder)
        facts = _facts(trials, len(plan), ended, settings, data, spending, argv, out)
        write_sweep(facts, folder.path)
        spending.close()
        published = folder.publish()
    except BaseException as error:
        abandon(error, spending, folder)
        raise
    result = sweep_json(facts) | {
        "out": str(published),
        "report": str(published / HTML_NAME),
        "stopped_by_budget": ended is not None and ended != INTERRUPTED,
    }
    lines = [
        f"sigma {p['noise_multiplier']:.4g}: test accuracy {100 * p['accuracy']:.2f} %, test loss {p['loss']:.4f}, "
        f"epsilon {p['epsilon']:.4g} for one trial alone"
        for p in result["curve"]
    ]
    text = "\n".join(
        [*lines, *([f"Ended early: {ended}"] if ended else []), statement(facts), f"report: {result['report']}"]
    )
    return Result(result, text, ok=ended != INTERRUPTED)


INTERRUPTED = "interrupted."
_Planned = tuple[float, float | None, int]  # noise multiplier, the target it was made for, seed


def _planned(
    settings: Settings, data: DataSet, values: Sequence[float], repeats: int, *, targets: bool
) -> Iterator[_Planned]:
    """Every trial: the cheapest noise first, and all noise levels once before any is repeated."""
    sampled = _charge(settings, data, 1.0)
    ((event, steps),) = sampled.items()
    found: list[tuple[float, float | None]] = []
    for value in values:
        sigma = value
        if targets:
            sigma = noise_multiplier(
                target_epsilon=value, target_delta=settings.delta, sample_rate=event.sample_rate, steps=steps
            )
        found.append((sigma, value if targets else None))
    for repeat in range(repeats):
        for sigma, target in sorted(found, reverse=True):
            yield sigma, target, settings.seed + repeat


def _charge(settings: Settings, data: DataSet, sigma: float) -> dict[Event, int]:
    """What one whole trial will be charged."""
    batch, n = settings.recipe.batch_size, len(data.train)
    event = Event("poisson-gaussian", sigma, min(1.0, batch / n), "add-remove")
    return {event: settings.recipe.epochs * math.ceil(n / batch)}


def _all(
    plan: Sequence[_Planned],
    settings: Settings,
    data: DataSet,
    device: torch.device,
    spending: Spending,
    folder: RunFolder,
) -> tuple[list[Trial], str | None]:
    """(trials, why they ended before the plan did, or None). A trial that would exceed the budget is not begun."""
    trials: list[Trial] = []
    ledger = spending.open(folder.path)
    for number, (sigma, target, seed) in enumerate(plan, start=1):
        alone = _charge(settings, data, sigma)
        if settings.epsilon is not None:
            spent = dict(ledger.events())
            together = float(compose(spent | {e: spent.get(e, 0) + k for e, k in alone.items()}, delta=settings.delta))
            if together > settings.epsilon:
                ended = (
                    f"one more trial, with noise multiplier {sigma:.4g}, would bring epsilon to {together:.4g}, above "
                    f"the budget of {settings.epsilon:g}."
                )
                if not trials:
                    raise BudgetExceeded(ended, found=together, fix="raise --budget-epsilon or the noise.")
                return trials, ended
        print(f"trial {number} of {len(plan)}: sigma {sigma:.4g}", file=sys.stderr, flush=True)
        try:
            trials.append(
                _trial(replace(settings, noise_multiplier=sigma, seed=seed), target, data, device, spending, folder)
            )
        except KeyboardInterrupt:
            if not trials:
                raise
            return trials, INTERRUPTED
    return trials, None


def _trial(
    settings: Settings, target: float | None, data: DataSet, device: torch.device, spending: Spending, folder: RunFolder
) -> Trial:
    model = built(settings.recipe.model, settings.seed, data, device)
    with fitted(settings, data, model, device, spending.open(folder.path), None) as done:
        if done.engine.stopped and done.engine.steps < done.planned_steps:
            raise BudgetExceeded(
                "the budget ended a trial midway: another process charged the same ledger meanwhile.",
                fix="raise --budget-epsilon, or let one process use the ledger at a time.",
            )
        event, steps = done.engine.plan.event, done.engine.steps
        return Trial(
            noise_multiplier=done.engine.plan.noise_multiplier,
            target_epsilon=target,
            epsilon=float(compose({event: steps}, delta=settings.delta)),
            accuracy=done.metrics.epochs[-1].test_accuracy,
            loss=mean_loss(done.average.model, done.data.test, device),
            steps=steps,
            seed=settings.seed,
            seconds=done.seconds,
        )


def _facts(
    trials: Sequence[Trial],
    planned: int,
    ended: str | None,
    settings: Settings,
    data: DataSet,
    spending: Spending,
    argv: Sequence[str],
    out: Path,
) -> SweepFacts:
    entries = spending.verify()
    ledger = spending.open(out)
    total = ledger.epsilon(delta=settings.delta)
    return SweepFacts(
        trials=tuple(trials),
        planned=planned,
        ended=ended,
        epsilon=total.upper,
        lower=total.lower,
        delta=settings.delta,
        budget=settings.epsilon,
        model=settings.recipe.model,
        data=data.name,
        train_records=len(data.train),
        test_records=len(data.test),
        sample_rate=min(1.0, settings.recipe.batch_size / len(data.train)),
        ledger=str(spending.path) if spending.shared else spending.path.name,
        entries=entries,
        head=str(ledger.head),
        earlier_entries=spending.earlier_entries,
        command=shlex.join(["sfumato", *argv]),
        finished=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
    )
