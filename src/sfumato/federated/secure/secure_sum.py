"""A sum to which every client adds its share of integer noise: nobody, the server included, sees one client's update.

A client: clip -> rotate -> scale -> round within a norm bound -> add a share of noise -> reduce modulo 2**bits -> mask.
The server: add up modulo 2**bits, stop if too few arrived, unmask, rotate back.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import cached_property
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sfumato import _validate
from sfumato.accounting import Event, compose
from sfumato.errors import ConfigurationError, DataError, PrivacyError
from sfumato.noise import Source

from .encoding import LARGEST, Grid, Integers, Residues, centred, clipped, wrapped
from .masks import Masks
from .rotation import padded, rotate, unrotate

_WIDEST_SHARE = 1 << 30  # variance, in squared grid steps: one table of the sampler
_CUT = 1e-9  # probability that some coordinate of a rotated vector is cut off
_WRAP = 2.0**-40  # probability that some coordinate of a sum wraps
_FINEST = 1 << 20  # denominator of the variance of a share
_PRECISION = 1e-5  # of a calibrated noise multiplier
_LEAST, _STEP = 2.0**-7, 1.25


class Void(PrivacyError):
    """Too few clients arrived for the noise that the guarantee needs: nothing was unmasked, nothing is released."""


@dataclass(frozen=True)
class SecureSum:
    """The plan of one secure sum, checked: everything in it is public and fixed before any client answers.

    Guarantee: the sum, and all that is computed from it, is as private as :meth:`event` says for each client that
    follows the plan, under zero-out: its update is replaced by zero, and it still sends its share of noise. Who takes
    part, and who does not arrive, is seen by the server and not protected. It holds if at most ``max_dropout`` of the
    clients are missing (else :class:`Void`), at most ``max_colluding`` of them reveal or leave out their noise, and the
    server sees the sum alone: masks must come from a real protocol (:mod:`.masks` simulates one), and each client
    answers a round once. Another client knows its own share of the noise: towards it, ``max_colluding`` has to count it
    too. A client that does not follow the plan can spoil the sum, not the privacy of others.

    Args:
        size: numbers in an update.
        clients: size of the cohort, declared before the round.
        max_update_norm: L2 norm to which each client clips its update.
        noise_multiplier: standard deviation of the least noise that may be in the sum, over the L2 norm to which
            rounded updates are held (``max_update_norm`` and what rounding may add to it).
        mechanism: ``skellam``, or ``discrete-gaussian``, whose sums are not discrete Gaussian: the difference is
            charged, and a share with a standard deviation below 1/2 grid step is refused.
        bits: of a residue, 8 … 32.
        max_dropout, max_colluding: shares of the cohort, in [0, 1).
        beta: how likely, at most, a vector has to be rounded more than once.
    Raises ``ConfigurationError`` for values out of range, shares that leave no honest client, or too few bits.
    """

    size: int
    clients: int
    max_update_norm: float
    noise_multiplier: float
    mechanism: Literal["skellam", "discrete-gaussian"] = "skellam"
    bits: int = 20
    max_dropout: float = 0.1
    max_colluding: float = 0.0
    beta: float = math.exp(-0.5)

    def __post_init__(self) -> None:
        for name in ("size", "clients", "bits"):
            _validate.count(name, getattr(self, name))
        for name in ("max_update_norm", "noise_multiplier"):
            _validate.positive(name, getattr(self, name))
        _validate.one_of("mechanism", self.mechanism, ("skellam", "discrete-gaussian"))
        for name in ("max_dropout", "max_colluding"):
            if not 0.0 <= _validate.number(name, getattr(self, name)) < 1.0:
                raise ConfigurationError(f"{name} must be in [0, 1).", found=getattr(self, name), where=name)
        if not 0.0 < _validate.number("beta", self.beta) < 1.0:
            raise ConfigurationError("beta must be in (0, 1).", found=self.beta, where="beta")
        if not 8 <= self.bits <= 32:
            raise ConfigurationError("bits must be 8 … 32.", found=self.bits, where="bits")
        if self.honest < 1:
            raise ConfigurationError(
                f"{self.clients} clients less those missing or colluding leave no share of noise.",
                found=self.honest,
                where="max_colluding",
                fix="tolerate fewer, or ask more clients.",
            )
        if self.mechanism == "discrete-gaussian" and self.honest > 1 and self.share_variance < Fraction(1, 4):
            raise ConfigurationError(
                "no bound is known for a sum of discrete Gaussians with a standard deviation below 1/2 grid step.",
                found=float(self.share_variance),
                where="mechanism",
                fix="use mechanism='skellam', or more bits.",
            )

    @cached_property
    def least(self) -> int:
        """How many clients must arrive."""
        return self.clients - _part(self.max_dropout, self.clients)

    @cached_property
    def honest(self) -> int:
        """How many secret shares of noise are in the sum of ``least`` clients."""
        return self.least - _part(self.max_colluding, self.clients)

    @cached_property
    def padded(self) -> int:
        """Numbers in a message: ``size`` rounded up to a power of two."""
        return padded(self.size)

    @cached_property
    def grid(self) -> Grid:
        """The finest grid on which the sum of all clients and their noise fits into ``bits``."""
        low, high = 0.0, 48.0  # log2 of the clipping norm in grid steps
        if not self._fits(self._grid(1.0)):
            raise ConfigurationError(
                f"{self.bits} bits cannot hold the sum of {self.clients} clients and its noise.",
                found=self.bits,
                where="bits",
                fix="use more bits, fewer clients, less noise, or train fewer parameters.",
            )
        for _ in range(40):
            middle = 0.5 * (low + high)
            low, high = (middle, high) if self._fits(self._grid(2.0**middle)) else (low, middle)
        return self._grid(2.0**low)

    def _grid(self, reach: float) -> Grid:
        spread = math.sqrt(2.0 * math.log(2.0 * self.padded / _CUT) / self.padded)
        grid = Grid(self.padded, reach / self.max_update_norm, reach, 0, self.beta)
        return replace(grid, limit=min(math.isqrt(grid.squared), math.ceil(reach * spread) + 1))

    def _fits(self, grid: Grid) -> bool:
        share = self._share(grid)
        if grid.limit > LARGEST or share > _WIDEST_SHARE:
            return False
        noise = _tail(float(share * self.clients), math.log(2.0 * self.padded / _WRAP))
        return self.clients * grid.limit + noise < 2 ** (self.bits - 1)

    def _share(self, grid: Grid) -> Fraction:
        least = Fraction(self.noise_multiplier) ** 2 * Fraction(grid.l2) ** 2
        return Fraction(math.ceil(least / self.honest * _FINEST), _FINEST)

    @cached_property
    def share_variance(self) -> Fraction:
        """Variance of the noise of one client, in squared grid steps: ``honest`` of them make the noise promised."""
        return self._share(self.grid)

    @cached_property
    def noise_std(self) -> float:
        """Standard deviation of the noise in a sum of all clients, in the units of an update."""
        return math.sqrt(self.share_variance * self.clients) / self.grid.scale

    @cached_property
    def inflation(self) -> float:
        """The norm that noise is scaled to, over ``max_update_norm``: what rounding on a coarse grid costs."""
        return self.grid.l2 / self.grid.reach

    def event(self, *, unit: str = "client", adjacency: str = "zero-out") -> Event:
        """What one round costs. The server knows the cohort, so there is no amplification.

        Skellam: Agarwal, Kairouz & Liu 2021, theorem 3.5. Discrete Gaussian: Kairouz, Liu & Steinke 2021, proposition
        14, as the noise multiplier of a Gaussian that diverges at least as much.
        Raises ``ConfigurationError`` for add-remove: a client that is away takes its share of noise with it.
        """
        if adjacency == "add-remove":
            raise ConfigurationError(
                "a client that is removed takes its noise with it, and the server sees that it is away: noise in "
                "shares protects what a client says, not whether it takes part.",
                found=adjacency,
                where="adjacency",
                fix="use 'zero-out' or 'replace-one'.",
            )
        l2, l1 = self.grid.l2, self.grid.l1
        if self.mechanism == "skellam":
            return Event(
                "skellam", self.noise_multiplier, 1.0, adjacency, unit,
                sensitivity=l2, l1_sensitivity=l1, dimension=self.padded,
            )  # fmt: skip
        loss = (1.0 / self.noise_multiplier + self._gap * math.sqrt(self.padded)) * (1.0 + 1e-12)
        # With dimension 1 the accountant would take the sum for a discrete Gaussian.
        return Event(
            "discrete-gaussian", 1.0 / loss, 1.0, adjacency, unit, sensitivity=l2, dimension=max(2, self.padded)
        )

    @cached_property
    def _gap(self) -> float:
        """Largest log-ratio of a sum of discrete Gaussians to a discrete Gaussian, in one coordinate."""
        rate = -2.0 * math.pi**2 * float(self.share_variance)
        k = np.arange(1.0, self.honest)
        return 10.0 * math.fsum(np.exp(rate * k / (k + 1.0)))

    def encode(self, vector: Tensor, source: Source, *, rotation: str) -> Residues:
        """The unmasked message of one client: (padded,) residues of its update, with its share of noise.

        ``vector``: (size,) real. A vector with a number that is not finite counts as zero. ``rotation``: public, the
        same for the whole cohort. Raises ``DataError`` for another shape.
        """
        if tuple(vector.shape) != (self.size,):
            raise DataError(
                f"an update of shape {tuple(vector.shape)} does not hold {self.size} numbers.",
                found=tuple(vector.shape),
                where="vector",
            )
        return wrapped(self.quantized(vector, source, rotation=rotation) + self._noise(source), self.bits)

    def quantized(self, vector: Tensor, source: Source, *, rotation: str) -> Integers:
        """:meth:`encode` before the noise: integers within the sensitivities of ``grid``. NOT private."""
        values = vector.detach().to("cpu", torch.float64).numpy()
        turned = rotate(clipped(values, self.max_update_norm), rotation)
        return self.grid.rounded(turned * self.grid.scale, source.uniform)

    def _noise(self, source: Source) -> Integers:
        if self.mechanism == "skellam":
            return source.skellam((self.padded,), variance=self.share_variance).numpy()
        return source.discrete_gaussian((self.padded,), sigma2=self.share_variance).numpy()

    def accepts(self, message: object) -> bool:
        """Whether a message has the right type, shape and range; what a client put into it cannot be checked."""
        return (
            isinstance(message, np.ndarray)
            and message.dtype == np.uint32
            and message.shape == (self.padded,)
            and int(message.max()) >> self.bits == 0
        )

    def total(self, messages: Mapping[str, Residues], masks: Masks | None = None) -> Integers:
        """The sum of what the clients encoded: (padded,) integers, wrapped with probability below 2⁻⁴⁰.

        ``masks``: those that the messages carry. Ask once a round. Raises :class:`Void` when fewer than ``least``
        clients arrived, before anything is unmasked, and ``DataError`` for a message that :meth:`accepts` refuses, or
        for more clients than the cohort has.
        """
        if odd := [client for client, message in messages.items() if not self.accepts(message)]:
            raise DataError("a message has another type, shape or range.", found=odd[0], where="messages")
        if len(messages) > self.clients or (masks is not None and not set(messages) <= set(masks.cohort)):
            raise DataError("some message is from outside the cohort.", found=len(messages), where="messages")
        if masks is not None and (len(masks.cohort), masks.size, masks.bits) != (self.clients, self.padded, self.bits):
            raise ConfigurationError("these masks belong to another plan.", found=masks, where="masks")
        if len(messages) < self.least:
            raise Void(
                f"{len(messages)} of {self.clients} clients arrived, {self.least} must: the noise would be too small.",
                found=len(messages),
                where="messages",
                fix="repeat the round, or plan with a larger max_dropout.",
            )
        result: Residues = np.zeros(self.padded, np.uint32)
        for message in messages.values():
            result += message  # wraps at 2**32, a multiple of 2**bits
        if masks is not None:
            result = masks.reveal(result, messages.keys())
        return centred(result & np.uint32((1 << self.bits) - 1), self.bits)

    def decode(self, total: Integers, *, rotation: str) -> Tensor:
        """(size,) float32: the noised sum of the clipped updates, in their units."""
        held: NDArray[np.float64] = total.astype(np.float64) / self.grid.scale
        return torch.from_numpy(unrotate(held, rotation, self.size)).to(torch.float32)


def calibrated(plan: SecureSum, *, target_epsilon: float, target_delta: float, rounds: int) -> SecureSum:
    """``plan`` with the least noise (to 1e-5) at which ``rounds`` sums stay within the target, zero-out.

    Raises ``ConfigurationError`` for a target out of range, or when so much noise does not fit into ``bits``.
    """
    _validate.positive("target_epsilon", target_epsilon)
    _validate.count("rounds", rounds)

    def within(noise: float) -> bool:
        try:
            event = replace(plan, noise_multiplier=noise).event()
        except ConfigurationError as error:
            if error.where == "mechanism":  # too little noise for a bound
                return False
            raise
        return float(compose({event: rounds}, delta=target_delta)) <= target_epsilon

    high = low = _LEAST
    while not within(high):  # upwards only, and slowly: much more noise than needed might not fit into the bits
        low, high = high, _STEP * high
    while high > low * (1.0 + _PRECISION):
        middle = math.sqrt(low * high)
        low, high = (low, middle) if within(middle) else (middle, high)
    return replace(plan, noise_multiplier=high)


def _part(share: float, of: int) -> int:
    """The largest whole number <= share · of, for the decimal as it is written: 0.29 of 100 is 29."""
    return math.floor(Fraction(repr(float(share))) * of)


def _tail(variance: float, log_odds: float) -> float:
    """A value that noise of ``variance`` exceeds with probability <= exp(-``log_odds``), by Chernoff's bound.

    E exp(hX) = exp(variance · (cosh h - 1)) for Skellam noise, and less for (sums of) discrete Gaussians.
    """

    def exponent(t: float) -> float:
        return t * math.asinh(t / variance) - t * t / (math.hypot(t, variance) + variance)

    low, high = 0.0, 1.0
    while exponent(high) < log_odds:
        low, high = high, 2.0 * high
    for _ in range(60):
        middle = 0.5 * (low + high)
        low, high = (middle, high) if exponent(middle) < log_odds else (low, middle)
    return high
