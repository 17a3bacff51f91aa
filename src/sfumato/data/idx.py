"""Folders in the idx format of MNIST and Fashion-MNIST, gzipped or not (format: LeCun, Cortes, Burges 1998)."""

from __future__ import annotations

import gzip
import math
import struct
import zlib
from pathlib import Path

import numpy as np

from ..errors import DataError
from .dataset import DataSet, Records, records

UNSIGNED_BYTE = 8
# Published constants of the data set (mean, standard deviation after / 255), not estimated here.
FASHION_MEAN_STD = (0.2860, 0.3530)
DEFAULT_MEAN_STD = (0.5, 0.5)
FASHION_CLASSES = (
    "T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot",
)  # fmt: skip


def is_fashion(folder: Path) -> bool:
    """Whether the folder's name says that it holds Fashion-MNIST."""
    return "fashion" in folder.resolve().name.lower()


def load_idx(folder: Path) -> DataSet:
    """``train-images-idx3-ubyte(.gz)`` and its three siblings -> images of shape (1, height, width)."""
    fashion = is_fashion(folder)
    mean, std = FASHION_MEAN_STD if fashion else DEFAULT_MEAN_STD
    train, test = (_part(folder, part, mean, std) for part in ("train", "t10k"))
    if train.x.shape[1:] != test.x.shape[1:]:
        raise DataError(f"{folder}: training and test images differ in size")
    highest = int(max(train.y.max(), test.y.max()))
    source = "the published constants of Fashion-MNIST" if fashion else "fixed constants"
    return DataSet(
        name="fashion-mnist" if fashion else folder.resolve().name,
        kind="idx",
        train=train,
        test=test,
        classes=FASHION_CLASSES if fashion and highest < 10 else tuple(str(c) for c in range(highest + 1)),
        checked=(
            f"Pixels are divided by 255, then shifted by {mean} and divided by {std} ({source}); "
            "nothing is fitted on the records.",
        ),
    )


def _part(folder: Path, part: str, mean: float, std: float) -> Records:
    images = _read(_find(folder, f"{part}-images", "idx3-ubyte"), axes=3)
    labels = _read(_find(folder, f"{part}-labels", "idx1-ubyte"), axes=1)
    if len(images) != len(labels):
        raise DataError(f"{folder}: {len(images)} {part} images but {len(labels)} labels")
    x = images.astype(np.float32)
    x /= 255.0
    x -= mean
    x /= std
    return records(x[:, None], labels, where=f"{folder}, {part}")


def _find(folder: Path, stem: str, suffix: str) -> Path:
    for joint in ("-", "."):
        for ending in ("", ".gz"):
            path = folder / f"{stem}{joint}{suffix}{ending}"
            if path.is_file():
                return path
    raise DataError(
        f"{folder} lacks {stem}-{suffix} (or .gz).", fix="point --data at a folder with all four idx files."
    )


def _read(path: Path, *, axes: int) -> np.ndarray:
    try:
        content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path} cannot be read: {error}") from None
    header = 4 + 4 * axes
    if len(content) < header or content[:2] != b"\0\0":
        raise DataError(f"{path} is not an idx file")
    kind, found = content[2], content[3]
    if kind != UNSIGNED_BYTE or found != axes:
        raise DataError(f"{path}: expected unsigned bytes with {axes} axes, found type {kind} with {found}")
    shape = struct.unpack(f">{axes}I", content[4:header])
    if len(content) - header != math.prod(shape):
        raise DataError(f"{path} is truncated: {len(content) - header} bytes for shape {shape}")
    return np.frombuffer(content, np.uint8, offset=header).reshape(shape)
