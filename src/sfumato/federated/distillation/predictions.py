"""Predictions on public inputs as one vector, and learning from them."""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sfumato import _validate
from sfumato.errors import ConfigurationError

from ..wire.schema import Schema

CHUNK = 4096


@dataclass(frozen=True)
class Distill:
    """How a model learns from predictions of others: Adam, over all public inputs asked so far.

    Args:
        temperature: T of all softmaxes, p = softmax(logits / T) (Hinton et al. 2015).
        loss: "brier", ‖p − t‖² to the released means t as they are: noise on t leaves the mean gradient alone. Or
            "cross-entropy", to the probabilities closest to t: for little noise.
        votes: "soft", peers answer with probabilities, or "hard", each with its most likely class. Either way only
            their noised sum is released, so that a hard vote needs no guarantee of its own.
    """

    epochs: int = 5
    lr: float = 0.01
    temperature: float = 1.0
    batch_size: int = 32
    loss: str = "brier"
    votes: str = "soft"

    def __post_init__(self) -> None:
        _validate.count("epochs", self.epochs)
        _validate.count("batch_size", self.batch_size)
        _validate.positive("lr", self.lr)
        _validate.positive("temperature", self.temperature)
        _validate.one_of("loss", self.loss, ("brier", "cross-entropy"))
        _validate.one_of("votes", self.votes, ("soft", "hard"))


def predictions_schema(queries: int, classes: int) -> Schema:
    """One number for each query and class."""
    return Schema((("predictions", (queries, classes)),))


def scaled(found: Tensor) -> Tensor:
    """(n·k,) from probabilities (n, k): centred, in units in which a peer that is certain of every query has norm 1."""
    n, k = found.shape
    return ((found - 1.0 / k) / math.sqrt(n * (1.0 - 1.0 / k))).reshape(-1)


def unscaled(vector: Tensor, classes: int) -> Tensor:
    """(n, classes), the inverse of :func:`scaled`; with noise, rows need be no probabilities."""
    rows = vector.view(-1, classes)
    return rows * math.sqrt(len(rows) * (1.0 - 1.0 / classes)) + 1.0 / classes


def simplex(rows: Tensor) -> Tensor:
    """The Euclidean projection of each row (n, k) on probabilities (Duchi et al. 2008)."""
    ordered = rows.sort(1, descending=True).values
    excess = (ordered.cumsum(1) - 1.0) / torch.arange(1, rows.shape[1] + 1)
    kept = (ordered > excess).sum(1, keepdim=True)
    return (rows - excess.gather(1, kept - 1)).clamp_min(0.0)


def probabilities(model: nn.Module, x: Tensor, temperature: float) -> Tensor:
    """(n, classes) float32 in evaluation mode. Raises ``ConfigurationError`` for other than one row of scores each."""
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            parts = [model(part) for part in x.split(CHUNK)]
    finally:
        model.train(training)
    for part, given in zip(parts, x.split(CHUNK), strict=True):
        if not isinstance(part, Tensor) or part.dim() != 2 or len(part) != len(given) or part.shape[1] < 2:
            shape = tuple(part.shape) if isinstance(part, Tensor) else type(part).__name__
            raise ConfigurationError(
                f"a model answers {len(given)} inputs with {shape}, not with (inputs, classes).",
                found=shape,
                where="model",
            )
    return torch.cat([F.softmax(part.float() / temperature, dim=1) for part in parts])


def learn(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    x: Tensor,
    targets: Tensor,
    distill: Distill,
    generator: torch.Generator,
) -> None:
    """``distill.epochs`` passes of ``model`` over public ``x`` (n, ...) and ``targets`` (n, classes), noise and all."""
    if distill.loss == "cross-entropy":
        targets = simplex(targets)
    for _ in range(distill.epochs):
        for rows in torch.randperm(len(x), generator=generator).split(distill.batch_size):
            optimizer.zero_grad()
            logits = model(x[rows]) / distill.temperature
            if distill.loss == "brier":
                gap = (F.softmax(logits, dim=1) - targets[rows]).square().sum(1).mean()
                (gap * distill.temperature).backward()
            else:
                (F.cross_entropy(logits, targets[rows]) * distill.temperature**2).backward()
            optimizer.step()
    optimizer.zero_grad()


def rows_of(order: int, first: int, count: int, size: int) -> Tensor:
    """(count,) int64: rows ``first`` and on of a public random order of ``size`` rows, from the start after the end."""
    # The raw words of a bit generator are the same in every version of NumPy; its permutations are not.
    words = np.random.Philox(key=order).random_raw(size)
    return torch.from_numpy(np.argsort(words, kind="stable")[(first + np.arange(count)) % size])


def hash_of(public: Tensor) -> str:
    """SHA-256 of the public inputs."""
    raw = public.detach().cpu().contiguous()
    head = f"public {raw.dtype} {tuple(raw.shape)}".encode()
    return hashlib.sha256(head + raw.view(-1).view(torch.uint8).numpy().tobytes()).hexdigest()


def inputs(public: object, queries: object) -> Tensor:
    """The public inputs, once they are known to be that, and to be enough for one round."""
    if not isinstance(public, Tensor) or public.dim() < 2 or len(public) < 2:
        raise ConfigurationError(
            "public is not a tensor of at least two inputs.",
            found=type(public).__name__,
            where="public",
            fix="give the inputs alone, (n, ...); labels are not used.",
        )
    if public.is_floating_point() and not bool(public.isfinite().all()):
        raise ConfigurationError("public inputs are not finite.", where="public")
    if _validate.count("queries", queries) > len(public):
        raise ConfigurationError(
            f"{queries} queries a round, and {len(public)} public inputs.", found=queries, where="queries"
        )
    return public.detach()
