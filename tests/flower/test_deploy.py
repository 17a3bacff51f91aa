"""Commands, keys and switches of a deployment, without starting one."""

from __future__ import annotations

import json
import os
import ssl
import stat
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("flwr.app")

from cryptography.hazmat.primitives.serialization import load_ssh_private_key, load_ssh_public_key
from flwr.app import Context, RecordDict

from sfumato.errors import ConfigurationError
from sfumato.integrations.flower import environment, server_app
from sfumato.integrations.flower.commands import (
    Link,
    connection,
    gate_command,
    superlink_command,
    supernode_command,
)
from sfumato.integrations.flower.deploy import Process, free_port
from sfumato.integrations.flower.keys import certificates, node_key
from sfumato.integrations.flower.server import OUTCOME


def test_plain_connections_have_to_be_asked_for_by_name() -> None:
    with pytest.raises(ConfigurationError, match="insecure=True"):
        Link("10.0.0.1", 8000)
    with pytest.raises(ConfigurationError):
        Link("10.0.0.1", 8000, Path("authority.pem"), insecure=True)
    assert Link("10.0.0.1", 8000, insecure=True).insecure
    with pytest.raises(ConfigurationError):
        superlink_command(Link("127.0.0.1", 8000, Path("authority.pem")), None)
    with pytest.raises(ConfigurationError):
        supernode_command(Link("10.0.0.1", 8000, Path("authority.pem")), "a", key=None, port=1)


@pytest.mark.parametrize("host", ["10.0.0.1", "0.0.0.0", "::", "fl.example.org"])
@pytest.mark.parametrize("insecure", [True, False])
def test_operators_are_on_loopback_alone(tmp_path: Path, host: str, insecure: bool) -> None:
    """Whoever reaches a SuperLink can start runs: Flower asks for no credentials."""
    files = certificates(tmp_path, ["127.0.0.1"])
    with pytest.raises(ConfigurationError, match="gate_command"):
        superlink_command(Link(host, 8000, None if insecure else files.authority, insecure), files)


def test_the_default_is_tls_and_authenticated_nodes(tmp_path: Path) -> None:
    files = certificates(tmp_path, ["127.0.0.1"])
    link = Link("127.0.0.1", 8000, files.authority)
    server = superlink_command(link, files, database=tmp_path / "state.db")
    assert "--enable-supernode-auth" in server
    assert "--disable-runtime-dependency-installation" in server
    node = supernode_command(
        link, "a", key=Path("k"), port=9, config={"part": 3, "share": 0.5, "on": True, "to": "x y"}
    )
    assert node[node.index("--auth-supernode-private-key") + 1] == "k"
    assert node[node.index("--node-config") + 1] == 'part=3 share=0.5 on=true to="x y" client="a"'
    assert not any("insecure" in word for word in (*server, *node, connection(link)))
    outer = Link("10.0.0.1", 443, files.authority)
    gate = gate_command(outer, link, files)
    assert gate[gate.index("--inner") + 1] == "https://127.0.0.1:8000"
    assert gate[gate.index("--certificate") + 1] == str(files.certificate)
    with pytest.raises(ConfigurationError):
        gate_command(outer, link, None)
    plain = Link("::1", 8000, insecure=True)
    assert "--insecure" in superlink_command(plain, None)
    assert "[::1]:8000" in supernode_command(plain, "a", key=None, port=9)
    assert gate_command(plain, plain, None)[-1] == "--insecure"


@pytest.mark.parametrize("name", ["", "a b", 'a"', "a'", "a=1", "a\n"])
def test_names_that_would_say_something_else_are_refused(name: str) -> None:
    with pytest.raises(ConfigurationError):
        supernode_command(Link("::1", 8000, insecure=True), name, key=None, port=9)


@pytest.mark.parametrize("config", [{"a b": 1}, {"a": 'x" client="b'}, {"a": "x\\"}])
def test_values_that_would_say_something_else_are_refused(config: dict[str, Any]) -> None:
    with pytest.raises(ConfigurationError):
        supernode_command(Link("::1", 8000, insecure=True), "a", key=None, port=9, config=config)


def test_a_node_cannot_be_configured_as_another_client() -> None:
    command = supernode_command(Link("::1", 8000, insecure=True), "a", key=None, port=9, config={"client": "b"})
    assert command[command.index("--node-config") + 1] == 'client="a"'


def shake(server: ssl.SSLContext, client: ssl.SSLContext, name: str) -> None:
    """A handshake in memory."""
    up, down = ssl.MemoryBIO(), ssl.MemoryBIO()
    ends = [client.wrap_bio(down, up, server_hostname=name), server.wrap_bio(up, down, server_side=True)]
    for _ in range(4):
        for end in list(ends):
            try:
                end.do_handshake()
                ends.remove(end)
            except ssl.SSLWantReadError:
                pass
    assert not ends


