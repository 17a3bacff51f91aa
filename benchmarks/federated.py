"""What a round of federated training costs: ``python -m benchmarks.federated [--rounds N] [--out FILE.md]``.

A round (local training of every client, clipping, noise, ledger) as a ratio to the local training alone: the same model
and data, all engines in one process, taking turns. See README.md.
"""

import argparse
import contextlib
import copy
import io
import platform
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

from sfumato.federated import ClientLevel, FederatedTrainer, LocalTraining, Round

Data = dict[str, TensorDataset]
Turn = Callable[[], object]


@dataclass(frozen=True)
class Case:
    """``records`` of shape ``inputs`` for each of ``clients``, one epoch in batches of ``batch``."""

    make: Callable[[], nn.Module]
    inputs: tuple[int, ...]
    classes: int
    clients: int
    records: int
    batch: int

    def data(self) -> Data:
        generator = torch.Generator().manual_seed(0)
        n = self.records
        return {
            f"{k:04d}": TensorDataset(
                torch.randn(n, *self.inputs, generator=generator),
                torch.randint(0, self.classes, (n,), generator=generator),
            )
            for k in range(self.clients)
        }


def mlp(*widths: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for a, b in pairwise(widths):
        layers += [nn.Linear(a, b), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def _lenet() -> nn.Sequential:
    body = [nn.Conv2d(1, 6, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(6, 16, 5), nn.ReLU(), nn.MaxPool2d(2)]
    return nn.Sequential(*body, nn.Flatten(), *mlp(400, 120, 84, 10))


CASES = {
    "MLP 1.5k, 7 steps, 50 clients": Case(lambda: mlp(20, 32, 24), (20,), 24, 50, 200, 32),
    "MLP 1.5k, 7 steps, 500 clients": Case(lambda: mlp(20, 32, 24), (20,), 24, 500, 200, 32),
    "MLP 10k, 7 steps, 100 clients": Case(lambda: mlp(20, 330, 10), (20,), 10, 100, 200, 32),
    "LeNet 62k, 5 steps, 50 clients": Case(_lenet, (1, 28, 28), 10, 50, 50, 10),
    "MLP 1.1M, 2 steps, 50 clients": Case(lambda: mlp(512, 1024, 512, 10), (512,), 10, 50, 64, 32),
}
LR = 0.05


def pure(case: Case, data: Data) -> Turn:
    """Local training and nothing else: no copies of the model, no updates, no privacy."""
    model, generator = case.make(), torch.Generator().manual_seed(0)
    start = copy.deepcopy(model.state_dict())
    parameters = list(model.parameters())

    def turn() -> None:
        model.load_state_dict(start)
        for held in data.values():
            x, y = held.tensors
            for rows in torch.randperm(len(x), generator=generator).split(case.batch):
                for p in parameters:
                    p.grad = None
                F.cross_entropy(model(x[rows]), y[rows]).backward()
                with torch.no_grad():
                    for p in parameters:
                        p.add_(p.grad, alpha=-LR)  # type: ignore[arg-type]

    return turn


def ordinary(case: Case, data: Data) -> Turn:
    """The same with ``torch.optim.SGD``, as most people would write it."""
    model, generator = case.make(), torch.Generator().manual_seed(0)
    start = copy.deepcopy(model.state_dict())
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)

    def turn() -> None:
        model.load_state_dict(start)
        for held in data.values():
            x, y = held.tensors
            for rows in torch.randperm(len(x), generator=generator).split(case.batch):
                optimizer.zero_grad()
                F.cross_entropy(model(x[rows]), y[rows]).backward()
                optimizer.step()

    return turn


def trainer(
    case: Case, data: Data, *, vectorize: bool, rounds: int, on_round: Callable[[Round], object] | None = None
) -> FederatedTrainer:
    return FederatedTrainer(
        model=case.make(),
        clients=data,
        privacy=ClientLevel(noise_multiplier=1.0, max_update_norm=1.0),
        local=LocalTraining(epochs=1, batch_size=case.batch, lr=LR),
        rounds=rounds,
        seed=0,
        vectorize=vectorize,
        on_round=on_round,
    )


def _rounds(case: Case, data: Data, vectorize: bool) -> Turn:
    """A round a call, all of one run that waits in a thread: what is done once is outside the clock."""
    go, done = threading.Semaphore(0), threading.Semaphore(0)

    def wait(_: object = None) -> None:
        done.release()
        go.acquire()

    def run() -> None:
        torch.set_num_threads(1)  # PyTorch keeps it by thread
        running.fit()

    def turn() -> None:
        go.release()
        done.acquire()

    running = trainer(case, data, vectorize=vectorize, rounds=1000, on_round=wait)
    threading.Thread(target=run, daemon=True).start()
    done.acquire()
    return turn


def sfumato(case: Case, data: Data) -> Turn:
    return _rounds(case, data, vectorize=False)


def vectorized(case: Case, data: Data) -> Turn:
    return _rounds(case, data, vectorize=True)


def pfl(case: Case, data: Data) -> Turn:
    """pfl-research, PyTorch, its plain (fastest) data set, central Gaussian mechanism with the same bound and noise."""
    from pfl.aggregate.simulate import SimulatedBackend
    from pfl.algorithm.base import NNAlgorithmParams
    from pfl.algorithm.federated_averaging import FederatedAveraging
    from pfl.data.dataset import Dataset
    from pfl.data.federated_dataset import FederatedDataset
    from pfl.data.sampling import get_user_sampler
    from pfl.hyperparam.base import NNEvalHyperParams, NNTrainHyperParams
    from pfl.metrics import Weighted
    from pfl.model.pytorch import PyTorchModel
    from pfl.privacy.gaussian_mechanism import GaussianMechanism
    from pfl.privacy.privacy_mechanism import CentrallyAppliedPrivacyMechanism

    inner = case.make()

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x)

        def loss(self, x: Tensor, y: Tensor, eval: bool = False) -> Tensor:
            return F.cross_entropy(self(x), y)

        def metrics(self, x: Tensor, y: Tensor, eval: bool = False) -> dict[str, object]:
            return {"loss": Weighted(0.0, len(x))}

    module = Model()
    model = PyTorchModel(module, torch.optim.SGD, torch.optim.SGD(module.parameters(), lr=1.0))
    users = list(data)
    held = FederatedDataset(
        lambda user: Dataset(data[user].tensors, user_id=user), get_user_sampler("minimize_reuse", users)
    )
    mechanism = CentrallyAppliedPrivacyMechanism(GaussianMechanism(1.0, 1.0))
    backend = SimulatedBackend(training_data=held, val_data=held, postprocessors=[mechanism])
    algorithm = NNAlgorithmParams(
        central_num_iterations=1, evaluation_frequency=10**6, train_cohort_size=len(users), val_cohort_size=0
    )
    training = NNTrainHyperParams(local_num_epochs=1, local_learning_rate=LR, local_batch_size=case.batch)

    def turn() -> None:
        with contextlib.redirect_stdout(io.StringIO()):  # it prints metrics
            FederatedAveraging().run(
                algorithm_params=algorithm,
                backend=backend,
                model=model,
                model_train_params=training,
                model_eval_params=NNEvalHyperParams(local_batch_size=None),
                callbacks=[],
            )

    return turn


ENGINES: dict[str, Callable[[Case, Data], Turn]] = {
    "local training alone": pure,
    "local training, torch.optim.SGD": ordinary,
    "Sfumato": sfumato,
    "Sfumato, vectorize=True": vectorized,
    "pfl-research": pfl,
}


def interleaved(case: Case, rounds: int) -> dict[str, list[float] | str]:
    """{engine: CPU seconds a client, round by round}, or the reason why it does not run."""
    data = case.data()
    turns: dict[str, Turn] = {}
    out: dict[str, list[float] | str] = {}
    for name, make in ENGINES.items():
        try:
            turns[name] = make(case, data)
            turns[name]()
            out[name] = []
        except ImportError:
            out[name] = "not installed"
        except Exception as error:  # noqa: BLE001 - whatever a peer raises is the result
            turns.pop(name, None)
            out[name] = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"[:80]
    names = list(turns)
    for k in range(rounds):
        shift = k % len(names)
        for name in names[shift:] + names[:shift]:
            start = time.process_time()
            turns[name]()
            found = out[name]
            assert isinstance(found, list)
            found.append((time.process_time() - start) / case.clients)
    return out


def speed(rounds: int) -> list[str]:
    """A table: CPU milliseconds a client, and the ratio to local training (median and quartiles over rounds)."""
    lines = ["| Case | Engine | ms a client | ratio | quartiles |", "|---|---|---|---|---|"]
    for title, case in CASES.items():
        found = interleaved(case, rounds)
        base = found["local training alone"]
        for name, times in found.items():
            if isinstance(times, str):
                lines.append(f"| {title} | {name} | – | – | {times} |")
                continue
            ratios = [a / b for a, b in zip(times, base, strict=True) if isinstance(b, float)]
            low, middle, high = statistics.quantiles(ratios, n=4, method="inclusive")
            took = f"{statistics.median(times) * 1e3:.3f}"
            lines.append(f"| {title} | {name} | {took} | {middle:.2f} | {low:.2f} to {high:.2f} |")
            print(lines[-1], flush=True)
    return lines


FIRST = """
import time, torch
begun = time.perf_counter()
from benchmarks.federated import CASES, trainer
case = CASES["MLP 1.5k, 7 steps, 50 clients"]
trainer(case, case.data(), vectorize={vectorize}, rounds=1).fit()
print(time.perf_counter() - begun)
"""

MANY = """
import resource, torch
from torch.utils.data import TensorDataset
from benchmarks.federated import Case, mlp, trainer
torch.set_num_threads(1)
case = Case(lambda: mlp(20, 32, 24), (20,), 24, 1000, 20, 20)
def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize() / 2**20
def show(round):
    if round.number in (5, 50):
        print(resident())
trainer(case, case.data(), vectorize={vectorize}, rounds=50, on_round=show).fit()
"""


def _script(text: str) -> list[float]:
    done = subprocess.run([sys.executable, "-c", text], capture_output=True, text=True, check=True)
    return [float(line) for line in done.stdout.split()]


def beside() -> list[str]:
    """First round and memory, each in a process of its own."""
    lines = ["| What | Loop | `vectorize=True` |", "|---|---|---|"]
    first = [statistics.median(_script(FIRST.format(vectorize=v))[0] for _ in range(5)) for v in (False, True)]
    lines.append(
        f"| import, set-up and first round of 50 clients, PyTorch imported | {first[0]:.2f} s | {first[1]:.2f} s |"
    )
    many = [_script(MANY.format(vectorize=v)) for v in (False, True)]
    cells = [f"{a:.1f} MiB, {b:.1f} MiB" for a, b in many]
    lines.append(f"| 1,000 clients, 50 rounds: resident after round 5, after round 50 | {cells[0]} | {cells[1]} |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.federated", description=__doc__)
    parser.add_argument("--rounds", type=int, default=9, help="turns of each engine, at least 2")
    parser.add_argument("--out", type=Path, help="write a Markdown file")
    given = parser.parse_args()
    torch.set_num_threads(1)
    about = (
        f"{platform.machine()}, one thread, CPU time, Python {platform.python_version()}, PyTorch {torch.__version__}"
    )
    text = "\n".join([*speed(given.rounds), "", *beside()])
    print(text)
    if given.out is not None:
        given.out.write_text(f"# Federated rounds\n\n{about}.\n\n{text}\n", encoding="utf-8")


if __name__ == "__main__":
    main()
