"""The joint guarantee, stated in one place: sampler, clip, noise and accounting event all derive from one ``Plan``."""

import math
from dataclasses import dataclass

from sfumato.accounting import Event
from sfumato.errors import ConfigurationError
from sfumato.sampling import Poisson, Shuffle


@dataclass(frozen=True)
class Plan:
    """Everything public about the steps of one private training.

    Guarantee: each step releases Σ_b clip(G_b, C) + N(0, (σC)²I), divided by ``expected_batch_size``. Adding or
    removing (Poisson) or zeroing out (Shuffle) one ``unit`` changes the sum by at most C = ``sensitivity``. A unit is
    a record, or a user with all their records, whose gradients are summed before they are clipped; batch and data set
    sizes count units.
    """

    noise_multiplier: float
    max_grad_norm: float
    sampler: Poisson | Shuffle
    expected_batch_size: int
    dataset_size: int
    steps_per_epoch: int
    loss_reduction: str = "mean"
    max_physical_batch_size: int | None = None
    noise_level: str = "secure"
    clipping: str = "flat"
    unit: str = "record"

    @property
    def sensitivity(self) -> float:
        """Largest change of the clipped sum for one unit, in gradient units."""
        return self.max_grad_norm

    @property
    def noise_std(self) -> float:
        """Standard deviation of the noise on the sum: the same C that clips."""
        return self.noise_multiplier * self.sensitivity

    @property
    def adjacency(self) -> str:
        return "add-remove" if isinstance(self.sampler, Poisson) else "zero-out"

    @property
    def sample_rate(self) -> float:
        """Probability that a unit takes part in a step; 1 for Shuffle, which has no amplification."""
        return self.sampler.rate or 1.0 if isinstance(self.sampler, Poisson) else 1.0

    @property
    def event(self) -> Event:
        """What one charge costs: a step under Poisson, a whole epoch under Shuffle."""
        if isinstance(self.sampler, Poisson):
            return Event(
                "poisson-gaussian", self.noise_multiplier, self.sample_rate, "add-remove", self.unit, sampler="poisson"
            )
        return Event("gaussian", self.noise_multiplier, 1.0, "zero-out", self.unit, sampler="shuffle")

    @property
    def covered(self) -> Event:
        """A release that the epoch's charge has already paid for."""
        return Event("covered", self.noise_multiplier, 1.0, self.adjacency, self.unit, sampler="shuffle")

    def charges(self, epochs: int) -> int:
        """Number of ``event`` that ``epochs`` epochs cost."""
        return epochs * self.steps_per_epoch if isinstance(self.sampler, Poisson) else epochs


def resolve(
    sampling: Poisson | Shuffle | None, batch_size: int, dataset_size: int, units: int | None = None
) -> tuple[Poisson | Shuffle, int, int]:
    """(sampler with its numbers filled in, expected batch size, steps per epoch).

    The data set's size is treated as public; the divisor is the declared batch size, never what was drawn.

    ``units``: how many own the ``dataset_size`` records. ``batch_size`` still counts records; a batch is expected to
    hold so many of them when units are drawn at the rate at which records would be.
    """
    if dataset_size < 1:
        raise ConfigurationError("The data set is empty.", found=dataset_size, where="data_loader")
    if units is not None:
        if sampling is None or (isinstance(sampling, Poisson) and sampling.rate is None):
            rate = min(1.0, batch_size / dataset_size)
            return Poisson(rate), max(1, round(rate * units)), math.ceil(dataset_size / batch_size)
        if isinstance(sampling, Shuffle) and sampling.batch_size is None:
            sampling = Shuffle(max(1, min(units, round(batch_size * units / dataset_size))))
        dataset_size = units
    if isinstance(sampling, Shuffle):
        size = sampling.batch_size or batch_size
        return Shuffle(size), size, math.ceil(dataset_size / size)
    if sampling is None or sampling.rate is None:
        return Poisson(min(1.0, batch_size / dataset_size)), batch_size, math.ceil(dataset_size / batch_size)
    expected = max(1, round(sampling.rate * dataset_size))
    return sampling, expected, max(1, math.ceil(1 / sampling.rate - 1e-9))
