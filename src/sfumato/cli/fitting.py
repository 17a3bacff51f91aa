"""One private training, from loaded data and settings to a fitted model: the part that runs and sweeps share."""

from __future__ import annotations

import importlib.util
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.utils.data import DataLoader

from ..accounting import Budget, Ledger
from ..data import DataSet, Records, as_batch, load
from ..engine import PrivacyEngine
from ..errors import BudgetExceeded, ConfigurationError
from ..models import Features, build, extract
from .averaging import Average
from .loop import train
from .metrics import Metrics
from .recipes import recipe_for
from .settings import Settings, complete

if TYPE_CHECKING:
    from jsonargparse import Namespace

FEATURES_NOTE = "A fixed feature map without trained parameters is applied to each record on its own."
NEEDED = ("safetensors", "matplotlib", "jinja2", "tqdm")


@dataclass(frozen=True)
class Fitted:
    """A training that is over, while its engine is still attached.

    ``model`` and ``data``: what was trained and on what; ``features``: the frozen part before it, None without one.
    """

    engine: PrivacyEngine
    model: nn.Module
    average: Average
    data: DataSet
    metrics: Metrics
    planned_steps: int
    seconds: float
    features: nn.Module | None

    @property
    def saved(self) -> nn.Module:
        """The model to keep: averaged if so chosen, frozen features included."""
        return self.average.model if self.features is None else Features(self.features, self.average.model)


def check_packages() -> None:
    """Raise :class:`ConfigurationError` if an optional package that training needs is missing."""
    if missing := [name for name in NEEDED if importlib.util.find_spec(name) is None]:
        raise ConfigurationError(f"training needs {', '.join(missing)}.", fix="pip install 'sfumato[cli]'")


def load_data(options: Namespace) -> tuple[DataSet, Settings]:
    """The data set, and the settings that its recipe completes."""
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


def warn(command: str, *texts: str) -> None:
    """Warnings, each on a line of standard error."""
    for text in texts:
        print(f"sfumato {command}: warning: {text}", file=sys.stderr)


def device_for(name: str) -> torch.device:
    """The device that ``--device`` names."""
    if name == "cuda" and not torch.cuda.is_available():
        raise ConfigurationError("--device cuda: no CUDA device is available")
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(name)


def built(name: str, seed: int, data: DataSet, device: torch.device) -> nn.Module:
    """A new model, initialised from ``seed``."""
    torch.manual_seed(seed)
    model = build(name, data.input_shape, len(data.classes)).to(device)
    if not any(p.requires_grad for p in model.parameters()):
        raise ConfigurationError(f"model {name} has no trainable parameter")
    return model


@contextmanager
def fitted(
    settings: Settings, data: DataSet, model: nn.Module, device: torch.device, ledger: Ledger, folder: Path | None
) -> Iterator[Fitted]:
    """Train ``model``, charging ``ledger``; rows go to ``metrics.jsonl`` in ``folder``, or nowhere.

    Raises :class:`BudgetExceeded` if the budget does not pay for a single step; typed errors of the engine.
    """
    started = time.perf_counter()
    features = model.features if isinstance(model, Features) else None
    model, fed = _feed(model, data, device)
    average = Average(model, settings.recipe.averaging)
    optimizer = _optimizer(model, settings)
    engine = PrivacyEngine(ledger=ledger)
    with engine:
        model, optimizer, loader = _privatise(engine, model, optimizer, fed, settings)
        planned = settings.recipe.epochs * engine.plan.steps_per_epoch
        with Metrics(folder, planned_steps=planned, private=settings.private_metrics) as metrics:
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
        seconds = time.perf_counter() - started
        yield Fitted(engine, model, average, fed, metrics, planned, seconds, features)


def _feed(model: nn.Module, data: DataSet, device: torch.device) -> tuple[nn.Module, DataSet]:
    """What is trained, and on what: frozen features are computed once for each record."""
    if not isinstance(model, Features):
        return model, data
    train_part, test_part = (
        Records(extract(model.features, part.x, device), part.y) for part in (data.train, data.test)
    )
    return model.head, replace(data, train=train_part, test=test_part, checked=(*data.checked, FEATURES_NOTE))


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
