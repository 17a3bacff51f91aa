"""A server that is killed anywhere and starts again: what was released is in the ledger, and no noise comes twice."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import textwrap
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from sfumato.accounting import Ledger
from sfumato.errors import LedgerError, SfumatoError
from sfumato.federated import ClientLevel, FederatedTrainer, LocalTraining, SampleLevel, checkpoint
from sfumato.federated.accounts import Accounts
from sfumato.federated.exchange import Exchange

ROUNDS = 4
POINTS = (
    "before the charge",
    "after the charge",
    "when asking",
    "after an answer",
    "before the release",
    "after the release",
    "before the checkpoint",
    "after the checkpoint",
)


def forked(work: Callable[[], None]) -> int:
    """The signal that ended a copy of this process which did ``work``; 0 if it came to an end."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # other threads of the test process are of no use to it
        pid = os.fork()
    if pid == 0:
        status = 1
        try:
            work()
            status = 0
        finally:
            os._exit(status)
    _, ended = os.waitpid(pid, 0)
    assert not os.WIFEXITED(ended) or os.WEXITSTATUS(ended) == 0
    return os.WTERMSIG(ended) if os.WIFSIGNALED(ended) else 0


class Journal:
    """What the outside has seen, on disk at once."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def write(self, **entry: Any) -> None:
        """One line."""
        handle = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        os.write(handle, (json.dumps(entry) + "\n").encode())
        os.fsync(handle)
        os.close(handle)

    def lines(self, kind: str) -> list[dict[str, Any]]:
        """Entries of one kind."""
        if not self.path.exists():
            return []
        return [e for e in map(json.loads, self.path.read_text().splitlines()) if e["kind"] == kind]


def life(fed: Any, folder: Path, victim: str | None, after: int, noise: str = "secure") -> None:
    """One life of the server: it dies at the ``after``-th time that it comes to ``victim``."""
    journal = Journal(folder / "journal")
    seen: dict[str, int] = {}

    def point(name: str) -> None:
        seen[name] = seen.get(name, 0) + 1
        if name == victim and seen[name] == after:
            os.kill(os.getpid(), signal.SIGKILL)

    def around(cls: Any, name: str, before: str, behind: str, note: Callable[[Any], None] | None = None) -> None:
        real = getattr(cls, name)

        def wrapped(*args: Any, **kwargs: Any) -> Any:
            point(before)
            found = real(*args, **kwargs)
            if note is not None:
                note(found)
            point(behind)
            return found

        setattr(cls, name, wrapped)

    def released(found: Any) -> None:
        journal.write(kind="release", vector=[float(v) for v in found[0]])

    around(Accounts, "charge", "before the charge", "after the charge")
    around(Exchange, "_release", "before the release", "after the release", released)
    around(checkpoint, "save", "before the checkpoint", "after the checkpoint")

    def says(task: Any, client: str) -> Any:
        journal.write(kind="task", round=task.round, nonce=task.nonce, run=task.run)
        point("after an answer")
        return fed.reply(task, client, np.zeros(8))

    transport = fed.Scripted({"c0": says, "c1": says, "c2": says})
    transport.before = lambda task, ids: point("when asking")
    trainer = FederatedTrainer(
        model=nn.Linear(3, 2),
        transport=transport,
        privacy=ClientLevel(epsilon=5.0),
        rounds=ROUNDS,
        ledger=folder / "ledger.db",
        checkpoint=folder / "state",
        noise=noise,  # type: ignore[arg-type]
        seed=1,
    )
    result = trainer.fit()
    journal.write(kind="end", stopped=result.stopped, epsilon=result.epsilon)


def check(folder: Path) -> None:
    """Invariants after any number of lives."""
    journal = Journal(folder / "journal")
    releases, tasks = journal.lines("release"), journal.lines("task")
    with Ledger(folder / "ledger.db") as ledger:
        charged = sum(e["count"] for e in ledger.entries())
        assert charged >= len(releases)
        assert float(ledger.epsilon(delta=1e-5)) <= 5.0
        steps = {(e["run"], e["step"]) for e in ledger.entries()}
    asked = {(t["run"], t["round"]): t["nonce"] for t in tasks}
    assert set(asked) <= steps  # nobody was asked before the ledger knew
    nonces = {(t["run"], t["round"], t["nonce"]) for t in tasks}
    assert len(nonces) == len(asked) == len({n for *_, n in nonces})  # a number has one nonce, a nonce one number
    vectors = np.array([r["vector"] for r in releases])
    for i in range(len(vectors)):
        assert not any(np.array_equal(vectors[i], other) for other in vectors[:i])


@pytest.mark.parametrize(
    ("victim", "noise"), [(p, "secure") for p in POINTS] + [("after an answer", "research"), (POINTS[-3], "research")]
)
def test_killed_and_started_again(fed: Any, tmp_path: Path, victim: str, noise: str) -> None:
    """It dies in its first and in its second life, and comes to an end in a later one, within the budget."""
    deaths = [forked(lambda k=k: life(fed, tmp_path, victim, k, noise)) for k in (2, 1)]
    assert deaths == [signal.SIGKILL] * 2
    if (tmp_path / "ledger.db").exists():
        check(tmp_path)
    for _ in range(2):
        assert forked(lambda: life(fed, tmp_path, None, 0, noise)) == 0
    check(tmp_path)
    ends = Journal(tmp_path / "journal").lines("end")
    assert ends
    assert all(0.0 < e["epsilon"] <= 5.0 for e in ends)
    assert ends[0]["epsilon"] == ends[1]["epsilon"]


def test_the_check_can_fail(fed: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A server that charges after it has released is found."""
    charged: list[Any] = []
    real = Accounts.charge

    def late(self: Accounts, charges: Any, step: int, note: str, *, reserve: bool = False) -> Any:
        if charged:
            real(self, *charged.pop())
        charged.append((charges, step, note))
        return []

    monkeypatch.setattr(Accounts, "charge", late)
    assert forked(lambda: life(fed, tmp_path, "after the release", 2)) == signal.SIGKILL
    with pytest.raises(AssertionError):
        check(tmp_path)


