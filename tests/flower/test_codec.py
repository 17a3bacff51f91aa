"""Tasks and replies survive the wire exactly, and nothing else is taken for one."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("flwr.app")

from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects
from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents

from sfumato.errors import DataError
from sfumato.federated.wire.messages import KINDS, Reply, Task
from sfumato.integrations.flower.codec import (
    ENTRIES,
    RAW,
    read_reply,
    read_task,
    reply_records,
    task_records,
)

TASK = Task(
    "run", 3, "nonce", "train", "base", "schema", np.arange(5, dtype=np.float32), None, {"lr": 0.1, "on": True, "n": 2}
)
REPLY = Reply("a", "run", 3, "nonce", "base", "schema", {"vector": np.ones(4, np.float32)})


def wire(records: RecordDict) -> RecordDict:
    contents = {name: held.deflate() for name, held in get_all_nested_objects(records).items()}
    read = inflate_object_from_contents(records.object_id, contents)
    assert isinstance(read, RecordDict)
    return read


def same(one: Any, other: Any) -> None:
    assert type(one) is type(other)
    for field in fields(one):
        a, b = getattr(one, field.name), getattr(other, field.name)
        if isinstance(a, np.ndarray):
            a, b = {"vector": a}, {"vector": b}
        if field.name in ("vector", "index", "arrays") and a is not None:
            assert set(a) == set(b)
            for name in a:
                assert a[name].dtype == b[name].dtype
                assert a[name].shape == b[name].shape
                assert a[name].tobytes() == b[name].tobytes()
                assert b[name].flags.writeable
        else:
            assert a == b, field.name
            assert type(a) is type(b)


@pytest.mark.parametrize("kind", KINDS)
def test_a_task_arrives_as_it_was(kind: Any) -> None:
    same(replace(TASK, kind=kind), read_task(wire(task_records(replace(TASK, kind=kind)))))


def test_special_values_of_a_vector_arrive_bit_for_bit() -> None:
    bits = np.array([0x7FC00001, 0xFFC12345, 0x7F800000, 0x80000000, 1, 0x3F800000], np.uint32)
    task = replace(TASK, vector=bits.view(np.float32))
    same(task, read_task(wire(task_records(task))))


def test_settings_keep_their_types() -> None:
    settings = {"yes": True, "one": 1, "uno": 1.0, "text": "true", "big": 2**53 + 1}
    found = read_task(wire(task_records(replace(TASK, settings=settings)))).settings
    assert {k: (type(v), v) for k, v in found.items()} == {k: (type(v), v) for k, v in settings.items()}


@pytest.mark.parametrize("dtype", ["float32", "float64", "int8", "int16", "int64", "uint8", "uint32", "uint64", "bool"])
def test_replies_carry_any_numbers(dtype: str) -> None:
    numbers = np.random.default_rng(0).integers(0, 2, 24).astype(dtype).reshape(2, 3, 4)
    reply = replace(REPLY, arrays={"x": numbers, "none": numbers[:0], "scalar": numbers[0, 0, 0].reshape(())})
    same(reply, read_reply(wire(reply_records(reply))))
    same(
        reply,
        read_reply(wire(reply_records(replace(reply, arrays={n: a.T.copy().T for n, a in reply.arrays.items()})))),
    )


@pytest.mark.parametrize(
    "reply",
    [
        replace(REPLY, arrays={}, error="budget", done=True),
        replace(REPLY, epsilon=1.5),
        replace(REPLY, epsilon=float("inf"), done=True),
        replace(REPLY, epsilon=0.0, error=""),
    ],
)
def test_what_a_reply_may_say(reply: Reply) -> None:
    same(reply, read_reply(wire(reply_records(reply))))


def test_big_endian_and_strided_arrays_mean_the_same() -> None:
    vector = np.arange(8, dtype=">f4")[::2]
    found = read_reply(wire(reply_records(replace(REPLY, arrays={"v": vector})))).arrays["v"]
    np.testing.assert_array_equal(found, vector.astype(np.float32))


def broken(change: Any) -> RecordDict:
    records = reply_records(REPLY)
    change(records)
    return records


def field(name: str, value: Any) -> Any:
    return lambda records: records["reply"].__setitem__(name, value)


def array(held: Array) -> Any:
    return lambda records: records["arrays"].__setitem__("vector", held)


BYTES = np.ones(4, np.float32).tobytes()


@pytest.mark.parametrize(
    "change",
    [
        lambda records: records.__delitem__("arrays"),
        lambda records: records.__delitem__("reply"),
        lambda records: records.__setitem__("metrics", MetricRecord({"num-examples": 3})),
        lambda records: records.__setitem__("arrays", ConfigRecord()),
        lambda records: records.__setitem__("reply", ArrayRecord()),
        lambda records: records["reply"].__delitem__("nonce"),
        field("loss", 0.3),
        field("round", 3.0),
        field("round", True),
        field("round", [3]),
        field("client", b"a"),
        field("done", 1),
        field("error", 5),
        field("error", "x" * 513),
        field("epsilon", float("nan")),
        field("epsilon", -1.0),
        field("epsilon", 1),
        array(Array(np.ones(4, np.float32))),
        array(Array("float32", (4,), "numpy.ndarray", BYTES)),
        array(Array("float32", (5,), RAW, BYTES)),
        array(Array("float32", (3,), RAW, BYTES)),
        array(Array("float32", (-4,), RAW, BYTES)),
        array(Array("float32", (-2, -2), RAW, BYTES)),
        array(Array("float32", (2**62, 2**62), RAW, BYTES)),
        array(Array("object", (2,), RAW, BYTES)),
        array(Array("float16", (8,), RAW, BYTES)),
        array(Array("complex64", (2,), RAW, BYTES)),
        array(Array("bool", (2,), RAW, b"\1\2")),
        array(Array("float32", (), RAW, b"")),
        lambda records: records.__setitem__(
            "arrays", ArrayRecord({f"x{n}": Array("uint8", (0,), RAW, b"") for n in range(ENTRIES + 1)})
        ),
    ],
)
def test_anything_else_is_refused(change: Any) -> None:
    with pytest.raises(DataError):
        read_reply(broken(change))


def test_a_long_reply_is_refused_before_it_is_built() -> None:
    assert read_reply(reply_records(REPLY), most=16)
    with pytest.raises(DataError, match="15 bytes"):
        read_reply(reply_records(REPLY), most=15)


@pytest.mark.parametrize("index", [[0], [4], [0, 1, 2, 3, 4], [1, 3]])
def test_a_task_may_train_some_positions(index: list[int]) -> None:
    task = replace(TASK, index=np.array(index))
    same(task, read_task(wire(task_records(task))))


@pytest.mark.parametrize("index", [[], [5], [-1, 2], [2, 1], [1, 1], [[1]], [1.0], np.array([1], np.int32)])
def test_other_positions_are_refused(index: Any) -> None:
    with pytest.raises(DataError, match="positions"):
        read_task(task_records(replace(TASK, index=np.asarray(index))))


def test_no_field_is_forgotten() -> None:
    named = {"run", "round", "nonce", "base", "schema"}
    assert {f.name for f in fields(Task)} == named | {"kind", "vector", "index", "settings"}
    assert {f.name for f in fields(Reply)} == named | {"client", "arrays", "error", "done", "epsilon"}


@pytest.mark.parametrize(
    "vector", [np.ones((2, 2), np.float32), np.ones(2, np.float64), np.ones(2, np.int32), np.float32(1).reshape(())]
)
def test_a_task_has_one_flat_float32_vector(vector: Any) -> None:
    with pytest.raises(DataError):
        read_task(task_records(replace(TASK, vector=vector)))


def test_unknown_tasks_and_settings_are_refused() -> None:
    with pytest.raises(DataError, match="kind"):
        read_task(task_records(replace(TASK, kind="leak")))  # type: ignore[arg-type]
    with pytest.raises(DataError, match="plain"):
        task_records(replace(TASK, settings={"records": [1, 2]}))  # type: ignore[dict-item]
    records = task_records(TASK)
    records["settings"]["raw"] = b"1"
    with pytest.raises(DataError, match="plain"):
        read_task(records)
    with pytest.raises(DataError):
        read_task(reply_records(REPLY))
    with pytest.raises(DataError, match="object"):
        reply_records(replace(REPLY, arrays={"x": np.array([None])}))


VALUES = st.one_of(st.booleans(), st.integers(-(2**60), 2**60), st.floats(), st.text(max_size=5), st.binary(max_size=5))
ARRAYS = st.builds(
    Array,
    st.sampled_from(["float32", "float64", "bool", "int8", "object", "O", "f4", "V8", ""]),
    st.lists(st.integers(-3, 9), max_size=3).map(tuple),
    st.sampled_from([RAW, "numpy.ndarray", ""]),
    st.binary(max_size=40),
)


@settings(max_examples=300, deadline=None)
@given(
    st.dictionaries(st.sampled_from([*(f.name for f in fields(Reply)), "other"]), VALUES),
    st.dictionaries(st.text(max_size=3), ARRAYS, max_size=3),
)
def test_hostile_records_give_a_reply_or_a_data_error(said: dict[str, Any], arrays: dict[str, Array]) -> None:
    records = reply_records(REPLY)
    for name, value in said.items():
        records["reply"][name] = value
    records["arrays"] = ArrayRecord(arrays)
    try:
        reply = read_reply(records, most=64)
    except DataError:
        return
    assert all(a.dtype.kind in "biuf" for a in reply.arrays.values())
    assert sum(a.nbytes for a in reply.arrays.values()) <= 64


@pytest.mark.parametrize("shape", [(1,) * 65, (1,) * 9, (0, 2**62, 2**62), (0, 2**63 - 1), (2**62, 4)])
def test_shapes_that_numpy_cannot_make_are_refused_and_do_not_crash(shape: tuple[int, ...]) -> None:
    records = reply_records(REPLY)
    size = 1 if 0 not in shape else 0
    records["arrays"]["vector"] = Array(dtype="uint8", shape=shape, stype=RAW, data=bytes(size))
    with pytest.raises(DataError):
        read_reply(records)
