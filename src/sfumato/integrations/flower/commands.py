"""The commands that start Flower's processes, on one machine or on many. TLS unless plain is asked for by name."""

from __future__ import annotations

import ipaddress
import json
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from sfumato.errors import ConfigurationError
from sfumato.federated.wire.messages import Scalar

from .client import CLIENT
from .keys import Certificates

CONNECTION = "sfumato"
_NAME = re.compile(r"[\w.:@-]+")


@dataclass(frozen=True)
class Link:
    """Where a SuperLink is, as seen from the process that is started.

    Args:
        host, port: where it listens.
        authority: file with the certificate of who vouches for it (:func:`.keys.certificates`).
        insecure: no encryption and no authentication of nodes: anybody who can reach the port can join, read updates
            before they are noised, and stand in for the server.

    Raises ``ConfigurationError`` for neither or both of ``authority`` and ``insecure``.
    """

    host: str
    port: int
    authority: Path | None = None
    insecure: bool = False

    def __post_init__(self) -> None:
        if (self.authority is not None) == self.insecure:
            raise ConfigurationError(
                "a connection has either an authority that vouches for the server, or insecure=True.",
                found=self.authority,
                where="authority",
                fix="make certificates with sfumato.integrations.flower.keys.certificates(folder, [host]).",
            )

    @property
    def address(self) -> str:
        """host:port."""
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


def superlink_command(link: Link, files: Certificates | None, *, database: Path | None = None) -> list[str]:
    """Start the server's side, on loopback; :func:`gate_command` lets nodes of other machines in.

    Nodes have to prove that they hold a registered key, unless the link is insecure. ``database``: where registered
    nodes and runs outlive a restart; None: in memory. Raises ``ConfigurationError`` for a secure link without
    ``files``, and off loopback: whoever reaches a SuperLink can start runs and register keys (:mod:`.gate`).
    """
    if not _loopback(link.host):
        raise ConfigurationError(
            f"a SuperLink on {link.host} takes orders from whoever reaches it: its interface for operators asks for no "
            "credentials.",
            found=link.host,
            where="host",
            fix="let it listen on 127.0.0.1, and start a gate_command() for the nodes.",
        )
    command = ["flower-superlink", "--host", link.host, "--port", str(link.port)]
    command.append("--disable-runtime-dependency-installation")
    if database is not None:
        command += ["--database", str(database)]
    if link.insecure:
        return [*command, "--insecure"]
    files = _needed(files)
    command += ["--ssl-ca-certfile", str(files.authority), "--ssl-certfile", str(files.certificate)]
    return [*command, "--ssl-keyfile", str(files.key), "--enable-supernode-auth"]


def gate_command(outer: Link, inner: Link, files: Certificates | None) -> list[str]:
    """Let nodes from ``outer`` through to the SuperLink at ``inner``, and nothing else.

    ``files``: the certificate is made out to both hosts. Raises ``ConfigurationError`` for secure links without it.
    """
    command = [sys.executable, "-m", "sfumato.integrations.flower.gate", "--host", outer.host, "--port"]
    command += [str(outer.port), "--inner", f"{'http' if inner.insecure else 'https'}://{inner.address}"]
    if not inner.insecure:
        command += ["--authority", str(inner.authority)]
    if outer.insecure:
        return [*command, "--insecure"]
    files = _needed(files)
    return [*command, "--certificate", str(files.certificate), "--key", str(files.key)]


def supernode_command(
    link: Link, client: str, *, key: Path | None, port: int, config: Mapping[str, Scalar] | None = None
) -> list[str]:
    """Start the side of ``client``.

    Args:
        key: its private key; the public one is registered under the client's name. None only over an insecure link.
        port: for the processes of this node among themselves, on its own loopback.
        config: what ``context.node_config`` holds besides ``client``.

    Raises ``ConfigurationError`` for a secure link without a key, or a name or value that Flower cannot carry.
    """
    if key is None and not link.insecure:
        raise ConfigurationError("a node proves who it is with its key.", where="key", fix="make one with node_key().")
    if not _NAME.fullmatch(client):
        raise ConfigurationError(f"client name {client!r} is not of letters, digits and .:@_-", found=client)
    entries = [f"{name}={_value(name, value)}" for name, value in {**(config or {}), CLIENT: client}.items()]
    command = ["flower-supernode", "--superlink", link.address, "--port", str(port)]
    command += ["--node-config", " ".join(entries)]
    if link.insecure:
        return [*command, "--insecure"]
    return [*command, "--root-certificates", str(link.authority), "--auth-supernode-private-key", str(key)]


def connection(link: Link) -> str:
    """The text of ``config.toml`` in ``FLWR_HOME`` for whoever starts runs on this SuperLink with ``flwr``."""
    trust = "insecure = true" if link.insecure else f"root-certificates = {json.dumps(str(link.authority))}"
    head = f'[superlink]\ndefault = "{CONNECTION}"\n\n[superlink.{CONNECTION}]\n'
    return f"{head}address = {json.dumps(link.address)}\n{trust}\n"


def _needed(files: Certificates | None) -> Certificates:
    if files is None:
        raise ConfigurationError(
            "TLS needs a certificate and its key.", where="files", fix="make them: certificates()."
        )
    return files


def _loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _value(name: str, value: Scalar) -> str:
    if not re.fullmatch(r"[\w-]+", name) or (isinstance(value, str) and ('"' in value or "\\" in value)):
        raise ConfigurationError(f"{name}={value!r} does not fit into a node configuration.", found=value, where=name)
    return json.dumps(value)
