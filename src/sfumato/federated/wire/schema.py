"""What a flat vector holds: names and shapes, in order. Everything that crosses the wire is one flat vector."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from sfumato.errors import ConfigurationError

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Schema:
    """``entries``: (name, shape) of each tensor, in the order in which they lie in a flat float32 vector.

    Raises ``ConfigurationError`` for a name that occurs twice, or if nothing is left to send.
    """

    entries: tuple[tuple[str, Shape], ...]

    def __post_init__(self) -> None:
        names = [name for name, _ in self.entries]
        if len(set(names)) != len(names) or self.size == 0:
            raise ConfigurationError(
                f"a schema needs distinct names and at least one number, got {names!r}.", found=names, where="schema"
            )

    @classmethod
    def of(cls, tensors: Iterable[tuple[str, Tensor]]) -> Schema:
        """The schema of these tensors. Raises ``ConfigurationError`` for one that is not floating point."""
        found = []
        for name, tensor in tensors:
            if not tensor.dtype.is_floating_point:
                raise ConfigurationError(
                    f"{name} has dtype {tensor.dtype}: only floating-point tensors can be clipped and noised.",
                    found=tensor.dtype,
                    where=name,
                    fix="leave it out of what is trained; counters and other buffers are never sent.",
                )
            found.append((name, tuple(tensor.shape)))
        return cls(tuple(found))

    @cached_property
    def size(self) -> int:
        """Numbers in the vector."""
        return sum(math.prod(shape) for _, shape in self.entries)

    @cached_property
    def digest(self) -> str:
        """A hash of names, shapes and dtype: two sides that agree on it mean the same by position i."""
        text = json.dumps({"dtype": "float32", "entries": self.entries}, separators=(",", ":"), ensure_ascii=True)
        return hashlib.sha256(text.encode()).hexdigest()

    def flatten(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """(size,) float32. Raises ``ConfigurationError`` unless names and shapes are exactly those of the schema."""
        wanted = dict(self.entries)
        if set(tensors) != set(wanted):
            odd = sorted(set(tensors) ^ set(wanted))
            raise ConfigurationError(f"{odd[0]!r} is not on both sides.", found=odd, where="schema")
        for name, shape in self.entries:
            if tuple(tensors[name].shape) != shape:
                raise ConfigurationError(
                    f"{name} has shape {tuple(tensors[name].shape)}, not {shape}.", found=name, where="schema"
                )
        return torch.cat([tensors[name].detach().reshape(-1).float() for name, _ in self.entries])

    def unflatten(self, vector: Tensor) -> dict[str, Tensor]:
        """{name: view of its shape}. Raises ``ConfigurationError`` unless ``vector`` is (size,)."""
        if tuple(vector.shape) != (self.size,):
            raise ConfigurationError(
                f"a vector of shape {tuple(vector.shape)} does not hold {self.size} numbers.", where="schema"
            )
        sizes = [math.prod(shape) for _, shape in self.entries]
        pieces = vector.split(sizes)
        return {name: piece.view(shape) for (name, shape), piece in zip(self.entries, pieces, strict=True)}


def digest(vector: Tensor, frozen: str = "") -> str:
    """SHA-256 of the float32 numbers of a flat vector, and of the ``frozen`` rest: which base an update is from."""
    held = vector.detach().to("cpu", torch.float32).contiguous().numpy()
    return hashlib.sha256(frozen.encode() + np.ascontiguousarray(held, dtype="<f4").tobytes()).hexdigest()
