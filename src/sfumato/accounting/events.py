"""What a release costs, as data: frozen, versioned, JSON-able events."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields

from ..errors import ConfigurationError
from .budget import nonnegative, rate

VERSION = 1
MECHANISMS = ("poisson-gaussian", "gaussian", "covered")
ADJACENCIES = ("add-remove", "zero-out")
SAMPLERS = ("poisson", "shuffle")


@dataclass(frozen=True)
class Event:
    """One release (or one planned release) as the accountant sees it.

    ``noise_multiplier`` is the noise standard deviation over the clipping norm, ``sample_rate`` the probability
    with which each unit takes part. "covered" marks a release already paid for by another event of the same epoch.
    Raises :class:`ConfigurationError` for a value outside the closed sets or ranges.
    """

    mechanism: str
    noise_multiplier: float
    sample_rate: float
    adjacency: str
    unit: str = "record"
    sampler: str = "poisson"
    version: int = VERSION

    def __post_init__(self) -> None:
        for name, allowed in (("mechanism", MECHANISMS), ("adjacency", ADJACENCIES), ("sampler", SAMPLERS)):
            value = getattr(self, name)
            if value not in allowed:
                raise ConfigurationError(f"Event.{name} must be one of {', '.join(allowed)}; got {value!r}")
        if not isinstance(self.unit, str) or not self.unit:
            raise ConfigurationError(f"Event.unit must be a non-empty string, got {self.unit!r}")
        if isinstance(self.version, bool) or self.version != VERSION:
            raise ConfigurationError(
                f"Event.version {self.version!r} is not understood (this release knows {VERSION}); "
                "a newer Sfumato wrote it: update before reading its ledger"
            )
        # 3 and 3.0 must be one event (and one hash), so numbers are normalised here.
        object.__setattr__(self, "version", int(self.version))
        object.__setattr__(self, "noise_multiplier", nonnegative("Event.noise_multiplier", self.noise_multiplier))
        object.__setattr__(self, "sample_rate", rate("Event.sample_rate", self.sample_rate))
        if self.mechanism == "gaussian" and self.sample_rate != 1.0:
            raise ConfigurationError(
                f"a 'gaussian' event has no sampling, so sample_rate must be 1.0; got {self.sample_rate!r}. "
                "Use mechanism='poisson-gaussian' for a Poisson sample"
            )
        if self.mechanism == "poisson-gaussian" and self.sampler != "poisson":
            raise ConfigurationError(
                f"amplification is proved for Poisson sampling only; got sampler={self.sampler!r} with "
                "'poisson-gaussian'. Charge a shuffled epoch as one 'gaussian' event"
            )

    def to_json(self) -> dict[str, str | float | int]:
        """Plain JSON object; :meth:`from_json` restores an equal event."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, object]) -> Event:
        """Restore an event; raises :class:`ConfigurationError` on unknown or missing fields."""
        known = {f.name for f in fields(cls)}
        required = known - {"unit", "sampler", "version"}
        if unknown := sorted(set(data) - known):
            raise ConfigurationError(f"unknown field(s) in an event: {', '.join(unknown)}; it cannot be accounted for")
        if missing := sorted(required - set(data)):
            raise ConfigurationError(f"missing field(s) in an event: {', '.join(missing)}")
        return cls(**data)  # type: ignore[arg-type]
