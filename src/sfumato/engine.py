"""PrivacyEngine: makes a model, an optimizer and a loader private in one call."""

import math
import os
from dataclasses import replace
from types import TracebackType
from typing import Any, Literal

import torch
from torch import nn
from torch.utils.data import DataLoader

from sfumato import _validate
from sfumato.accounting import Budget, Epsilon, Event, Ledger, compose
from sfumato.accounting import noise_multiplier as calibrate
from sfumato.errors import BudgetExceeded, ConfigurationError, PrivacyError, UnsupportedError
from sfumato.ghost import refuse_batch_statistics
from sfumato.noise import Research, Secure, source
from sfumato.plan import Plan, resolve
from sfumato.sampling import Poisson, Shuffle, Units
from sfumato.session import PrivacyUnit, PrivateLoader, Session, StepFacts, inspect, units_of

Private = tuple[nn.Module, torch.optim.Optimizer, DataLoader[Any]]


class PrivacyEngine:
    """Private training of a plain PyTorch loop.

    Guarantee: after any number of steps, everything that was released (all values that ``p.grad``, and so the model,
    ever took) is (ε, δ)-differentially private for adding or removing one record of the data set, with ε =
    ``get_epsilon(delta)``; under ``Shuffle`` for zeroing out one record; with ``privacy_unit=`` for one user and all
    their records. Abadi et al. 2016, Algorithm 1; McMahan et al. 2018 for users.

    Args:
        ledger: None for a ledger in memory, a path for the durable one, or an ``sf.Ledger``.
    """

    def __init__(self, *, ledger: str | os.PathLike[str] | Ledger | None = None):
        self.ledger = ledger if isinstance(ledger, Ledger) else Ledger(ledger)
        self._session: Session | None = None

    def make_private(
        self,
        *,
        module: nn.Module,
        optimizer: torch.optim.Optimizer,
        data_loader: DataLoader[Any],
        noise_multiplier: float,
        max_grad_norm: float,
        clipping: Literal["flat"] = "flat",
        noise: Literal["secure", "research"] | Secure | Research = "secure",
        sampling: Poisson | Shuffle | None = None,
        loss_reduction: Literal["mean", "sum"] = "mean",
        max_physical_batch_size: int | None = None,
        budget: Budget | None = None,
        batch_dim: int = 0,
        grad_scaler: "torch.amp.GradScaler | None" = None,
        check_first_batch: bool = True,
        privacy_unit: PrivacyUnit | None = None,
        max_records_per_unit: int | None = None,
    ) -> Private:
        """The same module and optimizer, and a private loader over the same data set.

        Args:
            noise_multiplier: σ, noise standard deviation over ``max_grad_norm``; 0 clips only and is not private.
            max_grad_norm: C, bound on the norm of one record's gradient, in the units of the summed loss.
            sampling: ``Poisson()`` (default; rate = batch size / data set size) or ``Shuffle()`` (no amplification).
            loss_reduction: how the criterion joins the records of a batch. Declared, never checked: a wrong one scales
                every gradient by the number of records drawn, and one record may then move the sum by up to 2 C.
            max_physical_batch_size: most records in memory at once; a logical batch is split, the loop unchanged.
            budget: the loader ends before the step that would exceed it.
            batch_dim: axis of the model's inputs that holds the records.
            grad_scaler: the ``GradScaler`` of an fp16 loop; its scale is divided out before clipping.
            check_first_batch: before the first batch counts, run the model on it with records replaced, and refuse a
                model whose outputs for one record depend on others (a few forward passes, once).
            privacy_unit: whose privacy each record is: ids in the order of the data set, a function of a record, or
                the name of a field of the records. The guarantee is then for adding or removing one user with all
                their records: users are drawn, each with all of them, and the sum of a user's gradients is clipped
                to C. The loader's ``batch_size`` still counts records, of which a batch holds so many on average; the
                sample rate is that of a user, and ``plan`` counts users. A user's records are never split, so one
                with more than ``max_physical_batch_size`` makes a larger microbatch.
            max_records_per_unit: most records of one user in one draw, chosen at random each time.

        Raises:
            ConfigurationError, UnsupportedError: before anything is changed.
        """
        self._refuse_second()
        sigma = _validate.non_negative("noise_multiplier", noise_multiplier)
        bound = _validate.positive("max_grad_norm", max_grad_norm)
        _validate.one_of("clipping", clipping, ("flat",))
        _validate.one_of("loss_reduction", loss_reduction, ("mean", "sum"))
        physical = (
            None
            if max_physical_batch_size is None
            else _validate.count("max_physical_batch_size", max_physical_batch_size)
        )
        if sampling is not None and not isinstance(sampling, (Poisson, Shuffle)):
            raise ConfigurationError(
                f"sampling={sampling!r} is not sf.Poisson(...) or sf.Shuffle(...).", found=sampling, where="sampling"
            )
        if budget is not None and not isinstance(budget, Budget):
            raise ConfigurationError(f"budget={budget!r} is not an sf.Budget.", found=budget, where="budget")
        if isinstance(batch_dim, bool) or not isinstance(batch_dim, int) or batch_dim < 0:
            raise ConfigurationError(
                f"batch_dim={batch_dim!r} is not an axis number >= 0.", found=batch_dim, where="batch_dim"
            )
        if grad_scaler is not None and not isinstance(grad_scaler, torch.amp.GradScaler):
            raise ConfigurationError(
                f"grad_scaler={grad_scaler!r} is not a torch.amp.GradScaler.", found=grad_scaler, where="grad_scaler"
            )
        _check_model(module, optimizer)
        units, batch_size, dataset_size = self._population(data_loader, privacy_unit, max_records_per_unit)
        sampler, expected, steps = resolve(sampling, batch_size, dataset_size, None if units is None else len(units))
        origin = source(noise)
        plan = Plan(
            noise_multiplier=sigma,
            max_grad_norm=bound,
            sampler=sampler,
            expected_batch_size=expected,
            dataset_size=dataset_size if units is None else len(units),
            steps_per_epoch=steps,
            loss_reduction=loss_reduction,
            max_physical_batch_size=physical,
            noise_level=origin.level,
            clipping=clipping,
            unit="record" if units is None else "user",
        )
        self._session = Session(
            module,
            optimizer,
            plan,
            origin,
            self.ledger,
            budget=budget,
            batch_dim=batch_dim,
            grad_scaler=grad_scaler,
            check_first_batch=check_first_batch,
        )
        return module, optimizer, PrivateLoader(data_loader, self._session, units)

    def make_private_with_epsilon(
        self,
        *,
        module: nn.Module,
        optimizer: torch.optim.Optimizer,
        data_loader: DataLoader[Any],
        target_epsilon: float,
        target_delta: float,
        epochs: int,
        max_grad_norm: float,
        clipping: Literal["flat"] = "flat",
        noise: Literal["secure", "research"] | Secure | Research = "secure",
        sampling: Poisson | Shuffle | None = None,
        loss_reduction: Literal["mean", "sum"] = "mean",
        max_physical_batch_size: int | None = None,
        budget: Budget | None = None,
        batch_dim: int = 0,
        grad_scaler: "torch.amp.GradScaler | None" = None,
        check_first_batch: bool = True,
        privacy_unit: PrivacyUnit | None = None,
        max_records_per_unit: int | None = None,
    ) -> Private:
        """``make_private`` with the least noise for which ``epochs`` epochs stay within the target.

        The target is (``target_epsilon``, ``target_delta``); what the ledger already holds counts against it. The
        loader also ends before a step that would exceed it, unless another ``budget`` is given.
        """
        self._refuse_second()
        limit = Budget(epsilon=target_epsilon, delta=target_delta)
        units, batch_size, dataset_size = self._population(data_loader, privacy_unit, max_records_per_unit)
        sampler, expected, steps = resolve(sampling, batch_size, dataset_size, None if units is None else len(units))
        trial = Plan(1.0, 1.0, sampler, expected, dataset_size, steps, unit="record" if units is None else "user")
        sigma = _calibrated(trial, self.ledger.events(), limit, _validate.count("epochs", epochs))
        return self.make_private(
            module=module,
            optimizer=optimizer,
            data_loader=data_loader,
            noise_multiplier=sigma,
            max_grad_norm=max_grad_norm,
            clipping=clipping,
            noise=noise,
            sampling=sampling,
            loss_reduction=loss_reduction,
            max_physical_batch_size=max_physical_batch_size,
            budget=limit if budget is None else budget,
            batch_dim=batch_dim,
            grad_scaler=grad_scaler,
            check_first_batch=check_first_batch,
            privacy_unit=units,
        )

    def get_epsilon(self, delta: float) -> Epsilon:
        """Certified upper bound on ε at ``delta`` of everything this ledger has paid for; changes nothing.

        For the unit that the events name: one record, or one user with all their records (``privacy_unit=``).
        """
        return self.ledger.epsilon(delta=delta)

    @property
    def plan(self) -> Plan:
        """The joint guarantee of the current training."""
        return self._current.plan

    @property
    def steps(self) -> int:
        """Releases so far (logical batches, empty ones included)."""
        return self._current.steps

    @property
    def stopped(self) -> bool:
        """Whether the budget ended the loader."""
        return self._current.stopped

    @property
    def last_step(self) -> StepFacts:
        """Un-noised facts about the last release: private diagnostics, not covered by the guarantee."""
        return self._current.last_step

    @property
    def tiers(self) -> dict[str, str]:
        """{parameter: "rule" | "vmap" | "microbatch"}: how its per-sample gradients are computed."""
        return self._current.capture.parameter_tiers()

    def detach(self) -> None:
        """Leave a plain model, optimizer and data set behind; the ledger keeps what was spent."""
        if self._session is not None:
            self._session.close()
            self._session = None

    def __enter__(self) -> "PrivacyEngine":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.detach()

    @property
    def _current(self) -> Session:
        if self._session is None:
            raise PrivacyError("This engine has made nothing private yet.", fix="call make_private first.")
        return self._session

    def _population(
        self, loader: DataLoader[Any], privacy_unit: PrivacyUnit | None, cap: int | None
    ) -> tuple[Units | None, int, int]:
        """(units, batch size, data set size in records) of a loader, if the ledger speaks of the same unit."""
        batch_size, records = inspect(loader)
        units = units_of(loader, privacy_unit, cap)
        unit = "record" if units is None else "user"
        others = sorted({event.unit for event in self.ledger.events()} - {unit})
        if others:
            raise UnsupportedError(
                f"The ledger holds releases that protect one {others[0]}, and these would protect one {unit}: no "
                "single ε describes both.",
                found=others,
                where="privacy_unit",
                fix="use another ledger, and report both guarantees.",
            )
        return units, batch_size, records if units is None else units.records

    def _refuse_second(self) -> None:
        if self._session is not None:
            raise UnsupportedError(
                "This engine already holds a private training.",
                fix="call engine.detach() first, or use another PrivacyEngine on the same ledger.",
            )


