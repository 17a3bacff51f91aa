"""The sampling schemes as frozen public records; the data set's size enters only when a batch is drawn."""

from __future__ import annotations

from dataclasses import dataclass

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
