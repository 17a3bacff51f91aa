"""Whose privacy each record is: the caller's ids, read once before training."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from typing import Any

import numpy as np
from torch import Tensor
from torch.utils.data import DataLoader

from sfumato.errors import ConfigurationError
from sfumato.sampling import Units, group

PrivacyUnit = str | Sequence[Any] | Callable[[Any], Any] | Units


def units_of(loader: DataLoader[Any], given: PrivacyUnit | None, cap: int | None) -> Units | None:
    """The units of a data set: ids in a row, a function of the record, or the name of a field of the records.

    A function or name reads the whole data set once. None: every record is a unit of its own.
    """
    if given is None:
        if cap is not None:
            raise ConfigurationError(
                "max_records_per_unit caps the records of a privacy unit, but privacy_unit is not given.",
                found=cap,
                where="max_records_per_unit",
            )
        return None
    n = len(loader.dataset)  # type: ignore[arg-type]
    units = given if isinstance(given, Units) else group((_plain(i) for i in _ids(loader.dataset, given, n)), cap)
    if len(units.order) != n:
        raise _uncounted(n, len(units.order))
    return units


def _ids(data: Any, given: str | Sequence[Any] | Callable[[Any], Any], n: int) -> Iterable[Any]:
    if isinstance(given, str):
        columns = getattr(data, "column_names", None)
        return data[given] if columns and given in columns else (_field(data[i], given) for i in range(n))
    # Iterating a table gives the names of its columns, a mapping its keys, and a set has no order.
    unordered = isinstance(given, (Mapping, AbstractSet)) or hasattr(given, "columns")
    if callable(given) and not unordered:
        return (given(data[i]) for i in range(n))
    ids: Any = given.tolist() if hasattr(given, "tolist") else given
    if unordered or not hasattr(ids, "__len__"):
        raise _uncounted(n, type(given).__name__)
    if len(ids) != n:
        raise _uncounted(n, len(ids))
    return ids


def _uncounted(n: int, found: object) -> ConfigurationError:
    return ConfigurationError(
        f"privacy_unit must have one id for each of the {n} records of the data set, in their order; found {found}.",
        found=found,
        where="privacy_unit",
        fix="pass a sequence as long as the data set, a function of a record, or the name of a field.",
    )


def _plain(value: Any) -> Any:
    """Numbers out of arrays: tensors are equal only to themselves."""
    if isinstance(value, (tuple, frozenset)):
        return (tuple if isinstance(value, tuple) else frozenset)(_plain(part) for part in value)
    one = getattr(value, "ndim", None) == 0 or (isinstance(value, (Tensor, np.ndarray)) and math.prod(value.shape) == 1)
    return value.item() if one and bool(value == value) else value


def _field(record: Any, name: str) -> Any:
    if not hasattr(record, "keys") or name not in record:
        raise ConfigurationError(
            f"privacy_unit={name!r} is not a field of the records, which are {type(record).__name__}.",
            found=name,
            where="privacy_unit",
            fix="pass the ids themselves, or a function of a record.",
        )
    return record[name]