def test_certificates_are_for_these_hosts_under_this_authority(tmp_path: Path) -> None:
    files = certificates(tmp_path / "one", ["127.0.0.1", "server.example"])
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server.load_cert_chain(files.certificate, files.key)
    client = ssl.create_default_context(cafile=files.authority)
    client.verify_flags |= ssl.VERIFY_X509_STRICT
    shake(server, client, "127.0.0.1")
    shake(server, client, "server.example")
    with pytest.raises(ssl.SSLCertVerificationError):
        shake(server, client, "other.example")
    stranger = certificates(tmp_path / "two", ["127.0.0.1"])
    with pytest.raises(ssl.SSLCertVerificationError):
        shake(server, ssl.create_default_context(cafile=stranger.authority), "127.0.0.1")


def test_private_files_are_their_owners_and_never_replaced(tmp_path: Path) -> None:
    files, key = certificates(tmp_path, ["localhost"]), node_key(tmp_path, "a")
    for path in (files.key, key.private):
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
    for again in (lambda: certificates(tmp_path, ["localhost"]), lambda: node_key(tmp_path, "a")):
        with pytest.raises(FileExistsError):
            again()
    private = load_ssh_private_key(key.private.read_bytes(), None)
    public = load_ssh_public_key(key.public.read_bytes())
    assert private.public_key() == public
    assert b"PRIVATE" not in files.authority.read_bytes() + files.certificate.read_bytes() + key.public.read_bytes()


def test_the_switches_keep_flower_at_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLWR_TELEMETRY_ENABLED", "1")
    found = environment(tmp_path / "home")
    assert found["FLWR_TELEMETRY_ENABLED"] == "0"
    assert found["FLWR_DISABLE_UPDATE_CHECK"] == "1"
    assert found["FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION"] == "1"
    assert found["FLWR_HOME"] == str(tmp_path / "home")
    assert stat.S_IMODE((tmp_path / "home").stat().st_mode) == 0o700
    assert os.environ["FLWR_TELEMETRY_ENABLED"] == "1"


def test_flower_still_reads_these_switches(tmp_path: Path) -> None:
    """Names of variables are no API: a release that renames one must not go unnoticed."""
    script = """
import urllib.request, socket
def refuse(*a, **k): raise SystemExit("it called home")
urllib.request.urlopen = socket.create_connection = refuse
from flwr.supercore import telemetry, utils
assert telemetry.FLWR_TELEMETRY_ENABLED == "0"
future = telemetry.event(telemetry.EventType.PING)
assert future.result(5) == "disabled", future.result(5)
print(utils.get_flwr_home())
"""
    done = subprocess.run(
        [sys.executable, "-c", script], env=environment(tmp_path), capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == str(tmp_path)


def test_the_outcome_says_how_a_run_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "outcome.json"
    monkeypatch.setenv(OUTCOME, str(path))
    context = Context(1, 1, {}, RecordDict(), {})
    server_app(lambda grid, context: {"epsilon": 2.0})(None, context)  # type: ignore[arg-type]
    assert json.loads(path.read_text()) == {"epsilon": 2.0, "status": "finished"}

    def fail(grid: Any, context: Any) -> None:
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        server_app(fail)(None, context)  # type: ignore[arg-type]
    assert json.loads(path.read_text()) == {"status": "failed", "error": "ValueError: no"}
    assert os.listdir(tmp_path) == ["outcome.json"]
    monkeypatch.delenv(OUTCOME)
    server_app(lambda grid, context: None)(None, context)  # type: ignore[arg-type]


def runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().split()[2] not in "ZX"
    except FileNotFoundError:
        return False


def test_stopping_a_process_stops_what_it_started(tmp_path: Path) -> None:
    script = "import subprocess,sys,time;print(subprocess.Popen(['sleep','60']).pid,flush=True);time.sleep(60)"
    process = Process([sys.executable, "-c", script], tmp_path / "log", os.environ)
    while not process.said().strip():
        assert process.returncode is None
    child = int(process.said())
    assert runs(child)
    process.stop(5.0)
    assert process.returncode is not None
    ends = time.monotonic() + 5.0
    while runs(child) and time.monotonic() < ends:
        time.sleep(0.01)
    assert not runs(child)


def test_free_ports_are_free() -> None:
    assert free_port("127.0.0.1") != free_port("127.0.0.1")


def test_what_a_process_says_is_for_its_owner_alone(tmp_path: Path) -> None:
    process = Process([sys.executable, "-c", "print('record 17')"], tmp_path / "node.log", dict(os.environ))
    process._held.wait(30)
    process.stop()
    assert "record 17" in process.said()
    assert process.log.stat().st_mode & 0o777 == 0o600
