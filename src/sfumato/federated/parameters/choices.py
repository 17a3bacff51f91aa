"""The ways to choose what is trained, as a closed set of frozen records.

Noise grows with the square root of how many numbers are sent, so that sending few of them is worth much. Which ones
must not depend on private data, or be paid for: see :class:`TopK`.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from sfumato import _validate
from sfumato.errors import ConfigurationError


@dataclass(frozen=True)
class All:
    """Every parameter with ``requires_grad``."""


@dataclass(frozen=True)
class LastLayers:
    """The last ``count`` modules that own parameters themselves, in the order in which the model registers them."""

    count: int = 1

    def __post_init__(self) -> None:
        _validate.count("count", self.count)


@dataclass(frozen=True)
class Named:
    """Parameters by name, by the name of a module that they are in, or by a pattern such as ``"encoder.*.bias"``."""

    patterns: tuple[str, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "patterns", _patterns("patterns", self.patterns))


@dataclass(frozen=True)
class LoRA:
    """Adapters of a low rank on linear layers (:func:`.lora.inject`), and the parameters that ``also`` names, whole.

    A new head has to be in ``also``: all other parameters stay as they are. ``freeze_a=False`` trains A as well. The
    mean of clients' B·A is then not (mean B)·(mean A), so that averaging is inexact, and noise on both factors
    multiplies; it is there for comparison. ``seed`` is public, and the same on the server and on every client.
    """

    rank: int = 4
    alpha: float = 8.0
    targets: tuple[str, ...] | None = None
    freeze_a: bool = True
    also: tuple[str, ...] = ()
    seed: int = 0

    def __post_init__(self) -> None:
        _validate.count("rank", self.rank)
        object.__setattr__(self, "alpha", _validate.positive("alpha", self.alpha))
        if self.targets is not None:
            object.__setattr__(self, "targets", _patterns("targets", self.targets))
        object.__setattr__(self, "also", _patterns("also", self.also) if self.also else ())


@dataclass(frozen=True)
class TopK:
    """The parameters that matter most, by scores that are public or paid for.

    Give ``fraction`` of the candidates (rounded up) or their ``count``; candidates are the parameters with
    ``requires_grad``: whole tensors, or with ``granularity="coordinate"`` single numbers.

    by: ``public``, gradients on public data (:func:`scores_from_public`): free. ``released``, updates that were
        released with noise before (:func:`scores_from_released`): free, they are paid for. ``private``, the clients'
        own gradients (:func:`client_score`), one number a tensor: the sum of their clipped scores is released with
        noise and charged like an update, before any choice is made.

    Raises ``ConfigurationError`` for ``raw`` scores. Choosing by gradients of private data without noise has no finite
    ε: one record can turn the choice around, so that an outcome has probability 1 on a data set and 0 on its
    neighbour, and what is sent afterwards shows which.
    """

    fraction: float | None = None
    count: int | None = None
    by: str = "public"
    granularity: str = "tensor"

    def __post_init__(self) -> None:
        if (self.fraction is None) == (self.count is None):
            raise ConfigurationError("give either fraction= or count=.", where="TopK")
        if self.count is not None:
            _validate.count("count", self.count)
        if self.fraction is not None and _validate.positive("fraction", self.fraction) > 1.0:
            raise ConfigurationError(f"fraction={self.fraction} is above 1.", found=self.fraction, where="fraction")
        if self.by not in ("public", "released", "private"):
            raise ConfigurationError(
                f"by={self.by!r}: a choice by private gradients without noise is not differentially private for any ε. "
                "One record can turn it around: an outcome has probability 1 on a data set and 0 on its neighbour.",
                found=self.by,
                where="by",
                fix="by='public' or by='released' cost nothing; by='private' adds noise to the scores and charges it.",
            )
        _validate.one_of("granularity", self.granularity, ("tensor", "coordinate"))
        if self.by == "private" and self.granularity == "coordinate":
            raise ConfigurationError(
                "by='private' scores whole tensors: noise on a score for every coordinate would drown them.",
                where="granularity",
                fix="granularity='tensor', or public or released scores.",
            )


Train = All | LastLayers | Named | LoRA | TopK


def _patterns(where: str, value: object) -> tuple[str, ...]:
    found = (value,) if isinstance(value, str) else tuple(value) if isinstance(value, Iterable) else ()
    if not found or not all(isinstance(entry, str) and entry for entry in found):
        raise ConfigurationError(f"{where}={value!r} is not a list of names.", found=value, where=where)
    return tuple(str(entry) for entry in found)
