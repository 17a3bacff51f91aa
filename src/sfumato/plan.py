"""The joint guarantee, stated in one place: sampler, clip, noise and accounting event all derive from one ``Plan``."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from sfumato import _validate
from sfumato.accounting import Event
from sfumato.clipping import Clip, Flat, Quantile, chosen, gradient_multiplier
from sfumato.errors import ConfigurationError
from sfumato.sampling import CyclicPoisson, Poisson, Shuffle, TruncatedPoisson, truncation
from sfumato.schedules import Schedule, factor

Sampler = Poisson | Shuffle | TruncatedPoisson | CyclicPoisson
_ADJACENCIES: dict[type, tuple[str, ...]] = {  # the first is the default
    Poisson: ("add-remove", "zero-out", "replace-one"),
    CyclicPoisson: ("zero-out", "replace-one"),  # a record's number decides its group, so numbers must not move
    Shuffle: ("zero-out", "replace-one"),
    TruncatedPoisson: ("zero-out",),
}
_NAMES: dict[type, str] = {
    Poisson: "poisson",
    CyclicPoisson: "cyclic",
    Shuffle: "shuffle",
    TruncatedPoisson: "truncated-poisson",
}


@dataclass(frozen=True)
class StepPlan:
    """One step's numbers, derived together. ``noise_std``: on the clipped sum, in gradient units."""

    noise_multiplier: float
    max_grad_norm: float
    noise_std: float
    count_noise_std: float | None  # of the count of unclipped units that moves the bound (quantile clipping)


