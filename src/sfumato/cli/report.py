"""``sfumato report``: a run's report made anew from the run folder, with everything it claims proved again.

Imports no torch.
"""

from __future__ import annotations

import json
import math
import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import ConfigurationError, DataError, PrivacyError
from .ledger import events_of, opened
from .result import Result, finite

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser, Namespace

    from ..accounting import Event, Ledger
    from ..report import RunFacts

SUMMARY = "make a run's report anew from its folder (exit code 1: its ledger does not prove what the report claims)"
FORMATS = ("html", "markdown", "json", "card")
CLOSE = 1e-3  # a certified bracket is this narrow, relative to ε


def add_arguments(parser: ArgumentParser) -> None:
    """A run folder."""
    add = parser.add_argument
    # fmt: off
    add("run", type=str, metavar="RUN", help="folder that 'sfumato train' wrote")
    add("--format", type=str, choices=list(FORMATS),
        help="print this instead of writing report.html and report.json; card: a section for a model card")
    add("--out", type=str, metavar="FILE", help="new file for --format (default: standard output)")
    add("--ledger", type=str, metavar="FILE.db", help="where the ledger is now (default: where the run left it)")
    # fmt: on


def run(options: Namespace, argv: Sequence[str]) -> Result:
    """Rewrite the report, or print it in another format."""
    folder, out = Path(options.run), None if options.out is None else Path(options.out)
    if out is not None and options.format is None:
        raise ConfigurationError("--out goes with --format")
    if out is not None and (out.exists() or out.is_symlink()):
        raise ConfigurationError(f"--out {out} exists.", fix="name a new file.")
    facts, later = proved(folder, None if options.ledger is None else Path(options.ledger))
    guarantee = facts.guarantee
    data: dict[str, Any] = {
        "run": str(folder),
        "epsilon": finite(guarantee.epsilon),
        "delta": guarantee.delta,
        "accuracy": facts.accuracy,
        "steps": facts.mechanism.steps,
        "private": math.isfinite(guarantee.epsilon),
        "head": facts.ledger.head,
        "later_entries": later,
    }
    from ..report import HTML_NAME, JSON_NAME, plain_sentence

    note = f"\nThe ledger has {later:,} later entries: these records have been used again." if later else ""
    if options.format is None:
        files = {name: _document(facts, kind) for name, kind in ((HTML_NAME, "html"), (JSON_NAME, "json"))}
        for name, text in files.items():
            _replace(folder / name, text)
        data["written"] = [str(folder / name) for name in files]
        return Result(data, f"{plain_sentence(guarantee)}\nreport: {folder / HTML_NAME}{note}")
    document = _document(facts, options.format)
    if out is None:
        return Result(data | {"format": options.format, "document": document}, document.rstrip("\n"))
    with out.open("x", encoding="utf-8") as file:
        file.write(document)
    return Result(data | {"format": options.format, "written": [str(out)]}, f"{options.format} written to {out}{note}")


def proved(folder: Path, moved: Path | None = None) -> tuple[RunFacts, int]:
    """(facts of the run with ε from its ledger, number of entries the ledger got since).

    Raises :class:`DataError` for a folder that is no run, and :class:`PrivacyError` if the ledger is damaged, does not
    contain the head that the run noted, or proves less than the report claims.
    """
    from ..accounting import compose
    from ..report import JSON_NAME, meaning, profile, read_metrics, read_report, trade_off

    for name in (JSON_NAME, "metrics.jsonl"):
        if not (folder / name).is_file():
            raise DataError(f"{folder} is no run folder: it has no {name}.", found=str(folder))
    facts = read_report(folder / JSON_NAME)
    steps, epochs = read_metrics(folder / "metrics.jsonl")
    noted = Path(facts.ledger.path)
    path = moved or (noted if facts.ledger.shared else folder / noted.name)
    with opened(path, facts.ledger.head) as ledger:
        spent, own, later = _until_head(ledger, facts)
    event = _recorded(facts, own)
    delta = facts.guarantee.delta
    bound = compose(spent, delta=delta)
    if facts.guarantee.epsilon < bound.upper * (1.0 - CLOSE):
        raise PrivacyError(
            f"{folder / JSON_NAME} claims epsilon = {facts.guarantee.epsilon:g}, but the ledger records "
            f"{bound.upper:g} (delta = {delta:g}): the report was changed",
            found=facts.guarantee.epsilon,
        )
    private = math.isfinite(bound)
    facts = replace(
        facts,
        guarantee=replace(
            facts.guarantee, epsilon=bound.upper, lower=float(bound.lower), unit=event.unit, adjacency=event.adjacency
        ),
        meaning=meaning(spent, delta=delta),
        trade_off=trade_off(spent) if private else (),
        epsilon_at=profile(spent) if private else (),
        steps=steps,
        epochs=epochs,
    )
    return facts, later


def _until_head(ledger: Ledger, facts: RunFacts) -> tuple[dict[Event, int], dict[Event, int], int]:
    """(what the run's guarantee is about, what was recorded while it ran, number of later entries)."""
    entries = ledger.entries()
    stood = next((i for i, entry in enumerate(entries, start=1) if entry["hash"] == facts.ledger.head), 0)
    if stood != facts.ledger.entries:
        raise PrivacyError(f"the report counts {facts.ledger.entries} ledger entries, but its head is entry {stood}")
    later = len(entries) - stood
    spent = events_of(entries[:stood]) if later else dict(ledger.events())
    return spent, events_of(entries[facts.ledger.earlier_entries : stood]), later


def _recorded(facts: RunFacts, own: Mapping[Event, int]) -> Event:
    """The event of the mechanism that the report states, from what was recorded while the run went on."""
    stated = facts.mechanism
    if stated.steps > sum(own.values()):
        raise PrivacyError(
            f"the report states {stated.steps} steps, its ledger records {sum(own.values())}: the report was changed",
            found=stated.steps,
        )
    same = (stated.noise_multiplier, stated.sample_rate, stated.sampler)
    for event in own:
        if event.mechanism != "covered" and (event.noise_multiplier, event.sample_rate, event.sampler) == same:
            return event
    raise PrivacyError(
        f"the report states sigma = {stated.noise_multiplier:g}, rate {stated.sample_rate:g} and sampler "
        f"{stated.sampler!r:.40}, which its ledger does not record: the report was changed",
        found=same,
    )


def _document(facts: RunFacts, kind: str) -> str:
    from ..report import as_card, as_html, as_json, as_markdown

    if kind == "json":
        return json.dumps(as_json(facts), indent=2, ensure_ascii=False) + "\n"
    return {"html": as_html, "markdown": as_markdown, "card": as_card}[kind](facts)


def _replace(path: Path, text: str) -> None:
    """Whole or not at all, and never through a link that stands in the file's place."""
    handle, draft = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
        if path.exists():
            os.chmod(draft, path.stat().st_mode & 0o777)
        os.replace(draft, path)
    except BaseException:
        os.unlink(draft)
        raise
