"""What a federation has agreed on: public, fixed before the first round, the same on the server and every client."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import nn
from torch.utils.data import Dataset

from sfumato.clipping import Quantile, gradient_multiplier
from sfumato.errors import ConfigurationError

from . import allocation as allocating
from .allocation import Adaptive, Allocation, Uniform
from .client.local import LocalTraining, Loss
from .client.worker import Worker
from .cohorts import Cohort, FixedCohort, PoissonCohort, participations
from .parameters.selection import All, TopK, Train
from .server import Average, ServerOptimizer
from .units import ClientLevel, Distributed, SampleLevel, Unit
from .validation import Validation
from .wire.compression import Codec


@dataclass(frozen=True)
class Settings:
    """The arguments of ``FederatedTrainer`` of the same names, checked against each other.

    Raises ``ConfigurationError`` for a combination that has no guarantee, or cannot do what it says.
    """

    unit: Unit
    local: LocalTraining
    rounds: int
    cohort: Cohort
    loss: Loss
    noise: str
    seed: int
    weighted: bool
    server: ServerOptimizer = field(default_factory=Average)
    train: Train = field(default_factory=All)
    compression: Codec | None = None
    allocation: Allocation = field(default_factory=Uniform)
    validation: Validation | None = None
    public: Dataset[Any] | None = None
    classes: int | None = None

    def __post_init__(self) -> None:
        for name, value, kind in (("local", self.local, LocalTraining), ("validation", self.validation, Validation)):
            if not isinstance(value, kind) and not (value is None and name == "validation"):
                raise ConfigurationError(f"{name}={value!r} is no {kind.__name__}.", found=value, where=name)
        if self.adaptive and self.validation is None:
            raise ConfigurationError(
                "Adaptive() follows measured progress, and nothing measures it.",
                where="validation",
                fix="give validation=Validation(...).",
            )
        if self.shared and (self.classes is None or not isinstance(self.unit, SampleLevel)):
            raise ConfigurationError(
                "shares by records and classes are for SampleLevel, and need classes=.", where="allocation"
            )
        if isinstance(self.unit, Distributed):
            self._refuse_hidden()
        if not isinstance(self.train, TopK):
            return
        if self.train.by == "public" and self.public is None:
            raise ConfigurationError("TopK(by='public') needs public records.", where="public", fix="give public=.")
        if self.train.by == "private" and isinstance(self.unit, SampleLevel):
            raise ConfigurationError(
                "under SampleLevel a private score is a released update.",
                found=self.train,
                where="train",
                fix="TopK(by='released'): the first round's updates decide.",
            )

    def _refuse_hidden(self) -> None:
        hidden = isinstance(self.cohort, PoissonCohort) and self.cohort.rate < 1.0
        if hidden or (isinstance(self.cohort, FixedCohort) and self.cohort.amplification):
            raise ConfigurationError(
                "shares of noise are made for a cohort that the server knows: nothing is gained from drawing it.",
                found=self.cohort,
                where="cohort",
                fix="FixedCohort(size), MinSeparation or PoissonCohort(1.0).",
            )
        if self.compression is not None or self.weighted:
            raise ConfigurationError(
                "masked integers can be neither compressed nor weighted by the server.",
                found=self.compression,
                where="compression",
                fix="choose fewer bits in Distributed(bits=...), and leave weights out.",
            )

    @property
    def adaptive(self) -> bool:
        """Whether noise is chosen on the way, and charged by the Rényi odometer."""
        return isinstance(self.allocation, Adaptive)

    @property
    def shared(self) -> bool:
        """Whether clients get shares of ε by their records."""
        return isinstance(self.allocation, Adaptive) and self.allocation.clients

    @property
    def scorings(self) -> int:
        """Rounds beside those of training that cost as much as one."""
        return int(isinstance(self.train, TopK) and self.train.by == "private")

    @property
    def factors(self) -> tuple[float, ...]:
        """Noise of each round relative to the calibrated one, as far as it is known in advance."""
        return allocating.planned(self.allocation, self.rounds) or (1.0,) * self.rounds

    def lasting(self, population: int, *, amplified: bool) -> tuple[float, ...]:
        """Noise factors of the rounds that a client's budget has to last for.

        Which rounds it is drawn for is not known in advance: those with the least noise.
        """
        times = participations(self.cohort, self.rounds + self.scorings, population, amplified=amplified)
        return tuple(sorted((*self.factors, *(1.0,) * self.scorings))[:times])

    def declared(self, population: int) -> int:
        """Clients in a cohort, as far as they are there."""
        return population if isinstance(self.cohort, PoissonCohort) else min(self.cohort.size, population)

    def count_noise(self, population: int) -> float | None:
        """Noise on the count of norms within C, where C follows a quantile of them."""
        schedule = self.unit.clip_schedule if isinstance(self.unit, ClientLevel) else None
        if not isinstance(schedule, Quantile) or self.unit.noise_multiplier == 0.0:
            return None
        rate = self.cohort.rate if isinstance(self.cohort, PoissonCohort) else 1.0
        return schedule.resolved(max(1, round(rate * self.declared(population)))).count_noise

    def check_count_noise(self, noise_multiplier: float, population: int) -> None:
        """Before anybody is asked: the largest noise of a round has to leave something for the count of norms."""
        if (count := self.count_noise(population)) is not None:
            gradient_multiplier(noise_multiplier * max(self.factors), count)

    def worker(self, model: nn.Module, population: int) -> Worker:
        """The clients' side, for ``population`` enrolled clients; it takes ``model`` over."""
        lasting = self.lasting(population, amplified=False)
        adaptive = self.allocation if isinstance(self.allocation, Adaptive) else None
        return Worker(
            model,
            unit=self.unit,
            local=self.local,
            train=self.train,
            loss=self.loss,
            rounds=len(lasting),
            declared=self.declared(population),
            factors=lasting,
            adaptive=self.adaptive,
            least=adaptive.lowest if adaptive else None,
            compression=self.compression,
            validation=self.validation,
            count_noise=adaptive.count_noise if adaptive and adaptive.clients else None,
            noise=self.noise,
            seed=self.seed,
        )
