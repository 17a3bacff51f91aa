"""One live model for many clients: trained parameters and gradients lie in one flat buffer each, reloaded in place."""

from __future__ import annotations

import copy
import hashlib
import math
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor, nn

from sfumato.errors import UnsupportedError

from ..parameters.selection import Trained


def frozen_digest(model: nn.Module, trained: Trained) -> str:
    """SHA-256 of everything that is not exchanged: two sides that agree on it start from the same model."""
    found = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        if name not in trained.names:
            found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            found.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


class Live:
    """The model of one worker.

    Guarantee: after :meth:`load` nothing is left of the client before: trained parameters, buffers and gradients are
    those of the given vector and of the model as it was made.
    """

    def __init__(self, model: nn.Module, trained: Trained):
        self.model, self.trained = model, trained
        self.frozen = frozen_digest(model, trained)
        named = dict(model.named_parameters())
        self.parameters = [named[name] for name in trained.names]
        odd = [n for n in trained.names if named[n].dtype != torch.float32 or named[n].device.type != "cpu"]
        if odd:
            raise UnsupportedError(
                f"{odd[0]} is {named[odd[0]].dtype} on {named[odd[0]].device}: updates are exchanged in float32 from "
                "the CPU, and a rounded copy would not be the model that was trained.",
                found=odd,
                where=odd[0],
                fix="train float32 parameters; a frozen base may have any dtype.",
            )
        self.flat = torch.cat([p.detach().reshape(-1) for p in self.parameters])
        self.grads = torch.zeros_like(self.flat)
        self.index: Tensor | None = None
        self._shapes = [tuple(p.shape) for p in self.parameters]
        for p, piece in zip(self.parameters, self._pieces(self.flat), strict=True):
            p.data = piece
        self.base = self.flat.clone()
        self._buffers = {name: b.detach().clone() for name, b in model.named_buffers()}
        self._everything = list(model.parameters())
        self._into = self._pieces(self.grads)

    def __deepcopy__(self, memo: dict[int, object]) -> Live:
        """Parameters that are copied one by one would no longer lie in the flat buffer."""
        found = Live(copy.deepcopy(self.model, memo), self.trained)
        found.frozen, found._buffers = self.frozen, {name: b.clone() for name, b in self._buffers.items()}
        found.narrow(self.index)
        memo[id(self)] = found
        return found

    def narrow(self, index: Tensor | None) -> None:
        """Train only the numbers at these positions of the vector (None: all); tensors without any are frozen."""
        self.index = index
        kept = torch.ones_like(self.flat, dtype=torch.bool)
        if index is not None:
            kept.zero_()[index] = True
        for p, piece in zip(self.parameters, self._pieces(kept), strict=True):
            p.requires_grad_(bool(piece.any()))

    @property
    def active(self) -> list[torch.nn.Parameter]:
        """The parameters that training moves."""
        return [p for p in self.parameters if p.requires_grad]

    def load(self, vector: Tensor) -> None:
        """Start from the global model, a (d,) vector of all numbers."""
        self.flat.copy_(vector)
        self.base.copy_(vector)
        if self._buffers:
            for name, buffer in self.model.named_buffers():
                buffer.detach().copy_(self._buffers[name])
        for p in self._everything:
            p.grad = None

    def update(self) -> Tensor:
        """How far training has moved the numbers at :attr:`index` from the loaded vector."""
        # NumPy asks for huge pages, PyTorch's allocator does not: 15 times as fast at a million numbers.
        moved = torch.from_numpy(np.subtract(self.flat.numpy(), self.base.numpy()))
        return moved if self.index is None else moved[self.index]

    @contextmanager
    def flat_gradients(self) -> Iterator[Tensor]:
        """Inside, autograd adds all gradients into the one flat tensor that this yields."""
        self.grads.zero_()
        for p, piece in zip(self.parameters, self._into, strict=True):
            p.grad = piece if p.requires_grad else None
        try:
            yield self.grads
        finally:
            for p in self.parameters:
                p.grad = None

    def proximal(self, strength: float) -> None:
        """Add strength·(w − w_global) to gradients that are there (FedProx, Li et al. 2020): it sees no record."""
        for p, base in zip(self.parameters, self._pieces(self.base), strict=True):
            if p.grad is not None:
                p.grad.add_(p.detach() - base, alpha=strength)

    def _pieces(self, flat: Tensor) -> list[Tensor]:
        pieces = flat.split([math.prod(shape) for shape in self._shapes])
        return [piece.view(shape) for piece, shape in zip(pieces, self._shapes, strict=True)]
