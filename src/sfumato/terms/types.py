"""The closed set of factored per-sample gradients.

A rule never ships a norm of its own: it returns one of these records, and every quantity (norm, inner
product, clipped sum, dense gradient) is derived from the record. Shapes: B records, T rows a record.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Outer:
    """G_b = Σ_t left[b, t] ⊗ right[b, t], reshaped to ``shape`` (linear layers, recurrent weights)."""

    left: Tensor  # (B, T, p)
    right: Tensor  # (B, T, d)
    shape: torch.Size  # of the parameter; numel = p·d

    @property
    def factors(self) -> tuple[int, int]:
        """(p, d)"""
        return self.left.shape[2], self.right.shape[2]


@dataclass(frozen=True, slots=True)
class ConvSpec:
    """The static arguments of one convolution, as ``torch.convolution`` takes them."""

    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    transposed: bool
    output_padding: tuple[int, ...]
    groups: int


@dataclass(frozen=True, slots=True)
class Conv:
    """G_b = the convolution weight gradient of record b's T images."""

    grad: Tensor  # (B, T, out channels, *spatial)
    input: Tensor  # (B, T, in channels, *spatial)
    weight: Tensor  # detached; only its shape and dtype matter
    spec: ConvSpec

    @property
    def shape(self) -> torch.Size:
        return self.weight.shape


@dataclass(frozen=True, slots=True)
class Scatter:
    """G_b = Σ_t e_{index[b, t]} ⊗ grad[b, t] (embedding rows)."""

    grad: Tensor  # (B, T, d)
    index: Tensor  # (B, T), long
    shape: torch.Size  # (V, d)


@dataclass(frozen=True, slots=True)
class Dense:
    """G_b itself: small tensors, or what no factored form fits."""

    value: Tensor  # (B, *shape)

    @property
    def shape(self) -> torch.Size:
        return self.value.shape[1:]


@dataclass(frozen=True, slots=True)
class Stack:
    """G_b is zero but for slices along the first axis, which do not overlap: {(start, rows): terms of the slice}."""

    parts: "dict[tuple[int, int], tuple[Term, ...]]"
    shape: torch.Size  # of the whole parameter


Term = Outer | Conv | Scatter | Dense | Stack


def device(term: Term) -> torch.device:
    """Where the term lives."""
    match term:
        case Outer(left=x) | Conv(grad=x) | Scatter(grad=x) | Dense(value=x):
            return x.device
        case Stack(parts):
            return device(next(iter(parts.values()))[0])


def batch_size(term: Term) -> int:
    """Number of records B of a term."""
    match term:
        case Outer(left=x) | Conv(grad=x) | Scatter(grad=x) | Dense(value=x):
            return x.shape[0]
        case Stack(parts):
            return batch_size(next(iter(parts.values()))[0])


def each_part(stack: Stack, change: Callable[[Term], Term]) -> Stack:
    """The stack with ``change`` made to every term."""
    return Stack({k: tuple(change(t) for t in terms) for k, terms in stack.parts.items()}, stack.shape)