def trainer_in(fed: Any, folder: Path, **changes: Any) -> FederatedTrainer:
    transport = fed.Scripted({f"c{i}": fed.constant(np.zeros(8)) for i in range(3)})
    settings: dict[str, Any] = {
        "model": nn.Linear(3, 2),
        "transport": transport,
        "privacy": ClientLevel(epsilon=5.0),
        "rounds": ROUNDS,
        "ledger": folder / "ledger.db",
        "checkpoint": folder / "state",
    }
    return FederatedTrainer(**{**settings, **changes})


def run_until(fed: Any, folder: Path, last: int, **changes: Any) -> None:
    """A process that ends after round ``last``."""

    class Enough(Exception):
        pass

    def stop(round: Any) -> None:
        if round.number == last:
            raise Enough

    trainer = trainer_in(fed, folder, on_round=stop, **changes)
    with pytest.raises(Enough):
        trainer.fit()
    if trainer.ledger is not None:
        trainer.ledger.close()


def test_an_old_checkpoint_spends_again(fed: Any, tmp_path: Path) -> None:
    """Put back a round: the rounds after it are new ones, with numbers of their own, and the budget still holds."""
    run_until(fed, tmp_path, 1)
    old = (tmp_path / "state").read_bytes()
    run_until(fed, tmp_path, 3)
    (tmp_path / "state").write_bytes(old)
    result = trainer_in(fed, tmp_path).fit()
    assert result.ledger is not None
    steps = [e["step"] for e in result.ledger.entries()]
    assert len(steps) == len(set(steps)) == 4  # one, two that were forgotten, and what the budget allowed
    assert result.stopped == "budget"
    assert result.epsilon <= 5.0
    assert [r.number for r in result.rounds] == [1, 2]


def test_research_noise_is_new_after_an_old_checkpoint(fed: Any, tmp_path: Path) -> None:
    """Also noise from a seed: its stream is named by the number of the question, which is new."""
    seen: list[torch.Tensor] = []
    more = {"noise": "research", "seed": 5, "privacy": ClientLevel(noise_multiplier=1.0)}
    run_until(fed, tmp_path, 1, **more)
    old = (tmp_path / "state").read_bytes()
    for _ in range(2):
        (tmp_path / "state").write_bytes(old)
        result = trainer_in(fed, tmp_path, rounds=2, **more).fit()
        assert result.ledger is not None
        result.ledger.close()
        seen.append(torch.cat([p.detach().reshape(-1) for p in result.model.parameters()]))
    assert not torch.allclose(seen[0], seen[1], atol=1e-3)


