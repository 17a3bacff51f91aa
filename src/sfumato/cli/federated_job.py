"""One federation, from options to a published run folder."""

from __future__ import annotations

import copy
import math
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from ..data import FederatedData, load_federated
from ..errors import BudgetExceeded, ConfigurationError, DataError
from ..federated import FederatedTrainer, Result, TopK, Validation
from ..federated.parameters.selection import Train, prepare
from ..federated.units import Unit
from ..models import Features
from ..report import write_federated
from .federated_books import Books
from .federated_metrics import FederatedMetrics
from .federated_outcome import facts_of, federated_result
from .federated_parts import allocation_of, codec_of, cohort_of, local_of, server_of, train_of, unit_of
from .federated_recipes import federated_recipe
from .federated_settings import Checked, FederatedSettings, complete
from .federated_start import featured, kept_back, pretrain
from .fitting import built, check_packages, warn
from .job import MODEL_NAME, leftovers
from .loop import accuracy
from .result import Result as Printed
from .run_folder import RunFolder, check_free

if TYPE_CHECKING:
    from jsonargparse import Namespace

CPU = torch.device("cpu")
SMALL = 100_000  # parameters: below, starting threads for an operation takes longer than the operation


@dataclass(frozen=True)
class Federated:
    """A federation that is over. ``data``: as it was fed; ``numbers``: trained, of ``parameters`` in the model."""

    result: Result
    metrics: FederatedMetrics
    data: FederatedData
    saved: nn.Module
    accuracy: float
    baseline: float
    numbers: int
    parameters: int
    seconds: float


def run_job(options: Namespace, checked: Checked, argv: Sequence[str]) -> Printed:
    """Train, report, publish.

    On any failure ``--out`` does not exist. If anything had been released by then, the ledgers, and only they, are kept
    beside it and named in the error. Raises typed errors.
    """
    started = time.perf_counter()
    check_packages()
    out = Path(options.out)
    check_free(out)
    data = load_federated(
        options.data,
        clients=options.clients,
        client_column=options.client_column,
        alpha=options.alpha,
        public_fraction=options.public_fraction,
        label=options.label,
        bounds=options.bounds,
        test_fraction=options.test_fraction,
        image_size=options.image_size,
    )
    recipe = federated_recipe(
        data.data.name,
        data.data.input_shape,
        options.unit,
        clients=len(data.clients),
        records=len(data.data.train),
        epsilon=options.epsilon,
    )
    settings = complete(options, checked, recipe)
    warn("federate", *data.data.warnings, *leftovers(out))
    if settings.noise == "research":
        warn("federate", "the noise can be repeated from --seed: for research, not for private data")
    unit = unit_of(settings, data.clients)
    model = built(settings.recipe.model, settings.seed, data.data, CPU)
    books = Books(data, level=settings.level, shared=settings.ledgers)
    folder: RunFolder | None = None
    try:
        folder = RunFolder(out)
        with _threads(model):
            done = _trained(settings, unit, data, model, books, folder.path, started)
        facts = facts_of(done, settings=settings, data=data, proof=books.proof(done.result), argv=argv)
        _save(done.saved, folder.path / MODEL_NAME)
        write_federated(facts, folder.path)
        books.close()
        published = folder.publish()
    except BaseException as error:
        spent = books.close()
        kept = folder.abandon(keep_ledger=spent) if folder else None
        if spent:
            error.add_note(
                f"Privacy had been spent by then; it is recorded in {kept or books.path} (see --ledger-dir)."
            )
        raise
    return federated_result(facts, published, MODEL_NAME)


def _trained(
    settings: FederatedSettings,
    unit: Unit,
    data: FederatedData,
    model: nn.Module,
    books: Books,
    folder: Path,
    started: float,
) -> Federated:
    recipe = settings.recipe
    features = model.features if isinstance(model, Features) else None
    model, fed = featured(model, data)
    public, validation = fed.public, None
    if settings.allocation == "adaptive":
        if public is None:
            raise ConfigurationError("--allocation adaptive measures progress on public records; there are none")
        public, measured = kept_back(public)
        validation = Validation(public=measured, patience=None)
    if public is not None:
        pretrain(model, public, steps=recipe.pretrain_steps, lr=recipe.pretrain_lr, seed=settings.seed)
    baseline = accuracy(model, fed.data.test, CPU)
    clients, ledger = books.open(folder, fed.clients)
    train = train_of(settings.train, public is not None)
    with FederatedMetrics(folder, planned=recipe.rounds) as metrics:
        trainer = FederatedTrainer(
            model=copy.deepcopy(model),
            clients=clients,
            privacy=unit,
            local=local_of(recipe),
            rounds=recipe.rounds,
            cohort=cohort_of(settings.cohort),
            server=server_of(recipe),
            train=train,
            compression=codec_of(settings.codec),
            allocation=allocation_of(settings.allocation, recipe.rounds),
            validation=validation,
            public=public,
            noise=settings.noise,
            seed=settings.seed,
            ledger=ledger,
            on_round=lambda found: metrics.add(found, accuracy(trainer.model, fed.data.test, CPU)),
        )
        result = trainer.fit()
    if result.stopped == "budget" and not books.charged:
        raise BudgetExceeded(
            f"epsilon = {settings.epsilon} at delta = {settings.delta:g} does not pay for a single round: the ledgers "
            f"stand at {result.epsilon:.4g}. Nothing was trained",
            found=result.epsilon,
            fix="raise --epsilon or --noise-multiplier, or start new ledgers.",
        )
    _refuse_silence(result)
    return Federated(
        result=result,
        metrics=metrics,
        data=fed,
        saved=result.model if features is None else Features(features, result.model),
        accuracy=accuracy(result.model, fed.data.test, CPU),
        baseline=baseline,
        numbers=_numbers(model, train),
        parameters=sum(p.numel() for p in model.parameters()),
        seconds=time.perf_counter() - started,
    )


@contextmanager
def _threads(model: nn.Module) -> Iterator[None]:
    """One thread for each operation on a small model."""
    before = torch.get_num_threads()
    if sum(p.numel() for p in model.parameters()) < SMALL:
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _refuse_silence(result: Result) -> None:
    """Raise :class:`DataError` if no answer of any client counted: nothing was learnt."""
    asked, accepted = (sum(getattr(row, name) for row in result.rounds) for name in ("cohort", "accepted"))
    reasons = Counter[str]()
    for row in result.rounds:
        reasons.update(row.rejected)
    if asked and not accepted:
        shown = ", ".join(f"{reason} ({count:,})" for reason, count in reasons.most_common(3)) or "no reply"
        raise DataError(f"no answer of any client counted: {shown}.", fix="see the warnings above; use --verbose.")


def _numbers(model: nn.Module, train: Train) -> int:
    """How many numbers a client's update has, before it is packed."""
    whole = prepare(copy.deepcopy(model), train).schema.size
    return math.ceil(train.fraction * whole) if isinstance(train, TopK) and train.fraction else whole


def _save(model: nn.Module, path: Path) -> None:
    from safetensors.torch import save_model

    save_model(model, str(path))
