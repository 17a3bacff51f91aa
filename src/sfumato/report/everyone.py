"""Upper bounds that hold for every client at once: the one who spent most at one δ need not be so at another."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import pairwise

from ..accounting import Event
from .facts import Meaning

History = Mapping[Event, int]
MOST = 100  # histories that are composed; more of them are covered by fewer, each at least as bad as those it covers


def covering(histories: Sequence[History], most: int = MOST) -> list[History]:
    """At most ``most`` histories (more, if of unlike kinds), of which each of ``histories`` spends at most one.

    Noise only falls, chances and counts only rise: the releases of a client that is covered can be made from those of
    its cover by adding noise, by leaving some out, and by answering for nobody now and then.
    """
    kinds: dict[object, list[History]] = {}
    for history in {frozenset(h.items()): h for h in histories}.values():
        kinds.setdefault(tuple(_kind(event) for event in _ordered(history)), []).append(history)
    found: list[History] = []
    for alike in kinds.values():
        alike.sort(key=lambda h: [(e.sample_rate, e.noise_multiplier) for e in _ordered(h)])
        groups = max(1, min(len(alike), most // len(kinds)))
        cuts = [len(alike) * i // groups for i in range(groups + 1)]
        found += [_cover(alike[a:b]) for a, b in pairwise(cuts)]
    return found


def largest_meaning(found: Sequence[Meaning], epsilon: float) -> Meaning:
    """The worst of each number; ``epsilon``: what a client spends for whom no sampling is counted on."""
    first = found[0]
    unamplified = [m.unamplified for m in found if m.unamplified is not None]
    return Meaning(
        advantage=max(m.advantage for m in found),
        detection=envelope([m.detection for m in found]),
        # Where hardly any client gains from its batches there is nothing to warn of.
        unamplified=max(unamplified) if unamplified and max(unamplified) > 1.001 * epsilon else None,
        groups=tuple((k, max(dict(m.groups)[k] for m in found)) for k, _ in first.groups),
    )


def envelope(curves: Sequence[tuple[tuple[float, float], ...]]) -> tuple[tuple[float, float], ...]:
    """The largest value of curves over the same points."""
    return tuple((points[0][0], max(value for _, value in points)) for points in zip(*curves, strict=True))


def _ordered(history: History) -> list[Event]:
    return sorted(history, key=lambda e: (repr(_kind(e)), e.noise_multiplier, e.sample_rate))


def _kind(event: Event) -> Event:
    """What has to agree for noise, rate and count to decide which is worse; other mechanisms stay as they are."""
    if event.mechanism not in ("gaussian", "poisson-gaussian"):
        return event
    return replace(event, noise_multiplier=1.0, sample_rate=1.0)


def _cover(alike: Sequence[History]) -> History:
    if len(alike) == 1:
        return alike[0]
    rows = [_ordered(history) for history in alike]
    found: dict[Event, int] = {}
    for events in zip(*rows, strict=True):
        event = replace(
            events[0],
            noise_multiplier=min(e.noise_multiplier for e in events),
            sample_rate=max(e.sample_rate for e in events),
        )
        count = max(history[e] for history, e in zip(alike, events, strict=True))
        found[event] = found.get(event, 0) + count
    return found
