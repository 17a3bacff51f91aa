"""Trains, is killed at a chosen line of the library, and trains on with the same ledger. Run as a script by the tests.

Nothing in the library knows about this: a trace function counts how often each of its lines is about to run, and sends
the process SIGKILL at the chosen one. Every release is written to a journal at the first line that runs after
``p.grad`` was set (or a reserved release was taken), before that line can kill. So the journal never holds more than
what was visible, and never less by more than the one line under way.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import nn

import sfumato as sf
from sfumato.accounting import Event, Ledger

LIBRARY = str(Path(sf.__file__).parent) + os.sep
STEPS = 4
EVENT = Event("poisson-gaussian", 1.1, 0.01, "add-remove")
RESERVED = 3

Line = tuple[str, int]


class Tracer:
    """Counts lines of the files in ``where``, calls ``watch`` before each, and kills at one of them."""

    def __init__(self, where: tuple[str, ...], watch: Callable[[], None], victim: Line | None, after: int) -> None:
        self.where, self.watch, self.victim, self.after = where, watch, victim, after
        self.seen: Counter[Line] = Counter()
        self.names: dict[str, str] = {}  # of the files to watch, by path; "" for all others

    def __call__(self, frame: FrameType, kind: str, _: object) -> Any:
        path = frame.f_code.co_filename
        if path not in self.names:
            name = path.removeprefix(LIBRARY)
            self.names[path] = name if name != path and name.startswith(self.where) else ""
        return self.line if self.names[path] else None

    def line(self, frame: FrameType, kind: str, _: object) -> Any:
        self.watch()
        if kind == "line":
            at = (self.names[frame.f_code.co_filename], frame.f_lineno)
            self.seen[at] += 1
            if at == self.victim and self.seen[at] == self.after:
                os.kill(os.getpid(), signal.SIGKILL)
        return self.line


class Journal:
    """One line for each release, on disk before anything else happens."""

    def __init__(self, path: Path) -> None:
        self.handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)

    def __call__(self) -> None:
        os.write(self.handle, b"released\n")
        os.fsync(self.handle)


def engine(ledger: Path, released: Journal, start: Callable[[Callable[[], None]], None]) -> None:
    """An ordinary loop; a release is visible as soon as any gradient is there."""
    model = nn.Linear(3, 2)
    data = [(torch.randn(3), torch.tensor(i % 2)) for i in range(12)]
    visible = False

    def watch() -> None:
        nonlocal visible
        before, visible = visible, any(p.grad is not None for p in model.parameters())
        if visible and not before:
            released()

    start(watch)
    private = sf.PrivacyEngine(ledger=ledger)
    model, optimizer, loader = private.make_private(  # type: ignore[assignment]
        module=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
        data_loader=torch.utils.data.DataLoader(data, batch_size=4),  # type: ignore[arg-type]
        noise_multiplier=1.0,
        max_grad_norm=1.0,
    )
    done = 0
    while done < STEPS:
        for x, y in loader:
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x), y).backward()
            optimizer.step()
            done += 1
            if done == STEPS:
                break
    private.detach()
    private.ledger.close()


def entries(ledger: Path, released: Journal, start: Callable[[Callable[[], None]], None]) -> None:
    """The ledger alone: every append that returned is a release."""
    start(lambda: None)
    with Ledger(ledger) as held:
        for step in range(STEPS):
            scope: dict[str, Any] = {"dataset": "d", "records": [step, 9]} if step % 2 else {}
            held.append(EVENT, run="a", step=step, budget=sf.Budget(5.0, 1e-5), **scope)
            released()


def reserved(ledger: Path, released: Journal, start: Callable[[Callable[[], None]], None]) -> None:
    """Steps reserved in advance, the last of which go unused."""
    start(lambda: None)
    with Ledger(ledger) as held:
        for step in range(STEPS):
            with held.reserve(EVENT, RESERVED, run="a", step=step) as reservation:
                for _ in range(RESERVED - step % 2):
                    reservation.use()
                    released()


TRAINING = {"engine": engine, "entries": entries, "reserved": reserved}
WHERE: dict[str, tuple[str, ...]] = {
    "engine": ("session/step.py", "session/loader.py", "accounting/ledger"),
    "entries": ("accounting/ledger",),
    "reserved": ("accounting/ledger",),
}


def life(kind: str, folder: Path, victim: Line | None, after: int, seed: int) -> tuple[int, dict[Line, int]]:
    """One process, forked here. Returns its exit status (-9: killed as planned) and how often each line ran."""
    report = folder / "lines.json"
    child = os.fork()
    if child == 0:
        status = 1
        try:
            torch.manual_seed(seed)
            tracers: list[Tracer] = []

            def start(watch: Callable[[], None]) -> None:
                tracers.append(Tracer(WHERE[kind], watch, victim, after))
                sys.settrace(tracers[0])

            TRAINING[kind](folder / "ledger.db", Journal(folder / "journal"), start)
            sys.settrace(None)
            report.write_text(json.dumps([[*line, n] for line, n in tracers[0].seen.items()]))
            status = 0
        except BaseException as error:  # noqa: BLE001  (the process ends here, whatever it was)
            print(f"{type(error).__name__}: {error}", file=sys.stderr)
        finally:
            os._exit(status)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    lines = {(name, at): n for name, at, n in json.loads(report.read_text())} if status == 0 else {}
    return status, lines


def schedule(kind: str, folder: Path, victim: Line, often: int, rng: random.Random) -> dict[str, Any]:
    """Up to three deaths at one line, then a life to the end; what was charged and what was released."""
    folder.mkdir()
    statuses = [
        life(kind, folder, victim, rng.randint(1, often), rng.randrange(2**31))[0] for _ in range(rng.randint(1, 3))
    ]
    statuses.append(life(kind, folder, None, 0, rng.randrange(2**31))[0])
    with Ledger(folder / "ledger.db") as ledger:
        ledger.verify()
        charged = sum(entry["count"] for entry in ledger.entries())
    released = len((folder / "journal").read_text().splitlines())
    return {"victim": victim, "statuses": statuses, "charged": charged, "released": released}


def main(kind: str, folder: Path, failpoints: int, schedules: int, seed: int) -> None:
    rng = random.Random(seed)
    folder.mkdir()
    # Once here, so that no life has to load what torch loads on first use.
    TRAINING[kind](folder / "warm.db", Journal(folder / "warm"), lambda _: None)
    first, lines = life(kind, folder, None, 0, 0)
    assert first == 0, "a life that nobody ends must end well"
    # What runs first after a crash (the ledger is there already, perhaps without a seal) counts too.
    _, again = life(kind, folder, None, 0, 1)
    lines = {line: max(n, lines.get(line, 0)) for line, n in (lines | again).items()}
    chosen = rng.sample(sorted(lines), min(failpoints, len(lines)))
    found = [
        schedule(kind, folder / f"{i}-{j}", victim, lines[victim], rng)
        for i, victim in enumerate(chosen)
        for j in range(schedules)
    ]
    print(json.dumps({"lines": len(lines), "schedules": found}))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(sys.argv[1], Path(sys.argv[2]), *map(int, sys.argv[3:6]))
