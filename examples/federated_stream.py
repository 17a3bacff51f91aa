"""Devices that see new network flows every round learn to tell attacks apart; ε does not grow with the rounds."""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn
from torch.utils.data import TensorDataset

import sfumato as sf
import sfumato.federated as fed

CLASSES = ("normal", "scan", "flood", "exfiltration")
FEATURES = (
    "duration",
    "packets",
    "bytes out",
    "bytes in",
    "ports",
    "peers",
    "SYN share",
    "interval",
    "payload",
    "hour",
)
COVERS = (
    "ε bounds what everything that leaves a device tells about whether any one flow was among those it saw (adding or "
    "removing it). Every flow is seen in one round by one device, which the device has to see to (each flow is dropped "
    "after its round): so rounds compose in parallel. Not covered: all flows of one host together, nor how many flows "
    "there were."
)


@dataclass(frozen=True)
class Settings:
    """``flows``: of a device in a round. ``turn``: part of a quarter turn by which the classes move in a round.
    ``steps``: DP-SGD steps of a device in a round. ``seed``: of the made-up flows and the start, never of noise."""

    devices: int = 12
    flows: int = 400
    rounds: int = 30
    epsilon: float = 2.0
    delta: float = 1e-5
    turn: float = 0.05
    steps: int = 5
    lr: float = 3.0
    max_grad_norm: float = 1.0
    seed: int = 0


def seeded(*words: object) -> torch.Generator:
    """A generator that depends on nothing but ``words``."""
    digest = hashlib.sha256(repr(words).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)


class Traffic:
    """SYNTHETIC flows, made up here: no real traffic. Each class is a cloud of standard scores, and attackers change
    their ways: from round to round the clouds' centres turn from one set of directions into another. Every device sees
    its own mixture of attacks, and its own shift."""

    def __init__(self, s: Settings):
        self.s, width = s, len(FEATURES)
        self.start, self.end = (
            3.0 * torch.linalg.qr(torch.randn(width, width, generator=seeded(s.seed, name)))[0][: len(CLASSES)]
            for name in ("start", "end")
        )

    def flows(self, place: str, round: int, count: int) -> TensorDataset:
        """(count, features) float32 and class numbers that ``place`` sees in ``round``; others in every round."""
        generator, own = seeded(self.s.seed, place, round), seeded(self.s.seed, place)
        mixture = torch.tensor([0.7, 0.1, 0.1, 0.1])
        shift = torch.zeros(len(FEATURES))
        if place != "everywhere":
            mixture = mixture * torch.rand(len(CLASSES), generator=own).clamp_min(0.05)
            shift = 0.3 * torch.randn(len(FEATURES), generator=own)
        y = torch.multinomial(mixture, count, replacement=True, generator=generator)
        angle = math.pi / 2 * self.s.turn * round
        centres = self.start * math.cos(angle) + self.end * math.sin(angle)
        x = centres[y] + shift + torch.randn(count, len(FEATURES), generator=generator)
        return TensorDataset(x.clamp(-5.0, 5.0), y)

    def stream(self, device: str) -> fed.Stream:
        """What ``device`` sees: the same number of flows in every round, none of them twice."""
        return fed.Stream(lambda round: self.flows(device, round, self.s.flows), disjoint=True)


@torch.no_grad()
def accuracy(model: nn.Module, data: TensorDataset) -> float:
    """Share of the flows that are told right."""
    x, y = data.tensors
    return float((model.eval()(x).argmax(1) == y).float().mean())


def trainer_for(traffic: Traffic, s: Settings, rounds: int, show: Callable[[fed.Round], None]) -> fed.FederatedTrainer:
    """All devices with their streams, and a fresh model."""
    torch.manual_seed(s.seed)
    return fed.FederatedTrainer(
        model=nn.Sequential(nn.Linear(len(FEATURES), 32), nn.Tanh(), nn.Linear(32, len(CLASSES))),
        clients={f"device {k}": traffic.stream(f"device {k}") for k in range(s.devices)},
        privacy=fed.SampleLevel(epsilon=s.epsilon, delta=s.delta, max_grad_norm=s.max_grad_norm),
        local=fed.LocalTraining(steps=s.steps, batch_size=batch(s), lr=s.lr),
        rounds=rounds,
        seed=s.seed,
        on_round=show,
    )


def run(s: Settings) -> dict[str, Any]:
    """Train round by round; after each, say what the model makes of the flows that come next."""
    traffic, began, lines = Traffic(s), time.perf_counter(), []
    early = max(1, s.rounds // 5)
    stopped: nn.Module | None = None

    def show(r: fed.Round) -> None:
        nonlocal stopped
        reached = accuracy(trainer.model, traffic.flows("everywhere", r.number + 1, 2000))
        if r.number == early:
            stopped = trainer.model
        lines.append({"round": r.number, "accuracy": reached, "epsilon": r.epsilon, "answered": r.accepted})
        say(
            f"round {r.number:>3}: {r.accepted}/{s.devices} devices, accuracy on the next flows {reached:.3f}, "
            f"ε = {r.epsilon:.3f}, {r.bytes_up / 1e3:.0f} kB up, {time.perf_counter() - began:.1f} s"
        )

    trainer = trainer_for(traffic, s, s.rounds, show)
    result = trainer.fit()
    last = traffic.flows("everywhere", s.rounds + 1, 2000)
    return {
        "rounds": lines,
        "epsilon": result.epsilon,
        "delta": result.delta,
        "accuracy": accuracy(result.model, last),
        "early": early,
        "accuracy_if_stopped_early": None if stopped is None else accuracy(stopped, last),
        "accuracy_of_normal": float((last.tensors[1] == 0).float().mean()),
        "epsilon_if_flows_came_back": repeated(s),
    }


def batch(s: Settings) -> int:
    """Expected flows of a device in one step."""
    return max(1, s.flows // 2)


def repeated(s: Settings) -> float:
    """ε of the same noise if the same flows came back in every round."""
    rate = batch(s) / s.flows
    noise = sf.accounting.noise_multiplier(
        target_epsilon=s.epsilon, target_delta=s.delta, sample_rate=rate, steps=s.steps
    )
    steps = s.steps * s.rounds
    return float(sf.accounting.epsilon(noise_multiplier=noise, sample_rate=rate, steps=steps, delta=s.delta))


def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        prog="federated_stream.py", description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    for name, value in asdict(Settings()).items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(value), default=value, help=" ")
    parser.add_argument("--json", action="store_true", help="print exactly one JSON object on standard output")
    options = vars(parser.parse_args(argv))
    as_json = options.pop("json")
    s = Settings(**options)
    torch.set_num_threads(1)  # steps of a millisecond: threads would only wait for each other
    result = run(s)
    if as_json:
        print(json.dumps(result))
        return
    early = result["accuracy_if_stopped_early"]
    print(
        f"accuracy {result['accuracy']:.3f} on the flows after round {s.rounds}; {early:.3f} with the model of round "
        f"{result['early']}, {result['accuracy_of_normal']:.3f} for calling everything normal. The flows are synthetic."
    )
    print(
        f"ε = {result['epsilon']:.3f} at δ = {s.delta:g} after {len(result['rounds'])} rounds; it would be "
        f"{result['epsilon_if_flows_came_back']:.2f} if the same flows came back every round. {COVERS}"
    )


def say(line: str) -> None:
    """Progress, on standard error: standard output is for the result."""
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
