"""One training job, from options to a published run folder."""

from __future__ import annotations

import importlib.util
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.utils.data import DataLoader

from ..accounting import Budget
from ..data import DataSet, Records, as_batch, load
from ..engine import PrivacyEngine
from ..errors import BudgetExceeded, ConfigurationError
from ..models import Features, build, extract
from ..report import RunFacts, write
from .averaging import Average
from .loop import train
from .metrics import Metrics
from .outcome import facts_of, result_of
from .recipes import recipe_for
from .result import Result
from .run_folder import RunFolder, abandoned, check_free
from .settings import Settings, complete
from .spending import Spending

if TYPE_CHECKING:
    from jsonargparse import Namespace

NEEDED = ("safetensors", "matplotlib", "jinja2", "tqdm")
MODEL_NAME = "model.safetensors"


def run_job(options: Namespace, argv: Sequence[str]) -> Result:
    """Train, report, publish.

    On any failure ``--out`` does not exist. If gradients had been released by then, the ledger, and only the ledger,
    is kept beside it and named in the error, because what was spent stays spent. Raises typed errors.
    """
    if missing := [name for name in NEEDED if importlib.util.find_spec(name) is None]:
        raise ConfigurationError(f"training needs {', '.join(missing)}.", fix="pip install 'sfumato[cli]'")
    out = Path(options.out)
    check_free(out)
    data, settings = _load(options)
    for warning in (*data.warnings, *_leftovers(out)):
        print(f"sfumato train: warning: {warning}", file=sys.stderr)
    device = _device(settings.device)
    torch.manual_seed(settings.seed)
    model = build(settings.recipe.model, data.input_shape, len(data.classes)).to(device)
    if not any(p.requires_grad for p in model.parameters()):
        raise ConfigurationError(f"model {settings.recipe.model} has no trainable parameter")
    spending = Spending(settings.ledger)
    folder: RunFolder | None = None
    try:
        spending.refuse_spent(settings.epsilon, settings.delta)
        folder = RunFolder(out)
        facts = _train(settings, data, model, device, spending, folder, argv)
        spending.close()
        published = folder.publish()
    except BaseException as error:
        spent = spending.close()
        kept = folder.abandon(keep_ledger=spent) if folder else None
        if spent:
            error.add_note(f"Privacy had been spent by then; it is recorded in {kept or spending.path} (see --ledger).")
        raise
    return result_of(facts, published, MODEL_NAME)


def _load(options: Namespace) -> tuple[DataSet, Settings]:
    data = load(
        options.data,
        label=options.label,
        bounds=options.bounds,
        test_fraction=options.test_fraction,
        image_size=options.image_size,
    )
    settings = complete(options, recipe_for(data.name, data.input_shape))
    if (batch := settings.recipe.batch_size) > len(data.train):
        if options.batch_size is not None:
            raise ConfigurationError(f"--batch-size {batch} is more than the {len(data.train)} training records")
        options.batch_size = max(1, len(data.train) // 4)  # a recipe's default must not refuse a small data set
        settings = complete(options, recipe_for(data.name, data.input_shape))
    return data, settings


def _train(
    settings: Settings,
    data: DataSet,
    model: nn.Module,
    device: torch.device,
    spending: Spending,
    folder: RunFolder,
    argv: Sequence[str],
) -> RunFacts:
    recipe = settings.recipe
    started = time.perf_counter()
    whole, (model, fed) = model, _feed(model, data, device)
    average = Average(model, recipe.averaging)
    optimizer = _optimizer(model, settings)
    engine = PrivacyEngine(ledger=spending.open(folder.path))
    with engine:
        model, optimizer, loader = _privatise(engine, model, optimizer, fed, settings)
        planned = recipe.epochs * engine.plan.steps_per_epoch
        with Metrics(folder.path, planned_steps=planned, private=settings.private_metrics) as metrics:
            train(
                engine=engine,
                model=model,
                optimizer=optimizer,
                loader=loader,
                average=average,
                test=fed.test,
                settings=settings,
                device=device,
                planned_steps=planned,
                metrics=metrics,
            )
        if engine.steps == 0:
            raise BudgetExceeded(
                f"epsilon = {settings.epsilon} at delta = {settings.delta:g} does not pay for a single step with noise "
                f"multiplier {engine.plan.noise_multiplier:g}.",
                fix="raise --epsilon or --noise-multiplier, or lower --batch-size.",
            )
        facts = facts_of(
            engine=engine,
            model=model,
            data=fed,
            record_shape=data.input_shape,
            settings=settings,
            spending=spending,
            metrics=metrics,
            planned_steps=planned,
            seconds=time.perf_counter() - started,
            device=device,
            argv=argv,
            out=folder.out,
        )
    from safetensors.torch import save_model

    saved = Features(whole.features, average.model) if isinstance(whole, Features) else average.model
    save_model(saved, str(folder.path / MODEL_NAME))
    write(facts, folder.path)
    return facts


def _feed(model: nn.Module, data: DataSet, device: torch.device) -> tuple[nn.Module, DataSet]:
    """What is trained, and on what: frozen features are computed once for each record."""
    if not isinstance(model, Features):
        return model, data
    train, test = (Records(extract(model.features, part.x, device), part.y) for part in (data.train, data.test))
    note = "A fixed feature map without trained parameters is applied to each record on its own."
    return model.head, replace(data, train=train, test=test, checked=(*data.checked, note))


def _privatise(
    engine: PrivacyEngine, model: nn.Module, optimizer: torch.optim.Optimizer, data: DataSet, settings: Settings
) -> tuple[nn.Module, torch.optim.Optimizer, DataLoader[Any]]:
    """With the noise that was asked for, or the least that keeps the budget for all planned steps."""
    recipe, physical = settings.recipe, settings.recipe.max_physical_batch_size
    loader = DataLoader(data.train, batch_size=recipe.batch_size, shuffle=True, collate_fn=as_batch)
    if settings.noise_multiplier is not None:
        return engine.make_private(
            module=model,
            optimizer=optimizer,
            data_loader=loader,
            noise_multiplier=settings.noise_multiplier,
            max_grad_norm=recipe.max_grad_norm,
            max_physical_batch_size=physical,
            budget=None if settings.epsilon is None else Budget(epsilon=settings.epsilon, delta=settings.delta),
        )
    if settings.epsilon is None:
        raise ConfigurationError("give a budget with --epsilon, or the noise with --noise-multiplier")
    return engine.make_private_with_epsilon(
        module=model,
        optimizer=optimizer,
        data_loader=loader,
        target_epsilon=settings.epsilon,
        target_delta=settings.delta,
        epochs=recipe.epochs,
        max_grad_norm=recipe.max_grad_norm,
        max_physical_batch_size=physical,
    )


def _optimizer(model: nn.Module, settings: Settings) -> torch.optim.Optimizer:
    trainable = [p for p in model.parameters() if p.requires_grad]
    if settings.recipe.optimizer == "adam":
        return torch.optim.Adam(trainable, lr=settings.recipe.lr)
    return torch.optim.SGD(trainable, lr=settings.recipe.lr, momentum=settings.recipe.momentum)


def _device(name: str) -> torch.device:
    if name == "cuda" and not torch.cuda.is_available():
        raise ConfigurationError("--device cuda: no CUDA device is available")
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(name)


def _leftovers(out: Path) -> list[str]:
    return [f"a killed run left its ledger, and what it spent, in {path}" for path in abandoned(out)]
