"""What federated training reaches on real e-mails, and what it sends: ``python -m benchmarks.federated_accuracy``.

Everything starts from the same network, trained on 100 public mails, and is measured on the same 1,280 mails that no
client holds. See examples/federated_emails.py for the mails, the clients and the network.
"""

import argparse
import copy
import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import TensorDataset

import sfumato.federated as fed

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))

import federated_emails as example
from emails import installed_model
from mails import read_mails

EPSILONS = (1.0, 2.0, 4.0, 8.0)
METHODS: dict[str, dict[str, Any]] = {
    "whole network": {},
    "8 bits a number": {"bits": 8},
    "1 bit a number": {"bits": 1},
    "LoRA, rank 32": {"mode": "lora"},
    "last layer": {"mode": "last"},
}
RATES = (0.1, 0.3, 1.2)  # of clients on their own at ε = 4; the best one counts, chosen on the test mails
PLAIN = 1e6  # a bound that nothing reaches
Federation, Settings, Figures = example.Federation, example.Settings, dict[str, Any]


def figures(result: fed.Result, f: Federation) -> Figures:
    reached = example.accuracy(result.model, f.test)
    return {"accuracy": reached, "epsilon": result.epsilon, "up": result.bytes_up, "down": result.bytes_down}


def together(f: Federation, s: Settings) -> Figures:
    return figures(example.trainer(example.start(f, s), f, s).fit(), f)


def distilled(f: Federation, s: Settings) -> Figures:
    """Every client trains a network of its own, and tells what it makes of public mails."""
    network = example.start(f, s)
    public = torch.cat([f.labelled.tensors[0], f.unlabelled])
    result = fed.FederatedDistillation(
        model=network,
        peers={name: fed.Peer(copy.deepcopy(network), data) for name, data in f.clients.items()},
        public=public,
        privacy=fed.SampleLevel(epsilon=s.epsilon, delta=s.delta, max_grad_norm=s.max_grad_norm or 0.3),
        local=fed.LocalTraining(
            steps=s.steps or 40, batch_size=example.EVERY, lr=s.lr or 0.3 * s.epsilon / 4.0, momentum=0.9
        ),
        rounds=s.rounds or 1,
        queries=len(public),
        distill=fed.Distill(epochs=20, lr=0.003),
        weights=f.weights,
        noise=s.noise,
        seed=s.seed,
    ).fit()
    return figures(result, f)


def whole_clients(f: Federation, s: Settings) -> Figures:
    """Client-level: a trusted server, and ε for all mails of a client together."""
    result = fed.FederatedTrainer(
        model=example.start(f, s),
        clients=f.clients,
        privacy=fed.ClientLevel(epsilon=s.epsilon, delta=s.delta, max_update_norm=s.max_grad_norm or 1.0),
        local=fed.LocalTraining(epochs=2, lr=s.lr or 0.1),
        rounds=s.rounds or 10,
        train=example.TRAINED[s.mode],
        noise=s.noise,
        seed=s.seed,
    ).fit()
    return figures(result, f)


def without_noise(f: Federation, s: Settings) -> Figures:
    """The same rounds without noise and clipping."""
    result = fed.FederatedTrainer(
        model=example.start(f, s),
        clients=f.clients,
        privacy=fed.SampleLevel(noise_multiplier=0.0, max_grad_norm=PLAIN),
        local=fed.LocalTraining(steps=1, batch_size=example.EVERY, lr=s.lr or 2.0),
        rounds=s.rounds or 60,
        server=fed.Momentum(momentum=0.9),
        weights=f.weights,
        noise="research",
        seed=s.seed,
    ).fit()
    return figures(result, f)


def alone(f: Federation, s: Settings, train: Callable[[Federation, Settings], Figures]) -> dict[str, float]:
    """{client: accuracy of what it reaches without the others, from the same start}."""
    return {
        name: train(f._replace(clients={name: data}, weights={name: 1.0}), s)["accuracy"]
        for name, data in f.clients.items()
    }


def held_back(f: Federation) -> Federation:
    """For choosing recipes: a fifth of every client's mails takes the place of the test mails."""
    kept, tests = {}, []
    for name, data in f.clients.items():
        x, y = data.tensors
        away = torch.arange(len(y)) % 5 == 0
        kept[name] = TensorDataset(x[~away], y[~away])
        tests.append((x[away], y[away]))
    return f._replace(clients=kept, test=TensorDataset(*(torch.cat(parts) for parts in zip(*tests, strict=True))))


def load(data: str, cache: str | None) -> Federation:
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()
    s = Settings(data, cache=cache)
    mails = read_mails(Path(data))
    return example.federation(mails, example.encoded(mails, s, installed_model()), s)


# -- the table --------------------------------------------------------------------------------------------------------


def middle(runs: list[Figures]) -> Figures:
    found = sorted(run["accuracy"] for run in runs)
    return runs[0] | {
        "accuracy": statistics.median(found),
        "least": found[0],
        "most": found[-1],
        "epsilon": max(run["epsilon"] for run in runs),
    }


