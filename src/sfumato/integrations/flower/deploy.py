"""A SuperLink and its SuperNodes as processes of this machine: to rehearse a deployment, or to run a small one."""

from __future__ import annotations

import json
import os
import signal
import socket
import ssl
import subprocess
import time
from collections.abc import Mapping
from contextlib import ExitStack, suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from sfumato.errors import ConfigurationError, SfumatoError
from sfumato.federated.wire.messages import Scalar

from .commands import CONNECTION, Link, connection, gate_command, superlink_command, supernode_command
from .keys import NodeKey, certificates, node_key
from .logs import LOG_FILE
from .server import OUTCOME
from .switches import environment

_INNER = "127.0.0.1"
_HEALTHY = 30.0  # seconds that a SuperLink has to come up
_LIVES = 5.0  # seconds between questions whether a run still lives
_TAIL = 2000  # letters of a log that an error quotes


class Process:
    """A process of Flower and all that it starts, in a process group of their own; what they say goes to ``log``.

    A new ``log`` is readable by its owner only: what an app prints on a node may quote records.
    """

    def __init__(self, command: list[str], log: Path, variables: Mapping[str, str]) -> None:
        self.log = log
        with os.fdopen(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600), "ab") as file:
            self._held = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                env=dict(variables),
                start_new_session=True,
            )

    @property
    def returncode(self) -> int | None:
        """None while it runs."""
        return self._held.poll()

    def stop(self, patience: float = 10.0) -> None:
        """Ask it to end, and after ``patience`` seconds end it and everything that it has started."""
        if self.returncode is None:
            self._held.send_signal(signal.SIGTERM)
            with suppress(subprocess.TimeoutExpired):
                self._held.wait(patience)
        self.kill()

    def kill(self) -> None:
        """End it and everything that it has started, at once."""
        with suppress(ProcessLookupError):
            os.killpg(self._held.pid, signal.SIGKILL)
        self._held.wait()

    def said(self) -> str:
        """The end of its log."""
        return self.log.read_text(errors="replace")[-_TAIL:]


