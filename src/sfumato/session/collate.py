"""Which record lies where in a batch: a collate_fn of the caller's must leave the records in the order of its list."""

import copy
import random
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence, pad_packed_sequence
from torch.utils.data import default_collate, default_convert

from sfumato.errors import UnsupportedError
from sfumato.ghost.indexing import attributes

_FIX = (
    "keep the order of the list in collate_fn (pack_sequence(enforce_sorted=False) sorts by itself), and do random "
    "work in the data set."
)


def in_order(collate: Callable[[list[Any]], Any]) -> Callable[[list[Any]], Any]:
    """``collate``, proved at every batch to keep the order; torch's own do."""
    return collate if collate in (default_collate, default_convert) else _InOrder(collate)


class _InOrder:
    """Collates the records a second time, in another order, one of them twice: the rows must follow."""

    def __init__(self, collate: Callable[[list[Any]], Any]):
        self.collate = collate

    def __call__(self, records: list[Any]) -> Any:
        n = len(records)
        if n < 2:
            return self.collate(records)
        order = random.SystemRandom().sample(range(n), n)
        order.append(order[0])  # neither ascending nor descending, as anything sorted would be
        again = [_copied(records[i]) for i in order]  # collate_fn may take the records apart
        with _same_draws():
            try:
                moved = self.collate(again)
            except Exception as error:
                self.collate(
                    [_copied(record) for record in records]
                )  # its own error, if the order is not what it fails for
                raise self._refused(f"fails on the same records in another order ({error})") from error
        batch = self.collate(records)
        if not _follows(batch, moved, order):
            raise self._refused("does not keep the order of the records, or draws random numbers for them")
        return batch

    def _refused(self, what: str) -> UnsupportedError:
        name = getattr(self.collate, "__qualname__", type(self.collate).__name__)
        return UnsupportedError(
            f"collate_fn {name} {what}; whose record a row is would be guessed.",
            found=name,
            where="data_loader.collate_fn",
            fix=_FIX,
        )


def _copied(record: Any) -> Any:
    try:
        return copy.deepcopy(record)
    except (TypeError, RuntimeError, NotImplementedError):
        return record


@contextmanager
def _same_draws() -> Iterator[None]:
    """Random numbers drawn inside are drawn again afterwards."""
    state, own, legacy = torch.get_rng_state(), random.getstate(), np.random.get_state()  # noqa: NPY002
    try:
        yield
    finally:
        torch.set_rng_state(state)
        random.setstate(own)
        np.random.set_state(legacy)  # noqa: NPY002


def _follows(batch: Any, moved: Any, order: list[int], depth: int = 12) -> bool:
    """Whether what has an entry for each record in ``batch`` has those of ``order`` in ``moved``.

    The list behind ``moved`` is longer by one: only what grew by one with it counts as having an entry per record.
    Without ``order``, both must be equal.
    """
    if depth == 0 or type(batch) is not type(moved):
        return depth == 0
    if isinstance(batch, PackedSequence):
        batch, moved = pad_packed_sequence(batch), pad_packed_sequence(moved)
    if isinstance(batch, np.ndarray):
        batch, moved = _plain(batch), _plain(moved)
    if isinstance(batch, Tensor):
        if batch.is_nested:
            batch, moved = batch.unbind(), moved.unbind()
        else:
            return _rows_follow(batch.detach().to_dense(), moved.detach().to_dense(), order)
    if isinstance(batch, Mapping):
        return batch.keys() == moved.keys() and all(_follows(v, moved[k], order, depth - 1) for k, v in batch.items())
    if isinstance(batch, (list, tuple)):
        if len(batch) == len(moved):
            return all(_follows(a, b, order, depth - 1) for a, b in zip(batch, moved, strict=True))
        if (len(batch), len(moved)) != (len(order) - 1, len(order)):
            return bool(order)
        return all(_follows(batch[i], b, [], depth - 1) for i, b in zip(order, moved, strict=True))
    if isinstance(batch, (str, bytes, int, float, complex, type)):
        return bool(order) or batch == moved or batch != batch
    return _follows(dict(attributes(batch)), dict(attributes(moved)), order, depth - 1)


def _plain(array: np.ndarray[Any, Any]) -> Any:
    return torch.from_numpy(array) if array.dtype.kind in "biufc" else array.tolist()


def _rows_follow(batch: Tensor, moved: Tensor, order: list[int]) -> bool:
    if batch.dim() != moved.dim():
        return False
    n = len(order) - 1
    axes = [k for k in range(batch.dim()) if (batch.shape[k], moved.shape[k]) == (n, n + 1)]
    if order and not axes:
        return True  # a constant, or rows of unequal number whose owners are declared
    index = torch.tensor(order, dtype=torch.long, device=batch.device)
    expected = batch
    for axis in axes:
        expected = expected.index_select(axis, index)
    if expected.shape != moved.shape:
        return False
    if expected.is_floating_point() or expected.is_complex():
        return torch.allclose(expected, moved, equal_nan=True)
    return torch.equal(expected, moved) or (batch.dim() == 1 and _places(batch) and _places(moved))


def _places(x: Tensor) -> bool:
    """0, 1, 2, …: the places themselves, the owners of one row each."""
    return torch.equal(x, torch.arange(len(x), dtype=x.dtype, device=x.device))


__all__ = ["in_order"]
