"""A Flower grid in this process: an unmodified ClientApp answers at once, or late, or never."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterable, Mapping
from typing import Any

from flwr.app import Context, Error, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.proto.node_pb2 import NodeInfo
from flwr.serverapp import Grid
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects
from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents
from flwr.supercore.task_identity import TaskIdentity

RUN = 7


class InProcessGrid(Grid):
    """Node n is ``clients[n - 1]``. Messages are serialized both ways, as over a network.

    ``late``: {client: seconds until its reply can be fetched}; ``stalled``: fetching their replies blocks until the
    test lets it go; ``gone``: never answer; ``nameless``: registered without a name.
    """

    def __init__(self, app: ClientApp, clients: Iterable[str], *, said: Mapping[str, str] | None = None) -> None:
        TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = RUN, 1, 1
        self.app = app
        self.names = list(clients)
        self.nodes = dict(enumerate(self.names, 1))
        self.said = dict(said or {})  # what a node claims, if not its name
        self.late: dict[str, float] = {}
        self.gone: set[str] = set()
        self.nameless: set[str] = set()
        self.stalled: dict[str, Any] = {}
        self.asked: list[tuple[str, str]] = []
        self.sent_bytes = 0
        self._replies: dict[str, tuple[float, str, Message]] = {}
        self._numbers = itertools.count(1)
        self._contexts: dict[int, Context] = {}

    def set_run(self, run: Any) -> None:
        raise NotImplementedError

    @property
    def run(self) -> Any:
        raise NotImplementedError

    def create_message(self, *arguments: Any, **named: Any) -> Message:
        raise NotImplementedError

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        raise NotImplementedError

    def get_nodes(self) -> list[NodeInfo]:
        return [NodeInfo(node_id=n, name=None if name in self.nameless else name) for n, name in self.nodes.items()]

    def get_node_ids(self) -> list[int]:
        return list(self.nodes)

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        found = []
        for message in messages:
            number = f"message {next(self._numbers)}"
            arrived = self._carried(message)
            arrived.metadata.__dict__["_message_id"] = number
            node = arrived.metadata.dst_node_id
            name = self.nodes[node]
            self.asked.append((name, arrived.metadata.message_type))
            found.append(number)
            if name not in self.gone:
                reply = self._carried(self._answer(arrived, node))
                self._replies[number] = (time.monotonic() + self.late.get(name, 0.0), name, reply)
        return found

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        found = []
        for number in message_ids:
            ready, name, reply = self._replies.get(number, (float("inf"), "", None))
            if reply is None or time.monotonic() < ready:
                continue
            if name in self.stalled:
                self.stalled[name].wait(30)
            del self._replies[number]
            found.append(reply)
        return found

    def _answer(self, message: Message, node: int) -> Message:
        name = self.nodes[node]
        context = self._contexts.setdefault(
            node, Context(RUN, node, {"client": self.said.get(name, name)}, RecordDict(), {})
        )
        try:
            return self.app(message, context)
        except Exception as error:  # noqa: BLE001  (as Flower does; the reason quotes the exception)
            return Message(Error(2, repr(error)), reply_to=message)

    def _carried(self, message: Message) -> Message:
        """Written out and read back, object by object."""
        contents = {number: held.deflate() for number, held in get_all_nested_objects(message).items()}
        self.sent_bytes += sum(map(len, contents.values()))
        return inflate_object_from_contents(message.object_id, contents)