def measure(f: Federation, seeds: int, rows: list[str], say: Callable[[str], None]) -> Figures:
    base = Settings("", noise="research")
    found: Figures = {
        "untuned": [example.accuracy(example.start(f, replace(base, seed=k)), f.test) for k in range(seeds)]
    }
    say(f"untuned {found['untuned']}")

    def several(name: str, train: Callable[[Federation, Settings], Figures], s: Settings) -> None:
        began = time.perf_counter()
        found[name] = middle([train(f, replace(s, seed=k)) for k in range(seeds)])
        say(f"{name}: {found[name]} {(time.perf_counter() - began) / seeds:.1f} s a run")

    def on_their_own(name: str, train: Callable[[Federation, Settings], Figures], s: Settings) -> None:
        runs = {
            rate: [alone(f, replace(s, seed=k, lr=rate * s.epsilon / 4.0), train) for k in range(min(3, seeds))]
            for rate in RATES
        }
        best = {
            client: max(statistics.median(run[client] for run in of_rate) for of_rate in runs.values())
            for client in f.clients
        }
        found[name] = best
        say(f"{name}: {best}")

    if "together" in rows:
        several("without noise", without_noise, base)
        for epsilon in EPSILONS:
            for name, options in METHODS.items():
                several(f"{name} {epsilon:g}", together, replace(base, epsilon=epsilon, **options))
    if "distilled" in rows:
        for epsilon in EPSILONS:
            several(f"distilled {epsilon:g}", distilled, replace(base, epsilon=epsilon))
    if "clients" in rows:
        several("whole clients 8", whole_clients, replace(base, epsilon=8.0, mode="last"))
    if "alone" in rows:
        on_their_own("alone without noise", without_noise, replace(base, rounds=30))
        for epsilon in EPSILONS:
            on_their_own(f"alone {epsilon:g}", together, replace(base, epsilon=epsilon))
    return found


def table(found: Figures, sizes: dict[str, int]) -> str:
    """Markdown."""
    heads = [f"ε = {e:g}" for e in EPSILONS]
    lines = [f"| | {' | '.join(heads)} | sent up | sent down |", "|---" * (len(heads) + 3) + "|"]

    def cell(run: Figures | None) -> str:
        if run is None:
            return "–"
        return f"{run['accuracy']:.3f} ({run['least']:.3f}–{run['most']:.3f})"

    for name in [*METHODS, "distilled"]:
        runs = [found.get(f"{name} {e:g}") for e in EPSILONS]
        if any(runs):
            one = next(run for run in runs if run)
            lines.append(f"| {name} | {' | '.join(map(cell, runs))} | {size(one['up'])} | {size(one['down'])} |")
    if any(f"alone {e:g}" in found for e in EPSILONS):
        for name, pick in (("best client alone", max), ("median client alone", statistics.median)):
            cells = [f"{pick(found[f'alone {e:g}'].values()):.3f}" for e in EPSILONS]
            lines.append(f"| {name} | {' | '.join(cells)} | 0 | 0 |")
    lines += ["", f"- untuned: {statistics.median(found['untuned']):.3f}"]
    if "without noise" in found:
        run = found["without noise"]
        lines.append(f"- federated without privacy: {cell(run)}, {size(run['up'])} up and as much down")
    if "alone without noise" in found:
        best = max(found["alone without noise"], key=found["alone without noise"].__getitem__)
        values = found["alone without noise"].values()
        lines.append(
            f"- clients alone without privacy: best {max(values):.3f} ({best}, {sizes[best]} mails), "
            f"median {statistics.median(values):.3f}"
        )
    if "whole clients 8" in found:
        run = found["whole clients 8"]
        lines.append(f"- client-level, ε = 8 (last layer): {cell(run)}, {size(run['up'])} up, {size(run['down'])} down")
    return "\n".join(lines) + "\n"


def size(count: int) -> str:
    return f"{count / 1e6:.2f} MB" if count >= 1e5 else f"{count / 1e3:.1f} kB"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.federated_accuracy", description=__doc__)
    parser.add_argument("--data", required=True, help="folder of the mails")
    parser.add_argument("--cache", help="file for the encoder's states")
    parser.add_argument("--seeds", type=int, default=3, help="0 up to one less; clients alone: at most three")
    parser.add_argument("--rows", nargs="+", default=ROWS, choices=ROWS)
    parser.add_argument(
        "--out", type=Path, help="write OUT.json, keeping rows that are in it already, and print it all"
    )
    options = parser.parse_args()
    torch.set_num_threads(1)
    f = load(options.data, options.cache)
    sizes = {name: len(data) for name, data in f.clients.items()}
    before = json.loads(options.out.read_text()) if options.out and options.out.is_file() else {}
    found = before | measure(f, options.seeds, options.rows, lambda line: print(line, file=sys.stderr, flush=True))
    if options.out:
        options.out.write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n")
    print(table(found, sizes))


ROWS = ["together", "distilled", "clients", "alone"]

if __name__ == "__main__":
    main()
