"""Schemas of answers: a part of the trained numbers, scores of tensors, counts of classes."""

from __future__ import annotations

import hashlib
import math

import torch
from torch import Tensor

from ..parameters.selection import Trained
from .schema import Schema


def narrowed(schema: Schema, index: Tensor | None) -> Schema:
    """The schema of the numbers at ``index`` (k,), sorted; names carry a hash of which numbers of a tensor they are."""
    if index is None:
        return schema
    entries, start = [], 0
    for name, shape in schema.entries:
        size = math.prod(shape)
        local = index[(index >= start) & (index < start + size)] - start
        start += size
        if len(local) == size:
            entries.append((name, shape))
        elif len(local):
            mark = hashlib.sha256(local.numpy().astype("<i8").tobytes()).hexdigest()[:16]
            entries.append((f"{name}#{mark}", (len(local),)))
    return Schema(tuple(entries))


def positions(everything: Trained, chosen: Trained) -> Tensor:
    """(k,) int64, sorted: where the ``chosen`` numbers lie among ``everything``."""
    starts, start = {}, 0
    for name, (_, shape) in zip(everything.names, everything.schema.entries, strict=True):
        starts[name] = (start, math.prod(shape))
        start += math.prod(shape)
    whole = torch.cat([torch.arange(at, at + size) for at, size in (starts[name] for name in chosen.names)])
    found = whole if chosen.index is None else whole[chosen.index]
    return found.sort().values


def scores_schema(schema: Schema) -> Schema:
    """One number for each tensor."""
    return Schema(tuple((f"score of {name}", ()) for name, _ in schema.entries))


def counts_schema(classes: int) -> Schema:
    """One number for each class."""
    return Schema((("records by class", (classes,)),))
