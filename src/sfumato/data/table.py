"""CSV and Parquet tables. Nothing is fitted on the records: columns are declared, or take a fixed transform."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ..errors import ConfigurationError, DataError
from .dataset import DataSet, records, split
from .schema import Schema, read_schema

if TYPE_CHECKING:
    import pandas as pd

HASH_BUCKETS = 16
ASINH_SCALE = 4.0  # asinh(x) / 4, cut at +-4: monotone, and covers |x| up to 4 million
MAX_CLASSES = 1000


@dataclass(frozen=True)
class Encoded:
    """All rows of a table, not split. ``x``: (n, features) float32; ``y``: (n,) int64; the rest as in ``DataSet``."""

    x: np.ndarray
    y: np.ndarray
    classes: tuple[str, ...]
    checked: tuple[str, ...]
    declared: tuple[str, ...]
    warnings: tuple[str, ...]


def load_table(path: Path, *, label: str, bounds: str | None, test_fraction: float) -> DataSet:
    """Records of shape (features,); classes are the values of ``label``; a fixed random split."""
    table = encode(read_table(path), label=label, schema=read_schema(bounds) if bounds else Schema(), where=str(path))
    rows, held_out = split(len(table.y), test_fraction, where=str(path))
    return DataSet(
        name=path.name,
        kind="table",
        train=records(table.x[rows], table.y[rows], where=str(path)),
        test=records(table.x[held_out], table.y[held_out], where=str(path)),
        classes=table.classes,
        checked=table.checked,
        declared=table.declared,
        warnings=table.warnings,
    )


def encode(frame: pd.DataFrame, *, label: str, schema: Schema, where: str) -> Encoded:
    """Columns -> numbers by declared bounds and categories, or by a fixed transform. Raises :class:`DataError`."""
    if label not in frame.columns:
        raise DataError(f"{where} has no column {label!r}; it has: {', '.join(map(str, frame.columns))}")
    if frame.shape[1] < 2:
        raise DataError(f"{where} has no column besides the label {label!r}")
    if unknown := sorted((set(schema.bounds) | set(schema.categories)) - set(map(str, frame.columns))):
        raise DataError(f"--bounds names column(s) that {where} does not have: {', '.join(unknown)}")
    classes, y = _labels(frame[label], label, schema.categories.get(label), where)
    declared = ["The column names and types are public."]
    declared.append(
        f"The list of classes of {label!r} is public"
        + (" (given in the bounds file)." if label in schema.categories else " (it was read from the label column).")
    )
    columns, loose, hashed = [], [], []
    for name in frame.columns:
        if name == label:
            continue
        column, text = frame[name], str(name)
        if column.isna().any():
            missing = int(column.isna().sum())
            raise DataError(f"{where}: column {text!r} has {missing} missing value(s).", fix="fill or drop them first.")
        if text in schema.categories:
            columns.append(_one_hot(column.astype(str), schema.categories[text]))
        elif _is_number(column):
            columns.append(_numeric(column.to_numpy(dtype=np.float64), schema.bounds.get(text), text, where))
            if text not in schema.bounds and column.dtype.kind != "b":
                loose.append(text)
        elif _is_text(column):
            columns.append(_hashed(column.astype(str), text))
            hashed.append(text)
        else:
            raise DataError(
                f"{where}: column {text!r} has type {column.dtype}.", fix="make it numeric or text, or drop it."
            )
    warnings = []
    if schema.bounds or schema.categories:
        declared.append("The bounds and categories in the bounds file were chosen without looking at these records.")
    if loose:
        warnings.append(
            f"no public bounds for {_some(loose)}: the fixed transform asinh(x)/4, cut at ±4, is used. "
            "Declare the range with --bounds for better accuracy."
        )
    if hashed:
        warnings.append(
            f"no declared categories for {_some(hashed)}: values are hashed into {HASH_BUCKETS} fixed buckets. "
            "Declare the categories with --bounds for better accuracy."
        )
    return Encoded(
        x=np.concatenate(columns, axis=1),
        y=y,
        classes=classes,
        checked=("Columns are scaled by declared bounds or by a fixed transform; nothing is fitted on the records.",),
        declared=tuple(declared),
        warnings=tuple(warnings),
    )


def read_table(path: Path) -> pd.DataFrame:
    """The file as it is. Raises :class:`DataError` for one that is unreadable, empty, or names a column twice."""
    try:
        import pandas as pd
    except ImportError:
        raise ConfigurationError("tables need pandas.", fix="pip install 'sfumato[data]'") from None
    name = path.name.lower()
    try:
        if name.endswith((".parquet", ".pq")):
            frame = pd.read_parquet(path)
        else:
            frame = pd.read_csv(path, sep="\t" if ".tsv" in name else ",")
    except ImportError:
        raise ConfigurationError("Parquet needs pyarrow.", fix="pip install 'sfumato[data]'") from None
    except (OSError, ValueError, EOFError) as error:  # parser, decoding and Arrow errors are ValueErrors or OSErrors
        raise DataError(f"{path} cannot be read: {error}") from None
    if frame.empty:
        raise DataError(f"{path} holds no records")
    if frame.columns.has_duplicates:
        raise DataError(f"{path} has two columns of the same name")
    return frame


def _labels(
    column: pd.Series, label: str, allowed: tuple[str, ...] | None, where: str
) -> tuple[tuple[str, ...], np.ndarray]:
    if column.isna().any():
        raise DataError(f"{where}: the label column {label!r} has {int(column.isna().sum())} missing value(s)")
    if column.dtype.kind == "f":
        if not (column % 1 == 0).all():
            raise DataError(f"{where}: the label column {label!r} holds fractions.", fix="give a column of classes.")
        column = column.astype("int64")
    values = column.astype(str)
    found = sorted(column.unique(), key=lambda v: (isinstance(v, str), v))
    classes = allowed or tuple(str(v) for v in found)
    if extra := sorted(set(values) - set(classes)):
        raise DataError(f"{where}: the label column {label!r} holds undeclared classes: {', '.join(extra[:5])}")
    if not 2 <= len(classes) <= MAX_CLASSES:
        raise DataError(
            f"{where}: the label column {label!r} has {len(classes)} classes; 2 to {MAX_CLASSES} are needed"
        )
    number = {name: i for i, name in enumerate(classes)}
    return classes, np.array([number[v] for v in values], dtype=np.int64)


def _is_number(column: pd.Series) -> bool:
    from pandas.api import types

    return bool(types.is_numeric_dtype(column) and not types.is_complex_dtype(column))


def _is_text(column: pd.Series) -> bool:
    from pandas.api import types

    return isinstance(column.dtype, type(column.astype("category").dtype)) or bool(
        types.is_string_dtype(column) or types.is_object_dtype(column)
    )


def _numeric(values: np.ndarray, bounds: tuple[float, float] | None, name: str, where: str) -> np.ndarray:
    """(n,) -> (n, 1): declared bounds map to [-1, 1]; otherwise the fixed transform."""
    if not np.isfinite(values).all():
        raise DataError(f"{where}: column {name!r} holds infinite values.", fix="clean them first.")
    if bounds is None:
        scaled = np.clip(np.arcsinh(values) / ASINH_SCALE, -ASINH_SCALE, ASINH_SCALE)
    else:
        low, high = bounds
        scaled = 2.0 * (np.clip(values, low, high) - low) / (high - low) - 1.0
    return scaled.astype(np.float32)[:, None]


def _one_hot(column: pd.Series, categories: tuple[str, ...]) -> np.ndarray:
    """(n,) -> (n, categories); a value that was not declared is a row of zeros."""
    return (column.to_numpy(dtype=object)[:, None] == np.array(categories, dtype=object)[None]).astype(np.float32)


def _hashed(column: pd.Series, name: str) -> np.ndarray:
    """(n,) -> (n, HASH_BUCKETS): the bucket depends on the value and the column name only."""
    unique = {value: _bucket(name, value) for value in column.unique()}
    buckets = np.array([unique[value] for value in column])
    return np.eye(HASH_BUCKETS, dtype=np.float32)[buckets]


def _bucket(name: str, value: str) -> int:
    digest = hashlib.blake2b(f"{name}\0{value}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") % HASH_BUCKETS


def _some(names: list[str]) -> str:
    shown = ", ".join(names[:4])
    return shown if len(names) <= 4 else f"{shown} and {len(names) - 4} more"
