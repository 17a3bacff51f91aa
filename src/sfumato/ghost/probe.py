"""The first batch of a training, seen natively: does one record of a batch reach the outputs of another?

The capture follows operations, and some hide (a scripted layer, values taken through numpy). Here the model itself
answers, with no capture and nothing but its outputs: the batch as it is, then with records replaced. The records that
stayed must come out as before. A few forward passes, once, and nothing of them remains.
"""

import copy
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from sfumato.errors import CoupledRecords
from sfumato.ghost import indexing
from sfumato.ghost.rows import Rows
from sfumato.ghost.state import State, close, kept_randomness, randomness, restore_randomness, same_randomness

if TYPE_CHECKING:
    from sfumato.ghost.capture import Capture

# Of the largest value of the rows that stayed. Rounding differs only where rows share a kernel that depends on all of
# them (grouped experts), so these are wide; the replacements move any statistic of the batch by far more.
_TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-3}

_ALONE = threading.RLock()  # a probe suspends the capture, for every thread


def wait(c: "Capture") -> None:
    """Let the probe of another thread end."""
    if c.prober not in (None, threading.get_ident()):
        with _ALONE:
            pass


def probe(
    c: "Capture", module: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> None:
    """Refuse a model whose outputs for a record depend on the other records of this batch.

    Silent where nothing can be concluded: a model that is random beyond its seed, one whose use of random numbers
    depends on the records, outputs without records, inputs that cannot be replaced.

    Raises:
        CoupledRecords
    """
    slots = [t for _, t in indexing.named_tensors((args, kwargs))]
    records = [t for t in slots if isinstance(tag := c.own_tag(t), Rows) and tag.plain]
    if c.records < 2 or not records or c.tape.declared is not None or torch._C._current_graph_task_id() != -1:
        return
    axes = {id(t): tag.axis for t in records if isinstance(tag := c.own_tag(t), Rows)}
    with _ALONE:
        if module in c.probed:
            return
        before, c.prober = c.suspended, threading.get_ident()
        c.suspended = True
        try:
            with kept_randomness(), torch.no_grad():
                run = _Runner(c, forward, args, kwargs, {id(t): t for t in slots}, axes)
                moved = _moved(run, c.records)
                if moved is None:
                    with _without_zeros(module) as changed:
                        moved = _moved(run, c.records) if changed else None
        finally:
            c.suspended, c.prober = before, None
        if moved is None:
            c.probed.add(module)
    if moved is not None:
        raise CoupledRecords(
            f"Replacing {moved} of the first batch changed what the model computes for the other records, so records "
            "are mixed and one record's influence cannot be bounded.",
            where=next((n for n, m in c.module.named_modules() if m is module and n), type(module).__name__),
            fix="sf.check(model, criterion, batch) names the place; compute it for each record on its own, and keep "
            "nothing from one batch to the next.",
        )


@contextmanager
def _without_zeros(module: nn.Module) -> Iterator[bool]:
    """Small numbers in parameters that are zero throughout (a last layer before training), which hide what they
    multiply; put back exactly. Whether there were any.
    """
    kept = [
        (p.data, p.data.clone())
        for p in module.parameters()
        if p.is_floating_point() and type(p) is nn.Parameter and p.numel() and not bool(p.data.any())
    ]
    try:
        for k, (p, _) in enumerate(kept):
            p.copy_(0.05 * torch.sin(1.0 + k + torch.arange(p.numel(), device=p.device)).reshape(p.shape))
        yield bool(kept)
    finally:
        for p, before in kept:
            p.copy_(before)


class _Runner:
    """Runs the forward on a changed batch, from the same state of everything."""

    def __init__(
        self,
        c: "Capture",
        forward: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        slots: dict[int, Tensor],
        axes: dict[int, int],
    ):
        self.forward, self.args, self.kwargs, self.slots, self.axes = forward, args, kwargs, slots, axes
        self.modules = {id(m): m for t in (args, kwargs) for m in _modules(t)}
        self.state = State.of(c.module, parameters=False)
        self.start = randomness()
        self.end: tuple[Any, ...] | None = None

    def __call__(self, rows: Callable[[Tensor], Tensor] | None = None, other_size: bool = False) -> list[Tensor] | None:
        """Outputs with records replaced (None: a copy of the batch); None if they cannot be compared."""
        restore_randomness(self.start)
        changed = {i: self._changed(t, rows) for i, t in self.slots.items()}
        try:
            args, kwargs = copy.deepcopy((self.args, self.kwargs), {**self.modules, **changed})
            out = self.forward(*args, **kwargs)
        except Exception:  # noqa: BLE001  (the user's code on a batch that was never drawn: not an answer)
            return None
        finally:
            self.state.restore()
        end = randomness()
        if not other_size:
            if self.end is not None and not same_randomness(self.end, end):
                return None
            self.end = end
        return [t.detach() for _, t in indexing.named_tensors(out) if t.is_floating_point()]

    def _changed(self, t: Tensor, rows: Callable[[Tensor], Tensor] | None) -> Tensor:
        if id(t) not in self.axes or rows is None:
            return t.detach().clone()
        axis = self.axes[id(t)]
        return rows(t.detach().movedim(axis, 0)).movedim(0, axis).contiguous()


def _modules(value: Any) -> list[nn.Module]:
    if isinstance(value, nn.Module):
        return [value]
    if isinstance(value, dict):
        value = tuple(value.values())
    return [m for v in value for m in _modules(v)] if isinstance(value, (tuple, list)) else []


def _moved(run: _Runner, n: int) -> str | None:
    """What was replaced when other records moved; None if nothing did, or nothing can be said."""
    once, twice = run(), run()
    if once is None or twice is None or len(once) != len(twice):
        return None
    if not all(a.shape == b.shape and close(a, b, 1e-2 * _tolerance(a)) for a, b in zip(once, twice, strict=True)):
        return None  # random beyond the seed
    axes = _record_axes(run, once, n)
    half = n // 2
    probes: list[tuple[str, list[int], Callable[[Tensor], Tensor]]] = [
        ("the last record by the first", [n - 1], lambda x: torch.cat([x[:-1], x[:1]])),
        (
            "half of the records by one",
            list(range(half, n)),
            lambda x: torch.cat([x[:half], x[:1].expand_as(x)[half:]]),
        ),
        ("the values of the first record by larger ones", [0], lambda x: torch.cat([_grown(x[:1], 10), x[1:]])),
        ("the values of the first record by huge ones", [0], lambda x: torch.cat([_grown(x[:1], 1000), x[1:]])),
    ]
    for what, gone, change in probes:
        other = run(change)
        if other is None or len(other) != len(once):
            continue
        stay = [i for i in range(n) if i not in set(gone)]
        for a, b, axis in zip(once, other, axes, strict=True):
            if axis is not None and a.shape == b.shape and not _rows_stay(a, b, axis, n, stay):
                return what
    return None


def _grown(row: Tensor, factor: float) -> Tensor:
    """Other values of a record, only where the values are not codes: integers and masks stay."""
    if not row.is_floating_point() or bool(((row == 0) | (row == 1)).all()):
        return row
    return factor * row + torch.linspace(-1, 1, row.numel(), dtype=row.dtype, device=row.device).reshape(row.shape)


def _record_axes(run: _Runner, outputs: list[Tensor], n: int) -> list[int | None]:
    """The axis of each output whose size follows the number of records."""
    fewer = run(lambda x: x[:-1], other_size=True)
    axes: list[int | None] = []
    for k, out in enumerate(outputs):
        fits = [a for a in range(out.dim()) if out.shape[a] % n == 0 and out.shape[a] > 0]
        if fewer is not None and k < len(fewer) and fewer[k].dim() == out.dim():
            fits = [a for a in fits if fewer[k].shape[a] == out.shape[a] // n * (n - 1)]
        else:
            fits = [a for a in fits if out.shape[a] == n]
        axes.append(fits[0] if len(fits) == 1 else None)
    return axes


def _tolerance(out: Tensor) -> float:
    return 5e-2 if torch.is_autocast_enabled(out.device.type) else _TOLERANCE.get(out.dtype, 5e-2)


def _rows_stay(a: Tensor, b: Tensor, axis: int, n: int, stay: list[int]) -> bool:
    """Rows may lie record by record, or step by step with the records inside; either will do."""
    a, b = a.movedim(axis, 0), b.movedim(axis, 0)
    layouts = [(a.reshape(n, -1), b.reshape(n, -1))]
    if len(a) != n:
        layouts += [(_inner(a, n), _inner(b, n))]
    tolerance = _tolerance(a)

    def same(x: Tensor, y: Tensor) -> bool:
        x, y = x[stay].double(), y[stay].double()
        scale = float(torch.where(x.isfinite(), x, 0).abs().max()) if x.numel() else 0.0
        return bool(torch.allclose(x, y, rtol=tolerance, atol=tolerance * scale, equal_nan=True))

    return any(same(x, y) for x, y in layouts)


def _inner(x: Tensor, n: int) -> Tensor:
    return x.reshape(-1, n, *x.shape[1:]).movedim(1, 0).reshape(n, -1)
