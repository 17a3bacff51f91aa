"""What every loader returns: two blocks of records, the class names, and what had to be declared to get there."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import DataError

SPLIT_SEED = 0  # fixed and public: neither --seed nor the records decide who is tested


@dataclass(frozen=True)
class Records(torch.utils.data.Dataset[tuple[Tensor, Tensor]]):
    """``x``: (n, *shape) float32 and finite; ``y``: (n,) int64 class numbers."""

    x: Tensor
    y: Tensor

    def __len__(self) -> int:
        return len(self.y)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.x[index], self.y[index]

    def __getitems__(self, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        """One gather for a whole batch; goes with :func:`as_batch` as the loader's ``collate_fn``."""
        rows = torch.as_tensor(indices, dtype=torch.int64)
        return self.x[rows], self.y[rows]


def as_batch(batch: Any) -> tuple[Tensor, Tensor]:
    """``collate_fn`` for :class:`Records`, whose batches arrive already stacked."""
    return batch


@dataclass(frozen=True)
class DataSet:
    """``checked``: preprocessing this code fixes in advance; ``declared``: what the user vouches for;
    ``warnings``: what the user should know before trusting either."""

    name: str
    kind: str
    train: Records
    test: Records
    classes: tuple[str, ...]
    checked: tuple[str, ...] = ()
    declared: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()

    @property
    def input_shape(self) -> tuple[int, ...]:
        """Shape of one record, without the batch axis."""
        return tuple(self.train.x.shape[1:])


def records(x: np.ndarray, y: np.ndarray, *, where: str) -> Records:
    """Tensors out of arrays; raises :class:`DataError` for an empty block or for NaN and infinite values."""
    if len(y) == 0:
        raise DataError(f"{where} holds no records")
    if not np.isfinite(x).all():
        bad = int((~np.isfinite(x.reshape(len(x), -1))).any(axis=1).sum())
        raise DataError(f"{where}: {bad} of {len(x)} records hold NaN or infinite values.", fix="clean them first.")
    return Records(torch.from_numpy(np.ascontiguousarray(x, dtype=np.float32)), torch.from_numpy(y.astype(np.int64)))


def split(n: int, test_fraction: float, *, where: str) -> tuple[np.ndarray, np.ndarray]:
    """Fixed random split of n records: (train rows, test rows), the same for every run."""
    held_out = round(n * test_fraction)
    if not 0 < held_out < n:
        raise DataError(f"{where}: {n} records cannot be split with a test fraction of {test_fraction}")
    order = np.random.default_rng(SPLIT_SEED).permutation(n)
    return np.sort(order[held_out:]), np.sort(order[:held_out])
