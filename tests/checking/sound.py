"""Models, losses and batches in which each record keeps to itself: nothing may be found."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from tests.checking.cases import CE, B, Case, Hidden, Layer, around, ragged, sequences, tokens, vectors
from tests.checking.violations import Tagger
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint


def conv() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.GroupNorm(2, 8), nn.ReLU(inplace=True), nn.MaxPool2d(2), nn.Dropout2d(0.3),
        nn.Flatten(), nn.Linear(128, 3),
    )  # fmt: skip


def images(n: int = B) -> tuple[Tensor, Tensor]:
    return torch.rand(n, 3, 8, 8), torch.arange(n) % 3


class Encoder(nn.Module):
    """Attention with a padding mask, dropout in it, mean over the real positions."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 8, padding_idx=0)
        layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.2, batch_first=True)
        self.encoder, self.head = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False), nn.Linear(8, 3)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        h = self.encoder(self.embed(input_ids), src_key_padding_mask=attention_mask == 0)
        keep = attention_mask[..., None].to(h)
        return self.head((h * keep).sum(1) / keep.sum(1))


def masked_batch() -> tuple[Tensor, Tensor, Tensor]:
    return tokens()[0], ragged(), torch.arange(B) % 3


class Shared(nn.Module):
    """Tied embedding and head."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(11, 6), nn.Linear(6, 11, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.embed(ids)).transpose(1, 2)


class Depth(nn.Module):
    """A whole layer is skipped at random, for all records alike."""

    def __init__(self, each: bool):
        super().__init__()
        self.each, self.a, self.b, self.head = each, nn.Linear(5, 5), nn.Linear(5, 5), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        coin = torch.rand((len(x), 1) if self.each else ()) < 0.5
        return self.head(self.a(x) + coin * self.b(x))


class Branch(nn.Module):
    """Control flow for each record by its own values."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(5, 3), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return torch.where(x.mean(1, keepdim=True) > 0, self.a(x), self.b(x))


