"""What the SuperLink runs: a trainer over the nodes that are connected, and a file that says how it ended."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from sfumato.federated.wire.messages import Scalar

from .logs import keep_log

# The exit code of ``flwr run`` says nothing about the run. This variable names the file that does.
OUTCOME = "SFUMATO_OUTCOME"


def server_app(fit: Callable[[Grid, Context], Mapping[str, Scalar] | None]) -> ServerApp:
    """A ``ServerApp`` that calls ``fit(grid, context)``.

    ``fit`` makes a :class:`.GridTransport` of the grid, hands it to a ``FederatedTrainer``, trains and saves what it
    wants to keep. What it returns is written to the file that the environment variable ``SFUMATO_OUTCOME`` names, as
    JSON: ``{"status": "finished", ...}``; or ``{"status": "failed", "error": ...}`` if it raises, which goes on to
    Flower. The file appears whole or not at all.
    """
    keep_log()
    app = ServerApp()

    @app.main()
    def main(grid: Grid, context: Context) -> None:
        try:
            said = fit(grid, context)
        except BaseException as error:
            _write({"status": "failed", "error": f"{type(error).__name__}: {error}"})
            raise
        _write({**(said or {}), "status": "finished"})

    return app


def _write(outcome: Mapping[str, Scalar]) -> None:
    name = os.environ.get(OUTCOME)
    if not name:
        return
    path = Path(name)
    handle, draft = tempfile.mkstemp(dir=path.parent, prefix=path.name)
    try:
        with os.fdopen(handle, "w") as file:
            json.dump(dict(outcome), file)
        os.replace(draft, path)
    except BaseException:
        with suppress(OSError):
            os.unlink(draft)
        raise