def damage(path: Path, how: str) -> None:
    raw = bytearray(path.read_bytes())
    if how == "missing":
        for part in path.parent.glob(path.name + "*"):
            part.unlink()
        return
    if how == "empty":
        raw = bytearray()
    elif how == "truncated":
        del raw[len(raw) // 2 :]
    elif how == "edited":
        at = raw.rfind(b"noise: ")
        raw[at : at + 5] = b"NOISE"
    path.write_bytes(bytes(raw))


@pytest.mark.parametrize("how", ["missing", "empty", "truncated", "edited", "older"])
def test_a_damaged_ledger_is_refused(fed: Any, tmp_path: Path, how: str) -> None:
    """Nothing is asked or released with a ledger that is not the one the checkpoint knows."""
    run_until(fed, tmp_path, 1)
    old = (tmp_path / "ledger.db").read_bytes()
    run_until(fed, tmp_path, 3)
    if how == "older":
        for part in tmp_path.glob("ledger.db*"):
            part.unlink()
        (tmp_path / "ledger.db").write_bytes(old)
    else:
        damage(tmp_path / "ledger.db", how)
    transport = fed.Scripted({f"c{i}": fed.constant(np.zeros(8)) for i in range(3)})
    with pytest.raises(LedgerError):
        trainer_in(fed, tmp_path, transport=transport).fit()
    assert transport.tasks == []


def test_a_ledger_of_another_schema_is_refused(fed: Any, tmp_path: Path) -> None:
    import sqlite3

    run_until(fed, tmp_path, 2)
    with sqlite3.connect(tmp_path / "ledger.db") as db:
        (name,) = db.execute("select name from sqlite_master where type='table' order by name limit 1").fetchone()
        db.execute(f'alter table "{name}" rename to something_else')
    db.close()
    with pytest.raises(LedgerError):
        trainer_in(fed, tmp_path).fit()


@pytest.mark.parametrize("part", range(12))
def test_a_damaged_checkpoint_is_refused(fed: Any, tmp_path: Path, part: int) -> None:
    """Cut anywhere, or with a flipped bit: an error of ours, before anybody is asked."""
    run_until(fed, tmp_path, 2)
    raw = bytearray((tmp_path / "state").read_bytes())
    at = len(raw) * part // 12
    if part % 2:
        del raw[at:]
    else:
        raw[at] ^= 0x11
    (tmp_path / "state").write_bytes(bytes(raw))
    transport = fed.Scripted({f"c{i}": fed.constant(np.zeros(8)) for i in range(3)})
    with pytest.raises(SfumatoError):
        trainer_in(fed, tmp_path, transport=transport).fit()
    assert transport.tasks == []


def test_a_checkpoint_of_another_model_is_refused(fed: Any, tmp_path: Path) -> None:
    run_until(fed, tmp_path, 1)
    transport = fed.Scripted({f"c{i}": fed.constant(np.zeros(15)) for i in range(3)})
    with pytest.raises(SfumatoError, match="other parameters"):
        trainer_in(fed, tmp_path, transport=transport, model=nn.Linear(4, 3)).fit()


def test_a_checkpoint_without_its_ledger_is_refused(fed: Any, tmp_path: Path) -> None:
    """A ledger in memory knows nothing of what was spent."""
    run_until(fed, tmp_path, 1)
    with pytest.raises(LedgerError):
        trainer_in(fed, tmp_path, ledger=None).fit()


def test_replies_of_the_first_life_are_not_heard_in_the_second(fed: Any, tmp_path: Path) -> None:
    """The round that was asked and not finished has another number and nonce."""
    kept: list[Any] = []

    def slow(task: Any, client: str) -> None:
        kept.append(fed.reply(task, client, np.full(8, 100.0)))
        raise OSError("killed")

    with pytest.raises(OSError, match="killed"):
        trainer_in(fed, tmp_path, transport=fed.Scripted({"c0": slow})).fit()
    result = trainer_in(fed, tmp_path, transport=fed.Scripted({"c0": lambda t, c: list(kept)})).fit()
    assert all(r.accepted == 0 and r.rejected == {"other round": 1} for r in result.rounds)


def test_sample_level_clients_pay_for_both_lives(fed: Any, tmp_path: Path) -> None:
    """A round that the server forgot is in the clients' ledgers, and their budgets hold."""
    more: dict[str, Any] = {
        "transport": None,
        "ledger": None,
        "privacy": SampleLevel(epsilon=4.0),
        "local": LocalTraining(steps=3, batch_size=5),
        "client_ledgers": tmp_path / "clients",
    }
    run_until(fed, tmp_path, 1, clients=fed.federation(), **more)
    old = (tmp_path / "state").read_bytes()
    run_until(fed, tmp_path, 3, clients=fed.federation(), **more)
    (tmp_path / "state").write_bytes(old)
    result = trainer_in(fed, tmp_path, clients=fed.federation(), **more).fit()
    for ledger in result.client_ledgers.values():
        assert sum(e["count"] for e in ledger.entries()) == 12  # of 3 + 6 + 9 steps, the budget is for 12
        assert float(ledger.epsilon(delta=1e-5)) <= 4.0
    assert result.epsilon == max(float(ledger.epsilon(delta=1e-5)) for ledger in result.client_ledgers.values())


@pytest.mark.parametrize("how", ["deleted", "memory", "another folder", "older"])
def test_clients_cannot_forget_what_they_spent(fed: Any, tmp_path: Path, how: str) -> None:
    """With a ledger that holds less than the checkpoint knows, a client would start with a fresh budget: refused."""
    more: dict[str, Any] = {
        "transport": None,
        "ledger": None,
        "privacy": SampleLevel(epsilon=4.0),
        "local": LocalTraining(steps=3, batch_size=5),
    }
    folder: Path | None = tmp_path / "clients"
    run_until(fed, tmp_path, 1, clients=fed.federation(), client_ledgers=folder, **more)
    assert folder is not None
    first = min(folder.glob("*.db"))
    old = first.read_bytes()
    run_until(fed, tmp_path, 3, clients=fed.federation(), client_ledgers=folder, **more)
    if how in ("deleted", "older"):
        for part in folder.glob(first.name + "*"):
            part.unlink()
    if how == "older":
        first.write_bytes(old)
    if how == "memory":
        folder = None
    if how == "another folder":
        folder = tmp_path / "others"
    with pytest.raises(LedgerError):
        trainer_in(fed, tmp_path, clients=fed.federation(), client_ledgers=folder, **more).fit()


@pytest.mark.parametrize("epsilon", [math.inf, 1e308])
def test_what_a_client_claims_does_not_end_the_run(fed: Any, tmp_path: Path, epsilon: float) -> None:
    """An infinite ε is reported, and kept over a restart."""
    says = {f"c{i}": (lambda t, c: fed.reply(t, c, np.zeros(8), epsilon=epsilon)) for i in range(2)}
    more: dict[str, Any] = {"ledger": None, "privacy": SampleLevel(epsilon=1.0)}
    for _ in range(2):
        result = trainer_in(fed, tmp_path, transport=fed.Scripted(says), **more).fit()
        assert result.epsilon == epsilon
        assert len(result.rounds) == ROUNDS


def test_min_separation_holds_over_a_restart(fed: Any, tmp_path: Path) -> None:
    from sfumato.federated import MinSeparation

    for last in (2, 4):
        run_until(fed, tmp_path, last, cohort=MinSeparation(1, 3), privacy=ClientLevel(noise_multiplier=2.0), rounds=9)
    with Ledger(tmp_path / "ledger.db") as ledger:
        digests = [e["records"] for e in ledger.entries()]
    assert all(len(set(digests[i : i + 3])) == 3 for i in range(len(digests) - 2))


SERVER = """
import sys
import numpy as np
from torch import nn
from pathlib import Path
from sfumato.federated import ClientLevel, FederatedTrainer, FixedCohort
from sfumato.federated.wire.messages import Reply

class Clients:
    def clients(self):
        return [f"c{i}" for i in range(6)]
    def ask(self, task, ids, *, deadline):
        with open(folder / "asked", "a") as f:
            f.write(f"{task.run} {task.round}\\n")
        for c in ids:
            names = c, task.run, task.round, task.nonce, task.base, task.schema
            yield Reply(*names, {"values": np.zeros(8, np.float32)})
    def close(self):
        pass

folder = Path(sys.argv[1])
def seen(round):
    with open(folder / "released", "a") as f:
        f.write(f"{round.number}\\n")
print("ready", flush=True)
FederatedTrainer(model=nn.Linear(3, 2), transport=Clients(), privacy=ClientLevel(noise_multiplier=30.0),
    cohort=FixedCohort(3), rounds=100000, ledger=folder / "ledger.db", checkpoint=folder / "state", on_round=seen).fit()
"""


@pytest.mark.slow
@pytest.mark.dist
def test_killed_from_outside_at_any_time(tmp_path: Path) -> None:
    """Six lives of a server in its own process, each killed at a random moment."""
    (tmp_path / "server.py").write_text(textwrap.dedent(SERVER))
    rng = np.random.default_rng()
    for _ in range(6):
        process = subprocess.Popen([sys.executable, tmp_path / "server.py", tmp_path], stdout=subprocess.PIPE)
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(float(rng.uniform(0.3, 1.5)))
        process.kill()
        process.wait()
        process.stdout.close()
    asked = (tmp_path / "asked").read_text().splitlines()
    released = (tmp_path / "released").read_text().splitlines()
    with Ledger(tmp_path / "ledger.db") as ledger:
        ledger.verify()
        steps = {f"{e['run']} {e['step']}" for e in ledger.entries()}
    assert len(released) > 6
    assert set(asked) <= steps
    assert len(asked) == len(set(asked))
    assert len(steps) >= len(released)
