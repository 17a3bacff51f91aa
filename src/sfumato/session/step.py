"""The hot step: clip the tape, accumulate, charge the ledger, add noise, and only then let a gradient be seen."""

import uuid
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from sfumato.accounting import Budget, Ledger, max_steps
from sfumato.errors import PrivacyError, TokenError, UnclippedGradient, UnsupportedError
from sfumato.ghost import Capture, Guard, Tape, by_unit, clipped, collect, install, remove, total_norms, wide_dtype
from sfumato.noise import Research, Secure
from sfumato.plan import Plan
from sfumato.sampling import Poisson


@dataclass(slots=True)
class Token:
    """The right to one backward over one physical microbatch of a logical batch."""

    size: int  # records
    first: bool
    last: bool
    tape: Tape | None = None
    spent: bool = False
    unit: Tensor | None = None  # which unit each record belongs to; None: each is one

    @property
    def units(self) -> int:
        """Those that are clipped: records, or users with all records of theirs that were drawn."""
        return self.size if self.unit is None else int(self.unit[-1]) + 1


@dataclass(slots=True)
class StepFacts:
    """Un-noised facts about the last release: diagnostics on private data, not covered by the guarantee."""

    batch_size: int = 0
    clipped: int = 0
    empty: bool = True

    @property
    def clip_fraction(self) -> float:
        """Share of the batch whose gradient was scaled down."""
        return self.clipped / self.batch_size if self.batch_size else 0.0


