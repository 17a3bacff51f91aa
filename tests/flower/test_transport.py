"""Questions reach the right nodes, and the answers that come back in time are those of the clients that were asked."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("flwr.app")

from flwr.app import Context, Error, Message, RecordDict
from tests.flower.in_process import InProcessGrid

from sfumato.errors import ConfigurationError, UnsupportedError
from sfumato.federated.client.participant import Client
from sfumato.federated.units import ClientLevel, Distributed, SampleLevel
from sfumato.federated.wire.messages import Reply, Task
from sfumato.integrations.flower import GridTransport, client_app
from sfumato.integrations.flower.exchange import exchange
from sfumato.integrations.flower.logs import keep_log

TASK = Task("run", 2, "nonce", "train", "base", "schema", np.arange(6, dtype=np.float32), None, {"noise_factor": 1.0})


class Doubling:
    """Stands in for a worker."""

    def __init__(self, unit: Any = None) -> None:
        self.unit = unit or ClientLevel(noise_multiplier=1.0)
        self.calls: list[str] = []
        self.change: Any = lambda reply: reply

    def answer(self, task: Task, client: Client) -> Reply:
        self.calls.append(client.id)
        named = (client.id, task.run, task.round, task.nonce, task.base, task.schema)
        return self.change(Reply(*named, {"vector": task.vector * 2}))


def grid_of(*names: str, worker: Any = None, **said: str) -> InProcessGrid:
    worker = worker or Doubling()
    app = client_app(lambda context: (worker, Client(str(context.node_config["client"]), [0])))
    return InProcessGrid(app, names, said=said)


def ask(grid: InProcessGrid, ids: Any, deadline: float | None = 5.0, task: Task = TASK, **named: Any) -> list[Reply]:
    return list(GridTransport(grid, wait=0, **named).ask(task, ids, deadline=deadline))


@contextmanager
def within(low: float, high: float) -> Iterator[None]:
    begins = time.monotonic()
    yield
    assert low <= time.monotonic() - begins <= high


def test_every_client_that_was_asked_answers() -> None:
    grid = grid_of("a", "b", "c")
    replies = ask(grid, ["c", "a"])
    assert sorted(r.client for r in replies) == ["a", "c"]
    assert all(r.error is None and (r.run, r.round, r.nonce) == ("run", 2, "nonce") for r in replies)
    for reply in replies:
        np.testing.assert_array_equal(reply.arrays["vector"], TASK.vector * 2)
    assert sorted(grid.asked) == [("a", "train.sfumato"), ("c", "train.sfumato")]


def test_make_is_called_once_per_node() -> None:
    made: list[str] = []

    def make(context: Context) -> tuple[Any, Client]:
        made.append(str(context.node_config["client"]))
        return Doubling(), Client(made[-1], [0])

    transport = GridTransport(InProcessGrid(client_app(make), "ab"), wait=0)
    for number in range(3):
        list(transport.ask(replace(TASK, round=number), ["a", "b"], deadline=5))
    assert sorted(made) == ["a", "b"]


def test_nobody_asked_nobody_answers() -> None:
    grid = grid_of("a")
    assert ask(grid, []) == []
    assert ask(grid, ["stranger"]) == []
    assert grid.asked == []


def test_replies_are_yielded_as_they_arrive() -> None:
    grid = grid_of("slow", "quick")
    grid.late["slow"] = 1.0
    transport = GridTransport(grid, wait=0)
    begins, times = time.monotonic(), {}
    for reply in transport.ask(TASK, ["slow", "quick"], deadline=10):
        times[reply.client] = time.monotonic() - begins
    assert times["quick"] < 0.8 < times["slow"] < 3.0


def test_the_round_ends_at_our_deadline() -> None:
    grid = grid_of("a", "b", "late")
    grid.gone.add("b")
    grid.late["late"] = 60.0
    with within(0.9, 1.5):
        replies = ask(grid, ["a", "b", "late"], deadline=1.0)
    assert [r.client for r in replies] == ["a"]


def test_a_sender_that_stalls_holds_up_neither_the_others_nor_the_deadline() -> None:
    grid = grid_of("bad", "a", "b")
    grid.stalled["bad"] = threading.Event()
    try:
        with within(0.9, 1.5):
            replies = ask(grid, ["bad", "a", "b"], deadline=1.0)
    finally:
        grid.stalled["bad"].set()
    assert sorted(r.client for r in replies) == ["a", "b"]


def test_a_late_reply_does_not_turn_up_in_the_next_round() -> None:
    grid = grid_of("a")
    transport = GridTransport(grid, wait=0)
    grid.late["a"] = 0.5
    assert list(transport.ask(TASK, ["a"], deadline=0.1)) == []
    time.sleep(0.6)
    grid.late.clear()
    assert [r.round for r in transport.ask(replace(TASK, round=3), ["a"], deadline=5)] == [3]


def test_a_consumer_that_stops_early_leaves_no_thread_behind() -> None:
    grid = grid_of("a", "b")
    grid.gone.add("b")
    before = threading.active_count()
    replies = GridTransport(grid, wait=0).ask(TASK, ["a", "b"], deadline=30)
    assert next(replies).client == "a"
    replies.close()
    time.sleep(0.6)
    assert threading.active_count() <= before


def test_many_nodes() -> None:
    names = [f"n{number}" for number in range(150)]
    with within(0.0, 10.0):
        replies = ask(grid_of(*names), names)
    assert sorted(r.client for r in replies) == sorted(names)


def test_without_a_deadline_all_are_waited_for() -> None:
    grid = grid_of("a", "b")
    grid.late["b"] = 0.7
    assert sorted(r.client for r in ask(grid, ["a", "b"], deadline=None)) == ["a", "b"]


# -- what clients may get wrong ----------------------------------------------------------------------------------


def failing(error: Exception) -> Any:
    def change(reply: Reply) -> Reply:
        raise error

    return change


def test_an_exception_is_an_error_whose_text_stays_in_the_client(caplog: pytest.LogCaptureFixture) -> None:
    worker = Doubling()
    worker.change = failing(ValueError("record 17 says SECRET"))
    (reply,) = ask(grid_of("a", worker=worker), ["a"])
    assert (reply.client, reply.error, dict(reply.arrays)) == ("a", "ValueError", {})
    assert [r.message for r in caplog.records if "client a" in r.message] == ["round 2, client a: 'ValueError'"]
    assert (reply.run, reply.round, reply.nonce) == ("run", 2, "nonce")


def test_a_failure_to_load_data_is_one_too() -> None:
    def make(context: Context) -> tuple[Any, Client]:
        raise OSError("/home/alice/scan.png is missing")

    (reply,) = ask(InProcessGrid(client_app(make), ["a"]), ["a"])
    assert (reply.client, reply.error) == ("a", "OSError")


def test_flowers_own_errors_give_their_code_alone() -> None:
    grid = grid_of("a", "b")
    grid.app = lambda message, context: Message(Error(8, "SECRET"), reply_to=message)  # type: ignore[assignment]
    assert [(r.client, r.error) for r in ask(grid, ["a"])] == [("a", "flower error 8")]


def test_a_client_cannot_answer_for_another() -> None:
    worker = Doubling()
    worker.change = lambda reply: replace(reply, client="b")
    (reply,) = ask(grid_of("a", "b", worker=worker), ["a"])
    assert (reply.client, dict(reply.arrays)) == ("a", {})
    assert "another" in str(reply.error)


def test_garbage_is_an_error_of_that_client_alone() -> None:
    def app(message: Message, context: Context) -> Message:
        return Message(message.content, reply_to=message)

    grid = grid_of("a")
    grid.app = app  # type: ignore[assignment]
    assert [(r.client, r.error) for r in ask(grid, ["a"])] == [("a", "malformed reply")]


def test_replies_longer_than_any_codec_sends_are_refused() -> None:
    worker = Doubling()
    worker.change = lambda reply: replace(reply, arrays={"x": np.zeros(2**20 + 400, np.uint8)})
    (reply,) = ask(grid_of("a", worker=worker), ["a"])
    assert reply.error == "malformed reply"
    (reply,) = ask(grid_of("a", worker=worker), ["a"], most_bytes=2**21)
    assert reply.error is None


def test_a_ledger_in_memory_is_refused_where_the_client_accounts(tmp_path: Path) -> None:
    worker = Doubling(SampleLevel(epsilon=1.0))
    (reply,) = ask(grid_of("a", worker=worker), ["a"])
    assert (reply.error, worker.calls) == ("ConfigurationError", [])
    app = client_app(lambda context: (worker, Client("a", [0], ledger=tmp_path / "a.ledger")))
    (reply,) = ask(InProcessGrid(app, ["a"]), ["a"])
    assert (reply.error, worker.calls) == (None, ["a"])


def test_a_clients_own_limit_is_refused_where_nobody_would_keep_it() -> None:
    worker = Doubling(ClientLevel(noise_multiplier=1.0))
    app = client_app(lambda context: (worker, Client("a", [0], epsilon=1.0)))
    (reply,) = ask(InProcessGrid(app, ["a"]), ["a"])
    assert (reply.error, worker.calls) == ("ConfigurationError", [])


def test_simulated_masks_are_refused_where_they_would_be_taken_for_real_ones() -> None:
    worker = Doubling(Distributed(noise_multiplier=1.0))
    (reply,) = ask(grid_of("a", worker=worker), ["a"])
    assert (reply.error, worker.calls) == ("ConfigurationError", [])


# -- who is who ---------------------------------------------------------------------------------------------------


def test_enrolled_are_those_connected_at_first_or_those_named() -> None:
    grid = grid_of("b", "a")
    transport = GridTransport(grid, wait=0)
    assert transport.clients() == ("a", "b")
    grid.nodes[9] = "late"
    assert transport.clients() == ("a", "b")
    assert GridTransport(grid, clients=["b", "away"], wait=0).clients() == ("b", "away")


def test_the_wait_ends_as_soon_as_all_are_there() -> None:
    grid = grid_of("a")
    threading.Timer(0.7, lambda: grid.nodes.update({5: "b"})).start()
    with within(0.5, 3.0):
        assert GridTransport(grid, clients=["a", "b"], wait=20).clients() == ("a", "b")
    with within(0.9, 2.0):
        GridTransport(grid, clients=["a", "b", "c"], wait=1)


def test_too_few_clients_stop_it() -> None:
    with pytest.raises(ConfigurationError, match="0 of at least 1"):
        GridTransport(grid_of(), wait=0)
    with pytest.raises(ConfigurationError, match="1 of at least 2"):
        GridTransport(grid_of("a"), clients=["a", "b"], least=2, wait=0)
    with pytest.raises(ConfigurationError, match="distinct"):
        GridTransport(grid_of("a"), clients=["a", "a"], wait=0)


def test_unregistered_and_doubly_registered_names_take_no_part() -> None:
    grid = grid_of("a", "b", "b", "c")
    grid.nameless.add("c")
    assert GridTransport(grid, wait=0).clients() == ("a",)
    assert {r.client for r in ask(grid, ["a", "b", "c"])} == {"a"}


def test_a_node_that_reconnects_under_its_key_is_the_same_client() -> None:
    grid = grid_of("a", "b")
    transport = GridTransport(grid, wait=0)
    grid.nodes[77] = grid.nodes.pop(1)
    assert sorted(r.client for r in transport.ask(TASK, ["a", "b"], deadline=5)) == ["a", "b"]


def test_claimed_names_are_asked_for_once() -> None:
    grid = grid_of("x", "y", x="a", y="b")
    transport = GridTransport(grid, wait=0, names="claimed")
    assert transport.clients() == ("a", "b")
    assert len(grid.asked) == 2
    assert sorted(r.client for r in transport.ask(TASK, ["a", "b"], deadline=5)) == ["a", "b"]
    assert [kind for _, kind in grid.asked].count("query.sfumato_name") == 2


def test_a_second_claim_of_a_name_is_not_heard() -> None:
    grid = grid_of("x", x="a")
    transport = GridTransport(grid, wait=0, names="claimed")
    grid.nodes[9] = "thief"
    grid.said["thief"] = "a"
    list(transport.ask(TASK, ["a", "b"], deadline=5))
    assert ("thief", "train.sfumato") not in grid.asked
    assert ("x", "train.sfumato") in grid.asked


def test_a_superlink_that_takes_nothing_is_an_error() -> None:
    grid = grid_of("a")
    grid.push_messages = lambda messages: []  # type: ignore[method-assign]
    with pytest.raises(UnsupportedError, match="none of the messages"):
        ask(grid, ["a"])


def test_errors_of_the_connection_reach_the_driver() -> None:
    grid = grid_of("a")

    def pull(message_ids: Any) -> Any:
        raise ConnectionError("gone")

    grid.pull_messages = pull  # type: ignore[method-assign]
    with pytest.raises(ConnectionError):
        list(
            exchange(
                grid,
                {1: RecordDict()},
                "query.sfumato_name",
                group="",
                seconds=5,
            )
        )


@pytest.mark.parametrize("forged", ["elsewhere", "message 2"])
def test_a_node_cannot_say_whose_answer_it_brings(forged: str) -> None:
    """What a message says that it replies to was written by its sender: the server waited for ever, or believed it."""
    grid = grid_of("a", "b")
    pull = grid.pull_messages

    def lying(message_ids: Any) -> list[Message]:
        found = pull(message_ids)
        for reply in found:
            if reply.content["reply"]["client"] == "a":
                reply.metadata.__dict__["_reply_to_message_id"] = forged
        return found

    grid.pull_messages = lying  # type: ignore[method-assign]
    with within(0.0, 5.0):
        found = ask(grid, ["a", "b"], deadline=None)
    assert sorted(r.client for r in found) == ["a", "b"]
    assert all(r.error is None for r in found)


@pytest.mark.parametrize("error", [ValueError("utf-8"), KeyError("Message"), AttributeError("values")])
def test_bytes_that_are_no_message_end_nobody_elses_part(error: Exception) -> None:
    grid = grid_of("a", "b")
    pull = grid.pull_messages

    def broken(message_ids: Any) -> list[Message]:
        found = pull(message_ids)
        if any(reply.content["reply"]["client"] == "a" for reply in found):
            raise error  # as Flower does, on reading the objects of a message
        return found

    grid.pull_messages = broken  # type: ignore[method-assign]
    found = {r.client: r.error for r in ask(grid, ["a", "b"], deadline=None)}
    assert found == {"a": f"unreadable: {type(error).__name__}", "b": None}


def test_a_run_that_was_stopped_does_not_wait() -> None:
    class Stopped(BaseException):
        """As Flower's RunNotRunningException."""

    def pull(message_ids: Any) -> Any:
        raise Stopped

    grid = grid_of("a")
    grid.pull_messages = pull  # type: ignore[method-assign]
    with within(0.0, 5.0), pytest.raises(Stopped):
        ask(grid, ["a"], deadline=None)


def test_the_log_is_for_its_owner_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What failed on a node may quote records."""
    logger = logging.getLogger("sfumato")
    before = list(logger.handlers)
    monkeypatch.setenv("SFUMATO_LOG", str(tmp_path / "said.log"))
    keep_log()
    try:
        logger.warning("record 17")
        assert "record 17" in (tmp_path / "said.log").read_text()
        assert (tmp_path / "said.log").stat().st_mode & 0o777 == 0o600
    finally:
        for handler in set(logger.handlers) - set(before):
            logger.removeHandler(handler)
            handler.close()