_REFUSED_OPTIMIZERS: dict[type[torch.optim.Optimizer], tuple[str, str]] = {
    torch.optim.LBFGS: (
        "evaluates the loss several times on one draw, and each evaluation would be a release of its own",
        "use SGD, Adam or another optimizer that evaluates once a step.",
    ),
    torch.optim.SparseAdam: (
        "takes sparse gradients, and a private gradient is dense: every row gets noise",
        "use torch.optim.Adam.",
    ),
}


def _check_model(module: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    if not isinstance(module, nn.Module):
        raise ConfigurationError(
            f"module is a {type(module).__name__}, not a torch.nn.Module.", found=type(module).__name__
        )
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise ConfigurationError(
            f"optimizer is a {type(optimizer).__name__}, not a torch.optim.Optimizer.", found=type(optimizer).__name__
        )
    for kind, (why, fix) in _REFUSED_OPTIMIZERS.items():
        if isinstance(optimizer, kind):
            raise UnsupportedError(f"{kind.__name__} {why}.", found=kind.__name__, where="optimizer", fix=fix)
    known = {id(p): n for n, p in module.named_parameters()}
    foreign = [tuple(p.shape) for g in optimizer.param_groups for p in g["params"] if id(p) not in known]
    if foreign:
        raise UnsupportedError(
            f"The optimizer trains {len(foreign)} tensors that are not parameters of the module (shapes "
            f"{foreign[:3]}), so their gradients would be neither clipped nor noised.",
            found=foreign,
            where="optimizer",
            fix="build the optimizer from module.parameters().",
        )
    refuse_module(module)


def refuse_module(module: nn.Module) -> None:
    """A model that cannot be made private, whatever its inputs are."""
    wrappers = (nn.DataParallel, nn.parallel.DistributedDataParallel)
    compiled = hasattr(module, "_orig_mod") and hasattr(module, "dynamo_ctx")
    if isinstance(module, wrappers) or compiled or isinstance(module, torch.jit.ScriptModule):
        raise UnsupportedError(
            f"{type(module).__name__} runs the model where its operations cannot be seen, so they cannot be clipped.",
            found=type(module).__name__,
            where="module",
            fix="make the plain module private, in one process and not compiled.",
        )
    if not any(p.requires_grad for p in module.parameters()):
        raise ConfigurationError(
            "The module has no trainable parameter.",
            where="module",
            fix="call requires_grad_(True) on what is to be trained.",
        )
    refuse_batch_statistics(module, "")


def _calibrated(trial: Plan, spent: dict[Event, int], limit: Budget, epochs: int) -> float:
    charges = trial.charges(epochs)
    if not spent:
        return calibrate(
            target_epsilon=limit.epsilon, target_delta=limit.delta, sample_rate=trial.event.sample_rate, steps=charges
        )

    def total(sigma: float) -> float:
        event = replace(trial.event, noise_multiplier=sigma)
        return float(compose({**spent, event: spent.get(event, 0) + charges}, delta=limit.delta))

    if float(compose(spent, delta=limit.delta)) >= limit.epsilon:
        raise BudgetExceeded(
            f"The ledger already holds ε = {float(compose(spent, delta=limit.delta)):.4g}, at or above the target "
            f"{limit.epsilon:g}.",
            found=limit.epsilon,
            where="target_epsilon",
            fix="raise the target, or train on other records with a ledger of their own.",
        )
    low, high = 1e-2, 1.0
    while total(high) > limit.epsilon:
        low, high = high, 2 * high
        if high > 1e6:
            raise BudgetExceeded(
                f"No noise brings {epochs} more epochs below ε = {limit.epsilon:g}: too much is spent.",
                found=limit.epsilon,
                where="target_epsilon",
            )
    while high / low > 1.0002:
        middle = math.sqrt(low * high)
        low, high = (middle, high) if total(middle) > limit.epsilon else (low, middle)
    return high