@dataclass
class Session:
    """One private training: one model, one plan, one ledger."""

    module: nn.Module
    optimizer: torch.optim.Optimizer
    plan: Plan
    source: Secure | Research
    ledger: Ledger
    budget: Budget | None = None
    batch_dim: int = 0
    grad_scaler: "torch.amp.GradScaler | None" = None
    check_first_batch: bool = False
    run: str = field(default_factory=lambda: uuid.uuid4().hex)

    def __post_init__(self) -> None:
        self.guard = Guard(self._violated)
        self.capture = Capture(self.module, self.batch_dim, self.plan.loss_reduction, self._watch)
        self.capture.probing = self.check_first_batch
        self.closed = False
        self._limit: int | None = None
        self._foreign = -1
        self.steps = 0
        self.stopped = False
        self.last_step = StepFacts()
        self._facts = StepFacts()
        self._token: Token | None = None
        self._poisoned = False
        self._skipped = False
        self._epoch_paid = False
        self._sums: dict[str, Tensor] = {}
        self._carried: dict[str, Tensor] = {}
        self._owners: dict[str, Tensor] = {}  # the parameters that _sums belong to
        self.capture.refresh()
        install(self.capture)
        self._step_hook = self.optimizer.register_step_pre_hook(self._check_optimizer)
        for p in self.module.parameters():
            p.grad = None  # a gradient from before this engine is not private

    def close(self) -> None:
        self.abandon()
        self.closed = True
        self._step_hook.remove()
        self.guard.release()
        remove(self.capture)

    def _watch(self, trainable: dict[str, Tensor]) -> None:
        for p in trainable.values():
            if not self.guard.watches(p):
                p.grad = None  # whatever it holds was written unseen
        self.guard.watch(trainable.items(), self.module.parameters())

    def _check_optimizer(self, optimizer: torch.optim.Optimizer, *_: object) -> None:
        own = {id(p) for p in self.module.parameters()}
        for p in (p for g in optimizer.param_groups for p in g["params"]):
            if id(p) not in own:
                raise UnsupportedError(
                    f"The optimizer trains a {tuple(p.shape)} tensor that is no parameter of the private module (any "
                    "more), so its gradient would be neither clipped nor noised.",
                    found=tuple(p.shape),
                    where="optimizer",
                    fix="register it in the module; after a module was replaced, call engine.detach(), build the "
                    "optimizer anew and call make_private again: the engine's ledger goes on.",
                )
            if p.grad is not None and not self.guard.watches(p):
                raise UnsupportedError(
                    f"A {tuple(p.shape)} parameter that was frozen or unknown at the last forward has a gradient, "
                    "which is neither clipped nor noised.",
                    found=tuple(p.shape),
                    where="optimizer",
                    fix="unfreeze and add parameters before the forward, and call zero_grad() before the next.",
                )

    # -- batches --------------------------------------------------------------------------------------------------

    def issue(self, token: Token, batch: object) -> None:
        """Hand out one microbatch. A logical batch that was left unfinished is discarded, never merged."""
        if token.first:
            self.abandon()
        self.capture.refresh()
        install(self.capture)
        token.tape = self.capture.open(self._complete, token.size)
        self.capture.load(batch)
        self._token = token

    def abandon(self) -> None:
        """Forget the unfinished logical batch: nothing of it was released, nothing is charged."""
        self._token = None
        self._poisoned = False
        self._skipped = False
        self._sums.clear()
        self._carried.clear()
        self._owners.clear()
        self._facts = StepFacts()
        self.capture.close()

    def settle(self, token: Token) -> None:
        """Called when the loop comes back for more: a logical batch is released whole or not at all.

        A loop that skips a batch by what it saw in it (a loss that is not finite) would let one record decide over the
        others.
        """
        if token.spent or token is not self._token:
            return
        self._skipped = True
        if token.last and self._facts.batch_size:
            self.abandon()
            raise TokenError(
                "The last microbatch of a logical batch had no backward(), so nothing of the batch was released: one "
                "record would decide whether the others count.",
                fix="call backward() on every microbatch, or break off the loop.",
            )
        if token.tape is not None and token.tape.records is not None and not self._poisoned:
            self.abandon()
            raise TokenError(
                "The last batch ran forward but no backward(): skipping a batch by its content lets one record decide "
                "whether the others count.",
                fix="call backward() on every batch (a record that is not finite weighs 0); look under no_grad().",
            )

    def begin_epoch(self) -> None:
        """A new pass over the records: under Shuffle, its first release pays for all of it."""
        self.abandon()
        self._epoch_paid = False

    def affordable(self) -> bool:
        """Whether the budget allows the next logical batch, after all that this ledger holds by now."""
        shuffled = not isinstance(self.plan.sampler, Poisson)
        if self.budget is None or (shuffled and self._epoch_paid):
            return True
        events = self.ledger.events()
        foreign = sum(events.values()) - self.steps
        if shuffled or foreign != self._foreign:
            left = max_steps(events, self.plan.event, epsilon=self.budget.epsilon, delta=self.budget.delta)
            if shuffled:
                return left > 0
            self._foreign, self._limit = foreign, self.steps + left
        return self._limit is None or self.steps < self._limit

    def empty(self) -> None:
        """A logical batch that drew nobody: charged, released as pure noise, and stepped here."""
        self.abandon()
        self.capture.refresh()
        for p in self.module.parameters():
            p.grad = None
        if self.grad_scaler is not None:
            self.grad_scaler.scale(torch.zeros(()))  # a scaler has no scale before it first scales something
        self._release()
        if self.grad_scaler is not None:
            self.grad_scaler.step(self.optimizer)
            self.grad_scaler.update()
        else:
            self.optimizer.step()
        for p in self.module.parameters():
            p.grad = None

    # -- the end of a backward ------------------------------------------------------------------------------------

    def _complete(self, tape: Tape) -> None:
        token = self._token
        if token is None or token.tape is not tape:
            self._discard()
            raise TokenError(
                "backward() reached a graph of a batch that is over or was never drawn by the private loader.",
                fix="run forward and backward inside the loop over the private loader, and detach what you carry on.",
            )
        if self._poisoned:
            self._discard()
            raise PrivacyError("This step was discarded after an error.", fix="go on with the next batch.")
        if self._skipped:
            self._discard()
            raise TokenError(
                "An earlier microbatch of this logical batch had no backward(), so its sum would not be whole.",
                fix="call backward() on every microbatch, or break off the loop.",
            )
        if token.spent:
            self._discard()
            raise TokenError(
                "A second backward on one batch of the private loader: it would be released twice for one charge.",
                fix="sum the losses and call backward() once.",
            )
        token.spent = True
        self._watch_thawed()
        for name, p in self.capture.parameters.items():
            if p.grad is not None and not token.last:
                self._carried[name] = p.grad if name not in self._carried else self._carried[name] + p.grad
                p.grad = None
        try:
            self._accumulate(tape, token)
        except BaseException:
            self._discard()  # a batch that failed in part is not released in part
            raise
        if token.last:
            self._release()

    def _watch_thawed(self) -> None:
        """A parameter unfrozen since the forward has no term on the tape; a gradient of it is autograd's own."""
        for name, p in self.module.named_parameters():
            if p.requires_grad and not self.guard.watches(p):
                if p.grad is not None:
                    self._violated(name)
                self.guard.watch([*self.capture.parameters.items(), (name, p)], self.module.parameters())

    def _refuse_replaced(self, token: Token) -> None:
        """A partial sum belongs to the parameter it was taken for, not to whatever bears its name later."""
        now: dict[str, Tensor] = dict(self.module.named_parameters())
        moved = None if token.first else next((n for n in self._sums if now.get(n) is not self._owners.get(n)), None)
        if moved is not None:
            raise PrivacyError(
                f"{moved} was replaced, tied or renamed between two microbatches of one logical batch; the batch was "
                "discarded.",
                where=moved,
                fix="change the model between logical batches only.",
            )
        self._owners = now

    def _accumulate(self, tape: Tape, token: Token) -> None:
        if not (token.first and token.last):
            self._refuse_replaced(token)
        parameters = self.capture.parameters
        parts = collect(tape, parameters)
        self._refuse_rounded_mean(tape)
        scale = (token.size if self.plan.loss_reduction == "mean" else 1) / self._loss_scale
        if token.unit is not None and token.units < token.size:
            parts = by_unit(parts, token.unit, token.units)
        norms = total_norms(parts, token.units)
        dtype = wide_dtype(parameters.values())
        sums, weights = clipped(parts, norms, self.plan.max_grad_norm, dtype, scale, self._unit)
        self._facts.batch_size += token.units
        self._facts.clipped += int((weights < 1).sum())
        self._facts.empty = False
        for name, total in sums.items():
            if name in self._sums and self._sums[name].shape != total.shape:
                self._discard()
                raise PrivacyError(
                    f"{name} changed its shape to {tuple(total.shape)} between two microbatches of one logical batch.",
                    where=name,
                    fix="change the model between logical batches only.",
                )
            # A sum of many microbatches in float32 would lose what a single record adds.
            whole = total if token.first and token.last else total.double()
            self._sums[name] = self._sums[name].to(total.device) + whole if name in self._sums else whole

    def _refuse_rounded_mean(self, tape: Tape) -> None:
        if self.plan.loss_reduction == "mean" and any(t.half for t in tape.family()):
            raise UnsupportedError(
                "The gradients pass through half precision after the loss was divided by the number of records drawn: "
                "how each is rounded depends on that number, and removing one record moved the sum by 21 C in a test.",
                where="loss_reduction",
                fix='let the criterion sum (reduction="sum") and say loss_reduction="sum".',
            )

    def _release(self) -> None:
        """Charge, then noise, then p.grad: in this order and nowhere else."""
        plan = self.plan
        pays = isinstance(plan.sampler, Poisson) or not self._epoch_paid
        self.ledger.append(
            plan.event if pays else plan.covered, run=self.run, step=self.steps, note=f"noise: {plan.noise_level}"
        )
        self._epoch_paid = True
        released = self._noised() if plan.noise_std else self._sums
        for name, p in self.capture.parameters.items():
            grad = released[name] if name in released else torch.zeros_like(p)
            if self.grad_scaler is not None:
                # The scaler divides by its scale of now, whatever it was at earlier microbatches of this batch.
                grad = grad * self._loss_scale
            grad = grad.to(p.dtype)
            before = self._carried.get(name)
            if p.grad is not None:
                before = p.grad if before is None else before + p.grad
            p.grad = grad if before is None else before + grad
        self.steps += 1
        self.last_step = self._facts
        self._facts = StepFacts()
        self._sums.clear()
        self._carried.clear()

    @property
    def _loss_scale(self) -> float:
        return 1.0 if self.grad_scaler is None else float(self.grad_scaler.get_scale())

    @property
    def _unit(self) -> float:
        """Sum to p.grad: a public constant."""
        return 1.0 / self.plan.expected_batch_size

    def _noised(self) -> dict[str, Tensor]:
        """The sums plus N(0, (unit·σC)²), for every trainable parameter: one draw a dtype and device, cut to shape."""
        kinds: dict[tuple[torch.dtype, torch.device], list[str]] = {}
        parameters = self.capture.parameters
        for name, p in parameters.items():
            kinds.setdefault((wide_dtype([p]), p.device), []).append(name)
        out: dict[str, Tensor] = {}
        for (dtype, device), names in kinds.items():
            sizes = [parameters[n].numel() for n in names]
            flat = self.source.normal((sum(sizes),), std=self.plan.noise_std * self._unit, dtype=dtype, device=device)
            for name, piece in zip(names, flat.split(sizes), strict=True):
                out[name] = piece.view_as(parameters[name])
                if name in self._sums:
                    out[name] += self._sums.pop(name)
        return out

    # -- violations -------------------------------------------------------------------------------------------------

    def _discard(self) -> None:
        self._poisoned = True
        self._sums.clear()
        self._carried.clear()
        self._facts = StepFacts()
        for p in self.module.parameters():
            p.grad = None

    def _violated(self, name: str) -> None:
        outside = self._token is None
        self._discard()
        if outside:
            raise TokenError(
                f"backward() wrote into {name} outside the loop over the private loader: this batch was not drawn, so "
                "nothing pays for it.",
                where=name,
                fix="iterate over the loader that make_private returned, or call engine.detach() first.",
            )
        raise UnclippedGradient(
            f"Autograd wrote an unclipped gradient into {name}; all gradients of this step were wiped.",
            where=name,
            fix="keep every use of the parameter inside the model's forward: no regulariser in the loss (use "
            "weight_decay), no scripted layer, no custom autograd Function that takes it.",
        )
