"""What travels instead of a float32 vector: fewer bits a number, or fewer numbers.

Compression costs no privacy and gives none. The server clips what it has decoded, so the bound on a client's influence
holds whatever bytes arrive; that also means that a vector which decoding made longer is clipped harder.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sfumato import _validate
from sfumato.errors import ConfigurationError, DataError

Bytes = NDArray[np.uint8]
_LEVELS = {8: 127, 4: 7, 1: 1}
_LARGEST = 2**32 - 1  # positions are sent as uint32


@dataclass(frozen=True)
class Quantize:
    """``bits`` a number and one float32 scale, the largest magnitude, for every ``chunk`` numbers.

    Stochastic rounding: the decoded vector has the mean of the vector. Its squared norm grows by up to a quarter of
    chunk·(scale/127)² (8 bits) or chunk·(scale/7)² (4 bits). With 1 bit every number becomes ±scale: the direction is
    kept on average only, over many clients and rounds (QSGD, Alistarh et al. 2017).
    Raises ``ConfigurationError`` unless bits is 8, 4 or 1.
    """

    bits: int = 8
    chunk: int = 1024

    def __post_init__(self) -> None:
        if isinstance(self.bits, bool) or self.bits not in _LEVELS:
            raise ConfigurationError(f"bits={self.bits!r} is not one of 8, 4, 1.", found=self.bits, where="bits")
        _validate.count("chunk", self.chunk)


@dataclass(frozen=True)
class Prune:
    """The fraction of the numbers that is sent, rounded up; the others count as 0.

    mask: ``common``, the same random positions for every client, drawn anew each round from (``seed``, round), all
        public (:func:`support`): a server that adds noise there only has noise shorter by √fraction (Fed-SMP, Hu et al.
        2022). ``own``, each client's largest magnitudes: the positions are data of the client, sent with the values,
        which whoever decodes them has to be trusted with unless the vector was private already.
    rescale: divide what a common mask keeps by the fraction, so that the mean over rounds is the whole vector. It makes
        the vector longer before it is clipped, by 1/√fraction in expectation; without it a round updates some
        coordinates and leaves the rest alone.
    Raises ``ConfigurationError`` unless 0 < fraction <= 1, and for ``rescale`` of own positions, which are no sample.
    """

    fraction: float
    mask: str = "common"
    rescale: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "fraction", _validate.positive("fraction", self.fraction))
        if self.fraction > 1.0:
            raise ConfigurationError(f"fraction={self.fraction} is above 1.", found=self.fraction, where="fraction")
        _validate.one_of("mask", self.mask, ("common", "own"))
        if self.rescale and self.mask == "own":
            raise ConfigurationError(
                "rescale=True needs mask='common': the largest magnitudes are no random sample.", where="rescale"
            )
        if isinstance(self.seed, bool) or not isinstance(self.seed, int):
            raise ConfigurationError(f"seed={self.seed!r} is not an integer.", found=self.seed, where="seed")


Codec = Quantize | Prune


def encode(
    codec: Codec | None,
    vector: Tensor,
    generator: torch.Generator | None = None,
    round: int = 0,
    *,
    copy: bool = True,
) -> dict[str, NDArray[Any]]:
    """The arrays that are sent for ``vector`` (size,); bits are packed, so their bytes are what crosses the wire.

    ``generator``, on the CPU, rounds (None: the global one); its secrecy carries no guarantee. ``round`` picks a common
    mask. ``copy=False``: the vector is not changed afterwards, and the arrays may share its memory.
    Raises ``ConfigurationError`` unless the vector is flat and not empty, ``DataError`` for one that is not
    finite in float32, which depends on a client's data.
    """
    flat = vector.detach().to("cpu", torch.float32).contiguous()
    if flat.dim() != 1 or not 0 < flat.numel() <= _LARGEST:
        raise ConfigurationError(
            f"a vector of shape {tuple(vector.shape)} cannot be sent: it has to be flat and not empty.",
            found=tuple(vector.shape),
            where="vector",
        )
    if not np.isfinite(flat.numpy()).all():
        raise DataError(
            "the vector has numbers that are not finite: training diverged.", where="vector", fix="a lower lr."
        )
    match codec:
        case None:
            return {"values": flat.numpy().copy() if copy else flat.numpy()}
        case Quantize():
            return _quantized(codec, flat, generator)
        case Prune():
            kept = _kept(codec, len(flat))
            if codec.mask == "common":
                return {"values": flat.numpy()[_common(codec, len(flat), round)]}
            index = np.sort(np.argpartition(flat.abs().numpy(), len(flat) - kept)[len(flat) - kept :])
            return {"values": flat.numpy()[index]} | _positions(index, len(flat), kept)
    raise _unknown(codec)


def decode(
    codec: Codec | None, arrays: Mapping[str, NDArray[Any]], size: int, round: int = 0, *, copy: bool = True
) -> Tensor:
    """(size,) float32, finite. ``arrays`` may come from anybody: work and memory are O(size).

    ``copy=False``: the vector may share memory with them, and is used up before they change.

    Raises ``DataError`` for anything but what :func:`encode` can produce for such a codec and size: other names,
    dtypes or shapes, a number that is not finite, a code out of range, positions that repeat, are unsorted or outside
    the vector, set padding bits.
    """
    _validate.count("size", size)
    match codec:
        case None:
            return torch.from_numpy(_floats(_only(arrays, "values")["values"], size, "values", copy))
        case Quantize():
            return _dequantized(codec, _only(arrays, "codes", "scales"), size)
        case Prune():
            return _spread(codec, arrays, size, round)
    raise _unknown(codec)


def nbytes(arrays: Mapping[str, NDArray[Any]]) -> int:
    """Bytes of the numbers themselves, without names and framing."""
    return sum(int(array.nbytes) for array in arrays.values())


def support(codec: Codec | None, size: int, round: int = 0) -> Tensor | None:
    """(kept,) int64 sorted: the public positions outside which every decoded vector of the round is 0; None: all."""
    if isinstance(codec, Prune) and codec.mask == "common":
        return torch.from_numpy(_common(codec, size, round).copy())
    return None


def _quantized(codec: Quantize, flat: Tensor, generator: torch.Generator | None) -> dict[str, NDArray[Any]]:
    size, levels = len(flat), _LEVELS[codec.bits]
    chunk = min(codec.chunk, size)
    rows = torch.nn.functional.pad(flat, (0, -size % chunk)).view(-1, chunk)
    scales = rows.abs().amax(1)
    unit = rows.double() / scales.double().clamp_min(torch.finfo(torch.float64).tiny).unsqueeze(1)
    # 1 bit has the two levels -1 and 1; the others have the whole numbers from -levels to levels.
    grid = (unit + 1.0) / 2.0 if codec.bits == 1 else unit * levels + levels
    draws = torch.rand(grid.shape, dtype=torch.float64, generator=generator)
    codes = (grid + draws).floor().clamp(0, 1 if codec.bits == 1 else 2 * levels).to(torch.uint8)
    return {"codes": _packed(codes.view(-1)[:size].numpy(), codec.bits), "scales": scales.numpy()}


def _dequantized(codec: Quantize, arrays: Mapping[str, NDArray[Any]], size: int) -> Tensor:
    levels, chunk = _LEVELS[codec.bits], min(codec.chunk, size)
    scales = _floats(arrays["scales"], math.ceil(size / chunk), "scales")
    if (scales < 0).any():
        raise DataError("a scale is negative.", where="scales")
    codes = _unpacked(arrays["codes"], size, codec.bits, "codes")
    if codec.bits != 1 and codes.max() > 2 * levels:
        raise DataError(f"a code is above {2 * levels}.", found=int(codes.max()), where="codes")
    unit = codes.astype(np.float32) * 2 - 1 if codec.bits == 1 else (codes.astype(np.float32) - levels) / levels
    return torch.from_numpy(unit * np.repeat(scales, chunk)[:size])


def _packed(codes: Bytes, bits: int) -> Bytes:
    if bits == 8:
        return codes
    if bits == 1:
        return np.packbits(codes, bitorder="little")
    even = np.append(codes, np.uint8(0)) if len(codes) % 2 else codes
    low: Bytes = even[::2] | (even[1::2] << np.uint8(4))
    return low


def _unpacked(array: object, size: int, bits: int, name: str) -> Bytes:
    """(size,) codes. Raises ``DataError`` for another dtype or length, and for padding that is not 0."""
    raw = _array(array, np.dtype(np.uint8), math.ceil(size * bits / 8), name)
    match bits:
        case 8:
            codes = raw
        case 4:
            codes = np.stack([raw & np.uint8(15), raw >> np.uint8(4)], axis=1).reshape(-1)
        case _:
            codes = np.unpackbits(raw, bitorder="little")
    if codes[size:].any():
        raise DataError(f"{name} has bits after its last number.", where=name)
    return codes[:size]


def _spread(codec: Prune, arrays: Mapping[str, NDArray[Any]], size: int, round: int) -> Tensor:
    kept = _kept(codec, size)
    if codec.mask == "common":
        values, index = _floats(_only(arrays, "values")["values"], kept, "values"), _common(codec, size, round)
    else:
        name = _positions_name(size, kept)
        given = _only(arrays, "values", name)
        values, index = _floats(given["values"], kept, "values"), _found(given[name], name, size, kept)
    if codec.rescale:
        with np.errstate(over="ignore"):
            values = _floats(values * np.float32(size / kept), kept, "values")
    out = np.zeros(size, np.float32)
    out[index] = values
    return torch.from_numpy(out)


def _kept(codec: Prune, size: int) -> int:
    return min(size, math.ceil(codec.fraction * size))


def _positions_name(size: int, kept: int) -> str:
    """A bit for every position takes fewer bytes than four bytes for every kept one, if many are kept."""
    return "mask" if size <= 32 * kept else "index"


def _positions(index: NDArray[np.int64], size: int, kept: int) -> dict[str, NDArray[Any]]:
    if _positions_name(size, kept) == "index":
        return {"index": index.astype(np.uint32)}
    bits = np.zeros(size, np.uint8)
    bits[index] = 1
    return {"mask": _packed(bits, 1)}


def _found(array: object, name: str, size: int, kept: int) -> NDArray[np.int64]:
    if name == "mask":
        index: NDArray[np.int64] = np.flatnonzero(_unpacked(array, size, 1, name))
        if len(index) != kept:
            raise DataError(f"the mask keeps {len(index)} numbers, not {kept}.", found=len(index), where=name)
        return index
    index = _array(array, np.dtype(np.uint32), kept, name).astype(np.int64)
    if index[-1] >= size or (np.diff(index) <= 0).any():
        raise DataError(f"the positions are not sorted, distinct and below {size}.", where=name)
    return index


@lru_cache(maxsize=4)  # the server asks for the same one for every client of a round
def _common(codec: Prune, size: int, round: int) -> NDArray[np.int64]:
    """Sorted positions of the ``kept`` smallest of ``size`` public random words: a uniform subset."""
    key = hashlib.sha256(f"sfumato common mask\0{codec.seed}\0{round}\0{size}".encode()).digest()
    # The raw words of a bit generator are the same in every version of NumPy; its permutations are not.
    words = np.random.Philox(key=int.from_bytes(key[:16], "little")).random_raw(size)
    index = np.sort(np.argsort(words, kind="stable")[: _kept(codec, size)])
    index.flags.writeable = False
    return index


def _only(arrays: Mapping[str, NDArray[Any]], *names: str) -> Mapping[str, NDArray[Any]]:
    if not isinstance(arrays, Mapping) or len(arrays) != len(names) or any(name not in arrays for name in names):
        raise DataError(f"the arrays are not exactly {', '.join(names)}.", where="arrays")
    return arrays


def _array(array: object, dtype: np.dtype[Any], length: int, name: str) -> NDArray[Any]:
    if type(array) is not np.ndarray or array.dtype != dtype or array.shape != (length,):
        found = f"{array.dtype} {array.shape[:4]}" if isinstance(array, np.ndarray) else type(array).__name__
        raise DataError(f"{name} is {found}, not {dtype} ({length},).", found=found[:80], where=name)
    return array


def _floats(array: object, length: int, name: str, copy: bool = True) -> NDArray[np.float32]:
    held: NDArray[np.float32] = _array(array, np.dtype(np.float32), length, name)
    if copy or not held.flags.writeable:  # PyTorch has no read-only tensors
        held = held.copy()
    if not np.isfinite(held).all():
        raise DataError(f"{name} has a number that is not finite.", where=name)
    return held


def _unknown(codec: object) -> ConfigurationError:
    kinds = " or ".join(kind.__name__ for kind in get_args(Codec))
    return ConfigurationError(f"{codec!r} is no codec.", found=codec, where="compression", fix=f"{kinds}, or None.")
