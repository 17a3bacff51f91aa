"""One training job, from options to a published run folder."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from ..data import DataSet
from ..report import RunFacts, write
from .fitting import built, check_packages, device_for, fitted, load_data, warn
from .outcome import facts_of, result_of
from .result import Result
from .run_folder import RunFolder, abandoned, check_free
from .settings import Settings
from .spending import Spending

if TYPE_CHECKING:
    from jsonargparse import Namespace

MODEL_NAME = "model.safetensors"


def run_job(options: Namespace, argv: Sequence[str]) -> Result:
    """Train, report, publish.

    On any failure ``--out`` does not exist. If gradients had been released by then, the ledger, and only the ledger,
    is kept beside it and named in the error, because what was spent stays spent. Raises typed errors.
    """
    check_packages()
    out = Path(options.out)
    check_free(out)
    data, settings = load_data(options)
    warn("train", *data.warnings, *leftovers(out))
    device = device_for(settings.device)
    model = built(settings.recipe.model, settings.seed, data, device)
    spending = Spending(settings.ledger)
    folder: RunFolder | None = None
    try:
        spending.refuse_spent(settings.epsilon, settings.delta)
        folder = RunFolder(out)
        facts = _train(settings, data, model, device, spending, folder, argv)
        spending.close()
        published = folder.publish()
    except BaseException as error:
        abandon(error, spending, folder)
        raise
    return result_of(facts, published, MODEL_NAME)


def abandon(error: BaseException, spending: Spending, folder: RunFolder | None) -> None:
    """Leave nothing behind but a ledger that holds releases, and say in ``error`` where that is."""
    spent = spending.close()
    kept = folder.abandon(keep_ledger=spent) if folder else None
    if spent:
        error.add_note(f"Privacy had been spent by then; it is recorded in {kept or spending.path} (see --ledger).")


def leftovers(out: Path) -> list[str]:
    """Warnings about ledgers of killed runs to the same ``out``."""
    return [f"a killed run left its ledger, and what it spent, in {path}" for path in abandoned(out)]


def _train(
    settings: Settings,
    data: DataSet,
    model: nn.Module,
    device: torch.device,
    spending: Spending,
    folder: RunFolder,
    argv: Sequence[str],
) -> RunFacts:
    with fitted(settings, data, model, device, spending.open(folder.path), folder.path) as done:
        facts = facts_of(
            done=done,
            record_shape=data.input_shape,
            settings=settings,
            spending=spending,
            device=device,
            argv=argv,
            out=folder.out,
        )
    from safetensors.torch import save_model

    save_model(done.saved, str(folder.path / MODEL_NAME))
    write(facts, folder.path)
    return facts
