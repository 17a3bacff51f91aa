"""``sfumato ledger``: what a ledger holds, whether it is intact, and a copy as JSON. Imports no torch."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import ConfigurationError, LedgerError, PrivacyError
from .messages import visible
from .result import Result, finite

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser, Namespace

    from ..accounting import Event, Ledger

SUMMARY = "show, verify or export the record of what was spent (exit code 1: damaged, or behind --head)"
ACTIONS = ("show", "verify", "export")
SHOWN = 40  # lines for people; --json has all


def add_arguments(parser: ArgumentParser) -> None:
    """An action and a file."""
    add = parser.add_argument
    # fmt: off
    add("action", type=str, choices=list(ACTIONS), help="show, verify or export")
    add("path", type=str, metavar="LEDGER.db", help="the ledger file")
    add("--head", type=str, metavar="HASH", help="a head noted earlier (report.json has one), which it must contain")
    add("--delta", type=float, default=1e-5, help="delta of the epsilon shown (default 1e-5)")
    add("--out", type=str, metavar="FILE.json", help="new file for export (default: standard output)")
    # fmt: on


def run(options: Namespace, argv: Sequence[str]) -> Result:
    """The whole chain is verified first, whatever the action."""
    if options.out is not None and options.action != "export":
        raise ConfigurationError(f"--out means nothing to {options.action}")
    if options.head is not None and not re.fullmatch(r"[0-9a-f]{64}", options.head):
        raise ConfigurationError(f"--head must be 64 hexadecimal digits, got {options.head!r}")
    path, out = Path(options.path), None if options.out is None else Path(options.out)
    if out is not None and (out.exists() or out.is_symlink()):
        raise ConfigurationError(f"--out {out} exists.", fix="name a new file.")
    with opened(path, options.head) as ledger:
        if options.action == "verify":
            count, head = ledger.verify(), ledger.head
            data = {"ok": True, "entries": count, "head": head, "path": str(path)}
            behind = " and contains the head given" if options.head else ""
            return Result(data, f"{path}: intact{behind}; {count:,} entries\nhead {head}")
        if options.action == "export":
            return _export(ledger, path, out)
        return _show(ledger, path, options.delta)


def opened(path: Path, head: str | None = None) -> Ledger:
    """The intact ledger at ``path`` that contains ``head``.

    Raises :class:`ConfigurationError` if there is no such file, which is never created, and :class:`PrivacyError` if
    the file is no intact ledger or does not contain the head.
    """
    from ..accounting import Ledger

    if not path.is_file():
        raise ConfigurationError(f"{path} is not a file.", fix="name the ledger of a run, such as run/ledger.db.")
    try:
        ledger = Ledger(path, head=head)
        try:
            ledger.verify()
        except BaseException:
            ledger.close()
            raise
    except LedgerError as error:
        raise PrivacyError(str(error)) from error
    return ledger


def _export(ledger: Ledger, path: Path, out: Path | None) -> Result:
    document = ledger.export(out)
    if out is None:
        return Result(document, json.dumps(document, indent=2, ensure_ascii=False))
    count = len(document["entries"])
    data = {"out": str(out), "entries": count, "head": ledger.head, "path": str(path)}
    return Result(data, f"{count:,} entries of {path} written to {out}")


def _show(ledger: Ledger, path: Path, delta: float) -> Result:
    from ..report import at_most

    entries = ledger.entries()
    total = ledger.epsilon(delta=delta)
    lines = summary(entries)
    names = {key: sorted({str(e[key]) for e in entries if e[key] is not None}) for key in ("group", "dataset")}
    groups = {name: float(ledger.epsilon(delta=delta, group=name)) for name in names["group"]}
    datasets = {name: float(ledger.epsilon(delta=delta, dataset=name)) for name in names["dataset"]}
    runs = _runs(entries, delta)
    units = sorted({entry["event"]["unit"] for entry in entries})
    data = {
        "path": str(path),
        "entries": len(entries),
        "releases": sum(line["count"] for line in lines),
        "head": ledger.head,
        "delta": delta,
        "epsilon": finite(total.upper),
        "lower": finite(total.lower),
        "unit": units[0] if len(units) == 1 else None,
        "runs": {name: finite(value) for name, value in runs.items()},
        "groups": {name: finite(value) for name, value in groups.items()},
        "datasets": {name: finite(value) for name, value in datasets.items()},
        "lines": lines,
    }
    text = [
        f"{path}: intact, {len(entries):,} entries, {data['releases']:,} releases",
        f"head {ledger.head}",
        f"epsilon = {at_most(total.upper)} at delta = {delta:g} for one {data['unit'] or 'unit'}, everything together",
        *_table("run alone", runs),
        *_table("group", groups),
        *_table("data set", datasets),
    ]
    if lines:
        text += ["", *_columns([_row(line) for line in lines])]
    return Result(data, "\n".join(text))


def summary(entries: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Entries that say the same, added up: one line for each run, group, data set and event."""
    found: dict[str, dict[str, Any]] = {}
    for entry in entries:
        same = {key: entry.get(key) for key in ("run", "group", "dataset", "event")}
        line = found.setdefault(
            json.dumps(same, sort_keys=True), {**same, "count": 0, "first": entry["seq"], "last": entry["seq"]}
        )
        line["count"] += entry.get("count", 1)
        line["last"] = entry["seq"]
    return list(found.values())


def events_of(entries: Iterable[Mapping[str, Any]]) -> dict[Event, int]:
    """{event: how often} of these entries, as if all concerned the same records."""
    from ..accounting import Event

    found: Counter[Event] = Counter()
    for line in summary(entries):
        found[Event.from_json(line["event"])] += line["count"]
    return {event: count for event, count in found.items() if count}


def _runs(entries: Sequence[Mapping[str, Any]], delta: float) -> dict[str, float]:
    """ε of each run by itself, as if all it did concerned one record; runs that released the same are composed once."""
    from ..accounting import compose

    by_run: dict[str, list[Mapping[str, Any]]] = {}
    for entry in entries:
        by_run.setdefault(entry["run"], []).append(entry)
    known: dict[frozenset[tuple[Event, int]], float] = {}
    found = {}
    for name, own in by_run.items():
        events = events_of(own)
        key = frozenset(events.items())
        if key not in known:
            known[key] = float(compose(events, delta=delta))
        found[name] = known[key]
    return found


def _table(title: str, values: Mapping[str, float]) -> list[str]:
    from ..report import at_most

    lines = [f"  {title} {_name(name)}: epsilon at most {at_most(value)}" for name, value in values.items()]
    return _cut(lines)


def _row(line: Mapping[str, Any]) -> tuple[str, ...]:
    event = line["event"]
    return (
        _name(line["run"]),
        _name(line["group"] or "-"),
        _name(line["dataset"] or "-"),
        f"{event['mechanism']} ({event['sampler']}, {event['adjacency']})",
        f"{event['noise_multiplier']:.6g}",
        f"{event['sample_rate']:.6g}",
        f"{line['count']:,}",
    )


def _columns(rows: Sequence[tuple[str, ...]]) -> list[str]:
    head = ("run", "group", "data set", "event", "sigma", "rate", "times")
    widths = [max(len(row[i]) for row in (head, *rows[:SHOWN])) for i in range(len(head))]
    return _cut(
        ["  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in (head, *rows)]
    )


def _cut(lines: list[str]) -> list[str]:
    left = len(lines) - SHOWN
    return lines if left <= 0 else [*lines[:SHOWN], f"  … and {left:,} more (all with --json)"]


def _name(text: str) -> str:
    """A name from the file, which must not break the line it stands in."""
    return visible(text, keep="")