class Deployment:
    """A context in which a SuperLink runs, with one SuperNode for each client.

    Args:
        folder: for keys, logs, Flower's state and outcomes. Keys from an earlier run in it are never overwritten: use
            a new folder for every deployment.
        clients: {name: what its ``context.node_config`` holds besides ``client``}.
        host: address at which nodes are let in (:mod:`.gate`); the SuperLink itself, and with it the right to start
            runs, is on loopback, open to every user of this machine.
        insecure: neither TLS nor authenticated nodes. Node names are then claims (``names="claimed"``).
        variables: added to the environment of every process.

    Everything is stopped on leaving, by the process ids that were recorded. Raises ``ConfigurationError`` if the
    SuperLink or the gate does not come up.
    """

    def __init__(
        self,
        folder: str | Path,
        clients: Mapping[str, Mapping[str, Scalar]],
        *,
        host: str = "127.0.0.1",
        insecure: bool = False,
        variables: Mapping[str, str] | None = None,
    ) -> None:
        self.folder = Path(folder).absolute()
        self.nodes: dict[str, Process] = {}
        self._clients = {name: dict(config) for name, config in clients.items()}
        self._variables = dict(variables or {})
        self._outcome = self.folder / "outcome.json"
        self._stack = ExitStack()
        self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        files = None if insecure else certificates(self.folder / "keys", [host, _INNER])
        authority = None if files is None else files.authority
        self._inner = Link(_INNER, free_port(_INNER), authority, insecure)
        self.link = Link(host, free_port(host), authority, insecure)
        self._command = superlink_command(self._inner, files)
        self._gate = gate_command(self.link, self._inner, files)

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            home = environment(self.folder / "operator")
            self._home = {**home, **self._variables}
            (Path(home["FLWR_HOME"]) / "config.toml").write_text(connection(self._inner))
            variables = {**self._environment("superlink"), OUTCOME: str(self._outcome)}
            self.superlink = Process(self._command, self.folder / "superlink.log", variables)
            stack.callback(self.superlink.stop)
            _await(self.superlink, self._inner)
            self.gate = Process(self._gate, self.folder / "gate.log", self._environment("gate"))
            stack.callback(self.gate.stop, 3.0)
            _await(self.gate, self.link)
            self._stack = stack
            for name in self._clients:
                self.join(name, key=None if self.link.insecure else self.register(name))
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    def register(self, client: str) -> NodeKey:
        """A new key for ``client``, known to the SuperLink under its name."""
        key = node_key(self.folder / "keys", f"node-{client}")
        said = self._flwr("supernode", "register", str(key.public), CONNECTION, "--name", client)
        if not said.get("success"):
            raise ConfigurationError(f"the key of {client!r} could not be registered.", found=said, where="clients")
        return key

    def join(self, client: str, *, key: NodeKey | None) -> Process:
        """Start the SuperNode of ``client``; it is stopped with the others."""
        private = None if key is None else key.private
        config = self._clients.get(client)
        command = supernode_command(self.link, client, key=private, port=free_port("127.0.0.1"), config=config)
        process = Process(command, self.folder / f"node-{client}.log", self._environment(f"node-{client}"))
        self._stack.callback(process.stop, 3.0)
        self.nodes[client] = process
        return process

    def run(self, app: str | Path, *, timeout: float) -> dict[str, Any]:
        """Start the Flower app in the folder ``app`` and return what its :func:`.server_app` left as outcome.

        Raises ``SfumatoError`` if it fails, ends without an outcome, or takes more than ``timeout`` seconds.
        """
        return self.result(self.start(app), timeout=timeout)

    def start(self, app: str | Path) -> int:
        """Start the app; the number of the run."""
        self._outcome.unlink(missing_ok=True)
        said = self._flwr("run", str(Path(app).absolute()), CONNECTION)
        if not said.get("success"):
            raise SfumatoError(f"the app did not start: {said}", found=said, where="app")
        return int(said["run-id"])

    def result(self, run: int, *, timeout: float) -> dict[str, Any]:
        """Wait for the outcome of a run; see :meth:`run`."""
        ends, ask = time.monotonic() + timeout, time.monotonic() + _LIVES
        while not self._outcome.exists():
            if time.monotonic() >= ends:
                raise SfumatoError(f"no outcome after {timeout:g} s. {self.superlink.said()}", where="timeout")
            if time.monotonic() >= ask:
                self._check_lives(run)
                ask = time.monotonic() + _LIVES
            time.sleep(0.1)
        outcome: dict[str, Any] = json.loads(self._outcome.read_text())
        if outcome["status"] != "finished":
            raise SfumatoError(f"the run failed: {outcome.get('error')}", found=outcome, where="app")
        return outcome

    def _environment(self, who: str) -> dict[str, str]:
        log = {LOG_FILE: str(self.folder / f"{who}.sfumato.log")}
        return {**environment(self.folder / who), **log, **self._variables}

    def _check_lives(self, run: int) -> None:
        listed = self._flwr("list", CONNECTION, "--run-id", str(run)).get("runs") or [{}]
        status = str(listed[0].get("status", ""))
        if (status.startswith("finished") or self.superlink.returncode is not None) and not self._outcome.exists():
            raise SfumatoError(f"the run ended without an outcome ({status}). {self.superlink.said()}", where="app")

    def _flwr(self, *arguments: str) -> dict[str, Any]:
        command = ["flwr", *arguments, "--format", "json"]
        done = subprocess.run(
            command, env=self._home, capture_output=True, text=True, check=False, timeout=60, cwd=self.folder
        )
        try:
            return dict(json.loads(done.stdout))
        except ValueError:
            return {"success": False, "said": (done.stdout + done.stderr)[-_TAIL:]}


def free_port(host: str) -> int:
    """A port that nobody listens on at the moment."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as probe:
        probe.bind((host, 0))
        return int(probe.getsockname()[1])


def _await(process: Process, link: Link) -> None:
    """Until the SuperLink takes connections, and with TLS proves that it is the one whose authority we know."""
    ends = time.monotonic() + _HEALTHY
    context = None if link.authority is None else ssl.create_default_context(cafile=link.authority)
    while process.returncode is None and time.monotonic() < ends:
        with suppress(OSError), socket.create_connection((link.host, link.port), timeout=2.0) as plain:
            if context is None:
                return
            with context.wrap_socket(plain, server_hostname=link.host):
                return
        time.sleep(0.1)
    raise ConfigurationError(
        f"nothing answers at {link.address} (exit code {process.returncode}). {process.said()}", where="host"
    )
