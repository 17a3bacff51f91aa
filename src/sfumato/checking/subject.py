"""The subject of a check: a copy of model and criterion, run natively on any records, always from the same state."""

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sfumato.checking import sketch, still
from sfumato.checking.batches import Pool, Records, pool
from sfumato.checking.calling import Criterion, output_and_loss
from sfumato.checking.sketch import Sketch, Sketcher
from sfumato.ghost.indexing import named_tensors
from sfumato.ghost.state import State, kept_randomness, randomness

# Two computations of one number in another order differ by rounding. In float64 that is some 1e-13 of the terms that
# were added; the bound lies far above it, and far below what a real dependence does (a share of 1/B, or the weight of
# an auxiliary loss: 1e-4 and more). Where a model computes in float32 inside, or its copy could not be made in
# float64, some 1e-6 comes back amplified by depth, and the bound follows the narrowest format that was seen.
TOLERANCE = {64: 1e-7, 32: 3e-4, 16: 6e-2, 8: 0.3}


@dataclass(frozen=True)
class Run:
    """One forward: floating-point outputs by path, and where the random generators ended."""

    outputs: dict[str, Tensor]
    loss: Tensor
    end: tuple[Any, ...]
    drawn: list[str]  # and those that the model holds
    foreign: list[Tensor]  # trainable tensors that the loss reaches and the model does not own
    state: tuple[State, State] | None  # of model and criterion, as the forward left them


class Subject:
    """Everything a check computes with. ``run`` and ``gradient`` take rows of the pool."""

    def __init__(self, model: nn.Module, criterion: Criterion, records: Records, reduction: str, double: bool):
        self.model, self.criterion, self.reduction = model, criterion, reduction
        self.dtype = torch.float64 if double else None
        self.constant = False  # random numbers are the same for all records, whatever the size of the batch
        self.draws = 0  # random numbers that the last run asked for, while they were constant
        self.withhold = False  # keep the target from the model, for the criterion alone
        records = records.cast(torch.float64) if double else records
        self.pool: Pool = pool(records)
        self.whole = records.of  # the batch that the records are from
        self.n = records.count
        self.state = State.of(model, criterion)
        self.sketcher = Sketcher()
        with still.Narrowest() as narrowest:
            self.first = self.run(range(self.n), state=True)
        self.bits = max(8, narrowest.bits)
        self.tolerance = self.exact = TOLERANCE[self.bits]  # exact: for gradients, once their rounding was measured

    @property
    def parameters(self) -> dict[str, nn.Parameter]:
        return {n: p for n, p in self.model.named_parameters() if p.requires_grad}

    @contextmanager
    def quiet(self, seed: int = 0) -> Iterator[None]:
        """From the same state, with the same random numbers, without dropout; leaves nothing behind."""
        with ExitStack() as stack:
            for context in (kept_randomness(), still.default_dtype(self.dtype), still.without_dropout(self.model)):
                stack.enter_context(context)
            stack.enter_context(torch.inference_mode(False))
            constant = still.Constant()
            if self.constant:
                stack.enter_context(constant)
                stack.enter_context(still.constant_numpy())
            still.seed_everything(seed)
            if seed:
                self.state.reseed(seed)
            try:
                yield
            finally:
                self.draws = constant.calls
                self.state.restore(thorough=False)

    def call(self, batch: Any) -> tuple[Any, Tensor]:
        with torch.enable_grad():
            return output_and_loss(self.model, self.criterion, batch, self.withhold)

    def run(self, rows: Sequence[int], seed: int = 0, state: bool = False) -> Run:
        """One forward; with ``state``, what it left in model and criterion as well."""
        with self.quiet(seed):
            batch = self.pool.take(rows)
            output, loss = self.call(batch)
            wanted = list(self.parameters.values())
            if state and loss.requires_grad and wanted:  # a backward may write state as well
                torch.autograd.grad(loss, wanted, allow_unused=True, retain_graph=True)
            return self._noted(output, loss, batch, state)

    def _noted(self, output: Any, loss: Tensor, batch: Any, state: bool = False) -> Run:
        outputs = {p: t.detach() for p, t in named_tensors(output) if t.is_floating_point()}
        states = (State.of(self.model, undo=False), State.of(self.criterion, undo=False)) if state else None
        foreign = _outside(loss, self.model, batch)
        return Run(outputs, loss.detach(), randomness(), self.state.drawn(), foreign, states)

    def run_whole(self) -> Run | None:
        """One forward of the batch that the records are from."""
        if self.whole is None:
            return None
        try:
            with self.quiet():
                batch = self.whole[0].take(range(self.whole[0].count))
                output, loss = self.call(batch)
                return self._noted(output, loss, batch)
        except Exception:  # noqa: BLE001
            return None

    def attempt(self, rows: Sequence[int], state: bool = False) -> Run | None:
        """``run``, or None where the user's code does not take these records."""
        try:
            return self.run(rows, state=state)
        except Exception:  # noqa: BLE001  (any code of the user's, on records they never put together)
            return None

    def measure(self, rows: Sequence[int], seed: int = 0) -> tuple[Run, Sketch]:
        """``run``, and the gradient of the sum of the losses by plain autograd: what should be a sum over records."""
        named = self.parameters
        with self.quiet(seed):
            batch = self.pool.take(rows)
            output, loss = self.call(batch)
            run = self._noted(output, loss, batch)
            wanted = list(named.values())
            found = torch.autograd.grad(loss, wanted, allow_unused=True) if loss.requires_grad and wanted else ()
            factor = len(rows) if self.reduction == "mean" else 1
            return run, self.sketcher(dict(zip(named, found, strict=False)), factor)

    def of(self, members: Sequence[int], constant: str | None = None) -> "Subject":
        """The same with some of the records, or with an input that is the same for all of them."""
        records = self.pool.first(self.n)
        axes = {p: a for p, a in records.axes.items() if p != constant}
        some = Records(records.take(members), len(members), axes)
        return Subject(self.model, self.criterion, some, self.reduction, self.dtype is not None)

    def shift_weights(self, size: float, least: float = 0.0) -> Callable[[], None]:
        """Add noise to every floating parameter, relative to its values or to ``least`` of what they start from.

        For good, or until what is returned is called.
        """
        before, kept = self.state, [(p, p.detach().clone()) for p in self.model.parameters() if p.is_floating_point()]
        generator = torch.Generator().manual_seed(1)

        def back() -> None:
            self.state = before
            with torch.no_grad():
                for p, value in kept:
                    p.copy_(value)

        with torch.no_grad():
            for p, value in kept:
                noise = torch.randn(p.shape, generator=generator, dtype=torch.float32).to(p)
                usual = (
                    least * max(float(value.std()) if p.numel() > 1 else 0.0, max(p[0].numel(), 1) ** -0.5)
                    if (least and p.dim())
                    else least
                )
                p.add_(noise * (usual + size * value.abs()))
        self.state = State.of(self.model, self.criterion)
        return back

    def try_measure(self, rows: Sequence[int], seed: int = 0) -> tuple[Run, Sketch] | None:
        """``measure``, or None where it fails or is not finite."""
        try:
            run, found = self.measure(rows, seed)
        except Exception:  # noqa: BLE001
            return None
        return (run, found) if sketch.finite(found) else None

    def try_gradient(self, rows: Sequence[int], seed: int = 0) -> Sketch | None:
        """The gradient alone."""
        both = self.try_measure(rows, seed)
        return None if both is None else both[1]


