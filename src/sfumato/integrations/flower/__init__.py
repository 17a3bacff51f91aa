"""Federated training over a network, carried by Flower: connections, TLS and node authentication are Flower's.

Clipping, noise, weights, cohorts and ledgers are Sfumato's: the same trainer and the same workers as in one process.
None of Flower's strategies, weighting or privacy mods is used. Needs the extra ``flower``.

- :func:`client_app`: what a SuperNode runs;
- :func:`server_app`: what the SuperLink runs, with a :class:`GridTransport` for ``FederatedTrainer``;
- :func:`environment`: switches that keep Flower from calling home or installing anything;
- :class:`Deployment`: a SuperLink and its SuperNodes as processes of this machine, with TLS and authenticated nodes;
- the modules ``commands``, ``keys`` and ``gate``: the same on several machines.
"""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING

from sfumato.errors import ConfigurationError

if TYPE_CHECKING:
    from sfumato.integrations.flower.client import client_app
    from sfumato.integrations.flower.deploy import Deployment
    from sfumato.integrations.flower.server import server_app
    from sfumato.integrations.flower.switches import environment
    from sfumato.integrations.flower.transport import GridTransport

_HOMES = {
    "Deployment": "deploy",
    "GridTransport": "transport",
    "client_app": "client",
    "environment": "switches",
    "server_app": "server",
}

__all__ = ["Deployment", "GridTransport", "client_app", "environment", "server_app"]


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if find_spec("flwr") is None:
        raise ConfigurationError(
            f"{name} needs Flower, which is not installed.", where=name, fix="pip install 'sfumato[flower]'"
        )
    value = getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
