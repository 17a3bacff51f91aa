"""PrivacyEngine: makes a model, an optimizer and a loader private in one call."""

import os
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any, Literal, TypeVar

import torch
from torch import nn
from torch.utils.data import DataLoader

from sfumato import _validate
from sfumato.accounting import Budget, Epsilon, Ledger
from sfumato.clipping import Clip, Quantile
from sfumato.errors import ConfigurationError, PrivacyError
from sfumato.ghost import refuse_owned
from sfumato.noise import Research, Secure, source
from sfumato.plan import Plan, Sampler, planned
from sfumato.schedules import Schedule
from sfumato.session import (
    PrivacyUnit,
    PrivateLoader,
    Session,
    StepFacts,
    charging_of,
    check_model,
    inspect,
    plain,
    resume,
    scope_of,
    target_noise,
    units_of,
)

Optimizers = TypeVar("Optimizers", torch.optim.Optimizer, Sequence[torch.optim.Optimizer])
Adjacency = Literal["add-remove", "zero-out", "replace-one"]
Clipping = Literal["flat", "per-layer", "automatic"] | Clip


class PrivacyEngine:
    """Private training of a plain PyTorch loop.

    Guarantee: after any number of steps, everything that was released (all values that ``p.grad``, and so the model,
    ever took) is (ε, δ)-differentially private for adding or removing one record of the data set, with ε =
    ``get_epsilon(delta)``; under ``Shuffle`` for zeroing out one record; with ``privacy_unit=`` for one user and all
    their records. Abadi et al. 2016, Algorithm 1; McMahan et al. 2018 for users.

    One engine may make several models private, one after the other or side by side (each with its own loader), and
    the same model again for another round: its ledger adds up all of them.

    Args:
        ledger: None for a ledger in memory, a path for the durable one, or an ``sf.Ledger``.
    """

    def __init__(self, *, ledger: str | os.PathLike[str] | Ledger | None = None):
        self.ledger = ledger if isinstance(ledger, Ledger) else Ledger(ledger)
        self._sessions: list[Session] = []

    def make_private(
        self,
        *,
        module: nn.Module,
        optimizer: Optimizers,
        data_loader: DataLoader[Any],
        noise_multiplier: float,
        max_grad_norm: float,
        clipping: Clipping = "flat",
        noise: Literal["secure", "research"] | Secure | Research = "secure",
        sampling: Sampler | None = None,
        adjacency: Adjacency | None = None,
        noise_schedule: Schedule | None = None,
        clip_schedule: Schedule | Quantile | None = None,
        loss_reduction: Literal["mean", "sum"] = "mean",
        max_physical_batch_size: int | None = None,
        static_shapes: bool = False,
        budget: Budget | None = None,
        batch_dim: int = 0,
        grad_scaler: "torch.amp.GradScaler | None" = None,
        check_first_batch: bool = True,
        privacy_unit: PrivacyUnit | None = None,
        max_records_per_unit: int | None = None,
        dataset: str | None = None,
        group: str | None = None,
        reserve: int = 1,
    ) -> tuple[nn.Module, Optimizers, DataLoader[Any]]:
        """The same module and optimizer, and a private loader over the same data set.

        A module that this engine has already made private is privatised again (another loader, other numbers); its
        earlier loader ends.

        Args:
            optimizer: one, or a sequence that shares the module's parameters out.
            data_loader: a plain ``DataLoader``, or one that this method returned (it stands for the one behind it).
            noise_multiplier: σ, noise standard deviation over ``max_grad_norm``; 0 clips only and is not private.
            max_grad_norm: C, bound on the norm of one record's gradient, in the units of the summed loss.
            clipping: ``"flat"``, ``"per-layer"``, ``"automatic"`` or an instance from ``sf.clipping``; all bound the
                whole gradient by C.
            sampling: ``Poisson()`` (default; rate = batch size / data set size), ``Shuffle()`` (no amplification),
                ``TruncatedPoisson()`` or ``CyclicPoisson()``.
            adjacency: the neighbouring relation to account for, if not the sampler's own ("add-remove" for Poisson,
                "zero-out" for the others).
            noise_schedule, clip_schedule: factors of σ and of C by the step's number (``sf.schedules``), known in
                advance; or ``sf.clipping.Quantile`` as the latter. Clip, noise and charge of a step use the same ones.
            loss_reduction: how the criterion joins the records of a batch. Declared, never checked: a wrong one scales
                every gradient by the number of records drawn, and one record may then move the sum by up to 2 C.
            max_physical_batch_size: most records in memory at once; a logical batch is split, the loop unchanged.
            static_shapes: fill every physical batch up to ``max_physical_batch_size`` with copies that weigh 0.
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
            dataset: name of the logical data set, with which you declare that its record i (below any ``Subset``) is
                the same record whenever the name is used. Without one, tensors are known again by their content.
                Rounds on subsets then compose over the records that they share, and in parallel over the others.
            group: name of a privacy group, with which you declare that no record is in two groups.
            reserve: charge so many steps with one write; what is not used is given back when training is detached.

        Raises:
            ConfigurationError, UnsupportedError: before anything is changed.
        """
        optimizers = [optimizer] if isinstance(optimizer, torch.optim.Optimizer) else list(optimizer)
        if budget is not None and not isinstance(budget, Budget):
            raise ConfigurationError(f"budget={budget!r} is not an sf.Budget.", found=budget, where="budget")
        if isinstance(batch_dim, bool) or not isinstance(batch_dim, int) or batch_dim < 0:
            raise ConfigurationError(
                f"batch_dim={batch_dim!r} is not an axis number >= 0.", found=batch_dim, where="batch_dim"
            )
        if not isinstance(check_first_batch, bool):
            raise ConfigurationError(
                f"check_first_batch={check_first_batch!r} is not a bool.",
                found=check_first_batch,
                where="check_first_batch",
            )
        if grad_scaler is not None and not isinstance(grad_scaler, torch.amp.GradScaler):
            raise ConfigurationError(
                f"grad_scaler={grad_scaler!r} is not a torch.amp.GradScaler.", found=grad_scaler, where="grad_scaler"
            )
        check_model(module, optimizers)
        held = [s for s in self._sessions if s.module is module]
        refuse_owned(module, [s.capture for s in held])
        base = plain(data_loader)
        batch_size, records = inspect(base)
        units = units_of(base, privacy_unit, max_records_per_unit)
        origin = source(noise)
        plan = planned(
            noise_multiplier=noise_multiplier,
            max_grad_norm=max_grad_norm,
            clipping=clipping,
            sampling=sampling,
            adjacency=adjacency,
            noise_schedule=noise_schedule,
            clip_schedule=clip_schedule,
            loss_reduction=loss_reduction,
            max_physical_batch_size=max_physical_batch_size,
            static_shapes=static_shapes,
            batch_size=batch_size,
            records=records if units is None else units.records,
            units=None if units is None else len(units),
            noise_level=origin.level,
        )
        charging = charging_of(
            self.ledger, plan, budget, scope_of(base.dataset, dataset, group, units, self.ledger.pseudonym), reserve
        )
        self._close(held)
        session = Session(
            module,
            optimizers,
            plan,
            origin,
            charging,
            batch_dim=batch_dim,
            grad_scaler=grad_scaler,
            check_first_batch=check_first_batch,
        )
        self._sessions.append(session)
        return module, optimizer, PrivateLoader(base, session, units)

    def make_private_with_epsilon(
        self,
        *,
        module: nn.Module,
        optimizer: Optimizers,
        data_loader: DataLoader[Any],
        target_epsilon: float,
        target_delta: float,
        epochs: int,
        max_grad_norm: float,
        clipping: Clipping = "flat",
        noise: Literal["secure", "research"] | Secure | Research = "secure",
        sampling: Sampler | None = None,
        adjacency: Adjacency | None = None,
        noise_schedule: Schedule | None = None,
        clip_schedule: Schedule | Quantile | None = None,
        loss_reduction: Literal["mean", "sum"] = "mean",
        max_physical_batch_size: int | None = None,
        static_shapes: bool = False,
        budget: Budget | None = None,
        batch_dim: int = 0,
        grad_scaler: "torch.amp.GradScaler | None" = None,
        check_first_batch: bool = True,
        privacy_unit: PrivacyUnit | None = None,
        max_records_per_unit: int | None = None,
        dataset: str | None = None,
        group: str | None = None,
        reserve: int = 1,
    ) -> tuple[nn.Module, Optimizers, DataLoader[Any]]:
        """``make_private`` with the least noise for which ``epochs`` epochs stay within the target.

        The target is (``target_epsilon``, ``target_delta``); what the ledger already holds for these records counts
        against it. The loader also ends before a step that would exceed it, unless another ``budget`` is given.
        """
        limit = Budget(epsilon=target_epsilon, delta=target_delta)
        base = plain(data_loader)
        batch_size, records = inspect(base)
        units = units_of(base, privacy_unit, max_records_per_unit)
        trial = planned(
            noise_multiplier=1.0,
            max_grad_norm=max_grad_norm,
            clipping=clipping,
            sampling=sampling,
            adjacency=adjacency,
            noise_schedule=noise_schedule,
            clip_schedule=None,  # does not change what a step costs
            loss_reduction=loss_reduction,
            max_physical_batch_size=max_physical_batch_size,
            static_shapes=static_shapes,
            batch_size=batch_size,
            records=records if units is None else units.records,
            units=None if units is None else len(units),
            noise_level="secure",
        )
        scope = scope_of(base.dataset, dataset, group, units, self.ledger.pseudonym)
        sigma = target_noise(trial, self.ledger, scope, limit, _validate.count("epochs", epochs))
        return self.make_private(
            module=module,
            optimizer=optimizer,
            data_loader=base,
            noise_multiplier=sigma,
            max_grad_norm=max_grad_norm,
            clipping=clipping,
            noise=noise,
            sampling=sampling,
            adjacency=adjacency,
            noise_schedule=noise_schedule,
            clip_schedule=clip_schedule,
            loss_reduction=loss_reduction,
            max_physical_batch_size=max_physical_batch_size,
            static_shapes=static_shapes,
            budget=limit if budget is None else budget,
            batch_dim=batch_dim,
            grad_scaler=grad_scaler,
            check_first_batch=check_first_batch,
            privacy_unit=units,
            dataset=dataset,
            group=group,
            reserve=reserve,
        )

    def change(self, *, noise_multiplier: float | None = None, max_grad_norm: float | None = None) -> None:
        """Go on with other numbers from the next logical batch on, chosen by whatever has been released so far.

        The steps that follow are marked as chosen on the way: their ε is that of a Rényi filter (Feldman and Zrnic
        2021), which holds for such choices and is looser than that of a schedule known in advance.
        """
        numbers: dict[str, float] = {}
        if noise_multiplier is not None:
            numbers["noise_multiplier"] = _validate.non_negative("noise_multiplier", noise_multiplier)
        if max_grad_norm is not None:
            numbers["max_grad_norm"] = _validate.positive("max_grad_norm", max_grad_norm)
        if not numbers:
            raise ConfigurationError("change() was given nothing to change.", where="change")
        self._session.change(**numbers)

    def get_epsilon(self, delta: float) -> Epsilon:
        """Certified upper bound on ε at ``delta`` of everything this ledger has paid for; changes nothing.

        For the unit that the events name: one record, or one user with all their records (``privacy_unit=``). If
        trainings were on different records of one data set, for the record with the largest ε.
        """
        return self.ledger.epsilon(delta=delta)

    def save_checkpoint(self, path: str | os.PathLike[str], *, extra: Mapping[str, Any] | None = None) -> None:
        """Write model, optimizers, position and the ledger's head to one file (safetensors), replacing it whole.

        ``extra``: numbers, strings, lists, dicts and tensors of your own, such as a scheduler's ``state_dict()``.
        Neither noise nor keys are stored, so a step that is run again after ``load_checkpoint`` has fresh noise and is
        charged again.
        """
        resume.save(self._session, path, extra)

    def load_checkpoint(self, path: str | os.PathLike[str]) -> dict[str, Any]:
        """Restore what ``save_checkpoint`` wrote, after ``make_private`` on the same kind of model; returns ``extra``.

        Raises:
            LedgerError: this engine's ledger does not hold what had been spent when the file was written.
            DataError, ConfigurationError: the file is damaged, or of another model or plan; nothing was changed.
        """
        return resume.load(self._session, path)

    @property
    def plan(self) -> Plan:
        """The joint guarantee of the current training (the one made private last)."""
        return self._session.plan

    @property
    def steps(self) -> int:
        """Releases so far (logical batches, empty ones included)."""
        return self._session.steps

    @property
    def steps_left(self) -> int | None:
        """How many more charges (steps; epochs under ``Shuffle``) the budget allows; None without a budget."""
        return self._session.left

    @property
    def max_grad_norm(self) -> float:
        """C of the next step."""
        return self._session.next_step.max_grad_norm

    @property
    def stopped(self) -> bool:
        """Whether the budget ended the loader."""
        return self._session.stopped

    @property
    def last_step(self) -> StepFacts:
        """Un-noised facts about the last release: private diagnostics, not covered by the guarantee."""
        return self._session.last_step

    @property
    def tiers(self) -> dict[str, str]:
        """{parameter: "rule" | "vmap" | "microbatch"}: how its per-sample gradients are computed."""
        return self._session.capture.parameter_tiers()

    def detach(self) -> None:
        """Leave plain models, optimizers and data sets behind; the ledger keeps what was spent."""
        self._close(list(self._sessions))

    def __enter__(self) -> "PrivacyEngine":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.detach()

    def _close(self, sessions: Sequence[Session]) -> None:
        for session in sessions:
            self._sessions.remove(session)
            session.close()

    @property
    def _session(self) -> Session:
        if not self._sessions:
            raise PrivacyError("This engine has made nothing private yet.", fix="call make_private first.")
        return self._sessions[-1]
