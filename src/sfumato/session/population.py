"""Which records of which data set a loader serves, as the ledger can know them again: by name, or by content."""

import hashlib
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Subset, TensorDataset

from sfumato.accounting import Records
from sfumato.errors import ConfigurationError, UnsupportedError
from sfumato.sampling import Units
from sfumato.session.charging import Scope


def scope_of(
    data: Any, dataset: str | None, group: str | None, units: Units | None, pseudonym: Callable[[str], str]
) -> Scope:
    """The scope of a training on ``data``.

    Record i of a data set is the same record in every round if its base (below any ``Subset``) has the same content,
    or if the caller says so by giving it a name. ``pseudonym`` hides the hash, which is data. Otherwise nothing is
    claimed: such rounds are charged as if all of them touched the same records.
    """
    for name, value in (("dataset", dataset), ("group", group)):
        if value is not None and (not isinstance(value, str) or not value):
            raise ConfigurationError(f"{name}={value!r} is not a non-empty string.", found=value, where=name)
    base, chosen = _base(data), numbers(data)
    if len(chosen) and units is None:
        _refuse_repeated(chosen)
    if group is not None:  # the caller has said whose records they are; groups are disjoint by that word
        return Scope(dataset, group)
    content = _content(base)
    if content is None and dataset is None:
        return Scope()
    size = len(base)
    key = "" if content is None else pseudonym(content)
    if units is not None:  # their numbers are of this loader only: anybody of the data set
        return Scope(f"{dataset} ({key})" if dataset else key)
    if data is base:
        chosen = np.arange(size, dtype=np.int64)
    # Two bases of one name are taken for one only if they could be: else their numbers have nothing in common.
    key = key or f"{size} records"
    return Scope(f"{dataset} ({key})" if dataset else key, None, Records(chosen))


def numbers(data: Any) -> NDArray[np.int64]:
    """The numbers that the records of a ``Subset`` have in the data set below it; none for anything else."""
    chosen: NDArray[np.int64] | None = None
    while type(data) is Subset:
        own = np.asarray(data.indices, dtype=np.int64)
        own = np.where(own < 0, own + len(data.dataset), own)  # type: ignore[arg-type]  # Subset passes them on
        chosen = own if chosen is None else own[chosen]
        data = data.dataset
    return np.empty(0, np.int64) if chosen is None else chosen


def _base(data: Any) -> Any:
    while type(data) is Subset:
        data = data.dataset
    return data


def _refuse_repeated(chosen: NDArray[np.int64]) -> None:
    numbers, times = np.unique(chosen, return_counts=True)
    if len(numbers) and times.max() > 1:
        raise UnsupportedError(
            f"Record {numbers[times.argmax()]} is {times.max()} times in this Subset: it would be drawn and clipped so "
            "often, and charged once.",
            found=int(times.max()),
            where="data_loader.dataset",
            fix="list each record once, or pass privacy_unit=subset.indices, which clips a record with its copies.",
        )


def _content(data: Any) -> str | None:
    """A hash of all records where they lie in memory; None where reading them might not be repeatable."""
    digest = hashlib.sha256()
    if type(data) is TensorDataset:
        digest.update(b"row by row")  # a list of the same tensors numbers them, not their rows
        data = list(data.tensors)
    elif isinstance(getattr(data, "_fingerprint", None), str) and hasattr(data, "column_names"):
        return f"sha256:{hashlib.sha256(data._fingerprint.encode()).hexdigest()[:32]}"
    return f"sha256:{digest.hexdigest()[:32]}" if _fed(digest, data) else None


def _fed(digest: Any, value: Any) -> bool:
    """Whether ``value`` could be hashed as it is."""
    if isinstance(value, np.ndarray) and value.dtype.kind in "biufc":
        value = torch.from_numpy(np.ascontiguousarray(value))
    if type(value) is Tensor and value.layout == torch.strided and not value.is_quantized:
        digest.update(f"{value.dtype}{tuple(value.shape)}".encode())
        flat = value.detach().cpu().contiguous().view(-1)
        digest.update(flat.view(torch.uint8).numpy().data if flat.numel() else b"")
        return True
    if type(value) in (list, tuple):
        digest.update(f"{type(value).__name__}{len(value)}".encode())
        return all(_fed(digest, part) for part in value)
    if type(value) in (int, float, bool, str, bytes, type(None)):
        digest.update(f"{type(value).__name__}:{value!r};".encode())
        return True
    return False


__all__ = ["scope_of"]
