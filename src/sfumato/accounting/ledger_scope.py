"""Which records an entry may have touched."""

from __future__ import annotations

import base64
import hashlib
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import ConfigurationError

MOST = 2**31  # record numbers are below this


class Records:
    """Some records of one data set, by number: sorted, each once, in [0, 2**31).

    Sorting and hashing take a while for many records: build it once and pass it to every entry of a training.
    """

    __slots__ = ("digest", "numbers")

    def __init__(self, numbers: Sequence[int] | NDArray[Any]) -> None:
        try:
            found = np.asarray(numbers)
        except (ValueError, TypeError):  # ragged
            found = np.empty(0)
        if found.ndim != 1 or found.dtype.kind not in "iu" or found.size == 0 or found.min() < 0 or found.max() >= MOST:
            raise ConfigurationError(
                f"records must be a non-empty, one-dimensional list of record numbers in [0, 2**31); got "
                f"{found.dtype} of shape {found.shape}.",
                found=found.shape,
                where="records",
                fix="for a mask, pass numpy.flatnonzero(mask); for every record, pass records=None.",
            )
        ordered = np.sort(found.astype("<u4"))
        self.numbers: NDArray[np.uint32] = ordered[np.r_[True, ordered[1:] != ordered[:-1]]]
        self.numbers.setflags(write=False)
        self.digest = hashlib.sha256(self.numbers.tobytes()).hexdigest()

    def encode(self) -> str:
        """Compressed text: the lengths of gaps and runs, or a bitmap, whichever is shorter."""
        runs = np.diff(self._runs().reshape(-1), prepend=0).astype("<u4").tobytes()
        size = int(self.numbers[-1]) + 1
        if len(runs) <= size // 8:
            name, raw = "runs", runs
        else:
            bits = np.zeros(size, dtype=bool)
            bits[self.numbers] = True
            name, raw = "bits", np.packbits(bits).tobytes()
        return f"{name}:{base64.b64encode(zlib.compress(raw, 1)).decode()}"

    def ranges(self) -> str:
        """For people: "0-99,105"."""
        return ",".join(f"{a}" if b == a + 1 else f"{a}-{b - 1}" for a, b in self._runs().tolist())

    def _runs(self) -> NDArray[np.int64]:
        """(runs, 2): first number, and one past the last."""
        member = self.numbers.astype(np.int64)
        breaks = np.flatnonzero(np.diff(member) != 1)
        return np.stack([member[np.r_[0, breaks + 1]], member[np.r_[breaks, -1]] + 1], axis=1)

    @classmethod
    def decode(cls, text: str) -> Records:
        """Inverse of :meth:`encode`; ``ValueError`` for anything else."""
        name, _, body = text.partition(":")
        try:
            packed = base64.b64decode(body, validate=True)
            raw = zlib.decompress(packed)
        except zlib.error as error:
            raise ValueError(str(error)) from error
        if base64.b64encode(packed).decode() != body:  # bits that no decoder looks at
            raise ValueError("not canonical")
        if name == "bits":
            return cls(np.flatnonzero(np.unpackbits(np.frombuffer(raw, dtype=np.uint8))))
        if name != "runs" or not raw or len(raw) % 8:
            raise ValueError("neither runs nor bits")
        edges = np.cumsum(np.frombuffer(raw, dtype="<u4").astype(np.int64))
        lengths = edges[1::2] - edges[::2]
        # Position inside its run, plus the run's start: the runs laid end to end without a loop.
        inside = np.arange(int(lengths.sum())) - np.repeat(np.cumsum(lengths) - lengths, lengths)
        return cls(np.repeat(edges[::2], lengths) + inside)


@dataclass(frozen=True)
class Scope:
    """The records that an entry may have touched; nothing given: anyone.

    ``group`` is a privacy group of ``dataset``; groups of one data set are declared disjoint. ``records`` is the digest
    of a set of record numbers of ``dataset``. Given both, only records in both are touched. How two data sets overlap,
    and how groups and record numbers do, is not known and never guessed.
    """

    dataset: str | None = None
    group: str | None = None
    records: str | None = None


EVERYONE = Scope()


def scoped(
    group: object, dataset: object, records: Sequence[int] | NDArray[Any] | Records | None
) -> tuple[Scope, Records | None]:
    """The checked scope of these arguments, and its record numbers."""
    for name, text in (("group", group), ("dataset", dataset)):
        if text is not None and (not isinstance(text, str) or not text):
            raise ConfigurationError(f"{name} must be a non-empty string or None, got {text!r}.", where=name)
    if records is None:
        return Scope(dataset, group), None  # type: ignore[arg-type]
    if dataset is None:
        raise ConfigurationError(
            "records are numbers within a data set, and no data set was named.",
            where="records",
            fix='name it: dataset="customers-2024", or its content hash.',
        )
    held = records if isinstance(records, Records) else Records(records)
    return Scope(dataset, group, held.digest), held  # type: ignore[arg-type]
