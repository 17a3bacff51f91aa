"""The hot step: clip the tape, accumulate, charge the ledger, add noise, and only then let a gradient be seen."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from sfumato.clipping import Flat, Quantile, group_of, update
from sfumato.errors import BudgetExceeded, PrivacyError, TokenError, UnclippedGradient, UnsupportedError
from sfumato.ghost import Capture, Guard, Tape, by_unit, clipped, collect, install, remove, total_norms, wide_dtype
from sfumato.noise import Research, Secure
from sfumato.plan import Plan, StepPlan
from sfumato.session.charging import Charging
from sfumato.session.release import log, noised
from sfumato.session.token import StepFacts, Token


@dataclass
class Session:
    """One private training: one model, one plan, one ledger."""

    module: nn.Module
    optimizers: Sequence[torch.optim.Optimizer]
    plan: Plan
    source: Secure | Research
    charging: Charging
    batch_dim: int = 0
    grad_scaler: "torch.amp.GradScaler | None" = None
    check_first_batch: bool = False

    def __post_init__(self) -> None:
        self.guard = Guard(self._violated)
        self.capture = Capture(self.module, self.batch_dim, self.plan.loss_reduction, self._watch)
        self.capture.probing = self.check_first_batch
        self.closed = False
        self.steps = 0
        self.turn = 0  # the sampler's next draw
        self.epoch_step = 0  # logical steps of the current epoch that are released
        self.resumed = 0  # of them, those that an earlier life of this training released
        self.bound: float | None = None  # the current C under quantile clipping: computed from released counts
        self.stopped = False
        self.last_step = StepFacts()
        self._facts = StepFacts()
        self._token: Token | None = None
        self._poisoned = False
        self._skipped = False
        # The plan and the numbers of the logical batch that has begun.
        self._under: Plan = self.plan
        self._now: StepPlan | None = None
        self._within = 0.0  # units within the bound, less half of those drawn
        self._sums: dict[str, Tensor] = {}
        self._carried: dict[str, Tensor] = {}
        self._last: dict[str, Tensor] = {}  # the parameters of the last release
        self._owners: dict[str, Tensor] = {}  # the parameters that _sums belong to
        self.capture.refresh()
        install(self.capture)
        self._step_hooks = [o.register_step_pre_hook(self._check_optimizer) for o in self.optimizers]
        for p in self.module.parameters():
            p.grad = None  # a gradient from before this engine is not private

    def close(self) -> None:
        self.abandon()
        self.closed = True
        self.charging.settle()
        for hook in self._step_hooks:
            hook.remove()
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
            self._begin(token)
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
        self._now, self._within = None, 0.0
        self.capture.close()

    def _begin(self, token: Token) -> None:
        """The numbers of this logical batch: the same for all its microbatches and for its noise."""
        self.turn = token.turn + 1
        self._under, self._now = self.plan, self.plan.at(self.steps, self.bound)

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

    def change(self, **numbers: float) -> None:
        """Other numbers from the next logical batch on; they may depend on what was released so far."""
        if self._token is not None and not (self._token.spent and self._token.last):
            raise PrivacyError(
                "A logical batch is half done, and bound, noise and charge of a batch are fixed when it is drawn.",
                fix="change the numbers after backward() of the last microbatch, or between epochs.",
            )
        plan = replace(self.plan, adaptive=True, **numbers)  # type: ignore[arg-type]
        bound = None if "max_grad_norm" in numbers else self.bound
        plan.at(self.steps, bound)  # a σ that the count of quantile clipping cannot spare is refused here
        self.plan, self.bound = plan, bound

    def affordable(self, token: Token) -> bool:
        """Whether the budget allows the logical batch that ``token`` begins."""
        return self.charging.affordable(self.plan, self.steps, token.period)

    def empty(self, token: Token) -> None:
        """A logical batch that drew nobody: charged, released as pure noise, and stepped here."""
        self.abandon()
        self._begin(token)
        if not self._set_of_empty_draw():
            self.capture.refresh()
        for p in self.module.parameters():
            p.grad = None
        if self.grad_scaler is not None:
            self.grad_scaler.scale(torch.zeros(()))  # a scaler has no scale before it first scales something
        self._release(token)
        for optimizer in () if self.stopped else self.optimizers:
            if self.grad_scaler is not None:
                self.grad_scaler.step(optimizer)
            else:
                optimizer.step()
        if self.grad_scaler is not None and not self.stopped:
            self.grad_scaler.update()
        for p in self.module.parameters():
            p.grad = None

    def _set_of_empty_draw(self) -> bool:
        """Release for the parameters of the last release: a loop may freeze some for the rest of its body.

        The first draw of an epoch takes what is trainable now, unless nothing is.
        """
        own = dict(self.module.named_parameters())
        if not self._last or any(own.get(n) is not p for n, p in self._last.items()):
            return False
        if self.epoch_step == 0 and any(p.requires_grad for p in own.values()):
            return False
        self.capture.parameters = dict(self._last)
        return True

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
            self._release(token)

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
        now = self._current
        clip, size = self.plan.clipping, token.units
        norms = total_norms(parts, size, group_of(clip, parameters))
        dtype = wide_dtype(parameters.values())
        padding = torch.arange(size) >= size - token.padding if token.padding else None
        sums, weighed = clipped(parts, norms, now.max_grad_norm, dtype, scale, self._unit, clip=clip, mask=padding)
        within = int((weighed.norms <= now.max_grad_norm).sum())
        self._facts.batch_size += len(weighed.norms)
        self._facts.clipped += len(weighed.norms) - within if clip == Flat() else int((weighed.weights < 1).sum())
        self._facts.empty = False
        self._within += within - len(weighed.norms) / 2
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

    def _release(self, token: Token) -> None:
        """Charge, then noise, then p.grad: in this order and nowhere else."""
        now = self._current
        try:
            self.charging.pay(self._under, self.steps, token.period)
        except BudgetExceeded:  # another process has spent it since the batch was drawn
            self._discard()
            self._poisoned, self.stopped = False, True
            if self.grad_scaler is not None:  # its step() insists on gradients
                for p in self.capture.parameters.values():
                    p.grad = torch.zeros_like(p)
            return
        released = self._sums
        if now.noise_std:
            released = noised(self._sums, self.capture.parameters, now.noise_std * self._unit, self.source)
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
        self._last = dict(self.capture.parameters)
        self._adapt(now)
        self.steps += 1
        self.epoch_step += 1
        self.last_step = self._facts
        self._facts = StepFacts()
        self._sums.clear()
        self._carried.clear()
        log(self.charging, self.plan, now, self.steps)

    def _adapt(self, now: StepPlan) -> None:
        """Move the bound by the noisy count (Andrew et al. 2021, algorithm 1), for which this step's event has paid."""
        if not isinstance(self.plan.clip_schedule, Quantile):
            return
        noise = self.source.normal((1,), std=now.count_noise_std or 0.0, dtype=torch.float64)
        fraction = (self._within + float(noise)) / self.plan.expected_batch_size + 0.5
        self.bound = update(self.plan.clip_schedule, now.max_grad_norm, fraction, self.steps)
        self._within = 0.0

    @property
    def _current(self) -> StepPlan:
        if self._now is None:
            raise PrivacyError("No logical batch has begun.", fix="iterate over the private loader.")
        return self._now

    @property
    def left(self) -> int | None:
        """Charges that the budget still allows; None without a budget."""
        return self.charging.left(self.plan, self.steps)

    @property
    def next_step(self) -> StepPlan:
        """The numbers of the step that comes next."""
        return self.plan.at(self.steps, self.bound)

    @property
    def _loss_scale(self) -> float:
        return 1.0 if self.grad_scaler is None else float(self.grad_scaler.get_scale())

    @property
    def _unit(self) -> float:
        """Sum to p.grad: a public constant."""
        return 1.0 / self.plan.expected_batch_size

    # -- violations -------------------------------------------------------------------------------------------------

    def _discard(self) -> None:
        self._poisoned = True
        self._sums.clear()
        self._carried.clear()
        self._facts = StepFacts()
        self._within = 0.0
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
