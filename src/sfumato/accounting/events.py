"""What a release costs, as data: frozen, versioned, JSON-able events."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, fields

from ..errors import ConfigurationError
from .budget import count, nonnegative, positive, rate

VERSION = 2
READABLE = (1, 2)  # 2 only added fields and names
MECHANISMS = (
    "poisson-gaussian",
    "gaussian",
    "covered",
    "truncated-poisson-gaussian",
    "fixed-size-gaussian",
    "laplace",
    "discrete-gaussian",
    "skellam",
)
ADJACENCIES = ("add-remove", "zero-out", "replace-one")
SAMPLERS = ("poisson", "shuffle", "cyclic", "truncated-poisson", "fixed-size")
# Which sampler a sampled mechanism goes with: amplification is proved for that one only.
_SAMPLED_BY = {
    "poisson-gaussian": ("poisson", "cyclic"),
    "truncated-poisson-gaussian": ("truncated-poisson",),
    "fixed-size-gaussian": ("fixed-size",),
    "laplace": ("poisson",),
    "discrete-gaussian": ("poisson",),
}
_SIZED = ("truncated-poisson-gaussian", "fixed-size-gaussian")


@dataclass(frozen=True)
class Event:
    """One release (or one planned release) as the accountant sees it.

    ``noise_multiplier`` is the noise standard deviation (``laplace``: the scale) over the sensitivity that the release
    clips to, under every adjacency; ``sample_rate`` the probability with which each record takes part. "covered" marks
    a release already paid for by another event of the same epoch or cycle.

    ``records``: most records of one unit, each drawn on its own (the unit's shift is then up to so many times the
    sensitivity). ``dataset_size``, ``cap``: public size, and largest batch, of a truncated or fixed-size draw.
    ``sensitivity``, ``l1_sensitivity``, ``dimension``: of an integer-valued query, in grid units (``discrete-gaussian``
    and ``skellam``). ``adaptive``: the parameters were chosen after earlier releases had been seen.
    Raises :class:`ConfigurationError` for a value outside the closed sets or ranges.
    """

    mechanism: str
    noise_multiplier: float
    sample_rate: float
    adjacency: str
    unit: str = "record"
    sampler: str = "poisson"
    version: int = VERSION
    records: int = 1
    dataset_size: int | None = None
    cap: int | None = None
    sensitivity: float = 1.0
    l1_sensitivity: float | None = None
    dimension: int = 1
    adaptive: bool = False

    def __post_init__(self) -> None:
        for name, allowed in (("mechanism", MECHANISMS), ("adjacency", ADJACENCIES), ("sampler", SAMPLERS)):
            value = getattr(self, name)
            if value not in allowed:
                raise ConfigurationError(f"Event.{name} must be one of {', '.join(allowed)}; got {value!r}")
        if not isinstance(self.unit, str) or not self.unit:
            raise ConfigurationError(f"Event.unit must be a non-empty string, got {self.unit!r}")
        if isinstance(self.version, bool) or self.version not in READABLE:
            raise ConfigurationError(
                f"Event.version {self.version!r} is not understood (this release knows up to {VERSION}); "
                "a newer Sfumato wrote it: update before reading its ledger"
            )
        if not isinstance(self.adaptive, bool):
            raise ConfigurationError(f"Event.adaptive must be True or False, got {self.adaptive!r}")
        # 3 and 3.0 must be one event (and one hash), so numbers are normalised here.
        self._set("version", VERSION)
        self._set("noise_multiplier", nonnegative("Event.noise_multiplier", self.noise_multiplier))
        self._set("sample_rate", rate("Event.sample_rate", self.sample_rate))
        self._set("sensitivity", positive("Event.sensitivity", self.sensitivity))
        for name in ("records", "dimension"):
            self._set(name, _at_least_one(name, getattr(self, name)))
        for name in ("dataset_size", "cap"):
            if getattr(self, name) is not None:
                self._set(name, _at_least_one(name, getattr(self, name)))
        if self.l1_sensitivity is not None:
            self._set("l1_sensitivity", positive("Event.l1_sensitivity", self.l1_sensitivity))
        self._refuse_mismatch()

    def _set(self, name: str, value: object) -> None:
        object.__setattr__(self, name, value)

    def _refuse_mismatch(self) -> None:
        """Fields that contradict one another, or that this mechanism has no use for."""
        kind, samplers = self.mechanism, _SAMPLED_BY.get(self.mechanism)
        if self.sample_rate != 1.0 and samplers is None:
            raise ConfigurationError(
                f"a {kind!r} event has no sampling, so sample_rate must be 1.0; got {self.sample_rate!r}. "
                "Use mechanism='poisson-gaussian' for a Poisson sample"
            )
        if samplers is not None and self.sampler not in samplers:
            raise ConfigurationError(
                f"amplification is proved for {' or '.join(samplers)} sampling only; got sampler={self.sampler!r} with "
                f"{kind!r}. Charge a shuffled epoch as one 'gaussian' event"
            )
        if kind in _SIZED:
            if self.dataset_size is None or self.cap is None or self.cap > self.dataset_size:
                raise ConfigurationError(
                    f"a {kind!r} event needs a public dataset_size and a cap <= dataset_size, got "
                    f"{self.dataset_size!r} and {self.cap!r}"
                )
            if kind == "fixed-size-gaussian" and self.sample_rate < self.cap / self.dataset_size * (1 - 1e-12):
                raise ConfigurationError(
                    f"a batch of {self.cap} out of {self.dataset_size} is drawn at the rate "
                    f"{self.cap / self.dataset_size:g}, not {self.sample_rate!r}"
                )
        elif self.dataset_size is not None or self.cap is not None:
            raise ConfigurationError(f"dataset_size and cap mean nothing to a {kind!r} event")
        if kind == "truncated-poisson-gaussian" and self.adjacency != "zero-out":
            raise ConfigurationError(
                "a truncated draw depends on the number of records, which must be public; adjacency must be "
                f"'zero-out', not {self.adjacency!r}"
            )
        if kind == "fixed-size-gaussian" and self.adjacency == "add-remove":
            raise ConfigurationError(
                "a draw of fixed size depends on the number of records, which must be public; adjacency must be "
                "'replace-one' or 'zero-out', not 'add-remove'"
            )
        if self.records > 1 and kind not in ("poisson-gaussian", "gaussian"):
            raise ConfigurationError(f"records={self.records} is accounted for Gaussian events only, not {kind!r}")
        if kind == "skellam" and self.l1_sensitivity is None:
            raise ConfigurationError("a 'skellam' event needs its l1_sensitivity beside its (L2) sensitivity")
        if self.l1_sensitivity is not None and self.l1_sensitivity < self.sensitivity:
            raise ConfigurationError(
                f"l1_sensitivity {self.l1_sensitivity!r} is below the L2 sensitivity {self.sensitivity!r}, as in no "
                "vector"
            )
        integers = ("discrete-gaussian", "skellam")
        if kind not in integers and (self.sensitivity, self.l1_sensitivity, self.dimension) != (1.0, None, 1):
            raise ConfigurationError(f"sensitivity, l1_sensitivity and dimension belong to {' and '.join(integers)}")

    def to_json(self) -> dict[str, str | float | int | bool | None]:
        """Plain JSON object, without what has its default; :meth:`from_json` restores an equal event."""
        added = {f.name: f.default for f in fields(self)[7:]}
        return {k: v for k, v in asdict(self).items() if k not in added or v != added[k]}

    @classmethod
    def from_json(cls, data: Mapping[str, object]) -> Event:
        """Restore an event; raises :class:`ConfigurationError` on unknown or missing fields."""
        known = {f.name for f in fields(cls)}
        required = {f.name for f in fields(cls) if f.default is MISSING}
        if unknown := sorted(set(data) - known):
            raise ConfigurationError(f"unknown field(s) in an event: {', '.join(unknown)}; it cannot be accounted for")
        if missing := sorted(required - set(data)):
            raise ConfigurationError(f"missing field(s) in an event: {', '.join(missing)}")
        return cls(**data)  # type: ignore[arg-type]


def _at_least_one(name: str, value: object) -> int:
    found = count(f"Event.{name}", value)
    if found < 1:
        raise ConfigurationError(f"Event.{name} must be an integer >= 1, got {value!r}")
    return found
