"""The server's state between two rounds, written whole or not at all."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from sfumato.accounting import Ledger
from sfumato.errors import ConfigurationError, DataError
from sfumato.session import stored

from .exchange import Exchange
from .history import Round
from .wire.schema import Schema

KIND = "federation"


@dataclass
class State:
    """What a federation goes on from: released vectors and public numbers.

    ``history`` also counts who was drawn and who answered, which is for whoever runs the server (see ``Round``): the
    file has mode 0600.
    """

    run: str
    vector: Tensor
    schema: str
    number: int = 0
    rounds: int = 0
    optimizer: dict[str, Tensor] = field(default_factory=dict)
    index: Tensor | None = None
    bound: float | None = None
    factor: float = 1.0
    measures: list[float] = field(default_factory=list)
    last_drawn: dict[str, int] = field(default_factory=dict)
    shares: dict[str, float] = field(default_factory=dict)
    epsilons: dict[str, float] = field(default_factory=dict)
    history: list[dict[str, Any]] = field(default_factory=list)
    head: str | None = None
    prepared: bool = False


def save(path: str | os.PathLike[str], state: State) -> None:
    """One atomic, durable write."""
    document = {name: value for name, value in vars(state).items() if name not in ("vector", "optimizer", "index")}
    document["epsilons"] = {client: _written(epsilon) for client, epsilon in state.epsilons.items()}
    document["history"] = [row | {"epsilon": _written(row["epsilon"])} for row in state.history]
    tensors = {"vector": state.vector} | {f"optimizer.{name}": t for name, t in state.optimizer.items()}
    if state.index is not None:
        tensors["index"] = state.index
    stored.write(path, {"kind": KIND} | document, tensors)


def load(path: str | os.PathLike[str]) -> State | None:
    """What :func:`save` wrote; None if there is no file. Raises ``DataError`` for anything else."""
    if not Path(path).exists():
        return None
    document, tensors = stored.read(path)
    if document.pop("kind", None) != KIND or "vector" not in tensors:
        raise DataError(f"{path} is not the state of a federation.", where=str(path))
    optimizer = {name.removeprefix("optimizer."): t for name, t in tensors.items() if name.startswith("optimizer.")}
    try:
        document["epsilons"] = {client: float(epsilon) for client, epsilon in document["epsilons"].items()}
        document["history"] = [row | {"epsilon": float(row["epsilon"])} for row in document["history"]]
        return State(**document, vector=tensors["vector"], optimizer=optimizer, index=tensors.get("index"))
    except (TypeError, KeyError, ValueError, AttributeError) as error:
        raise DataError(f"{path} is of another version: {error}.", where=str(path)) from error


def note(state: State, exchange: Exchange, ledger: Ledger | None, rounds: Sequence[Round]) -> None:
    """Take over what the exchange and the ledger know after a round."""
    state.number, state.last_drawn = exchange.number, dict(exchange.history.last)
    state.epsilons = {} if ledger is not None else dict(exchange.epsilons)
    state.history = [row_of(round) for round in rounds]
    state.head = None if ledger is None else ledger.head


def restore(state: State, exchange: Exchange, ledger: Ledger | None, schema: Schema, where: str) -> None:
    """Let the exchange go on from ``state``. Raises ``LedgerError`` unless the ledger holds all that was spent by then.

    Rounds that were charged and not finished keep their numbers: nothing is released twice under one.
    """
    if state.schema != schema.digest:
        raise ConfigurationError(
            f"{where} is of a federation that trains other parameters.",
            found=state.schema,
            where="checkpoint",
            fix="give the same model and train=, or another file.",
        )
    if ledger is not None:
        if state.head is not None:
            ledger.require(state.head)
        used = [entry["step"] for entry in ledger.entries() if entry["run"] == state.run]
        state.number = max([state.number, *used])
        assert exchange.accounts is not None
        exchange.accounts.run = state.run
    exchange.run, exchange.number = state.run, state.number
    # Who had nothing left says so again when asked: its limit may have been raised since.
    exchange.history.last = dict(state.last_drawn)
    for client, spent in state.epsilons.items():
        if client in exchange.epsilons:
            exchange.epsilons[client] = max(exchange.epsilons[client], spent)


def _written(epsilon: float) -> float | str:
    """Without noise, or by what a client says, ε may be infinite, which JSON cannot hold."""
    return epsilon if math.isfinite(epsilon) else "inf"


def row_of(round: Round) -> dict[str, Any]:
    """A round as JSON, without the ε of each client."""
    row = {name: value for name, value in vars(round).items() if name != "client_epsilons"}
    return row | {"rejected": dict(round.rejected)}


def round_of(row: Mapping[str, Any]) -> Round:
    """Inverse of :func:`row_of`."""
    return Round(**row, client_epsilons={})
