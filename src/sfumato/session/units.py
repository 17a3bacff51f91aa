"""Whose privacy each record is: the caller's ids, read once before training."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

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
    if isinstance(given, Units):
        return given
    data = loader.dataset
    n = len(data)  # type: ignore[arg-type]
    ids: Iterable[Any]
    if isinstance(given, str):
        columns = getattr(data, "column_names", None)
        ids = data[given] if columns and given in columns else (_field(data[i], given) for i in range(n))
    elif callable(given):
        ids = (given(data[i]) for i in range(n))
    else:
        ids = given.tolist() if hasattr(given, "tolist") else given
        if not hasattr(ids, "__len__") or len(ids) != n:
            raise ConfigurationError(
                f"privacy_unit must have one id for each of the {n} records of the data set.",
                found=len(ids) if hasattr(ids, "__len__") else type(given).__name__,
                where="privacy_unit",
                fix="pass a sequence as long as the data set, a function of a record, or the name of a field.",
            )
    return group((_plain(i) for i in ids), cap)


def _plain(value: Any) -> Any:
    """Numbers out of arrays: tensors are equal only to themselves."""
    return value.item() if getattr(value, "ndim", None) == 0 else value


def _field(record: Any, name: str) -> Any:
    if not hasattr(record, "keys") or name not in record:
        raise ConfigurationError(
            f"privacy_unit={name!r} is not a field of the records, which are {type(record).__name__}.",
            found=name,
            where="privacy_unit",
            fix="pass the ids themselves, or a function of a record.",
        )
    return record[name]
