"""Flags that describe a training -> accounting events. Imports no torch."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..errors import ConfigurationError

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser, Namespace

    from ..accounting import Event

SAMPLINGS = ("poisson", "cyclic", "shuffle", "truncated-poisson", "fixed-size")
ADJACENCIES = ("add-remove", "zero-out", "replace-one")
# What the draws leave public or shift decides which neighbours can be compared; the first is the default.
_ALLOWED = {
    "poisson": ADJACENCIES,
    "cyclic": ADJACENCIES,
    "shuffle": ("zero-out", "replace-one"),
    "truncated-poisson": ("zero-out",),
    "fixed-size": ("zero-out", "replace-one"),
}
_OWN = {
    "cycle": ("cyclic",),
    "max_batch_size": ("truncated-poisson",),
    "dataset_size": ("truncated-poisson", "fixed-size"),
}


@dataclass(frozen=True)
class Scheme:
    """How records are drawn, and which neighbours are compared."""

    sampling: str
    adjacency: str
    cycle: int | None = None
    max_batch_size: int | None = None
    dataset_size: int | None = None


def add_arguments(parser: ArgumentParser) -> None:
    """``--sampling``, ``--adjacency`` and what single samplings need."""
    add = parser.add_argument
    # fmt: off
    add("--sampling", type=str, default="poisson", choices=list(SAMPLINGS),
        help="how records are drawn (default poisson: each one independently, with --sample-rate)")
    add("--adjacency", type=str, choices=list(ADJACENCIES),
        help="what neighbours differ in (default add-remove; zero-out where the size of batches is fixed)")
    add("--cycle", type=int, help="steps until a record can be drawn again (cyclic)")
    add("--max-batch-size", type=int, help="largest batch (truncated-poisson)")
    add("--dataset-size", type=int, help="number of records, public (truncated-poisson, fixed-size)")
    # fmt: on


def scheme(options: Namespace) -> Scheme:
    """The flags, checked against one another; raises :class:`ConfigurationError`."""
    kind, given = options.sampling, {name: options[name] for name in _OWN}
    for name, kinds in _OWN.items():
        flag = "--" + name.replace("_", "-")
        if kind in kinds and given[name] is None:
            raise ConfigurationError(f"--sampling {kind} needs {flag}")
        if given[name] is not None and kind not in kinds:
            raise ConfigurationError(f"{flag} means nothing to --sampling {kind}")
        if given[name] is not None and given[name] < 1:
            raise ConfigurationError(f"{flag} must be 1 or more, got {given[name]}")
    allowed = _ALLOWED[kind]
    adjacency = options.adjacency or allowed[0]
    if adjacency not in allowed:
        raise ConfigurationError(
            f"--adjacency {adjacency} cannot be claimed with --sampling {kind}: its batches depend on the number of "
            "records.",
            fix=f"choose {' or '.join(allowed)}.",
        )
    return Scheme(kind, adjacency, given["cycle"], given["max_batch_size"], given["dataset_size"])


def events(how: Scheme, *, noise_multiplier: float, sample_rate: float, steps: int) -> dict[Event, int]:
    """What ``steps`` noisy steps cost: shuffled epochs and cycles are charged once, whatever their number of steps."""
    from ..accounting import Event
    from ..accounting.budget import count, rate

    q = rate("sample_rate", sample_rate)
    times = charges(how, sample_rate=q, steps=count("steps", steps))
    if how.sampling == "shuffle":
        event = Event("gaussian", noise_multiplier, 1.0, how.adjacency, sampler="shuffle")
    elif how.sampling == "truncated-poisson":
        event = Event(
            "truncated-poisson-gaussian", noise_multiplier, q, how.adjacency, sampler=how.sampling,
            dataset_size=how.dataset_size, cap=how.max_batch_size,
        )  # fmt: skip
    elif how.sampling == "fixed-size":
        assert how.dataset_size is not None
        size = max(1, round(q * how.dataset_size))
        event = Event(
            "fixed-size-gaussian", noise_multiplier, size / how.dataset_size, how.adjacency, sampler=how.sampling,
            dataset_size=how.dataset_size, cap=size,
        )  # fmt: skip
    else:
        event = Event("poisson-gaussian", noise_multiplier, q, how.adjacency, sampler=how.sampling)
    return {event: times}


def charges(how: Scheme, *, sample_rate: float, steps: int) -> int:
    """How many of ``steps`` one record can take part in, as far as the sampling fixes it."""
    if how.sampling == "shuffle":
        return math.ceil(steps / steps_per_epoch(sample_rate))
    return math.ceil(steps / how.cycle) if how.cycle is not None else steps


def steps_per_epoch(sample_rate: float) -> int:
    """Steps that shuffled batches of this share of the records need to go through all of them."""
    return math.ceil(1.0 / sample_rate - 1e-9)
