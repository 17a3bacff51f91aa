"""Sfumato: private training for PyTorch that proves itself.

Names are loaded when first used, so that accounting and the ledger start without torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sfumato import accounting, clipping, errors, federated, noise, sampling, schedules
    from sfumato.accounting import Budget, Epsilon, Event, Ledger
    from sfumato.checking import check, check_rule, fix
    from sfumato.engine import PrivacyEngine
    from sfumato.errors import SfumatoError
    from sfumato.ghost import record
    from sfumato.ghost.declared import rows
    from sfumato.ghost.rules.user import rule
    from sfumato.sampling import CyclicPoisson, Poisson, Shuffle, TruncatedPoisson

__version__ = "0.1.0"

_HOMES = {
    "Budget": "accounting",
    "CyclicPoisson": "sampling",
    "Epsilon": "accounting",
    "Event": "accounting",
    "Ledger": "accounting",
    "Poisson": "sampling",
    "PrivacyEngine": "engine",
    "SfumatoError": "errors",
    "Shuffle": "sampling",
    "TruncatedPoisson": "sampling",
    "check": "checking",
    "check_rule": "checking",
    "fix": "checking",
    "record": "ghost",
    "rows": "ghost.declared",
    "rule": "ghost.rules.user",
}
_MODULES = ("accounting", "clipping", "errors", "federated", "noise", "sampling", "schedules")

__all__ = [
    "Budget",
    "CyclicPoisson",
    "Epsilon",
    "Event",
    "Ledger",
    "Poisson",
    "PrivacyEngine",
    "SfumatoError",
    "Shuffle",
    "TruncatedPoisson",
    "accounting",
    "check",
    "check_rule",
    "clipping",
    "errors",
    "federated",
    "fix",
    "noise",
    "record",
    "rows",
    "rule",
    "sampling",
    "schedules",
]


def __getattr__(name: str) -> object:
    if name in _MODULES:
        return import_module(f"sfumato.{name}")
    if name in _HOMES:
        value = getattr(import_module(f"sfumato.{_HOMES[name]}"), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module 'sfumato' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
