"""What the rounds begin from: features that are computed once, and a model made of public records alone."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import nn
from torch.nn import functional as F

from ..data import FederatedData, Records
from ..models import Features, extract
from .fitting import FEATURES_NOTE

BATCH = 32
WEIGHT_DECAY = 1e-3
VALIDATION_SHARE = 3  # one public record in so many is kept back, where progress is measured on public records


def featured(model: nn.Module, data: FederatedData) -> tuple[nn.Module, FederatedData]:
    """What is trained, and on what: frozen features are computed once for each record."""
    if not isinstance(model, Features):
        return model, data
    held = [*data.clients.values(), data.data.test, *([data.public] if data.public else [])]
    x = extract(model.features, torch.cat([part.x for part in held]), torch.device("cpu"))
    parts = [Records(piece, part.y) for piece, part in zip(x.split([len(p) for p in held]), held, strict=True)]
    clients = dict(zip(data.clients, parts, strict=False))
    base = replace(data.data, test=parts[len(clients)], checked=(*data.data.checked, FEATURES_NOTE))
    return model.head, replace(data, data=base, clients=clients, public=parts[-1] if data.public else None)


def pretrain(model: nn.Module, public: Records, *, steps: int, lr: float, seed: int) -> None:
    """Train ``model`` in place on ``public``, without any protection: these records are not protected."""
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr, weight_decay=WEIGHT_DECAY)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    model.train()
    for _ in range(steps):
        rows = torch.randperm(len(public), generator=generator)[:BATCH]
        optimizer.zero_grad()
        F.cross_entropy(model(public.x[rows]), public.y[rows]).backward()
        optimizer.step()
        schedule.step()
    optimizer.zero_grad()


def kept_back(public: Records) -> tuple[Records, Records]:
    """(to train on, to measure on): every third public record is for measuring."""
    held = torch.arange(len(public)) % VALIDATION_SHARE == 0
    return Records(public.x[~held], public.y[~held]), Records(public.x[held], public.y[held])
