"""How tasks reach clients. A transport carries; it neither checks, nor clips, nor accounts."""

from __future__ import annotations

import copy
import queue
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from typing import Protocol

from sfumato import _validate
from sfumato.errors import ConfigurationError

from .client.participant import Client
from .client.worker import Worker
from .wire.messages import Reply, Task


class Transport(Protocol):
    """What the driver asks of it."""

    def clients(self) -> Sequence[str]:
        """Everybody who is enrolled, online or not."""

    def ask(self, task: Task, ids: Sequence[str], *, deadline: float | None) -> Iterator[Reply]:
        """Send ``task`` to ``ids`` and yield replies as they arrive, for at most ``deadline`` seconds.

        ``Reply.client`` is who the transport knows to have sent it, never what the message says: one client that
        could answer for others would move the sum by more than C.
        """

    def close(self) -> None:
        """Give back what was opened; nothing is sent afterwards."""


class InProcess:
    """All clients in this process: ``workers`` live models take them one after the other, the largest first.

    Every client has a clock of its own, as if all worked at once: a slow one must not decide whether another is heard.
    One that is slower than the deadline is not interrupted, but what it says is not passed on.
    """

    def __init__(self, worker: Worker, clients: Mapping[str, Client], *, workers: int = 1):
        _validate.count("workers", workers)
        for name, client in clients.items():
            if not isinstance(client, Client) or client.id != name:
                raise ConfigurationError(
                    f"clients[{name!r}] is not the Client of that id.", found=name, where="clients"
                )
        if workers > 1 and worker.seed_model:
            raise ConfigurationError(
                "several workers in one process share PyTorch's random state, so dropout cannot be seeded.",
                found=workers,
                where="workers",
                fix="use workers=1 with noise='research', or leave the seed out.",
            )
        self._clients = dict(clients)
        self._workers = [worker, *(copy.deepcopy(worker) for _ in range(workers - 1))]

    def clients(self) -> Sequence[str]:
        """The ids that were given."""
        return tuple(self._clients)

    def ask(self, task: Task, ids: Sequence[str], *, deadline: float | None) -> Iterator[Reply]:
        """See :class:`Transport`. Errors of set-up (a model that cannot be made private) are raised, not swallowed."""
        if len(self._workers) == 1:
            for name in ids:
                reply = _timed(self._workers[0], task, self._clients[name], deadline)
                if reply is not None:
                    yield reply
            return
        yield from self._shared(task, sorted(ids, key=self._work, reverse=True), deadline)

    def _work(self, name: str) -> int:
        data = self._clients[name].data
        return len(data) if hasattr(data, "__len__") else 0

    def _shared(self, task: Task, ids: Sequence[str], deadline: float | None) -> Iterator[Reply]:
        """One queue, longest first: whoever is free takes the next (Graham 1969: at most 4/3 of the best makespan)."""
        todo: queue.SimpleQueue[str] = queue.SimpleQueue()
        done: queue.SimpleQueue[Reply | BaseException | None] = queue.SimpleQueue()
        for name in ids:
            todo.put(name)

        def work(worker: Worker) -> None:
            try:
                while True:
                    done.put(_timed(worker, task, self._clients[todo.get_nowait()], deadline))
            except queue.Empty:
                return
            except BaseException as error:  # noqa: BLE001 (it is raised again, in the caller's thread)
                done.put(error)

        threads = [threading.Thread(target=work, args=(worker,), daemon=True) for worker in self._workers]
        for thread in threads:
            thread.start()
        try:
            for _ in ids:
                found = done.get()
                if isinstance(found, BaseException):
                    raise found
                if found is not None:
                    yield found
        finally:
            with suppress(queue.Empty):
                while True:
                    todo.get_nowait()
            for thread in threads:  # a live model must not be asked again while it works
                thread.join()

    def close(self) -> None:
        """Nothing is open."""


def _timed(worker: Worker, task: Task, client: Client, deadline: float | None) -> Reply | None:
    began = time.monotonic()
    reply = worker.answer(task, client)
    return reply if deadline is None or time.monotonic() - began <= deadline else None
