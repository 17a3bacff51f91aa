"""Models, losses and loops in which one record reaches another, or what is kept."""

from __future__ import annotations

import math
import warnings
from collections import deque
from typing import Any

import torch
from tests.checking.cases import CE, B, Case, Hidden, Layer, around, ragged, sequences, tokens, vectors
from torch import Tensor, nn
from torch.nn import functional as F

# -- normalisation over the batch --------------------------------------------------------------------------------------


class CentreFn(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return (x - x.mean(0)) / (x.std(0, unbiased=False) + 1e-3)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return g


class MixedBackwardFn(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return g + 0.1 * g.mean(0)


def centre(x: Tensor) -> Tensor:
    return x - x.mean(0)


def scripted() -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return Hidden(torch.jit.script(centre))


def frozen(layer: nn.Module) -> nn.Module:
    return layer.requires_grad_(False)


def ghost_batch_norm(_: nn.Module, h: Tensor) -> Tensor:
    parts = h.split(4)
    return torch.cat([p - p.mean(0) for p in parts])


def padded_mean(m: nn.Module, ids: Tensor) -> Tensor:
    """Cuts to the longest record, then averages over the padding too."""
    longest = int((ids != 0).sum(1).max())
    return m.head(m.embed(ids[:, :longest]).mean(1))


def padded_tokens() -> tuple[Tensor, Tensor]:
    ids, y = tokens()
    return ids * ragged(), y


# -- mixing of records -------------------------------------------------------------------------------------------------


class BatchAttention(nn.Module):
    """batch_first forgotten: the first axis, the records, is taken for time."""

    def __init__(self) -> None:
        super().__init__()
        self.attend, self.head = nn.MultiheadAttention(5, 1), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.attend(x, x, x, need_weights=False)[0].mean(1))


class SwappedAxes(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rnn, self.head = nn.LSTM(5, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.rnn(x)[0][:, -1])


def mixup(m: nn.Module, x: Tensor) -> Tensor:
    if m.training:
        share = torch.rand(())
        x = share * x + (1 - share) * x[torch.randperm(len(x))]
    return m.head(x)


class Experts(nn.Module):
    """Two experts; ``capacity``: records beyond it pass by. Also returns a balancing loss."""

    def __init__(self, capacity: int | None):
        super().__init__()
        self.capacity, self.gate = capacity, nn.Linear(6, 2)
        self.experts = nn.ModuleList(nn.Linear(6, 6) for _ in range(2))

    def forward(self, h: Tensor) -> Tensor:
        weight = self.gate(h).softmax(1)
        choice, out = weight.argmax(1), torch.zeros_like(h)
        for e, expert in enumerate(self.experts):
            rows = (choice == e).nonzero()[:, 0]
            rows = rows if self.capacity is None else rows[: self.capacity]
            out.index_add_(0, rows, expert(h[rows]) * weight[rows, e : e + 1])
        return out


class Balanced(nn.Module):
    """A mixture of experts that returns its loss, balancing included."""

    def __init__(self) -> None:
        super().__init__()
        self.encode, self.gate, self.head = nn.Linear(5, 6), nn.Linear(6, 2), nn.Linear(6, 3)

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        h = self.encode(x)
        share = self.gate(h).softmax(1)
        logits = self.head(h * share[:, :1])
        return {"loss": F.cross_entropy(logits, labels) + 0.01 * 2 * share.mean(0).square().sum(), "logits": logits}


def xy_dict() -> dict[str, Tensor]:
    x, y = vectors()
    return {"x": x, "labels": y}


# -- losses ------------------------------------------------------------------------------------------------------------


def clip_loss(out: tuple[Tensor, Tensor], _: Tensor) -> Tensor:
    a, b = (F.normalize(t, dim=1) for t in out)
    logits = a @ b.t() / 0.1
    return CE(logits, torch.arange(len(logits)))


def contrastive(out: Tensor, y: Tensor) -> Tensor:
    near = (y[:, None] == y).float() - torch.eye(len(y))
    return (near * torch.cdist(out, out).square()).mean()


class Tower(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(5, 4), nn.Linear(5, 4)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.a(x), self.b(x * 2)


class Tagger(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(11, 6), nn.Linear(6, 11)

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.head(self.embed(input_ids))


def token_mean(out: Tensor, batch: dict[str, Tensor]) -> Tensor:
    return F.cross_entropy(out.flatten(0, 1), batch["labels"].flatten(), ignore_index=-100)


def tagged() -> dict[str, Any]:
    ids, _ = tokens()
    return {"input_ids": ids, "labels": torch.where(ragged() > 0, ids, -100)}


def counted() -> dict[str, Any]:
    return {**tagged(), "num_items_in_batch": int(ragged().sum())}


class Counting(Tagger):
    def forward(self, input_ids: Tensor, labels: Tensor, **kwargs: Any) -> dict[str, Tensor]:  # type: ignore[override]
        logits = super().forward(input_ids)
        total = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")
        return {"loss": total / kwargs["num_items_in_batch"], "logits": logits}


def penalised(model: nn.Module) -> Any:
    return lambda out, y: CE(out, y) + 0.01 * sum(p.square().sum() for p in model.parameters())


# -- state -------------------------------------------------------------------------------------------------------------


def moving_average(m: nn.Module, h: Tensor) -> Tensor:
    out = h - m.average
    with torch.no_grad():
        m.average.mul_(0.9).add_(0.1 * h.detach().mean(0))
    return out


def memory_bank(m: nn.Module, h: Tensor) -> Tensor:
    past = sum(m.bank) / len(m.bank) if m.bank else 0
    m.bank.append(h.detach().mean(0))
    return h + 0.1 * past


def hidden_state(m: nn.Module, h: Tensor) -> Tensor:
    before = m.last if m.last is not None and m.last.shape == h.shape else torch.zeros_like(h)
    m.last = h.detach()
    return h + 0.5 * before


def running_scale(m: nn.Module, h: Tensor) -> Tensor:
    before = m.scale
    m.scale = 0.9 * m.scale + 0.1 * float(h.detach().abs().mean())
    return h / before


GLOBAL: dict[str, Tensor] = {}


def global_cache(_: nn.Module, h: Tensor) -> Tensor:
    past = GLOBAL.get("last")
    GLOBAL["last"] = h.detach().mean(0)
    return h if past is None else h + past.to(h)


class Stateful(nn.Module):
    """A criterion with a moving average of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("level", torch.ones(()))

    def forward(self, out: Tensor, y: Tensor) -> Tensor:
        each = F.cross_entropy(out, y, reduction="none")
        self.level = 0.9 * self.level + 0.1 * each.detach().mean()
        return each.mean()


class Queue(nn.Module):
    """Negatives from earlier batches."""

    def __init__(self) -> None:
        super().__init__()
        self.queue: list[Tensor] = []

    def forward(self, out: Tensor, y: Tensor) -> Tensor:
        past = torch.cat([*self.queue[-2:], torch.zeros(1, 3).to(out)])
        self.queue.append(out.detach())
        return F.cross_entropy(out, y) + (out @ past.to(out).t()).logsumexp(1).mean()


def unregistered() -> nn.Module:
    loose = nn.Parameter(torch.ones(6))
    return Hidden(lambda h: h * loose)


def with_buffer(body: Any) -> nn.Module:
    layer = Layer(body)
    layer.register_buffer("average", torch.zeros(6))
    return around(layer)


def wide_bn() -> nn.Module:
    return around(Layer(lambda _, h: F.batch_norm(h, None, None, training=True)))


def quantised(h: Tensor) -> Tensor:
    scale = h.detach().abs().max() / 127
    return h + ((h / scale).round() * scale - h).detach()


def attention_over_records(h: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(h[None], h[None], h[None])[0]


def on_extremes(h: Tensor) -> Tensor:
    return h * 0.5 if bool(h.abs().max() > 30) else h


VIOLATIONS: dict[str, Case] = {
    # normalisation
    "BatchNorm": Case(lambda: around(nn.BatchNorm1d(6)), where="1", fix="GroupNorm"),
    "BatchNorm, affine=False": Case(lambda: around(nn.BatchNorm1d(6, affine=False)), where="1", fix="GroupNorm"),
    "BatchNorm, frozen": Case(lambda: around(frozen(nn.BatchNorm1d(6))), where="1", fix="GroupNorm"),
    "BatchNorm, no running statistics, eval": Case(
        lambda: around(nn.BatchNorm1d(6, track_running_stats=False)).eval(), where="1", fix="GroupNorm"
    ),
    "SyncBatchNorm": Case(lambda: around(nn.SyncBatchNorm(6)), where="1", fix="GroupNorm"),
    "InstanceNorm with running statistics": Case(
        lambda: nn.Sequential(
            nn.Conv1d(4, 4, 1), nn.InstanceNorm1d(4, track_running_stats=True), nn.Flatten(), nn.Linear(20, 3)
        ),
        batch=sequences,
        where="1",
        fix="track_running_stats",
    ),
    "F.batch_norm": Case(wide_bn, where="1", fix="each record"),
    "minus the mean": Case(lambda: around(Layer(lambda _, h: h - h.mean(0))), where="1", fix="LayerNorm"),
    "minus the mean, in the outer forward": Case(lambda: Hidden(lambda h: h - h.mean(0)), where="Hidden"),
    "scripted mean": Case(scripted, where="Hidden"),
    "mean through numpy": Case(
        lambda: Hidden(lambda h: h - torch.from_numpy(h.detach().numpy().mean(0)).to(h)), where="Hidden"
    ),
    "custom Function with batch statistics": Case(lambda: Hidden(CentreFn.apply), where="Hidden"),
    "custom Function that mixes in backward": Case(
        lambda: Hidden(MixedBackwardFn.apply), where="encode.", fix="custom autograd Function"
    ),
    "gradient hook that mixes": Case(
        lambda: Hidden(lambda h: (h.register_hook(lambda g: g - g.mean(0)), h)[1]), where="encode.", fix="hook"
    ),
    "standardised over the batch": Case(lambda: Hidden(lambda h: F.layer_norm(h.t(), (len(h),)).t()), where="Hidden"),
    "ghost batch norm": Case(lambda: around(Layer(ghost_batch_norm)), where="1"),
    "scaled by the largest": Case(lambda: Hidden(lambda h: h / h.abs().max()), where="Hidden"),
    "dynamic quantisation": Case(lambda: Hidden(quantised), where="Hidden"),
    "divided by the root of the batch size": Case(lambda: Hidden(lambda h: h / math.sqrt(len(h))), where="Hidden"),
    # mixing
    "softmax over records": Case(lambda: Hidden(lambda h: h.softmax(0)), where="Hidden"),
    "sorted": Case(lambda: Hidden(lambda h: h.sort(0).values), where="Hidden"),
    "topk over records": Case(lambda: Hidden(lambda h: h * (h >= h.topk(2, 0).values[-1])), where="Hidden"),
    "cumulated": Case(lambda: Hidden(lambda h: h.cumsum(0)), where="Hidden"),
    "rolled": Case(lambda: Hidden(lambda h: h + h.roll(1, 0)), where="Hidden"),
    "shuffled": Case(lambda: Hidden(lambda h: h[torch.randperm(len(h))]), where="Hidden"),
    "attention over records": Case(lambda: Hidden(attention_over_records), where="Hidden"),
    "attention without batch_first": Case(BatchAttention, batch=sequences, where="attend", fix="batch_first"),
    "LSTM without batch_first": Case(SwappedAxes, batch=sequences, where="rnn", fix="batch_first"),
    "mixup in the forward": Case(lambda: Layer(mixup, head=nn.Linear(5, 3)), where="Layer"),
    "expert capacity": Case(lambda: around(Experts(4)), where="1", fix="capacity"),
    "a branch on the batch's maximum": Case(lambda: Hidden(on_extremes), where="Hidden"),
    "mean over the padded length": Case(
        lambda: Layer(padded_mean, embed=nn.Embedding(11, 6), head=nn.Linear(6, 3)), batch=padded_tokens, where="Layer"
    ),
    # losses
    "balancing loss of experts": Case(Balanced, None, xy_dict, where="loss inside Balanced", fix="balancing"),
    "CLIP loss": Case(Tower, clip_loss, where="criterion", fix="reduction='none'"),
    "contrastive pairs": Case(Hidden, contrastive, where="criterion"),
    "mean over the batch's tokens": Case(Tagger, token_mean, tagged, where="criterion", fix="record"),
    "num_items_in_batch": Case(Counting, None, counted, where="num_items_in_batch", fix="leave it out"),
    "num_items_in_batch, declared a sum": Case(
        Counting, None, counted, where="num_items_in_batch", options={"loss_reduction": "sum"}
    ),
    "class weights": Case(
        Hidden, nn.CrossEntropyLoss(weight=torch.tensor([0.1, 1.0, 5.0])), where="criterion", fix="multiply"
    ),
    "ignored targets": Case(Hidden, nn.CrossEntropyLoss(ignore_index=0), where="criterion", fix="reduction='none'"),
    "square root of the mean": Case(
        Hidden, lambda out, y: F.cross_entropy(out, y).sqrt(), where="criterion", fix="reduction='none'"
    ),
    "a sum declared a mean": Case(
        Hidden, nn.CrossEntropyLoss(reduction="sum"), where="loss_reduction", fix="loss_reduction='sum'"
    ),
    "a mean declared a sum": Case(
        Hidden, CE, where="loss_reduction", fix="loss_reduction='mean'", options={"loss_reduction": "sum"}
    ),
    "divided by the root of the batch size, in the loss": Case(
        Hidden, lambda out, y: F.cross_entropy(out, y, reduction="sum") / len(y) ** 0.5, where="criterion"
    ),
    "hard examples only": Case(
        Hidden, lambda out, y: F.cross_entropy(out, y, reduction="none").topk(4).values.mean(), where="criterion"
    ),
    "a queue of negatives": Case(Hidden, Queue(), where="criterion.queue"),
    "noise, and divided by the root of the batch size": Case(
        lambda: Hidden(lambda h: (h + 0.1 * torch.randn_like(h)) / len(h) ** 0.5), where="Hidden"
    ),
    "noise, and a sum declared a mean": Case(
        lambda: Hidden(lambda h: h + 0.1 * torch.randn(h.shape)),
        nn.CrossEntropyLoss(reduction="sum"),
        where="loss_reduction",
    ),
    "weights by the place in the batch": Case(
        lambda: Hidden(lambda h: h * torch.arange(1, len(h) + 1)[:, None]), where="Hidden"
    ),
    "large batches only": Case(
        lambda: Hidden(lambda h: h - h.mean(0) if len(h) > 16 else h), batch=lambda: vectors(32), where="Hidden"
    ),
    "squeezed too far": Case(
        lambda: Layer(lambda m, x: m.head(x).squeeze(), head=nn.Linear(5, 1)),
        nn.BCEWithLogitsLoss(),
        lambda: (torch.randn(B, 5), torch.ones(B)),
        where="Layer",
        fix="squeeze",
    ),
    # state
    "moving average in a buffer": Case(lambda: with_buffer(moving_average), where="1.average", fix="do not update"),
    "memory bank": Case(lambda: around(Layer(memory_bank, bank=deque(maxlen=4))), where="1.bank"),
    "hidden state": Case(lambda: around(Layer(hidden_state, last=None)), where="1.last"),
    "running scale in a float": Case(lambda: around(Layer(running_scale, scale=1.0)), where="1.scale"),
    "global cache": Case(lambda: around(Layer(global_cache)), where="Sequential", fix="global"),
    "criterion with a moving average": Case(Hidden, Stateful(), where="criterion.level"),
    # configuration
    "penalty on the weights": Case(Hidden, penalised, where="criterion", fix="weight_decay"),
    "unregistered parameter": Case(unregistered, where="model", fix="register"),
    "nothing to train": Case(lambda: frozen(Hidden()), where="module", fix="requires_grad"),
    "wrapped": Case(lambda: nn.DataParallel(Hidden()), where="module", fix="plain module"),
    "fixed batch size": Case(lambda: Hidden(lambda h: h.view(B, 6)), where="Hidden", fix="number of records"),
    "a loss for each record": Case(Hidden, nn.CrossEntropyLoss(reduction="none"), where="criterion", fix="mean"),
    "wrong width": Case(lambda: nn.Linear(7, 3), where="Linear", fix="without any privacy"),
}