@dataclass(frozen=True)
class Plan:
    """Everything public about the steps of one private training.

    Guarantee: each step releases Σ_b clip(G_b, C) + N(0, (σC)²I), divided by ``expected_batch_size``. Adding or
    removing (Poisson) or zeroing out (Shuffle, truncated Poisson) one ``unit`` changes the sum by at most C =
    ``sensitivity``; replacing one, by at most 2 C. A unit is a record, or a user with all their records, whose
    gradients are summed before they are clipped; batch and data set sizes count units. Schedules multiply σ and C by
    public factors of the step's number; clip, noise and event of a step always use the same ones.
    """

    noise_multiplier: float
    max_grad_norm: float
    sampler: Sampler
    expected_batch_size: int
    dataset_size: int
    steps_per_epoch: int
    loss_reduction: str = "mean"
    max_physical_batch_size: int | None = None
    noise_level: str = "secure"
    clipping: Clip = field(default_factory=Flat)
    unit: str = "record"
    adjacency: str = "add-remove"
    noise_schedule: Schedule | None = None
    clip_schedule: Schedule | Quantile | None = None
    static_shapes: bool = False
    adaptive: bool = False  # parameters were changed after releases had been seen

    @property
    def sensitivity(self) -> float:
        """Largest change of the clipped sum for adding, removing or zeroing one unit at the first step."""
        return self.max_grad_norm

    @property
    def noise_std(self) -> float:
        """Standard deviation of the noise on the sum at the first step: the same C that clips."""
        return self.at(0).noise_std

    @property
    def sample_rate(self) -> float:
        """Probability that a unit takes part in a step that may draw it; 1 for Shuffle, which has no amplification."""
        return 1.0 if isinstance(self.sampler, Shuffle) else self.sampler.rate or 1.0

    @property
    def period(self) -> int | None:
        """Over so many consecutive steps each unit takes part at most once by construction, and one charge pays."""
        if isinstance(self.sampler, Shuffle):
            return self.steps_per_epoch
        return self.sampler.cycle if isinstance(self.sampler, CyclicPoisson) else None

    @property
    def event(self) -> Event:
        """What the first charge costs: a step, or a whole epoch (Shuffle) or cycle (CyclicPoisson)."""
        return self.charge(0)

    def at(self, step: int, bound: float | None = None) -> StepPlan:
        """The numbers of step ``step`` (0, 1, …). ``bound``: the current C under quantile clipping."""
        sigma = self._sigma(step)
        if not isinstance(self.clip_schedule, Quantile):
            c = self.max_grad_norm * _factor(self.clip_schedule, step)
            return StepPlan(sigma, c, sigma * c, None)
        c = self.max_grad_norm if bound is None else bound
        if sigma == 0.0:
            return StepPlan(sigma, c, 0.0, 0.0)
        count_std = self.count_noise
        # The count of norms within C is a second query on the same batch; z⁻² is split between the two. Zeroing a
        # record out moves its term from one half to the other, all other neighbours by one half.
        shift = count_std / 2 if self.adjacency == "zero-out" else count_std
        return StepPlan(sigma, c, gradient_multiplier(sigma, shift) * c, count_std)

    @property
    def count_noise(self) -> float:
        """Standard deviation of the noise on the count, in units."""
        schedule = self.clip_schedule
        given = schedule.count_noise if isinstance(schedule, Quantile) else None
        return self.expected_batch_size / 20 if given is None else given

    def charge(self, step: int) -> Event:
        """What step ``step`` costs if it pays; one that pays for a period has the least noise of it."""
        sigma = min(self._sigma(s) for s in range(step, step + (self.period or 1)))
        sampler = _NAMES[type(self.sampler)]
        if isinstance(self.sampler, Shuffle):
            return Event("gaussian", sigma, 1.0, self.adjacency, self.unit, sampler, adaptive=self.adaptive)
        if isinstance(self.sampler, TruncatedPoisson):
            return Event(
                "truncated-poisson-gaussian",
                sigma,
                self.sample_rate,
                self.adjacency,
                self.unit,
                sampler,
                dataset_size=self.dataset_size,
                cap=self.sampler.max_batch_size,
                adaptive=self.adaptive,
            )
        return Event(
            "poisson-gaussian", sigma, self.sample_rate, self.adjacency, self.unit, sampler, adaptive=self.adaptive
        )

    def covered(self, step: int) -> Event:
        """The release of step ``step`` when its period's charge has already paid for it."""
        sampler = _NAMES[type(self.sampler)]
        return Event("covered", self._sigma(step), 1.0, self.adjacency, self.unit, sampler, adaptive=self.adaptive)

    def charges(self, epochs: int) -> int:
        """Number of charges that ``epochs`` epochs cost."""
        return epochs if isinstance(self.sampler, Shuffle) else math.ceil(self._steps(epochs) / (self.period or 1))

    def noise_factors(self, epochs: int) -> Sequence[float] | None:
        """The noise of each of these charges relative to ``noise_multiplier``; None if all are 1."""
        if self.noise_schedule is None:
            return None
        one = replace(self, noise_multiplier=1.0)
        return [one.charge(step).noise_multiplier for step in range(0, self._steps(epochs), self.period or 1)]

    def described(self) -> dict[str, object]:
        """The plan as JSON, for reports and checkpoints."""
        return {
            "noise_multiplier": self.noise_multiplier,
            "max_grad_norm": self.max_grad_norm,
            "sampler": repr(self.sampler),
            "sample_rate": self.sample_rate,
            "expected_batch_size": self.expected_batch_size,
            "dataset_size": self.dataset_size,
            "steps_per_epoch": self.steps_per_epoch,
            "loss_reduction": self.loss_reduction,
            "clipping": repr(self.clipping),
            "unit": self.unit,
            "adjacency": self.adjacency,
            "noise_schedule": None if self.noise_schedule is None else repr(self.noise_schedule),
            "clip_schedule": None if self.clip_schedule is None else repr(self.clip_schedule),
            "noise_level": self.noise_level,
        }

    def _steps(self, epochs: int) -> int:
        return epochs * self.steps_per_epoch

    def _sigma(self, step: int) -> float:
        return self.noise_multiplier * _factor(self.noise_schedule, step)


def _factor(schedule: Schedule | None, step: int) -> float:
    return 1.0 if schedule is None else factor(schedule, step)


def resolve(
    sampling: Sampler | None, batch_size: int, dataset_size: int, units: int | None = None
) -> tuple[Sampler, int, int]:
    """(sampler with its numbers filled in, expected batch size, steps per epoch).

    The data set's size is treated as public; the divisor is the declared batch size, never what was drawn.

    ``units``: how many own the ``dataset_size`` records. ``batch_size`` still counts records; a batch is expected to
    hold so many of them when units are drawn at the rate at which records would be.
    """
    if dataset_size < 1:
        raise ConfigurationError("The data set is empty.", found=dataset_size, where="data_loader")
    population = dataset_size if units is None else units
    steps = math.ceil(dataset_size / batch_size)
    if isinstance(sampling, Shuffle):
        size = sampling.batch_size
        if size is None:
            size = batch_size if units is None else max(1, min(units, round(batch_size * units / dataset_size)))
        return Shuffle(size), size, math.ceil(population / size)
    scheme = Poisson() if sampling is None else sampling
    cycle = scheme.cycle if isinstance(scheme, CyclicPoisson) else 1
    if cycle > population:
        raise ConfigurationError(
            f"CyclicPoisson(cycle={cycle}) over {population} units leaves groups without any.",
            found=cycle,
            where="sampling",
            fix="choose a cycle that is at most the number of units.",
        )
    if scheme.rate is None:
        rate = min(1.0, batch_size * cycle / dataset_size)
        expected = batch_size if units is None else max(1, round(rate * units / cycle))
        scheme = replace(scheme, rate=rate)
    else:
        expected = max(1, round(scheme.rate * population / cycle))
        steps = max(1, math.ceil(cycle / scheme.rate - 1e-9))
    if isinstance(scheme, TruncatedPoisson):
        most = scheme.max_batch_size or truncation(population, scheme.rate or 1.0)
        scheme = replace(scheme, max_batch_size=min(most, population))
    return scheme, expected, steps


