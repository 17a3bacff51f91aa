"""What the loader hands to the session for each microbatch, and what is known of a step when it is over."""

from dataclasses import dataclass

from torch import Tensor

from sfumato.ghost import Tape


@dataclass(slots=True)
class Token:
    """The right to one backward over one physical microbatch of a logical batch."""

    size: int  # records
    first: bool
    last: bool
    tape: Tape | None = None
    spent: bool = False
    unit: Tensor | None = None  # which unit each record belongs to; None: each is one
    padding: int = 0  # rows at the end that only fill the shape
    turn: int = 0  # of the sampler, whatever became of earlier draws
    period: int | None = None  # of the sampler: all draws of one are paid for together

    @property
    def units(self) -> int:
        """Those that are clipped: records, or users with all records of theirs that were drawn; padding included."""
        return self.size if self.unit is None else int(self.unit[-1]) + 1


@dataclass(slots=True)
class StepFacts:
    """Un-noised facts about the last release: diagnostics on private data, not covered by the guarantee."""

    batch_size: int = 0
    clipped: int = 0
    empty: bool = True

    @property
    def clip_fraction(self) -> float:
        """Share of the batch whose gradient was scaled down."""
        return self.clipped / self.batch_size if self.batch_size else 0.0


__all__ = ["StepFacts", "Token"]
