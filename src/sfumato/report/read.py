"""``report.json`` and ``metrics.jsonl`` -> facts again. The files may come from anywhere, so every field is checked."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import MISSING, fields, is_dataclass
from pathlib import Path
from types import UnionType
from typing import Any, get_args, get_origin, get_type_hints

from ..errors import DataError
from .facts import EpochRow, RunFacts, StepRow
from .words import NEIGHBOUR
from .write import SCHEMA

LARGEST = 2**63


def read_report(path: Path) -> RunFacts:
    """The facts that a ``report.json`` was written from. Raises :class:`DataError`.

    ``meaning`` and ``trade_off`` are left empty: they follow from the ledger, and are never taken from the file.
    """
    document = _loaded(path, path.read_bytes())
    if not isinstance(document, Mapping) or document.get("schema") != SCHEMA:
        found = document.get("schema") if isinstance(document, Mapping) else None
        raise DataError(f"{path} is no privacy report of schema {SCHEMA} (found {found!r}).", found=found)
    results, curves = (_section(document, name, path) for name in ("results", "curves"))
    mechanism = _section(document, "mechanism", path)
    tiers, versions = _section(mechanism, "tiers", path), _section(document, "versions", path)
    flat = {
        **document,
        "meaning": {"advantage": 1.0, "detection": [], "unamplified": None, "groups": []},
        "mechanism": {**mechanism, "tiers": list(tiers.items())},
        "accuracy": results.get("test_accuracy"),
        "steps": curves.get("steps"),
        "epochs": curves.get("epochs"),
        "epsilon_at": [],
        "trade_off": [],
        "versions": list(versions.items()),
    }
    kept = {field.name: flat.get(field.name, MISSING) for field in fields(RunFacts)}
    facts: RunFacts = _as(RunFacts, kept, str(path))
    guarantee, ledger = facts.guarantee, facts.ledger
    for name, value, sound in (
        ("guarantee: delta", guarantee.delta, 0.0 < guarantee.delta < 1.0),
        ("guarantee: adjacency", guarantee.adjacency, guarantee.adjacency in NEIGHBOUR),
        ("results: test_accuracy", facts.accuracy, 0.0 <= facts.accuracy <= 1.0),
        ("data: train_records", facts.data.train_records, facts.data.train_records > 0),
        ("ledger: head", ledger.head, re.fullmatch("[0-9a-f]{64}", ledger.head)),
        ("ledger: entries", ledger.entries, ledger.earlier_entries <= ledger.entries),
    ):
        if not sound:
            raise DataError(f"{path}: {name}: unexpected {value!r:.80}.", found=value, where=name)
    return facts


def read_metrics(path: Path) -> tuple[tuple[StepRow, ...], tuple[EpochRow, ...]]:
    """The rows of a ``metrics.jsonl``, in order. Raises :class:`DataError`."""
    steps, epochs = [], []
    for number, line in enumerate(path.read_bytes().splitlines(), start=1):
        row, where = _loaded(path, line), f"{path}, line {number}"
        kind = row.pop("kind", None) if isinstance(row, dict) else None
        if kind == "step":
            steps.append(_as(StepRow, row, where))
        elif kind == "epoch":
            epochs.append(_as(EpochRow, row, where))
        elif kind != "note":
            raise DataError(f"{where}: neither a note nor a step nor an epoch.")
    return tuple(steps), tuple(epochs)


def _loaded(path: Path, text: bytes) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path} is not JSON: {error}") from None


def _section(document: Mapping[str, Any], name: str, path: Path) -> Mapping[str, Any]:
    found = document.get(name)
    if not isinstance(found, Mapping):
        raise DataError(f"{path}: {name} is missing or no object.", found=name)
    return found


def _as(hint: Any, value: Any, where: str) -> Any:
    """``value`` from JSON as what ``hint`` says; a null where a number must be was infinite."""
    if is_dataclass(hint) and isinstance(hint, type):
        return _record(hint, value, where)
    if get_origin(hint) is UnionType:  # X | None
        return None if value is None or value is MISSING else _as(get_args(hint)[0], value, where)
    if get_origin(hint) is tuple and isinstance(value, (list, tuple)):
        return tuple(_as(kind, item, where) for kind, item in _paired(hint, value, where))
    if hint is float and value is None:
        return math.inf
    if hint is float:
        sound = (type(value) is float and math.isfinite(value)) or (type(value) is int and abs(value) <= LARGEST)
        value = float(value) if sound else value
    elif hint is int:
        sound = type(value) is int and 0 <= value <= LARGEST
    else:
        sound = type(value) is hint
    if sound:
        return value
    raise DataError(f"{where}: {'missing' if value is MISSING else f'unexpected {value!r:.80}'}.", where=where)


def _paired(hint: Any, value: Iterable[Any], where: str) -> Iterable[tuple[Any, Any]]:
    kinds, items = get_args(hint), list(value)
    if len(kinds) == 2 and kinds[1] is Ellipsis:
        return [(kinds[0], item) for item in items]
    if len(kinds) != len(items):
        raise DataError(f"{where}: {len(items)} values instead of {len(kinds)}.", where=where)
    return list(zip(kinds, items, strict=True))


def _record(kind: type, value: Any, where: str) -> Any:
    if not isinstance(value, Mapping):
        raise DataError(f"{where}: {'missing' if value is MISSING else 'no object'}.", where=where)
    hints = get_type_hints(kind)
    return kind(**{name: _as(hints[name], value.get(name, MISSING), f"{where}: {name}") for name in hints})
