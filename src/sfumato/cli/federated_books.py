"""The ledgers of a federation: one for each client, or the server's, in the run folder or shared by several runs."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

from torch.utils.data import TensorDataset

from ..accounting import Event, Ledger, compose
from ..data import FederatedData, Records
from ..errors import ConfigurationError, LedgerError, PrivacyError
from ..federated import Client, Result
from ..federated.accounts import DATASET
from ..federated.cohorts import number_of
from ..report import Level, covering
from .run_folder import LEDGER_NAME, LEDGERS_NAME, SIDE_FILES

DIVISION_NAME = "division.sha256"
LONGEST = 80


@dataclass(frozen=True)
class Proof:
    """What the client that spent most was charged (``worst``), histories of which every client's spends at most one
    (``everyone``), and the noise multipliers of all (least, largest)."""

    worst: Mapping[Event, int]
    everyone: Sequence[Mapping[Event, int]]
    noise: tuple[float, float]
    path: str
    files: int
    entries: int
    head: str


class Books:
    """Opens ledgers where they belong; those that hold nothing are not left behind.

    ``own``: every client keeps a ledger (the server keeps none), as ``level`` has it; ``shared``: a folder that
    outlives the run.
    """

    def __init__(self, data: FederatedData, *, level: Level, shared: Path | None):
        own = level in ("sample", "local")
        self.own, self.shared = own, shared
        self._clients, self._server = dict[str, Client](), list[Ledger]()
        self._folder = Path() if shared is None else shared.absolute()
        self._before: dict[Path, int] = {}
        self._spent = False
        self._division = _division(data, level if own else "server")
        if shared is not None:
            _refuse_others(self._folder, self._division)

    def open(self, folder: Path, records: Mapping[str, Records]) -> tuple[dict[str, Client], Ledger | None]:
        """(participants, the server's ledger or None); without a shared folder the ledgers lie in ``folder``."""
        if self.shared is None:
            self._folder = folder / LEDGERS_NAME if self.own else folder
        self._folder.mkdir(exist_ok=True)
        if self.shared is not None:
            (self._folder / DIVISION_NAME).write_text(self._division + "\n", encoding="utf-8")
        paths = {name: self._folder / file_name(name) if self.own else None for name in records}
        for path in [p for p in paths.values() if p is not None] or [self._folder / LEDGER_NAME]:
            self._before[path] = _entries(path)
        self._clients = {
            name: Client(name, TensorDataset(records[name].x, records[name].y), ledger=path)
            for name, path in paths.items()
        }
        if self.own:
            return self._clients, None
        self._server = [Ledger(self._folder / LEDGER_NAME)]
        return self._clients, self._server[0]

    def proof(self, result: Result) -> Proof:
        """Verify every chain and take from the ledgers what the report states."""
        worst = max(result.client_epsilons, key=lambda name: result.client_epsilons[name])
        ledgers = list(result.client_ledgers.values()) if self.own else self._server
        held = result.client_ledgers[worst] if self.own else self._server[0]
        try:
            counts = [ledger.verify() for ledger in ledgers]
        except LedgerError as error:
            raise PrivacyError(f"ledgers in {self._folder}: {error}") from error
        spent = held.spent() if self.own else held.spent(dataset=DATASET, records=[number_of(worst)])
        noise = [event.noise_multiplier for ledger in ledgers for event in ledger.events()]
        return Proof(
            worst=max(spent, key=lambda events: float(compose(events, delta=result.delta))),
            everyone=covering([events for events in self._histories(result) if events] or list(spent)),
            noise=(min(noise, default=math.inf), max(noise, default=math.inf)),
            path=str(self._folder) if self.shared else LEDGERS_NAME if self.own else LEDGER_NAME,
            files=len(ledgers),
            entries=sum(counts),
            head=str(held.head),
        )

    def _histories(self, result: Result) -> list[Mapping[Event, int]]:
        """What every client was charged."""
        if self.own:
            return [events for ledger in result.client_ledgers.values() for events in ledger.spent()]
        numbers = [number_of(name) for name in result.client_epsilons]
        return [events for n in numbers for events in self._server[0].spent(dataset=DATASET, records=[n])]

    @property
    def charged(self) -> bool:
        """Whether this run has put entries into any ledger so far."""
        return any(len(held.entries()) > self._before.get(held.path or Path(), 0) for held in self._opened())

    def _opened(self) -> list[Ledger]:
        # A client that never answered never opened its ledger, and asking for it would make the file.
        own = [client._ledger for client in self._clients.values() if isinstance(client._ledger, Ledger)]
        return [*own, *self._server]

    def close(self) -> bool:
        """Close all; True if this run put entries into any. Removes ledgers made here that hold none."""
        opened = self._opened()
        self._clients, self._server = {}, []
        for ledger in opened:
            held = len(ledger.entries())
            ledger.close()
            if ledger.path is None:
                continue
            before = self._before.get(ledger.path, 0)
            self._spent = self._spent or held > before
            if before == held == 0:
                for suffix in ("", *SIDE_FILES):
                    Path(f"{ledger.path}{suffix}").unlink(missing_ok=True)
        return self._spent

    @property
    def path(self) -> Path:
        """Where the ledgers are."""
        return self._folder


def file_name(client: str) -> str:
    """A file name for a client's ledger: its id where that can be one, with a hash where it is too long."""
    name = quote(client, safe=" ")
    if len(name) > LONGEST or name.startswith("."):
        name = f"{name[:LONGEST].lstrip('.')}-{hashlib.sha256(client.encode()).hexdigest()[:16]}"
    return f"{name}.db"


def _entries(path: Path) -> int:
    if not path.exists():
        return 0
    with Ledger(path) as ledger:
        return len(ledger.entries())


def _division(data: FederatedData, books: str) -> str:
    """Ledgers add up only if a client's name means the same records in every run, and all runs charge the same books:
    a hash of who holds how many, and of whose ledgers protect what."""
    sizes = [(name, len(own_records)) for name, own_records in data.clients.items()]
    text = repr((data.data.name, data.data.classes, data.partition, sizes, books))
    return hashlib.sha256(text.encode()).hexdigest()


def _refuse_others(folder: Path, division: str) -> None:
    mark = folder / DIVISION_NAME
    if mark.exists() and mark.read_text(encoding="utf-8").strip() != division:
        raise ConfigurationError(
            f"--ledger-dir {folder} belongs to other clients or other books: another data set, divided otherwise, or "
            "a --unit whose ledgers do not add up with these (sample; local; client and distributed).",
            fix="give the same data, --clients, --alpha, --public-fraction and --unit, or another folder.",
        )
