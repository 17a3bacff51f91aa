"""The subject of a check: a copy of model and criterion, run natively on any records, always from the same state."""

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
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
_TOLERANCE = {64: 1e-7, 32: 3e-4, 16: 6e-2, 8: 0.3}


@dataclass(frozen=True)
class Run:
    """One forward: floating-point outputs by path, and where the random generators ended."""

    outputs: dict[str, Tensor]
    loss: Tensor
    end: tuple[Any, ...]
    foreign: list[Tensor]  # trainable tensors that the loss reaches and the model does not own
    state: tuple[State, State] | None  # of model and criterion, as the forward left them


class Subject:
    """Everything a check computes with. ``run`` and ``gradient`` take rows of the pool."""

    def __init__(self, model: nn.Module, criterion: Criterion, records: Records, reduction: str, double: bool):
        self.model, self.criterion, self.reduction = model, criterion, reduction
        self.dtype = torch.float64 if double else None
        self.constant = False  # random numbers are the same for all records, whatever the size of the batch
        self.withhold = False  # keep the target from the model, for the criterion alone
        records = records.cast(torch.float64) if double else records
        self.pool: Pool = pool(records)
        self.whole = records.of  # the batch that the records are from
        self.n = records.count
        self.state = State.of(model, criterion)
        self.sketcher = Sketcher()
        with still.Narrowest() as narrowest:
            self.first = self.run(range(self.n), state=True)
        self.tolerance = _TOLERANCE[max(8, narrowest.bits)]

    @property
    def parameters(self) -> dict[str, nn.Parameter]:
        return {n: p for n, p in self.model.named_parameters() if p.requires_grad}

    @contextmanager
    def quiet(self, seed: int = 0) -> Iterator[None]:
        """From the same state, with the same random numbers, without dropout; leaves nothing behind."""
        constant = still.Constant() if self.constant else nullcontext()
        with kept_randomness(), still.default_dtype(self.dtype), still.without_dropout(self.model), constant:
            still.seed_everything(seed)
            try:
                yield
            finally:
                self.state.restore(thorough=False)

    def call(self, batch: Any) -> tuple[Any, Tensor]:
        with torch.enable_grad():
            return output_and_loss(self.model, self.criterion, batch, self.withhold)

    def run(self, rows: Sequence[int], seed: int = 0, state: bool = False) -> Run:
        """One forward; with ``state``, what it left in model and criterion as well."""
        with self.quiet(seed):
            return self._noted(*self.call(self.pool.take(rows)), state)

    def _noted(self, output: Any, loss: Tensor, state: bool = False) -> Run:
        outputs = {p: t.detach() for p, t in named_tensors(output) if t.is_floating_point()}
        states = (State.of(self.model, undo=False), State.of(self.criterion, undo=False)) if state else None
        return Run(outputs, loss.detach(), randomness(), _outside(loss, self.model), states)

    def run_whole(self) -> Run | None:
        """One forward of the batch that the records are from."""
        if self.whole is None:
            return None
        try:
            with self.quiet():
                return self._noted(*self.call(self.whole[0].take(range(self.whole[0].count))))
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
            output, loss = self.call(self.pool.take(rows))
            run = self._noted(output, loss)
            wanted = list(named.values())
            found = torch.autograd.grad(loss, wanted, allow_unused=True) if loss.requires_grad and wanted else ()
            factor = len(rows) if self.reduction == "mean" else 1
            return run, self.sketcher(dict(zip(named, found, strict=False)), factor)

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
    for double in (True, False):
        try:
            twin, rule = copy.deepcopy((model, criterion))
            if double:
                _to_double(twin, rule)
            return Subject(twin, rule, records, reduction, double), lambda: None
        except Exception:  # noqa: BLE001, S112  (whatever a user's class does when copied)
            continue
    state = State.of(model, criterion)
    grads = {p: p.grad for p in model.parameters()}

    def put_back() -> None:
        state.restore()
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


def _outside(loss: Tensor, model: nn.Module) -> list[Tensor]:
    own = {id(p) for p in model.parameters()}
    seen, todo, found = set(), [loss.grad_fn], []
    while todo:
        node = todo.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        variable = getattr(node, "variable", None)
        if isinstance(variable, Tensor) and id(variable) not in own:
            found.append(variable)
        todo += [n for n, _ in node.next_functions]
    return found
