"""The door for nodes: what a SuperLink has for them, and nothing else of it.

A SuperLink answers nodes, operators and its own processes on one port. Its interface for operators (start a run, which
executes code on every node; register a key under any client's name) asks for no credentials in the free distribution.
So a SuperLink listens on loopback, and this passes on requests to ``/v1/fleet/`` alone, where nodes sign in with keys.
"""

from __future__ import annotations

import argparse
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable, MutableMapping, Sequence
from typing import Any

import httpx
import uvicorn

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]

# By name: what a later release adds stays closed until it has been looked at.
OPEN = frozenset(
    f"/v1/fleet/{name}"
    for name in (
        "activate-node",
        "confirm-message-received",
        "deactivate-node",
        "get-fab",
        "get-run",
        "pull-messages",
        "pull-object",
        "push-messages",
        "push-object",
        "register-node",
        "send-node-heartbeat",
        "unregister-node",
    )
)
# RFC 9110, 7.6.1, and what belongs to one connection.
_HOP = {b"connection", b"host", b"keep-alive", b"proxy-connection", b"te", b"trailer", b"transfer-encoding", b"upgrade"}


class Gate:
    """An ASGI application that hands requests for :data:`OPEN` to ``inner``, and answers 404 to all others."""

    def __init__(self, inner: httpx.AsyncClient) -> None:
        self._inner = inner

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return
        path = scope.get("raw_path", b"").partition(b"?")[0].decode("latin-1")
        if scope["method"] != "POST" or path not in OPEN:
            await _answer(send, 404)
            return
        if {b"content-length", b"transfer-encoding"} <= {name.lower() for name, _ in scope["headers"]}:
            await _answer(send, 400)  # two lengths: RFC 9112, 6.1, a sign of smuggling
            return
        headers = [(name, value) for name, value in scope["headers"] if name.lower() not in _HOP]
        request = self._inner.build_request("POST", path, headers=headers, content=_body(receive))
        if any(name == b"content-length" for name, _ in headers):
            request.headers.pop("transfer-encoding", None)
        try:
            response = await self._inner.send(request, stream=True)
        except httpx.TransportError:
            await _answer(send, 502)
            return
        try:
            kept = [(name.lower(), value) for name, value in response.headers.raw if name.lower() not in _HOP]
            await send({"type": "http.response.start", "status": response.status_code, "headers": kept})
            async for part in response.aiter_raw():
                await send({"type": "http.response.body", "body": part, "more_body": True})
            await send({"type": "http.response.body", "body": b""})
        finally:
            await response.aclose()


async def _body(receive: Receive) -> AsyncIterator[bytes]:
    more = True
    while more:
        message = await receive()
        if message["type"] != "http.request":  # the node has gone
            raise httpx.ReadError("the node has gone")
        more = message.get("more_body", False)
        yield message.get("body", b"")


async def _answer(send: Send, status: int) -> None:
    await send({"type": "http.response.start", "status": status, "headers": [(b"content-length", b"0")]})
    await send({"type": "http.response.body", "body": b""})


def main(arguments: Sequence[str] | None = None) -> None:
    """``python -m sfumato.integrations.flower.gate``; :func:`.commands.gate_command` writes the command."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--host", required=True)
    parser.add_argument("--port", required=True, type=int)
    parser.add_argument("--inner", required=True, help="URL of the SuperLink, on loopback")
    parser.add_argument("--authority", help="certificate of the authority that vouches for the SuperLink")
    parser.add_argument("--certificate")
    parser.add_argument("--key")
    parser.add_argument("--insecure", action="store_true", help="no TLS towards the nodes")
    found = parser.parse_args(arguments)
    if found.insecure != (found.certificate is None) or found.insecure != (found.key is None):
        parser.error("give --certificate and --key, or --insecure")
    trust = True if found.authority is None else ssl.create_default_context(cafile=found.authority)
    # trust_env: a proxy from the environment must not stand between two ends of one machine.
    inner = httpx.AsyncClient(
        base_url=found.inner, verify=trust, timeout=httpx.Timeout(None, connect=10.0), trust_env=False
    )
    uvicorn.run(
        Gate(inner),
        host=found.host,
        port=found.port,
        ssl_certfile=found.certificate,
        ssl_keyfile=found.key,
        lifespan="off",
        log_level="warning",
        server_header=False,
    )


if __name__ == "__main__":
    main()
