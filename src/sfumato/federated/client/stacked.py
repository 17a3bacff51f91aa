"""Plain local training with the models of many clients stacked: every operation is done for all of them at once."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.func import functional_call

from .live import Live
from .local import LocalTraining, Loss

SMALL = 3600  # from here on PyTorch transposes one matrix in blocks, several times as fast as a stack of them


@dataclass(frozen=True, eq=False)
class Records:
    """What one client trains on: x (n, ...), y (n, ...), and the seed of the order."""

    x: Tensor
    y: Tensor
    seed: int

    def __len__(self) -> int:
        return len(self.y)

    @property
    def kind(self) -> tuple[object, ...]:
        """Clients can be stacked if this is the same."""
        return self.x.shape[1:], self.x.dtype, self.y.shape[1:], self.y.dtype


def train(live: Live, clients: Sequence[Records], local: LocalTraining, loss: Loss) -> Tensor:
    """(clients, k): the updates that :func:`.local.plain` comes to from the numbers in ``live``, up to rounding.

    ``loss`` is the mean over records: where the batches of a step differ in size it is taken record by record, so that
    padding can weigh 0. ``live`` is not changed. Whatever ``vmap`` cannot do is raised as it comes.
    """
    steps = [local.count(len(records)) for records in clients]
    # Those with the most steps first: who is done drops off the end.
    order = sorted(range(len(clients)), key=lambda c: (steps[c], len(clients[c])), reverse=True)
    batches = _Batches([clients[c] for c in order], [steps[c] for c in order], local)
    stack = _Stack(live, len(clients), local)
    live.model.train()
    running = len(clients)
    for step in range(max(steps)):
        while steps[order[running - 1]] <= step:
            running -= 1
        stack.step(*batches.take(step, running), loss)
    return stack.update(torch.tensor(order))


class _Batches:
    """The batches of all clients, those of :func:`.local.plain` with the same seeds."""

    def __init__(self, clients: Sequence[Records], steps: Sequence[int], local: LocalTraining):
        self.x, self.y = torch.cat([c.x for c in clients]), torch.cat([c.y for c in clients])
        width = min(local.batch_size, max(len(c) for c in clients))
        rows = torch.zeros(len(clients), max(steps), width, dtype=torch.int64)
        sizes = torch.zeros(len(clients), max(steps), dtype=torch.int64)
        start = 0
        for own, counts, client, total in zip(rows, sizes, clients, steps, strict=True):
            generator, size = torch.Generator().manual_seed(client.seed), len(client)
            epoch = -(-size // local.batch_size)
            last = size - (epoch - 1) * local.batch_size
            for first in range(0, total, epoch):
                drawn = torch.randperm(size, generator=generator).add_(start)
                into = own[first : first + epoch].view(-1)
                into[:size] = drawn[: len(into)]
                counts[first : first + epoch] = width
                if first + epoch <= total:
                    counts[first + epoch - 1] = last
            start += size
        self._sizes = sizes
        # A record of the same batch stands in for what is missing: if it is not finite, the batch is lost anyway.
        self._there = torch.arange(width) < sizes[:, :, None]
        self._rows = torch.where(self._there, rows, rows[:, :, :1])

    def take(self, step: int, running: int) -> tuple[Tensor, Tensor, Tensor | None]:
        """x (running, B, ...), y (running, B, ...) and the weight of each record (running, B); None: all equal."""
        sizes = self._sizes[:running, step]
        least, width = int(sizes.min()), int(sizes.max())
        rows = self._rows[:running, step, :width]
        weights = None if least == width else self._there[:running, step, :width] / sizes[:, None]
        return self.x[rows], self.y[rows], weights


class _Stack:
    """The trained tensors of all clients, each (clients, ...)."""

    def __init__(self, live: Live, clients: int, local: LocalTraining):
        self.live, self.local, self._moved = live, local, False
        self.base: dict[str, Tensor] = {}
        self.weights: dict[str, Tensor] = {}
        self.velocity: dict[str, Tensor] = {}
        self._kept: dict[str, Tensor] = {}
        self._sent: list[tuple[str, int, Tensor | None]] = []
        start = 0
        for name, p in zip(live.trained.names, live.parameters, strict=True):
            size = p.numel()
            at = None if live.index is None else live.index[(live.index >= start) & (live.index < start + size)] - start
            start += size
            self._sent.append((name, size if at is None else len(at), at))
            if not p.requires_grad:
                continue
            self.base[name] = p.detach().clone()
            self.weights[name] = _empty(clients, *p.shape).copy_(p.detach())
            if at is not None and len(at) < size:
                self._kept[name] = torch.zeros(size, dtype=torch.bool).index_fill_(0, at, True).view(p.shape)

    def step(self, x: Tensor, y: Tensor, weights: Tensor | None, loss: Loss) -> None:
        """One step of the first len(x) clients."""
        count, local, model = len(x), self.local, self.live.model
        leaves = {name: w[:count].detach().requires_grad_() for name, w in self.weights.items()}

        def whole(own: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
            return loss(functional_call(model, own, (x,)), y)

        def weighted(own: dict[str, Tensor], x: Tensor, y: Tensor, weight: Tensor) -> Tensor:
            return torch.dot(torch.vmap(one)(functional_call(model, own, (x,)), y), weight)

        def one(found: Tensor, y: Tensor) -> Tensor:
            return loss(found.unsqueeze(0), y.unsqueeze(0))

        losses = torch.vmap(whole)(leaves, x, y) if weights is None else torch.vmap(weighted)(leaves, x, y, weights)
        gradients = torch.autograd.grad(losses.sum(), list(leaves.values()), allow_unused=True, materialize_grads=True)
        for name, gradient in zip(leaves, gradients, strict=True):
            if not self._moved:
                self._lay_out_as(name, gradient)
            w = self.weights[name][:count]
            if local.proximal:
                gradient = gradient.add(w - self.base[name], alpha=local.proximal)
            if name in self._kept:
                gradient = torch.where(self._kept[name], gradient, 0.0)
            if local.momentum:
                if name not in self.velocity:
                    self.velocity[name] = torch.zeros_like(self.weights[name])
                gradient = self.velocity[name][:count].mul_(local.momentum).add_(gradient)
            w.add_(gradient, alpha=-local.lr)
        self._moved = True

    def _lay_out_as(self, name: str, gradient: Tensor) -> None:
        """vmap gives gradients of linear layers transposed; adding what lies otherwise takes 10 times as long."""
        if self.weights[name].stride() != gradient.stride():
            self.base[name] = torch.empty_like(gradient[0]).copy_(self.base[name])
            self.weights[name] = self.weights[name].as_strided(gradient.shape, gradient.stride()).copy_(self.base[name])

    def update(self, order: Tensor) -> Tensor:
        """(clients, k): how far each has moved; row ``order[i]`` is of the client in place i."""
        count, sizes = len(order), [size for _, size, _ in self._sent]
        out = _empty(count, sum(sizes))
        for (name, size, at), into in zip(self._sent, out.split(sizes, 1), strict=True):
            if name not in self.weights:
                into.zero_()
                continue
            moved = self.weights[name].sub_(self.base[name])
            if name in self._kept:
                into[order] = moved.reshape(count, -1)[:, at]
            elif moved.is_contiguous() or size < SMALL:
                into[order] = moved.reshape(count, -1)
            else:
                for row, own in zip(order.tolist(), moved, strict=True):
                    into[row].view(own.shape).copy_(own)
        return out


def _empty(*shape: int) -> Tensor:
    """NumPy asks for huge pages, PyTorch's allocator does not: most of what large memory costs is to get it."""
    return torch.from_numpy(np.empty(shape, np.float32))


def activations(live: Live, clients: Sequence[Records], local: LocalTraining, loss: Loss) -> tuple[Tensor, int]:
    """:func:`train`, and the bytes that autograd kept for one client in one step."""
    kept = 0

    def pack(tensor: Tensor) -> Tensor:
        nonlocal kept
        kept += tensor.nbytes
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        found = train(live, clients, local, loss)
    return found, math.ceil(kept / sum(local.count(len(c)) for c in clients))
