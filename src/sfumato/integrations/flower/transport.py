"""The trainer's way to clients behind Flower's SuperLink."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Sequence
from typing import final

from flwr.app import RecordDict
from flwr.serverapp import Grid

from sfumato import _validate
from sfumato.errors import ConfigurationError
from sfumato.federated.wire.messages import Reply, Task

from .codec import read_reply, refusal, task_records
from .exchange import exchange
from .roster import Names, Roster

LOG = logging.getLogger("sfumato")
TASK = "train.sfumato"
_LOOK = 0.5  # seconds between looks for nodes that are still to connect


@final
class GridTransport:
    """Asks the nodes of a Flower grid. Implements :class:`sfumato.federated.transport.Transport`.

    Who takes part is fixed when the transport is made: a client that is offline later counts as one that contributes
    nothing, and one that comes later is not asked. A mechanism that samples clients is charged for this population.

    Args:
        grid: what Flower hands to a ``ServerApp``.
        clients: the enrolled clients, online or not; None: whoever is connected once the wait is over.
        wait: seconds to wait until all of ``clients`` are connected (or, for None, until ``least`` are). Fewer after
            that is no error as long as ``least`` are there.
        least: clients without whom training does not start.
        names: see :class:`.roster.Roster`.
        most_bytes: a longer reply is refused; None: 64 bytes for each number of the task's vector, and 1 MiB.

    Raises ``ConfigurationError`` if fewer than ``least`` clients are there after the wait.
    """

    def __init__(
        self,
        grid: Grid,
        *,
        clients: Sequence[str] | None = None,
        wait: float = 60.0,
        least: int = 1,
        names: Names = "registered",
        most_bytes: int | None = None,
    ) -> None:
        self._grid = grid
        self._roster = Roster(grid, names)
        self._most = most_bytes
        if clients is not None and (len(set(clients)) != len(clients) or not all(clients)):
            raise ConfigurationError(
                "client names must be distinct and not empty.", found=list(clients), where="clients"
            )
        found = self._awaited(clients, _validate.non_negative("wait", wait), least)
        self._clients = tuple(sorted(found) if clients is None else clients)

    def clients(self) -> Sequence[str]:
        """The enrolled clients."""
        return self._clients

    def ask(self, task: Task, ids: Sequence[str], *, deadline: float | None) -> Iterator[Reply]:
        """Yield replies as they arrive; return ``deadline`` seconds after the call at the latest.

        A client that is not connected, or not done in time, is not yielded. One that answers something that is no reply
        of its own to this task gives a ``Reply`` with an error: texts of exceptions stay in the client, since they may
        quote records. With ``deadline=None`` a node that is gone ends the wait after about a minute.
        """
        ends = None if deadline is None else time.monotonic() + deadline
        connected = self._roster.connected(ids)
        names = {connected[name]: name for name in ids if name in connected}
        records = task_records(task)
        most = self._most if self._most is not None else 64 * task.vector.size + 2**20
        contents = dict.fromkeys(names, records)
        seconds = None if ends is None else max(ends - time.monotonic(), 0.0)
        for node, answer in exchange(self._grid, contents, TASK, group=str(task.round), seconds=seconds):
            reply = _judged(task, names[node], answer, most)
            if reply.error is not None:
                LOG.warning("round %d, client %s: %r", task.round, reply.client, reply.error)
            yield reply

    def close(self) -> None:
        """Nothing to release: Flower owns the connection."""

    def _awaited(self, clients: Sequence[str] | None, wait: float, least: int) -> set[str]:
        ends = time.monotonic() + wait
        enough = max(least, 1) if clients is None else len(clients)
        while True:
            found = set(self._roster.connected(clients))
            if clients is not None:
                found &= set(clients)
            if len(found) >= enough:
                return found
            if time.monotonic() >= ends:
                break
            time.sleep(_LOOK)
        if len(found) < max(least, 1):
            raise ConfigurationError(
                f"{len(found)} of at least {max(least, 1)} clients were connected after {wait:g} s.",
                found=sorted(found),
                where="clients",
                fix="register each node's key under the client's name (`flwr supernode register KEY --name CLIENT`), "
                "or use names='claimed' where every node is trusted.",
            )
        return found


def _judged(task: Task, client: str, answer: RecordDict | str, most: int) -> Reply:
    if isinstance(answer, str):
        return refusal(task, client, answer)
    try:
        reply = read_reply(answer, most=most)
    except Exception:  # noqa: BLE001  (records of a node that nothing foresaw must not end the run either)
        return refusal(task, client, "malformed reply")
    if reply.client != client:
        return refusal(task, client, "reply under another client's name")
    return reply
