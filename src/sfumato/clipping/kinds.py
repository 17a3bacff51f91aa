"""The ways to clip, as a closed set of frozen records, and which parameters share a bound."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import get_args

from sfumato import _validate
from sfumato.errors import ConfigurationError

# Far above what underflow in float32 hides from a norm, so that C/(‖g‖ + γ) times what was hidden stays below C.
_LEAST_GAMMA = 1e-6


@dataclass(frozen=True)
class Flat:
    """One norm over all parameters: min(1, C/‖g‖) (Abadi et al. 2016)."""


@dataclass(frozen=True)
class Automatic:
    """Every gradient is normalised, C/(‖g‖ + γ): C only scales the learning rate (AUTO-S, Bu et al. 2022).

    ``gamma`` is in units of a record's gradient; it keeps small gradients from being blown up, to C/γ times at most.
    Raises ``ConfigurationError`` unless gamma >= 1e-6.
    """

    gamma: float = 0.01

    def __post_init__(self) -> None:
        gamma = _validate.positive("gamma", self.gamma)
        if gamma < _LEAST_GAMMA:
            raise ConfigurationError(
                f"gamma={gamma} is below {_LEAST_GAMMA}: gradients of nothing but rounding would be scaled up to C.",
                found=gamma,
                where="gamma",
                fix="use the 0.01 of the paper.",
            )
        object.__setattr__(self, "gamma", gamma)


@dataclass(frozen=True)
class PerLayer:
    """Every parameter tensor is clipped on its own, to C/√K for K of them: C in quadrature (McMahan et al. 2018)."""


@dataclass(frozen=True, init=False)
class Grouped:
    """Named groups of parameters, each clipped on its own; their bounds are C in quadrature.

    ``groups``: {group: names of parameters, or of modules for all that is in them}. ``bounds``: {group: share}, of
    which only the proportions matter: C_k = C·b_k/√Σb²; equal if left out. Every trainable parameter has to be in
    exactly one group, which is checked against the model (:func:`groups_of`).
    Raises ``ConfigurationError`` for empty groups, entries that occur twice, and bounds that are not one positive
    number for each group.
    """

    groups: tuple[tuple[str, tuple[str, ...]], ...]
    bounds: tuple[float, ...]

    def __init__(self, groups: Mapping[str, Sequence[str]], bounds: Mapping[str, float] | None = None):
        if not isinstance(groups, Mapping) or not groups:
            raise ConfigurationError(
                f"groups={groups!r} is not a mapping of group names to parameter names.", found=groups, where="groups"
            )
        seen: set[str] = set()
        for name, entries in groups.items():
            if isinstance(entries, str) or not all(isinstance(e, str) and e for e in entries) or not list(entries):
                raise ConfigurationError(
                    f"groups[{name!r}]={entries!r} is not a list of names of parameters or modules.",
                    found=entries,
                    where="groups",
                )
            if twice := sorted(e for e in entries if e in seen or list(entries).count(e) > 1):
                raise ConfigurationError(
                    f"{twice[0]!r} occurs twice in groups: it would be released twice.", found=twice[0], where="groups"
                )
            seen.update(entries)
        if bounds is not None and (not isinstance(bounds, Mapping) or set(bounds) != set(groups)):
            raise ConfigurationError(
                f"bounds={bounds!r} does not name the groups {', '.join(map(str, groups))}, each once.",
                found=bounds,
                where="bounds",
            )
        parts = [1.0 if bounds is None else _validate.positive(f"bounds[{name!r}]", bounds[name]) for name in groups]
        if min(parts) < 1e-6 * max(parts):
            raise ConfigurationError(
                f"bounds={bounds!r} differ by more than a factor of 1e6: a group would be rounded away.",
                found=bounds,
                where="bounds",
            )
        object.__setattr__(self, "groups", tuple((str(name), tuple(entries)) for name, entries in groups.items()))
        object.__setattr__(self, "bounds", tuple(part / math.hypot(*parts) for part in parts))


Clip = Flat | Automatic | PerLayer | Grouped

_NAMES: dict[str, type[Clip]] = {"flat": Flat, "automatic": Automatic, "per-layer": PerLayer, "grouped": Grouped}


def chosen(value: object, where: str = "clipping") -> Clip:
    """The clip that ``value`` names, or is; raises ``ConfigurationError`` for anything else."""
    if isinstance(value, get_args(Clip)):
        return value
    if isinstance(value, str) and value in _NAMES and value != "grouped":
        return _NAMES[value]()  # type: ignore[call-arg]
    raise ConfigurationError(
        f"{where}={value!r} is no way to clip.",
        found=value,
        where=where,
        fix="one of 'flat', 'automatic', 'per-layer', or an instance of "
        f"{', '.join(kind.__name__ for kind in get_args(Clip))}; Grouped needs its groups.",
    )


def label(clip: Clip) -> str:
    """The name of the kind of clip, for ledgers and reports."""
    return next(name for name, kind in _NAMES.items() if kind is type(clip))


def shares(clip: Clip, groups: int) -> tuple[float, ...]:
    """C_k / C of each of ``groups`` groups: 1 in quadrature."""
    if isinstance(clip, Grouped):
        return clip.bounds
    return (1.0 / math.sqrt(groups),) * groups


def groups_of(clip: Clip, names: Iterable[str]) -> tuple[tuple[int, ...], tuple[float, ...]]:
    """(group of each of ``names``, share of C of each group); ``names``: all trainable parameters.

    Raises ``ConfigurationError`` for a parameter in no group or in several, and for an entry that names none.
    """
    names = tuple(names)
    match clip:
        case PerLayer():
            found = tuple(range(len(names)))
        case Grouped():
            found = _grouped(clip, names)
        case _:
            found = (0,) * len(names)
    count = len(clip.groups) if isinstance(clip, Grouped) else max(found, default=0) + 1
    return found, shares(clip, count)


def group_of(clip: Clip, names: Iterable[str]) -> dict[str, int] | None:
    """{name: its group}; None for a clip that has one group only. Raises as :func:`groups_of`."""
    names = tuple(names)
    if isinstance(clip, (Flat, Automatic)):
        return None
    return dict(zip(names, groups_of(clip, names)[0], strict=True))


def _grouped(clip: Grouped, names: tuple[str, ...]) -> tuple[int, ...]:
    entries = {entry: k for k, (_, group) in enumerate(clip.groups) for entry in group}
    used: set[str] = set()
    out = []
    for name in names:
        hits = [e for e in entries if name == e or name.startswith(f"{e}.")]
        if len({entries[e] for e in hits}) != 1:
            groups = [clip.groups[entries[e]][0] for e in hits]
            raise ConfigurationError(
                f"{name} is in {'no group' if not hits else 'the groups ' + ', '.join(groups)}: the bounds of the "
                "groups are C in quadrature only if every trainable parameter is in exactly one.",
                found=name,
                where="clipping",
                fix="name it, or the module that it is in, in one group.",
            )
        used.update(hits)
        out.append(entries[hits[0]])
    if idle := sorted(set(entries) - used):
        raise ConfigurationError(
            f"{idle[0]!r} in groups names no trainable parameter.",
            found=idle[0],
            where="clipping",
            fix="take names from model.named_parameters(); a tied parameter goes by its first one.",
        )
    return tuple(out)
