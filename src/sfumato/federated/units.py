"""Whose privacy a federation protects, and whom they have to trust: a closed set of frozen records."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal, get_args

from sfumato import _validate
from sfumato.accounting import Budget
from sfumato.clipping import Automatic, Clip, Flat, Quantile, chosen
from sfumato.errors import ConfigurationError
from sfumato.schedules import Schedule

Epsilons = float | Mapping[str, float]


@dataclass(frozen=True)
class SampleLevel:
    """DP-SGD inside every client: protects each record, from the server and the other clients.

    A record trusts its own client only. Every client accounts in its own ledger; records of different clients compose
    in parallel, so ε is the largest over clients. No credit is taken for the sampling of clients, which the server
    sees (a per-step rate times a client rate is no valid rate).

    Args:
        epsilon: what each client may spend in all: one number, or {client: number}.
        delta: of every client's guarantee.
        max_grad_norm: C, bound on one record's gradient, in units of the summed loss.
        noise_multiplier: σ of every client, instead of the least that lasts for all rounds.
        clipping: of record gradients, as in ``PrivacyEngine.make_private``.
        max_update_norm: longest update that the server takes from a client, against broken or hostile ones. It has no
            part in the guarantee; None: no limit.
    """

    epsilon: Epsilons | None = None
    delta: float = 1e-5
    max_grad_norm: float = 1.0
    noise_multiplier: float | None = None
    clipping: Clip | Literal["flat", "per-layer", "automatic"] = "flat"
    max_update_norm: float | None = None

    def __post_init__(self) -> None:
        _check(self)
        _validate.positive("max_grad_norm", self.max_grad_norm)
        if self.max_update_norm is not None:
            _validate.positive("max_update_norm", self.max_update_norm)


@dataclass(frozen=True)
class ClientLevel:
    """The server clips each client's update to C and adds N(0, (zC)²) to their sum: protects a whole client.

    The server is trusted: it sees the updates and keeps the cohort secret. Adding or removing one client changes the
    sum by at most C, whatever the client sends, whatever the weights and however many drop out (McMahan et al. 2018,
    fixed-denominator estimator).

    Args:
        epsilon: one number, or {client: number}; None with ``noise_multiplier``: no limit.
        max_update_norm: C, the longest update.
        noise_multiplier: z, instead of the least that lasts for all rounds.
        clipping: ``"flat"``, ``"per-layer"`` or ``sf.clipping.Grouped``: parts with bounds that are C in quadrature.
        clip_schedule: factors of C by round, or ``sf.clipping.Quantile``: C follows a quantile of the norms, measured
            privately beside the sum (Andrew et al. 2021).
        personal: how clients with a smaller ε get it: ``"rate"``, they are drawn less often (Boenisch et al. 2023), or
            ``"noise"``, they are clipped to a smaller C under the same noise.
    """

    epsilon: Epsilons | None = None
    delta: float = 1e-5
    max_update_norm: float = 1.0
    noise_multiplier: float | None = None
    clipping: Clip | Literal["flat", "per-layer"] = "flat"
    clip_schedule: Schedule | Quantile | None = None
    personal: Literal["rate", "noise"] = "rate"

    def __post_init__(self) -> None:
        _check(self)
        _validate.positive("max_update_norm", self.max_update_norm)
        _validate.one_of("personal", self.personal, ("rate", "noise"))
        clip = chosen(self.clipping)
        if isinstance(clip, Automatic):
            raise ConfigurationError(
                "clipping='automatic' would blow up small updates to length C, noise and all.",
                found=self.clipping,
                where="clipping",
                fix="use 'flat' with a Quantile schedule.",
            )
        if isinstance(self.clip_schedule, Quantile) and not isinstance(clip, Flat):
            raise ConfigurationError(
                "Quantile moves one bound by the norms of whole updates, so it needs clipping='flat'.",
                found=self.clipping,
                where="clip_schedule",
            )
        if self.clip_schedule is not None and not isinstance(self.clip_schedule, Schedule | Quantile):
            raise ConfigurationError(
                f"clip_schedule={self.clip_schedule!r} is not one of sf.schedules, nor a Quantile.",
                found=self.clip_schedule,
                where="clip_schedule",
            )


@dataclass(frozen=True)
class LocalLevel:
    """Every client clips its update to C and adds N(0, (zC)²) itself: protects a client from everybody.

    Nobody is trusted. The guarantee is for replacing a client's data by any other (2C), per report; each client
    accounts in its own ledger. No amplification: the server sees who reports.
    """

    epsilon: Epsilons | None = None
    delta: float = 1e-5
    max_update_norm: float = 1.0
    noise_multiplier: float | None = None

    def __post_init__(self) -> None:
        _check(self)
        _validate.positive("max_update_norm", self.max_update_norm)


@dataclass(frozen=True)
class Distributed:
    """Clients add shares of integer noise and the server sees only the sum of masked reports.

    Protects a client from the server as far as the masking does; the masks here are SIMULATED, for research: they show
    sums, ranges and drop-outs as a real protocol would, but one process makes them all. The noise is the target's as
    long as at most ``max_dropout`` of the cohort is missing; with more, nothing is unmasked. The guarantee is for a
    client's contribution being replaced by nothing (zero-out); no amplification, for the server sees who reports.
    A client that takes part knows its own share: towards it the noise is that of one client less, unless
    ``max_colluding`` allows for it. Clients keep no ledger: the server is trusted to count, and to ask no more often
    than its own ledger says.

    Args:
        mechanism: "skellam" (Agarwal et al. 2021).
        bits: of the modulus; the range is proved to fit before anything is sent.
        max_colluding: share of clients that may tell the server their noise.
    """

    epsilon: float | None = None
    delta: float = 1e-5
    max_update_norm: float = 1.0
    noise_multiplier: float | None = None
    mechanism: Literal["skellam"] = "skellam"
    bits: int = 24
    max_dropout: float = 0.1
    max_colluding: float = 0.0

    def __post_init__(self) -> None:
        _check(self)
        _validate.positive("max_update_norm", self.max_update_norm)
        _validate.one_of("mechanism", self.mechanism, ("skellam",))
        if isinstance(self.epsilon, Mapping):
            raise ConfigurationError(
                "one noise protects every client of a secure sum, so there is one ε.",
                found=self.epsilon,
                where="epsilon",
            )


Unit = SampleLevel | ClientLevel | LocalLevel | Distributed
UNITS: tuple[type, ...] = get_args(Unit)


def budgets(unit: Unit, clients: tuple[str, ...]) -> dict[str, Budget | None]:
    """{client: what it may spend}. Raises ``ConfigurationError`` for a client that ``epsilon`` leaves out."""
    if unit.epsilon is None:
        return dict.fromkeys(clients)
    if not isinstance(unit.epsilon, Mapping):
        return dict.fromkeys(clients, Budget(unit.epsilon, unit.delta))
    if missing := sorted(set(clients) - set(unit.epsilon)):
        raise ConfigurationError(
            f"epsilon names no budget for {missing[0]!r} ({len(missing)} such clients).",
            found=missing,
            where="epsilon",
            fix="name every client, or give one number.",
        )
    return {client: Budget(unit.epsilon[client], unit.delta) for client in clients}


def privacy_unit(unit: Unit) -> str:
    """The unit in events and reports."""
    return "record" if isinstance(unit, SampleLevel) else "client"


def _check(unit: Unit) -> None:
    Budget(1.0, unit.delta)
    if unit.epsilon is None and unit.noise_multiplier is None:
        raise ConfigurationError("give epsilon=, noise_multiplier=, or both.", where="epsilon")
    if isinstance(unit.epsilon, Mapping):
        held = {str(client): Budget(value, unit.delta).epsilon for client, value in unit.epsilon.items()}
        object.__setattr__(unit, "epsilon", MappingProxyType(held))
    elif unit.epsilon is not None:
        object.__setattr__(unit, "epsilon", Budget(unit.epsilon, unit.delta).epsilon)
    if unit.noise_multiplier is not None:
        _validate.non_negative("noise_multiplier", unit.noise_multiplier)


__all__ = ["UNITS", "ClientLevel", "Distributed", "LocalLevel", "SampleLevel", "Unit", "budgets", "privacy_unit"]