def subject(
    model: nn.Module, criterion: Criterion, records: Records, reduction: str
) -> tuple[Subject, Callable[[], None]]:
    """A subject in double precision if that works, else in the model's own; and what to call at the end.

    A model that cannot be copied (it holds tensors with a history) is used itself, and put back afterwards.
    """
    far = State.of(model, criterion, parameters=False, far=True)  # functions are shared with the copies
    for double in (True, False):
        try:
            twin, rule = copy.deepcopy((model, criterion))
            if double:
                _to_double(twin, rule)
            return Subject(twin, rule, records, reduction, double), far.restore
        except Exception:  # noqa: BLE001  (whatever a user's class does when copied)
            far.restore()
    state = State.of(model, criterion)
    grads = {p: p.grad for p in model.parameters()}

    def put_back() -> None:
        state.restore()
        far.restore()
        for p, grad in grads.items():
            p.grad = grad

    try:
        return Subject(model, criterion, records, reduction, False), put_back
    except BaseException:
        put_back()
        raise


def _to_double(*parts: Any) -> None:
    for part in parts:
        if isinstance(part, nn.Module):
            part.double()
            for m in part.modules():
                for name, value in list(vars(m).items()):
                    if isinstance(value, Tensor) and value.is_floating_point() and value.is_leaf:
                        vars(m)[name] = value.detach().double().requires_grad_(value.requires_grad)


def _outside(loss: Tensor, model: nn.Module, batch: Any) -> list[Tensor]:
    own = {id(p) for p in model.parameters()} | {id(t) for _, t in named_tensors(batch)}
    memory = {p.data_ptr() for p in model.parameters()}  # a scripted module makes them anew at each access
    seen, todo, found = set(), [loss.grad_fn], []
    while todo:
        node = todo.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        variable = getattr(node, "variable", None)
        if isinstance(variable, Tensor) and id(variable) not in own and variable.data_ptr() not in memory | {0}:
            found.append(variable)
        todo += [n for n, _ in node.next_functions]
    return found
