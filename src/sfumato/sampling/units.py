"""Privacy units that own several records: which records a draw of units brings, and how they are cut into batches."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..errors import ConfigurationError
from ._checks import checked_count
from .draw import Indices, Uniform


@dataclass(frozen=True, eq=False)
class Units:
    """The records of each unit: ``order[starts[u]:starts[u + 1]]``, ascending. ``cap``: most of them in one draw."""

    order: Indices
    starts: Indices
    cap: int | None = None

    def __len__(self) -> int:
        return len(self.starts) - 1

    @property
    def records(self) -> int:
        """Records that a draw of all units would bring."""
        sizes = np.diff(self.starts)
        return int(sizes.sum() if self.cap is None else np.minimum(sizes, self.cap).sum())

    def drawn(self, units: Indices, uniform: Uniform) -> list[Indices]:
        """The records of each of ``units``; of one with more than ``cap``, that many, drawn anew each time."""
        found = []
        for unit in units.tolist():
            own = self.order[self.starts[unit] : self.starts[unit + 1]]
            if self.cap is not None and len(own) > self.cap:
                own = np.sort(own[np.argsort(uniform(len(own)), kind="stable")[: self.cap]])
            found.append(own)
        return found


def group(ids: Iterable[Hashable], cap: int | None = None) -> Units:
    """Units by id, in the order in which they first occur.

    Raises ``ConfigurationError`` for an id that names nobody (None, or not equal to itself as NaN is), that cannot be
    compared (not hashable, or of several values), or that is equal to no other (no ``__hash__`` of its own).
    """
    cap = None if cap is None else checked_count(cap, "max_records_per_unit", least=1)
    numbers: dict[Hashable, int] = {}
    owner: list[int] = []
    for record, name in enumerate(ids):
        if (flaw := _flaw(name)) is not None:
            raise ConfigurationError(
                f"privacy_unit: the id {name!r} of record {record} {flaw}.",
                found=name,
                where="privacy_unit",
                fix="give every record the id (a number or a string) of the one whose privacy it is.",
            )
        owner.append(numbers.setdefault(name, len(numbers)))
    whose: NDArray[np.int64] = np.asarray(owner, np.int64)
    sizes = np.bincount(whose, minlength=len(numbers))
    order = np.argsort(whose, kind="stable").astype(np.int64, copy=False)
    return Units(order, np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64), cap)


def _flaw(name: object) -> str | None:
    """Why an id, or a part of it, cannot say who owns a record."""
    if isinstance(name, (tuple, frozenset)):
        return next((flaw for part in name if (flaw := _flaw(part)) is not None), None)
    try:
        if name is None or bool(name != name):
            return "names nobody"
    except (TypeError, ValueError, RuntimeError):  # pandas.NA, and arrays of several values
        return "cannot be compared"
    if not isinstance(name, Hashable):
        return "cannot be compared"
    return "is equal to nothing but itself" if type(name).__hash__ is object.__hash__ else None


def physical_units(parts: Sequence[Indices], max_physical_batch_size: int | None) -> list[Sequence[Indices]]:
    """Cut one logical batch between units, so that none is clipped twice: as many as fit, but at least one.

    A unit with more than ``max_physical_batch_size`` records makes a larger batch of its own.
    """
    if max_physical_batch_size is None:
        return [parts] if parts else []
    size = checked_count(max_physical_batch_size, "max_physical_batch_size", least=1)
    cut: list[list[Indices]] = []
    room = 0
    for part in parts:
        if not cut or len(part) > room:
            cut.append([])
            room = size
        cut[-1].append(part)
        room -= len(part)
    return list(cut)
