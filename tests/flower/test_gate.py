"""Nodes get through to what is theirs; nothing gets through to the rest of a SuperLink."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest

pytest.importorskip("flwr.app")

import httpx
from flwr.superlink.routers.control.router import router as control
from flwr.superlink.routers.fleet.router import router as fleet

from sfumato.integrations.flower.gate import OPEN, Gate, main


class Inner:
    """Stands in for a SuperLink, and remembers what reached it."""

    def __init__(self) -> None:
        self.seen: list[httpx.Request] = []
        self.bodies: list[bytes] = []
        self.error: Exception | None = None

    async def __call__(self, request: httpx.Request) -> httpx.Response:
        self.seen.append(request)
        self.bodies.append(await request.aread())
        if self.error is not None:
            raise self.error
        return httpx.Response(
            201,
            headers=[
                ("x-answer", "1"),
                ("x-answer", "2"),
                ("connection", "close"),
                ("content-type", "application/grpc"),
            ],
            content=_parts(b"said ", self.bodies[-1]),
        )


async def _parts(*parts: bytes) -> AsyncIterator[bytes]:
    for part in parts:
        yield part


def ask(inner: Inner, method: str, path: str, **named: Any) -> httpx.Response:
    async def go() -> httpx.Response:
        async with (
            httpx.AsyncClient(base_url="https://127.0.0.1:1", transport=httpx.MockTransport(inner)) as upstream,
            httpx.AsyncClient(base_url="https://node", transport=httpx.ASGITransport(Gate(upstream))) as node,
        ):
            return await node.request(method, path, **named)

    return asyncio.run(go())


def test_requests_of_nodes_arrive_whole() -> None:
    inner = Inner()
    body = bytes(range(256)) * 1000
    headers = {"flwr-public-key": "k", "flwr-signature": "s", "content-type": "application/x", "connection": "x"}
    answer = ask(inner, "POST", "/v1/fleet/push-object", content=body, headers=headers)
    (seen,) = inner.seen
    assert str(seen.url) == "https://127.0.0.1:1/v1/fleet/push-object"
    assert inner.bodies == [body]
    assert (seen.headers["flwr-public-key"], seen.headers["flwr-signature"]) == ("k", "s")
    assert seen.headers["content-length"] == str(len(body))
    assert "transfer-encoding" not in seen.headers
    assert seen.headers.get("connection") != "x"
    assert (answer.status_code, answer.content) == (201, b"said " + body)
    assert answer.headers.get_list("x-answer") == ["1", "2"]


def test_a_body_of_unknown_length_arrives_too() -> None:
    inner = Inner()
    assert ask(inner, "POST", "/v1/fleet/push-messages", content=_parts(b"a", b"", b"bc")).content == b"said abc"


@pytest.mark.parametrize(
    "path",
    [
        "/",
        "/docs",
        "/health",
        "/v1/control/start-run",
        "/v1/control/register-node",
        "/v1/control/list-runs",
        "/v1/runtime/push-messages",
        "/v1/fleet/",
        "/v1/fleet",
        "/v1/fleet/unknown",
        "/v1/fleet/../control/start-run",
        "/v1/fleet/get-run/../../control/start-run",
        "/v1/fleet/%2e%2e/control/start-run",
        "/v1/fleet/get-run%2f..%2f..%2fcontrol%2fstart-run",
        "/v1/fleet//get-run",
        "//v1/control/start-run",
        "/V1/CONTROL/start-run",
        "/v1/control/start-run?/v1/fleet/get-run",
        "/v1/control/start-run#/v1/fleet/get-run",
    ],
)
@pytest.mark.parametrize("method", ["GET", "POST"])
def test_nothing_else_gets_through(path: str, method: str) -> None:
    inner = Inner()
    scope = {
        "type": "http",
        "method": method,
        "path": path,
        "raw_path": path.encode(),
        "query_string": b"",
        "headers": [],
    }
    sent: list[Any] = []

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": b""}

    async def send(message: Any) -> None:
        sent.append(message)

    async def go() -> None:
        async with httpx.AsyncClient(base_url="https://127.0.0.1:1", transport=httpx.MockTransport(inner)) as upstream:
            await Gate(upstream)(scope, receive, send)

    asyncio.run(go())
    assert sent[0]["status"] == 404
    assert inner.seen == []


@pytest.mark.parametrize("method", ["GET", "PUT", "DELETE", "PATCH", "HEAD"])
def test_nodes_only_post(method: str) -> None:
    inner = Inner()
    assert ask(inner, method, "/v1/fleet/get-run").status_code == 404
    assert inner.seen == []


def test_a_superlink_that_is_down_is_a_bad_gateway() -> None:
    inner = Inner()
    inner.error = httpx.ConnectError("down")
    assert ask(inner, "POST", "/v1/fleet/get-run").status_code == 502


def test_what_is_open_is_what_nodes_need() -> None:
    """A release that adds to either side must be looked at."""
    paths = {(route.path, *sorted(route.methods)) for route in fleet.routes}
    assert {(path, "POST") for path in OPEN} == paths
    assert not OPEN & {route.path for route in control.routes}


def test_a_request_of_two_lengths_is_refused() -> None:
    inner = Inner()
    headers = [(b"content-length", b"0"), (b"Transfer-Encoding", b"chunked")]
    scope = {"type": "http", "method": "POST", "raw_path": b"/v1/fleet/pull-messages", "headers": headers}
    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message)

    async def receive() -> Any:
        return {"type": "http.request", "body": b"POST /v1/control/start-run HTTP/1.1\r\n\r\n"}

    async def go() -> None:
        async with httpx.AsyncClient(base_url="https://x", transport=httpx.MockTransport(inner)) as upstream:
            await Gate(upstream)(scope, receive, send)

    asyncio.run(go())
    assert sent[0]["status"] == 400
    assert inner.seen == []


@pytest.mark.parametrize("given", [[], ["--certificate", "c"], ["--key", "k"], ["--insecure", "--certificate", "c"]])
def test_the_gate_has_tls_unless_plain_is_asked_for_by_name(given: list[str], capsys: Any) -> None:
    with pytest.raises(SystemExit):
        main(["--host", "0.0.0.0", "--port", "1", "--inner", "http://127.0.0.1:1", *given])
    assert "--insecure" in capsys.readouterr().err
