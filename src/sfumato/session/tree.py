"""Nested Python values as a JSON document beside a list of plain tensors, from a closed set of types."""

import math
from collections import Counter, OrderedDict
from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from sfumato.errors import DataError, UnsupportedError

Json = Any

_DEEPEST = 64  # levels of nesting; any reader's stack holds them
_LONGEST = 4096  # bits of an integer; decimal text of longer ones is refused by Python itself


def memory(tensor: Tensor) -> Hashable:
    """Equal for two tensors that are the same view of the same memory: tied weights."""
    if not tensor.numel():
        return id(tensor)  # no memory to share
    place = str(tensor.device), tensor.untyped_storage().data_ptr(), tensor.storage_offset()
    return *place, tensor.dtype, tensor.shape, tensor.stride(), tensor.is_conj(), tensor.is_neg()


@dataclass
class Writer:
    """Turns values into JSON; tensors go to ``tensors``, each memory once.

    Raises ``UnsupportedError`` that names the place of anything but None, bool, int, float, str, list, tuple, dict,
    Counter, a number of NumPy or a dense tensor: it could not be restored exactly without running code from the file.
    """

    tensors: dict[str, Tensor] = field(default_factory=dict)
    _names: dict[Hashable, str] = field(default_factory=dict)
    _originals: list[Tensor] = field(default_factory=list)  # alive, so that no address is used twice

    def write(self, value: Any, where: str, depth: int = 0) -> Json:
        """The JSON for ``value``; ``where`` names it in an error, and its tensors in the file."""
        if depth > _DEEPEST:
            raise UnsupportedError(
                f"{where} is nested deeper than {_DEEPEST} levels, so it cannot be written.", where=where
            )
        if isinstance(value, np.generic):
            value = value.item()
        kind = type(value)
        if value is None or kind in (bool, str) or (kind is int and value.bit_length() <= _LONGEST):
            return value
        if kind is float:
            return value if math.isfinite(value) else {"float": str(value)}
        if kind is list:
            return [self.write(v, f"{where}[{i}]", depth + 1) for i, v in enumerate(value)]
        if kind is tuple:
            return {"tuple": [self.write(v, f"{where}[{i}]", depth + 1) for i, v in enumerate(value)]}
        if kind in (dict, OrderedDict, Counter):
            tag = "counter" if kind is Counter else "dict"
            pairs = [[self._key(k, where), self.write(v, f"{where}[{k!r}]", depth + 1)] for k, v in value.items()]
            return {tag: pairs}
        if kind in (Tensor, nn.Parameter):
            return {"tensor": self._tensor(value, where)}
        raise UnsupportedError(
            f"{where} is a {kind.__module__}.{kind.__qualname__}, which cannot be restored exactly without running "
            "code from the file.",
            found=kind.__qualname__,
            where=where,
            fix="leave it out, or store numbers, strings, lists, dicts and dense tensors that describe it.",
        )

    def _key(self, key: object, where: str) -> Json:
        if key is None or type(key) in (bool, int, str) or (type(key) is float and math.isfinite(key)):
            return key
        raise UnsupportedError(
            f"{where} has a key of type {type(key).__qualname__}; only strings and numbers can be restored.",
            found=type(key).__qualname__,
            where=where,
        )

    def _tensor(self, value: Tensor, where: str) -> str:
        if value.layout is not torch.strided or value.is_quantized or value.device.type == "meta":
            kind = "quantized" if value.is_quantized else f"{value.layout} on {value.device}"
            raise UnsupportedError(
                f"{where} is a tensor that is {kind}; only dense ones have values to store.",
                found=kind,
                where=where,
                fix="make it dense before saving.",
            )
        place = memory(value)
        if place not in self._names:
            plain = value.detach().resolve_conj().resolve_neg().to("cpu").contiguous()
            if plain.untyped_storage().nbytes() != plain.nbytes or plain.data_ptr() == value.data_ptr():
                plain = plain.clone()  # a view would drag along, or share, the memory of others
            self._names[place] = where  # other tools find module.<name>
            self.tensors[where] = plain
            self._originals.append(value)
        return self._names[place]


@dataclass
class Reader:
    """The inverse of ``Writer``: tensors that were one memory are one again, in copies of their own by default."""

    tensors: dict[str, Tensor]
    copies: bool = True
    _copies: dict[str, Tensor] = field(default_factory=dict)

    def read(self, node: Json) -> Any:
        """The value of a JSON node; ``DataError`` for one that no ``Writer`` writes."""
        try:
            return self._read(node)
        except RecursionError:
            raise DataError("The document is nested too deep.") from None

    def _read(self, node: Json) -> Any:
        if isinstance(node, list):
            return [self._read(v) for v in node]
        if not isinstance(node, dict):
            return node
        if len(node) == 1:
            ((tag, body),) = node.items()
            if tag == "tensor" and isinstance(body, str) and body in self.tensors:
                if body not in self._copies:
                    self._copies[body] = self.tensors[body].clone() if self.copies else self.tensors[body]
                return self._copies[body]
            if tag == "float" and body in ("inf", "-inf", "nan"):
                return float(body)
            if tag == "tuple" and isinstance(body, list):
                return tuple(self._read(v) for v in body)
            if tag in ("dict", "counter") and _is_items(body):
                pairs = {k: self._read(v) for k, v in body}
                return Counter(pairs) if tag == "counter" else pairs
        raise DataError(f"The document holds {_short(node)}, which stands for nothing.", found=_short(node))


def mentioned(node: Json) -> set[str]:
    """Names of the tensors that a document refers to."""
    try:
        return set(_mentioned(node))
    except RecursionError:
        raise DataError("The document is nested too deep.") from None


def _mentioned(node: Json) -> list[str]:
    if isinstance(node, list):
        return [name for part in node for name in _mentioned(part)]
    if not isinstance(node, dict):
        return []
    return [
        name
        for tag, body in node.items()
        for name in ([body] if tag == "tensor" and isinstance(body, str) else _mentioned(body))
    ]


def _is_items(body: Json) -> bool:
    return isinstance(body, list) and all(
        isinstance(pair, list) and len(pair) == 2 and not isinstance(pair[0], (list, dict)) for pair in body
    )


def _short(node: Json) -> str:
    text = repr(list(node)[:3] if isinstance(node, dict) else node)
    return text if len(text) <= 80 else text[:80] + "…"
