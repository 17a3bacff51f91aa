"""One question to some nodes, and whatever comes back before a deadline that is ours, not Flower's."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Iterator, Mapping

import httpx
from flwr.app import DEFAULT_TTL, Message, RecordDict
from flwr.serverapp import Grid

from sfumato.errors import UnsupportedError

POLL = 0.25
_SKEW = 60.0  # seconds by which the clocks of two machines may differ: Flower judges a message's age by both
_THREADS = 64
_REQUESTS = 40.0  # polls a second that a SuperLink is asked for, whatever the size of the cohort

_Arrival = tuple[str, RecordDict | str] | BaseException


def exchange(
    grid: Grid, contents: Mapping[int, RecordDict], message_type: str, *, group: str, seconds: float | None
) -> Iterator[tuple[int, RecordDict | str]]:
    """Yield (node, its answer) as answers arrive; text says why there is none. Return after ``seconds`` at the latest.

    None: wait for all; Flower reports a node that is gone after a minute. A node without an answer is not yielded.
    Each answer is fetched on its own thread: fetching waits for a sender that has stalled, for minutes, and must hold
    up neither the others nor the deadline. It is the answer of the node whose question it was fetched for, which the
    SuperLink has checked; what the message says of that, its sender wrote. Raises ``UnsupportedError`` if the SuperLink
    takes none of the messages.
    """
    if not contents:
        return
    # Counted from before the sending, which the deadline covers.
    ends = None if seconds is None else time.monotonic() + seconds
    life = DEFAULT_TTL if seconds is None else seconds + _SKEW
    messages = [Message(content, node, message_type, ttl=life, group_id=group) for node, content in contents.items()]
    waiting = {
        number: node for number, node in zip(grid.push_messages(messages), contents, strict=False) if number is not None
    }
    if not waiting:
        raise UnsupportedError(
            "the SuperLink took none of the messages.", where="flower", fix="see its log; a message may be too large."
        )
    arrived: queue.SimpleQueue[_Arrival] = queue.SimpleQueue()
    stopped = threading.Event()
    left = queue.SimpleQueue[str]()
    for number in waiting:
        left.put(number)
    workers = min(len(waiting), _THREADS)
    for _ in range(workers):
        arguments = (grid, left, arrived, stopped, max(POLL, workers / _REQUESTS))
        threading.Thread(target=_fetch, args=arguments, daemon=True).start()
    try:
        while waiting:
            try:
                reply = arrived.get(timeout=None if ends is None else max(ends - time.monotonic(), 0.0))
            except queue.Empty:
                return
            if isinstance(reply, BaseException):
                raise reply
            number, answer = reply
            yield waiting.pop(number), answer
    finally:
        stopped.set()


def _fetch(
    grid: Grid,
    left: queue.SimpleQueue[str],
    arrived: queue.SimpleQueue[_Arrival],
    stopped: threading.Event,
    pause: float,
) -> None:
    """Take a message, look for its reply, put it back if there is none yet; until stopped or nothing is left."""
    while not stopped.is_set():
        try:
            number = left.get_nowait()
        except queue.Empty:
            return
        try:
            replies = list(grid.pull_messages([number]))
            if not replies:
                left.put(number)
                stopped.wait(pause)
                continue
            found: RecordDict | str = _content(replies[0])
        except (OSError, httpx.HTTPError) as error:  # of the SuperLink: raised again by the caller, on its own thread
            arrived.put(error)
            return
        except Exception as error:  # noqa: BLE001  (a node's bytes that are no message must not end the run)
            found = f"unreadable: {type(error).__name__}"
        except BaseException as error:  # noqa: BLE001  (so Flower says that the run was stopped)
            arrived.put(error)
            return
        arrived.put((number, found))


def _content(reply: Message) -> RecordDict | str:
    if not reply.has_content():
        return f"flower error {reply.error.code}"
    return reply.content if isinstance(reply.content, RecordDict) else "no records"
