"""Task and Reply as Flower records, and back. What arrives is checked before anything is built from it.

Arrays travel as raw little-endian bytes with a dtype from a closed list, so that reading them runs no parser and
allocates no more than arrived. What the numbers mean is checked by the server, as on every transport.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict
from numpy.typing import NDArray

from sfumato.errors import DataError
from sfumato.federated.wire.messages import KINDS, Reply, Scalar, Task

RAW = "sfumato.raw"
ENTRIES = 64  # most arrays of a message
LETTERS = 512  # most letters of a text
AXES = 8  # most axes of an array
LONGEST = 2**40  # most numbers of an array, were its empty axes not empty
_ORDERS = {name: np.dtype(name).newbyteorder("<") for name in ("float32", "float64", "int8", "int16", "int32", "int64")}
_ORDERS |= {name: np.dtype(name).newbyteorder("<") for name in ("uint8", "uint16", "uint32", "uint64", "bool")}
_TASK = {"run": str, "round": int, "nonce": str, "kind": str, "base": str, "schema": str}
_REPLY = {"client": str, "run": str, "round": int, "nonce": str, "base": str, "schema": str, "done": bool}
_MAYBE = {"error": str, "epsilon": float}


def task_records(task: Task) -> RecordDict:
    """What a task becomes on the wire. Raises ``DataError`` for a setting that is no plain number or text."""
    for name, value in task.settings.items():
        if type(value) not in (bool, int, float, str):
            raise _refused(f"setting {name!r} is {type(value).__name__}, not a plain number or text", value)
    arrays: dict[str, NDArray[Any]] = {"vector": task.vector}
    if task.index is not None:
        arrays["index"] = task.index
    return RecordDict(
        {
            "task": ConfigRecord({name: getattr(task, name) for name in _TASK}),
            "settings": ConfigRecord(dict(task.settings)),
            "arrays": ArrayRecord({name: _sent(name, array) for name, array in arrays.items()}),
        }
    )


def read_task(records: RecordDict) -> Task:
    """The task in these records. Raises ``DataError`` unless they are exactly what :func:`task_records` writes."""
    fields, arrays = _read(records, "task", _TASK, extra={"settings"})
    if fields["kind"] not in KINDS:
        raise _refused(f"{fields['kind']!r} is no kind of task", fields["kind"])
    vector, index = arrays.pop("vector", None), arrays.pop("index", None)
    if arrays or vector is None or vector.dtype != np.float32 or vector.ndim != 1:
        raise _refused("a task carries one flat float32 vector", sorted(arrays))
    if index is not None and not _positions(index, len(vector)):
        raise _refused("the index of a task is not of sorted positions in its vector", index.shape)
    return Task(**fields, vector=vector, index=index, settings=_settings(records["settings"]))


def reply_records(reply: Reply) -> RecordDict:
    """What a reply becomes on the wire."""
    fields: dict[str, Any] = {name: getattr(reply, name) for name in _REPLY}
    fields |= {name: value for name in _MAYBE if (value := getattr(reply, name)) is not None}
    return RecordDict(
        {
            "reply": ConfigRecord(fields),
            "arrays": ArrayRecord({name: _sent(name, array) for name, array in reply.arrays.items()}),
        }
    )


def read_reply(records: RecordDict, *, most: int | None = None) -> Reply:
    """The reply in these records. Raises ``DataError`` for anything else, or for arrays of more than ``most`` bytes."""
    fields, arrays = _read(records, "reply", _REPLY, optional=_MAYBE, most=most)
    if not fields.get("epsilon", 0.0) >= 0.0:
        raise _refused("epsilon is no bound", fields["epsilon"])
    return Reply(**fields, arrays=arrays)


def refusal(task: Task, client: str, why: str) -> Reply:
    """The reply of a client that gave none."""
    return Reply(client, task.run, task.round, task.nonce, task.base, task.schema, error=why)


def _read(
    records: RecordDict,
    name: str,
    types: Mapping[str, type],
    *,
    optional: Mapping[str, type] | None = None,
    extra: set[str] | None = None,
    most: int | None = None,
) -> tuple[dict[str, Any], dict[str, NDArray[Any]]]:
    if set(records) != {name, "arrays"} | (extra or set()):
        raise _refused(f"a {name} does not consist of these records", sorted(records))
    fields, arrays = records[name], records["arrays"]
    if not isinstance(fields, ConfigRecord) or not isinstance(arrays, ArrayRecord):
        raise _refused(f"a record of this {name} is of another type", sorted(records))
    known = {**types, **(optional or {})}
    if not set(types) <= set(fields) <= set(known):
        raise _refused(f"a {name} does not have these fields", sorted(fields))
    for field, value in fields.items():
        if type(value) is not known[field] or (isinstance(value, str) and len(value) > LETTERS):
            raise _refused(f"{field} is not {known[field].__name__}, or too long", type(value).__name__)
    if len(arrays) > ENTRIES:
        raise _refused(f"more than {ENTRIES} arrays", len(arrays))
    if most is not None and sum(len(array.data) for array in arrays.values()) > most:
        raise _refused(f"arrays of more than {most} bytes", None)
    return dict(fields), {key: _received(key, array) for key, array in arrays.items()}


def _positions(index: NDArray[Any], size: int) -> bool:
    if index.dtype != np.int64 or index.ndim != 1 or not len(index):
        return False
    return bool(index[0] >= 0 and index[-1] < size and (np.diff(index) > 0).all())


def _settings(record: object) -> dict[str, Scalar]:
    if not isinstance(record, ConfigRecord):
        raise _refused("settings are of another type", type(record).__name__)
    settings: dict[str, Scalar] = {}
    for name, value in record.items():
        if not isinstance(value, (bool, int, float, str)):
            raise _refused(f"setting {name!r} is no plain number or text", type(value).__name__)
        settings[name] = value
    return settings


def _sent(name: str, array: NDArray[Any]) -> Array:
    kind = array.dtype.name
    if kind not in _ORDERS:
        raise _refused(f"{name} has dtype {kind}", kind)
    data = np.ascontiguousarray(array, dtype=_ORDERS[kind]).tobytes()
    return Array(dtype=kind, shape=tuple(array.shape), stype=RAW, data=data)


def _received(name: str, sent: Array) -> NDArray[Any]:
    shape = tuple(sent.shape)
    if sent.stype != RAW or sent.dtype not in _ORDERS:
        raise _refused(f"{name[:40]!r} is written as {sent.stype!r} with dtype {sent.dtype!r}", None)
    order = _ORDERS[sent.dtype]
    if len(shape) > AXES or math.prod(max(size, 1) for size in shape) > LONGEST:  # NumPy counts empty axes as 1
        raise _refused(f"{name[:40]!r} has too many axes, or too long ones", len(shape))
    if any(size < 0 for size in shape) or math.prod(shape) * order.itemsize != len(sent.data):
        raise _refused(f"{name[:40]!r} of shape {shape} has {len(sent.data)} bytes", shape)
    if sent.dtype == "bool" and sent.data.strip(b"\0\1"):
        raise _refused(f"{name[:40]!r} holds bytes that are no truth values", None)
    # A copy: the bytes belong to the message and cannot be written to, which torch does not take.
    return np.frombuffer(sent.data, order).reshape(shape).astype(order.newbyteorder("="), copy=True)


def _refused(what: str, found: object) -> DataError:
    return DataError(f"not a message of Sfumato: {what}.", found=found, where="flower")
