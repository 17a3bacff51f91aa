"""The sampling schemes as frozen public records; the data set's size enters only when a batch is drawn."""

from __future__ import annotations

from dataclasses import dataclass, field

from ._checks import checked_count, checked_rate


@dataclass(frozen=True)
class Poisson:
    """Every record takes part in a step independently with probability ``rate``; amplifies privacy.

    ``rate=None`` stands for batch size over data set length of the loader that is made private.
    Raises ``ConfigurationError`` unless 0 < rate <= 1.
    """

    rate: float | None = None

    def __post_init__(self) -> None:
        if self.rate is not None:
            object.__setattr__(self, "rate", checked_rate(self.rate))


@dataclass(frozen=True)
class Shuffle:
    """Every record takes part exactly once an epoch, in random order; charged with no amplification at all.

    ``batch_size=None`` stands for that of the loader that is made private. Accounting a shuffled epoch as if it were
    Poisson understates the loss (Chua et al. 2024). Raises ``ConfigurationError`` unless batch_size >= 1.
    """

    batch_size: int | None = None

    def __post_init__(self) -> None:
        if self.batch_size is not None:
            object.__setattr__(self, "batch_size", checked_count(self.batch_size, "batch_size", least=1))


@dataclass(frozen=True)
class TruncatedPoisson:
    """A Poisson sample; of one with more than ``max_batch_size`` records, a uniform subset of that size.

    Bounds memory and shapes. Accounted for as it is, for a data set of public size and a record that is zeroed out: a
    truncated draw is not a Poisson sample (Chua et al. 2024).
    ``rate=None`` stands for batch size over data set length of the loader that is made private, ``max_batch_size=None``
    for the expected size and five standard deviations.
    Raises ``ConfigurationError`` unless 0 < rate <= 1 and max_batch_size >= 1.
    """

    rate: float | None = None
    max_batch_size: int | None = None

    def __post_init__(self) -> None:
        if self.rate is not None:
            object.__setattr__(self, "rate", checked_rate(self.rate))
        if self.max_batch_size is not None:
            cap = checked_count(self.max_batch_size, "max_batch_size", least=1)
            object.__setattr__(self, "max_batch_size", cap)


@dataclass(frozen=True)
class CyclicPoisson:
    """The data set in ``cycle`` public groups (index modulo ``cycle``); step t draws from group t modulo ``cycle``.

    Within its group every record takes part independently with probability ``rate``, so it takes part in one step of
    every ``cycle`` at most (Choquette-Choo et al. 2023). The adjacency is zero-out: a removed record would renumber
    the others. ``rate=None`` stands for batch size times ``cycle`` over data set length of the loader that is made
    private. Raises ``ConfigurationError`` unless 0 < rate <= 1 and cycle >= 1.
    """

    rate: float | None = None
    cycle: int = field(kw_only=True)

    def __post_init__(self) -> None:
        if self.rate is not None:
            object.__setattr__(self, "rate", checked_rate(self.rate))
        object.__setattr__(self, "cycle", checked_count(self.cycle, "cycle", least=1))
