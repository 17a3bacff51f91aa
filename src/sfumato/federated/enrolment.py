"""Who takes part: clients with their ledgers and limits, and the server's end of the exchange with them."""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch.utils.data import Dataset

from sfumato.accounting import Budget, Ledger
from sfumato.errors import ConfigurationError

from .accounts import Accounts
from .calibration import calibrated
from .client.participant import Client, Stream
from .cohorts import Terms
from .exchange import Exchange
from .secure import masked
from .settings import Settings
from .transport import Transport
from .units import ClientLevel, Distributed, Unit, budgets


def participants(
    clients: Mapping[str, Dataset[Any] | Stream | Client], folder: str | os.PathLike[str] | None
) -> dict[str, Client]:
    """{id: Client}; ``folder`` gets one ledger for each id, the same one whoever else is enrolled."""
    if not isinstance(clients, Mapping):
        raise ConfigurationError(
            f"clients is a {type(clients).__name__}.", where="clients", fix="a dict {id: data set, Stream or Client}."
        )
    if not clients:
        raise ConfigurationError("no client is enrolled.", found=clients, where="clients")
    found: dict[str, Client] = {}
    for name, data in clients.items():
        if isinstance(data, Client):
            if folder is not None:
                raise ConfigurationError(
                    f"client {name!r} brings its own ledger.", where="client_ledgers", fix="leave client_ledgers out."
                )
            data.done, data.share = False, 1.0  # what it was in another federation is in its ledger
            found[name] = data
            continue
        path = None
        if folder is not None:
            Path(folder).mkdir(parents=True, exist_ok=True)
            path = Path(folder) / f"client-{hashlib.sha256(name.encode()).hexdigest()[:24]}.db"
        found[name] = Client(name, data, ledger=path)
    return found


def with_own_limits(unit: Unit, clients: Mapping[str, Client]) -> Unit:
    """ClientLevel with the smaller of its ε and each client's own, so that noise and rates are made for them."""
    if not isinstance(unit, ClientLevel) or unit.epsilon is None or all(c.epsilon is None for c in clients.values()):
        return unit
    limits = budgets(unit, tuple(clients))
    found = {name: client.limit(limits[name], unit.delta) for name, client in clients.items()}
    return replace(unit, epsilon={name: budget.epsilon for name, budget in found.items() if budget is not None})


def server_ledger(unit: Unit, ledger: str | os.PathLike[str] | Ledger | None) -> Ledger | None:
    """The server's ledger, where it keeps one. Raises ``ConfigurationError`` for one where clients keep theirs."""
    if isinstance(unit, ClientLevel | Distributed):
        return ledger if isinstance(ledger, Ledger) else Ledger(ledger)
    if ledger is not None:
        raise ConfigurationError(
            f"under {type(unit).__name__} every client keeps its own ledger.",
            found=str(ledger),
            where="ledger",
            fix="give client_ledgers=FOLDER, or Client(ledger=...).",
        )
    return None


def exchange_for(
    settings: Settings,
    transport: Transport,
    clients: Mapping[str, Client],
    ledger: Ledger | None,
    *,
    weights: Mapping[str, float],
    size: int,
    run: str,
    frozen: str,
    deadline: float | None,
) -> tuple[Exchange, float]:
    """The exchange and the noise multiplier of its rounds (NaN where each client has its own)."""
    unit, enrolled = settings.unit, tuple(transport.clients())
    limits: dict[str, Budget | None] = budgets(unit, enrolled)
    limits |= {name: client.limit(limits[name], unit.delta) for name, client in clients.items()}
    accounts = None if ledger is None else Accounts(ledger, limits, run)
    terms, scales = dict.fromkeys(enrolled, Terms(1.0)), dict.fromkeys(enrolled, 1.0)
    z = math.nan if unit.noise_multiplier is None else unit.noise_multiplier
    if isinstance(unit, Distributed):
        lasting = settings.lasting(len(enrolled), amplified=False)
        z = masked.lasting_noise(
            unit, size, settings.declared(len(enrolled)), lasting, settings.validation, adaptive=settings.adaptive
        )
    elif isinstance(unit, ClientLevel):
        measures = 0 if settings.validation is None else settings.validation.times(settings.rounds)
        found = calibrated(
            unit,
            settings.cohort,
            enrolled,
            factors=settings.lasting(len(enrolled), amplified=True),
            beside={settings.validation.noise_multiplier: measures} if settings.validation and measures else {},
            adaptive=settings.adaptive,
        )
        z, terms, scales = found.noise_multiplier, dict(found.terms), dict(found.scales)
        settings.check_count_noise(z, len(enrolled))
    return Exchange(
        transport,
        unit=unit,
        cohort=settings.cohort,
        weights=weights,
        accounts=accounts,
        terms=terms,
        scales=scales,
        noise=settings.noise,
        seed=settings.seed,
        deadline=deadline,
        run=run,
        frozen=frozen,
        here=clients,
    ), z
