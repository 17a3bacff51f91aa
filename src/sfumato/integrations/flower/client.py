"""What a SuperNode runs: it answers a task with the worker and the records that belong to this client."""

from __future__ import annotations

import logging
from collections.abc import Callable

from flwr.app import Context, Error, Message
from flwr.clientapp import ClientApp

from sfumato.errors import ConfigurationError, DataError
from sfumato.federated.client.participant import Client
from sfumato.federated.client.worker import Worker
from sfumato.federated.units import ClientLevel, Distributed, LocalLevel, SampleLevel

from .codec import read_task, refusal, reply_records
from .logs import keep_log
from .roster import NAME_QUESTION, name_records
from .transport import TASK

LOG = logging.getLogger("sfumato")
# The node configuration's key for who this client is.
CLIENT = "client"
_NOT_SAID = 1  # Flower's own codes are about the transport; zero is taken for none


def client_app(make: Callable[[Context], tuple[Worker, Client]]) -> ClientApp:
    """A ``ClientApp`` that answers whatever a ``FederatedTrainer`` asks over :class:`.GridTransport`.

    SampleLevel, LocalLevel and ClientLevel; Distributed is refused, because its masks are simulated.

    ``make``: the worker and the client of this node; ``context.node_config["client"]`` says which client it is. Flower
    starts a new process for every message, so ``make`` runs in each, and the client's ledger must be a path: one in
    memory would forget what earlier messages spent, and is refused. In one process it is called once per node and run.
    Whatever fails is answered with the kind of error alone: texts may quote records, and stay in the file that the
    environment variable ``SFUMATO_LOG`` names on the node.

    Flower sends the app's code to the nodes with every run: whoever may start runs decides what nodes execute, and so
    whether records are protected at all. Give that right to those alone whom the clients trust with it.
    """
    keep_log()
    app = ClientApp()
    made: dict[tuple[int, int], tuple[Worker, Client]] = {}

    @app.train(TASK.partition(".")[2])
    def answer(message: Message, context: Context) -> Message:
        try:
            task = read_task(message.content)
        except DataError as error:
            return Message(Error(_NOT_SAID, type(error).__name__), reply_to=message)
        key = (context.run_id, context.node_id)
        try:
            if key not in made:
                made[key] = _deployable(*make(context))
            worker, client = made[key]
            reply = worker.answer(task, client)
        except Exception as error:  # noqa: BLE001  (whatever the user's code raises stays in this log)
            LOG.warning("no answer in round %d: %s", task.round, error)
            reply = refusal(task, _name(context), type(error).__name__)
        return Message(reply_records(reply), reply_to=message)

    @app.query(NAME_QUESTION.partition(".")[2])
    def name(message: Message, context: Context) -> Message:
        return Message(name_records(_name(context)), reply_to=message)

    return app


def _deployable(worker: Worker, client: Client) -> tuple[Worker, Client]:
    if isinstance(worker.unit, SampleLevel | LocalLevel) and client.ledger.path is None:
        raise ConfigurationError(
            "a ledger in memory is forgotten after every message, since each starts a new process.",
            where="Client.ledger",
            fix="give the client's ledger as a path on its own machine.",
        )
    if isinstance(worker.unit, ClientLevel) and client.epsilon is not None:
        raise ConfigurationError(
            "under ClientLevel the server keeps the books: a limit set here would not be kept.",
            found=client.epsilon,
            where="Client.epsilon",
            fix="name it in the server's ClientLevel(epsilon={client: number, ...}).",
        )
    if isinstance(worker.unit, Distributed):
        raise ConfigurationError(
            "the masks of Distributed are simulated: a server that draws them takes them off again, and sees a report "
            "with one share of the noise.",
            where="unit",
            fix="SampleLevel or LocalLevel where the server is not trusted, ClientLevel where it is.",
        )
    return worker, client


def _name(context: Context) -> str:
    found = context.node_config.get(CLIENT)
    if not isinstance(found, str) or not found:
        raise ConfigurationError(
            "this node does not know which client it is.",
            found=found,
            where="node configuration",
            fix=f"start it with --node-config '{CLIENT}=\"NAME\"'.",
        )
    return found
