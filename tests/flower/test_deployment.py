"""The example, over a SuperLink and SuperNodes on loopback, with TLS and authenticated nodes."""

from __future__ import annotations

import http.client
import importlib
import json
import ssl
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import TensorDataset

pytest.importorskip("flwr.app")
pytest.importorskip("sklearn")

from safetensors.torch import load_file

from sfumato.accounting import Ledger
from sfumato.federated import FederatedTrainer
from sfumato.integrations.flower import Deployment
from sfumato.integrations.flower.deploy import Process
from sfumato.integrations.flower.keys import node_key

pytestmark = [pytest.mark.slow, pytest.mark.dist, pytest.mark.timeout(240)]

APP = Path(__file__).parents[2] / "examples" / "flower_app"
DEADLINE = 40.0


def deployed(folder: Path) -> Deployment:
    config = {f"clinic-{n}": {"part": n, "parts": 2, "ledger": str(folder / f"{n}.db")} for n in range(2)}
    # One thread each: the processes share few cores.
    return Deployment(folder / "flower", config, variables={"OMP_NUM_THREADS": "1"})


@pytest.fixture(scope="module")
def deployment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployment]:
    with deployed(tmp_path_factory.mktemp("deployment")) as running:
        yield running


@pytest.fixture
def app(tmp_path: Path) -> Callable[..., Path]:
    def configured(**values: Any) -> Path:
        """A copy of the example with another run configuration."""
        place = tmp_path / "app"
        (place / "digits_app").mkdir(parents=True)
        for path in (APP / "digits_app").glob("*.py"):
            (place / "digits_app" / path.name).write_text(path.read_text())
        lines = (APP / "pyproject.toml").read_text().splitlines()
        known = {line.partition(" = ")[0]: number for number, line in enumerate(lines)}
        for name, value in values.items():
            lines[known[name]] = f"{name} = {json.dumps(value)}"
        (place / "pyproject.toml").write_text("\n".join(lines))
        return place

    return configured


def wait(until: Callable[[], object], seconds: float = 60.0) -> None:
    ends = time.monotonic() + seconds
    while not until():
        assert time.monotonic() < ends
        time.sleep(0.05)


def received(node: Process) -> int:
    return node.log.read_text(errors="replace").count("Receiving: train.sfumato")


def asked(connection: http.client.HTTPConnection, path: str = "/v1/fleet/get-run") -> int:
    with closing(connection):
        connection.request("POST", path)
        return connection.getresponse().status


def test_plain_http_is_refused(deployment: Deployment) -> None:
    host, port = deployment.link.host, deployment.link.port
    with pytest.raises((http.client.HTTPException, OSError)):
        asked(http.client.HTTPConnection(host, port, timeout=5))
    known = ssl.create_default_context(cafile=deployment.link.authority)
    assert asked(http.client.HTTPSConnection(host, port, timeout=5, context=known)) in (401, 403, 415, 422)
    with pytest.raises(ssl.SSLCertVerificationError):
        asked(http.client.HTTPSConnection(host, port, timeout=5))


def test_nodes_cannot_reach_what_is_the_operators(deployment: Deployment) -> None:
    host, port = deployment.link.host, deployment.link.port
    known = ssl.create_default_context(cafile=deployment.link.authority)
    for path in ("/v1/control/list-runs", "/v1/control/register-node", "/v1/runtime/acquire-task", "/docs"):
        assert asked(http.client.HTTPSConnection(host, port, timeout=5, context=known), path) == 404


def test_an_unregistered_key_is_refused(deployment: Deployment, tmp_path: Path) -> None:
    stranger = deployment.join("stranger", key=node_key(tmp_path, "stranger"))
    wait(lambda: stranger.returncode is not None, 30.0)
    assert stranger.returncode != 0
    assert "SuperNode ID" not in stranger.said()


def test_a_run_and_a_node_that_is_killed_in_it(deployment: Deployment, app: Callable[..., Path]) -> None:
    """Round 1 has both clients; one is killed while it works on round 2, which ends at our deadline, not Flower's."""
    begins = time.monotonic()
    before = received(deployment.nodes["clinic-1"])
    run = deployment.start(app(rounds=2, deadline=DEADLINE))
    wait(lambda: received(deployment.nodes["clinic-1"]) == before + 2)
    deployment.nodes["clinic-1"].kill()
    outcome = deployment.result(run, timeout=80.0)
    assert outcome["status"] == "finished"
    first, second = json.loads(outcome["rounds"])
    assert first[:3] == [2, 2, {}]
    assert first[3] < DEADLINE
    assert second[:2] == [2, 1]
    assert DEADLINE - 0.5 <= second[3] <= DEADLINE + 5.0
    epsilons = json.loads(outcome["clients"])
    assert set(epsilons) == {"clinic-0", "clinic-1"}
    assert 0.0 < max(epsilons.values()) <= 4.0
    assert outcome["accuracy"] >= 0.8
    for number in range(2):
        assert (deployment.folder.parent / f"{number}.db").stat().st_size > 0
    assert time.monotonic() - begins < 90.0


def test_a_deployed_run_equals_the_one_in_this_process(
    app: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Equal seeds of the research noise: the same parameters, and the same events in every ledger."""
    out = tmp_path / "model.safetensors"
    with deployed(tmp_path) as running:
        run = running.start(app(rounds=2, noise="research", seed=7, out=str(out)))
        outcome = running.result(run, timeout=80.0)
    assert outcome["status"] == "finished"
    monkeypatch.syspath_prepend(str(APP))
    agreed = importlib.import_module("digits_app.federation")
    held = agreed.data(2)
    parts = [held.clients[name] for name in sorted(held.clients)]
    result = FederatedTrainer(
        model=agreed.pretrained(held.public),
        clients={f"clinic-{n}": TensorDataset(part.x, part.y) for n, part in enumerate(parts)},
        privacy=agreed.UNIT,
        local=agreed.LOCAL,
        rounds=2,
        noise="research",
        seed=7,
    ).fit()
    there, here = load_file(out), result.model.state_dict()
    assert set(there) == set(here)
    for name, value in here.items():
        assert torch.allclose(there[name], value, rtol=0.0, atol=1e-6), name
    for n in range(2):
        with Ledger(tmp_path / f"{n}.db") as ledger:
            assert charged(ledger) == charged(result.client_ledgers[f"clinic-{n}"])
            assert len(charged(ledger)) > 10
    assert outcome["epsilon"] == pytest.approx(result.epsilon, abs=1e-9)


def charged(ledger: Ledger) -> list[tuple[Any, ...]]:
    """Everything in it but when and in which run."""
    return [(e["step"], e["group"], e["dataset"], e["event"], e["count"], e["note"]) for e in ledger.entries()]