def adjacency_of(sampler: Sampler, asked: str | None) -> str:
    """The neighbouring relation of the guarantee: the sampler's own, or another that it supports."""
    allowed = _ADJACENCIES[type(sampler)]
    if asked is None:
        return allowed[0]
    if asked not in allowed:
        raise ConfigurationError(
            f"adjacency={asked!r} cannot be promised under {type(sampler).__name__}: {' or '.join(allowed)} can.",
            found=asked,
            where="adjacency",
            fix="leave adjacency out, or choose another sampling=.",
        )
    return asked


def planned(
    *,
    noise_multiplier: float,
    max_grad_norm: float,
    clipping: Clip | str,
    sampling: Sampler | None,
    adjacency: str | None,
    noise_schedule: Schedule | None,
    clip_schedule: Schedule | Quantile | None,
    loss_reduction: str,
    max_physical_batch_size: int | None,
    static_shapes: bool,
    batch_size: int,
    records: int,
    units: int | None,
    noise_level: str,
) -> Plan:
    """The plan that these arguments of ``make_private`` ask for. Raises ``ConfigurationError`` where they cannot be."""
    sigma = _validate.non_negative("noise_multiplier", noise_multiplier)
    bound = _validate.positive("max_grad_norm", max_grad_norm)
    _validate.one_of("loss_reduction", loss_reduction, ("mean", "sum"))
    if max_physical_batch_size is not None:
        _validate.count("max_physical_batch_size", max_physical_batch_size)
    if sampling is not None and not isinstance(sampling, Sampler):
        raise ConfigurationError(
            f"sampling={sampling!r} is not sf.Poisson(...), sf.Shuffle(...) or another sampling scheme.",
            found=sampling,
            where="sampling",
        )
    for name, value, kinds in (
        ("noise_schedule", noise_schedule, Schedule),
        ("clip_schedule", clip_schedule, Schedule | Quantile),
    ):
        if value is not None and not isinstance(value, kinds):
            raise ConfigurationError(
                f"{name}={value!r} is not one of sf.schedules.", found=value, where=name, fix="see sf.schedules."
            )
    if not isinstance(static_shapes, bool):
        raise ConfigurationError(f"static_shapes={static_shapes!r} is not a bool.", where="static_shapes")
    if static_shapes and (max_physical_batch_size is None or units is not None):
        raise ConfigurationError(
            "static_shapes pads every physical batch to max_physical_batch_size records, "
            + ("which is not given." if units is None else "and users have unequal numbers of them."),
            where="static_shapes",
            fix="give max_physical_batch_size." if units is None else "leave static_shapes out.",
        )
    sampler, expected, steps = resolve(sampling, batch_size, records, units)
    clip = chosen(clipping, "clipping")
    if isinstance(clip_schedule, Quantile) and not isinstance(clip, Flat):
        raise ConfigurationError(
            "Quantile moves one bound by the norms of whole gradients, so it needs clipping='flat'.",
            found=clip,
            where="clip_schedule",
        )
    plan = Plan(
        noise_multiplier=sigma,
        max_grad_norm=bound,
        sampler=sampler,
        expected_batch_size=expected,
        dataset_size=records if units is None else units,
        steps_per_epoch=steps,
        loss_reduction=loss_reduction,
        max_physical_batch_size=max_physical_batch_size,
        noise_level=noise_level,
        clipping=clip,
        unit="record" if units is None else "user",
        adjacency=adjacency_of(sampler, adjacency),
        noise_schedule=noise_schedule,
        clip_schedule=clip_schedule,
        static_shapes=static_shapes,
    )
    plan.at(0)  # a σ that the count of quantile clipping cannot spare is refused here
    return plan