class Loop(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(5, 3), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([self.a(r) if bool(r.mean() > 0) else self.b(r) for r in x])


class Noisy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mean, self.log_std, self.head = nn.Linear(5, 4), nn.Linear(5, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        mean = self.mean(x)
        return self.head(mean + torch.randn_like(mean) * self.log_std(x).mul(0.1).exp())


class Counter(nn.Module):
    """A step count and a warm-up that depends on it: no record enters."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.steps, self.history = nn.Linear(5, 3), 0, []
        self.register_buffer("seen", torch.zeros((), dtype=torch.long))

    def forward(self, x: Tensor) -> Tensor:
        self.steps += 1
        self.seen += 1
        self.history.append(self.steps)
        return self.linear(x) * min(1.0, 0.5 + 0.1 * self.steps)


class Keyword(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(5, 3)

    def forward(self, *, values: Tensor, scale: float = 1.0) -> Any:
        return Boxed(self.linear(values) * scale, ["a"])


@dataclass
class Boxed:
    logits: Tensor
    names: list[str]


class OwnLoss(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(5, 3)

    def forward(self, x: Tensor, labels: Tensor | None = None) -> tuple[Tensor, ...]:
        logits = self.linear(x)
        return (logits,) if labels is None else (F.cross_entropy(logits, labels), logits)


class TwoInputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(5, 3), nn.Embedding(7, 3)

    def forward(self, x: Tensor, category: Tensor, table: Tensor | None = None) -> Tensor:
        out = self.a(x) + self.b(category)
        return out if table is None else out @ table


class TimeFirst(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rnn, self.head = nn.GRU(5, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.rnn(x)[0][-1])


class Weighed(nn.Module):
    """A mixture of experts in which each record goes to the better half of them."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.experts = nn.Linear(6, 4), nn.ModuleList(nn.Linear(6, 6) for _ in range(4))

    def forward(self, h: Tensor) -> Tensor:
        scores = self.gate(h)
        best = torch.zeros_like(scores).scatter(1, scores.topk(2, dim=1).indices, 1.0)
        weight = scores.masked_fill(best == 0, float("-inf")).softmax(1)
        return torch.stack([expert(h) * weight[:, e : e + 1] for e, expert in enumerate(self.experts)]).sum(0)


def token_loss(out: Tensor, batch: dict[str, Tensor]) -> Tensor:
    """Each record's own mean over its own tokens."""
    each = F.cross_entropy(out.transpose(1, 2), batch["labels"], reduction="none")
    keep = batch["mask"].to(each)
    return ((each * keep).sum(1) / keep.sum(1)).mean()


def token_batch() -> dict[str, Any]:
    ids, _ = tokens()
    return {"input_ids": ids, "labels": ids, "mask": ragged(), "ids": [f"record {i}" for i in range(B)], "source": "x"}


def frozen_part() -> nn.Module:
    model = Hidden()
    model.encode.requires_grad_(False)
    return model


def unused_layer() -> nn.Module:
    model = Hidden()
    model.spare = nn.Linear(3, 3)
    return model


def norm_in_eval() -> nn.Module:
    model = around(nn.BatchNorm1d(6))
    model[1].eval()
    return model


def half() -> nn.Module:
    return Hidden().to(torch.bfloat16)


class Uncopied(Hidden):
    """Holds a tensor with a history, as after a step of its own: deepcopy refuses."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = self.encode.weight.sum() * 0 + 1


def quick(build: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    def silent() -> nn.Module:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return build()

    return silent


SOUND: dict[str, Case] = {
    "perceptron": Case(Hidden),
    "in eval mode": Case(lambda: Hidden().eval()),
    "sum": Case(Hidden, nn.CrossEntropyLoss(reduction="sum"), options={"loss_reduction": "sum"}),
    "two records": Case(Hidden, batch=lambda: vectors(2)),
    "more records than are looked at": Case(Hidden, batch=lambda: vectors(33)),
    "equal records": Case(Hidden, batch=lambda: (torch.ones(B, 5), torch.zeros(B, dtype=torch.long))),
    "regression": Case(Hidden, nn.MSELoss(), lambda: (torch.randn(B, 5), torch.randn(B, 3))),
    "probabilities as targets": Case(
        lambda: nn.Sequential(nn.Linear(5, 3), nn.Sigmoid()), nn.BCELoss(),
        lambda: (torch.randn(B, 5), torch.rand(B, 3)),
    ),
    "convolutions, GroupNorm, dropout": Case(conv, batch=images),
    "BatchNorm in eval mode": Case(norm_in_eval),
    "LayerNorm": Case(lambda: around(nn.LayerNorm(6))),
    "InstanceNorm": Case(
        lambda: nn.Sequential(nn.Conv1d(4, 4, 1), nn.InstanceNorm1d(4, affine=True), nn.Flatten(), nn.Linear(20, 3)),
        batch=sequences,
    ),
    "padding masks": Case(Encoder, batch=masked_batch),
    "padding masks of one length": Case(Encoder, batch=lambda: (tokens()[0], torch.ones(B, 6).long(), vectors()[1])),
    "tied weights": Case(Shared, batch=lambda: (tokens()[0], tokens()[0])),
    "embedding bag of integers": Case(
        lambda: Layer(lambda m, x: m.head(m.embed(x).mean(1)), embed=nn.Embedding(11, 6), head=nn.Linear(6, 3)),
        batch=tokens,
    ),
    "as many steps as records": Case(
        lambda: Layer(lambda m, x: m.head(m.embed(x)).mean(1), embed=nn.Embedding(11, 6), head=nn.Linear(6, 3)),
        batch=lambda: tokens(6, 6),
    ),
    "sparse gradients": Case(
        lambda: Layer(lambda m, x: m.head(m.embed(x).mean(1)), embed=nn.Embedding(11, 6, sparse=True),
                      head=nn.Linear(6, 3)),
        batch=tokens,
    ),
    "activation checkpointing": Case(
        lambda: Layer(lambda m, x: m.b(checkpoint(m.a, x, use_reentrant=False)), a=nn.Linear(5, 6), b=nn.Linear(6, 3))
    ),
    "autoencoder": Case(lambda: nn.Sequential(nn.Linear(5, 3), nn.Linear(3, 5)), nn.MSELoss(), lambda: vectors()[0]),
    "single precision inside": Case(
        lambda: Hidden(lambda h: (h.float() / (h.float().square().mean(1, True) + 1e-5).sqrt()).to(h.dtype))
    ),
    "bfloat16 inside": Case(lambda: Hidden(lambda h: (h.bfloat16() @ torch.eye(6).bfloat16()).to(h.dtype))),
    "large values": Case(Hidden, batch=lambda: (1e4 * torch.randn(B, 5), vectors()[1])),
    "label smoothing": Case(Hidden, nn.CrossEntropyLoss(label_smoothing=0.1)),
    "unused layer": Case(unused_layer),
    "frozen layer": Case(frozen_part),
    "random depth, one coin": Case(lambda: Depth(each=False)),
    "random depth, a coin for each record": Case(lambda: Depth(each=True)),
    "noise in the forward": Case(Noisy),
    "branch for each record": Case(Branch),
    "loop over records": Case(Loop),
    "experts without capacity": Case(lambda: around(Weighed())),
    "spectral norm": Case(lambda: around(nn.utils.parametrizations.spectral_norm(nn.Linear(6, 6)))),
    "weight norm": Case(lambda: around(nn.utils.parametrizations.weight_norm(nn.Linear(6, 6)))),
    "weight norm, of old": Case(quick(lambda: around(nn.utils.weight_norm(nn.Linear(6, 6))))),
    "counters": Case(Counter),
    "LSTM": Case(
        lambda: Layer(lambda m, x: m.head(m.rnn(x)[0][:, -1]), rnn=nn.LSTM(5, 6, 2, batch_first=True, dropout=0.2),
                      head=nn.Linear(6, 3)),
        batch=sequences,
    ),
    "records on the second axis": Case(
        TimeFirst, batch=lambda: (torch.randn(4, B, 5), vectors()[1]), options={"batch_dim": 1}
    ),
    "keyword-only forward, dataclass output": Case(
        Keyword, CE, lambda: ({"values": vectors()[0], "scale": 0.5}, vectors()[1])
    ),
    "a dict with more than the model takes": Case(
        Keyword, lambda out, batch: F.cross_entropy(out.logits, batch["y"]),
        lambda: {"values": vectors()[0], "y": vectors()[1], "source": "here"},
    ),
    "a loss module on a dict": Case(
        Keyword, CE, lambda: {"values": vectors()[0], "label": vectors()[1]},
    ),
    "the model's own loss": Case(OwnLoss, None, vectors),
    "several inputs": Case(TwoInputs, batch=lambda: (vectors()[0], torch.arange(B) % 7, vectors()[1])),
    "several inputs in a tuple": Case(TwoInputs, batch=lambda: ((vectors()[0], torch.arange(B) % 7), vectors()[1])),
    "an input without records": Case(
        TwoInputs, batch=lambda: (vectors()[0], torch.arange(B) % 7, torch.randn(3, 3), vectors()[1])
    ),
    "mean over each record's tokens": Case(Tagger, token_loss, token_batch),
    "class-weighted, then the plain mean": Case(
        Hidden,
        lambda out, y: (F.cross_entropy(out, y, reduction="none") * torch.tensor([0.1, 1.0, 5.0])[y]).mean(),
    ),
    "bfloat16": Case(half, batch=lambda: (vectors()[0].bfloat16(), vectors()[1])),
    "a model that cannot be copied": Case(Uncopied),
    "a copy of a private model": Case(lambda: copy.deepcopy(Hidden())),
}  # fmt: skip
