"""Codecs: what is decoded is what was sent, up to what the codec promises; hostile arrays only ever raise DataError."""

from __future__ import annotations

import math
import tracemalloc
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy import stats

from sfumato.errors import ConfigurationError, DataError
from sfumato.federated.wire.compression import Codec, Prune, Quantize, decode, encode, nbytes, support

CODECS: list[Codec | None] = [
    None,
    Quantize(8),
    Quantize(4, chunk=7),
    Quantize(1, chunk=10),
    Prune(0.1),
    Prune(0.3, rescale=True, seed=5),
    Prune(0.25, mask="own"),
    Prune(0.01, mask="own"),
    Prune(1.0, mask="own"),
]
SIZES = [1, 2, 3, 9, 33, 1000, 1025]


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def vector(size: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(size, generator=generator(seed))


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("codec", CODECS, ids=str)
def test_round_trip_keeps_size_and_sends_plain_arrays(codec: Codec | None, size: int) -> None:
    v = vector(size)
    arrays = encode(codec, v, generator(), round=3)
    out = decode(codec, arrays, size, round=3)
    assert out.shape == (size,)
    assert out.dtype == torch.float32
    assert torch.isfinite(out).all()
    assert {a.dtype.name for a in arrays.values()} <= {"float32", "uint8", "uint32"}
    assert torch.equal(v, vector(size)), "the input was changed"
    match codec:
        case None:
            assert torch.equal(out, v)
        case Quantize(bits):
            scale = v.abs().max()
            step = {8: 1 / 127, 4: 1 / 7, 1: 2.0}[bits]
            assert (out - v).abs().max() <= scale * step * (1 + 1e-6)
        case Prune():
            kept = math.ceil(codec.fraction * size)
            assert int((out != 0).sum()) == kept
            factor = size / kept if codec.rescale else 1.0
            torch.testing.assert_close(out[out != 0], v[out != 0] * factor)


@pytest.mark.parametrize(("bits", "share"), [(8, 1 / 4), (4, 1 / 8), (1, 1 / 32)])
def test_quantized_bytes_are_packed(bits: int, share: float) -> None:
    size = 1 << 16
    plain = nbytes(encode(None, vector(size)))
    assert plain == 4 * size
    assert nbytes(encode(Quantize(bits), vector(size), generator())) == plain * share + 4 * size / 1024


def test_pruned_bytes_are_those_of_what_is_kept() -> None:
    size = 32000
    v = vector(size)
    assert nbytes(encode(Prune(0.1), v)) == 4 * 3200
    assert nbytes(encode(Prune(0.1, mask="own"), v)) == 4 * 3200 + size / 8
    assert nbytes(encode(Prune(0.01, mask="own"), v)) == 8 * 320


def _bias(codec: Quantize, skew: float) -> float:
    """The smallest p-value over all coordinates, times their number, that decoding has the mean of the vector."""
    v = vector(12)
    runs = 4000
    g = generator(7)
    rows = torch.stack([decode(codec, encode(codec, v, g), 12) for _ in range(runs)]).double()
    z = (rows.mean(0) - v.double() * skew) / (rows.std(0) / math.sqrt(runs) + 1e-7)
    return 12 * float(2 * stats.norm.sf(z.abs().max()))


@pytest.mark.parametrize("bits", [8, 4, 1])
def test_rounding_has_the_mean_of_the_vector(bits: int) -> None:
    assert _bias(Quantize(bits), 1.0) > 1e-9
    assert _bias(Quantize(bits), 0.7) < 1e-9, "the test would not see a bias of 30 %"


def test_exact_values_of_the_grid_are_kept_exactly() -> None:
    v = torch.tensor([-7.0, -3.0, 0.0, 1.0, 7.0])
    for seed in range(20):
        assert torch.equal(decode(Quantize(4), encode(Quantize(4), v, generator(seed)), 5), v)
    assert torch.equal(decode(Quantize(8), encode(Quantize(8), torch.zeros(5), generator()), 5), torch.zeros(5))


def test_extreme_numbers_survive() -> None:
    for v in (torch.tensor([3.4e38, -3.4e38, 1.0]), torch.tensor([1e-45, -1e-45, 0.0])):
        for bits in (8, 4, 1):
            out = decode(Quantize(bits), encode(Quantize(bits), v, generator()), 3)
            assert torch.isfinite(out).all()
            assert out.abs().max() == v.abs().max()


def test_the_same_generator_gives_the_same_bytes() -> None:
    a, b = (encode(Quantize(4), vector(100), generator(3)) for _ in range(2))
    assert all(np.array_equal(a[k], b[k]) for k in a)


def test_common_mask_is_one_public_subset_a_round() -> None:
    codec = Prune(0.2)
    first, again, other = support(codec, 500, 1), support(codec, 500, 1), support(codec, 500, 2)
    assert first is not None
    assert other is not None
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert len(first) == 100
    assert (first.diff() > 0).all()
    assert not torch.equal(first, support(Prune(0.2, seed=1), 500, 1))
    out = decode(codec, encode(codec, vector(500), round=1), 500, 1)
    outside = torch.ones(500, dtype=torch.bool)
    outside[first] = False
    assert (out[outside] == 0).all()
    assert support(Prune(0.2, mask="own"), 500) is None
    assert support(None, 500) is None
    # Fixed for good: both sides of a federation may run different versions.
    assert support(Prune(0.1), 50, 1).tolist() == [4, 6, 33, 36, 48]


def test_common_mask_covers_all_positions_equally() -> None:
    rounds, size, codec = 3000, 40, Prune(0.25)
    counts = torch.stack([torch.bincount(support(codec, size, r), minlength=size) for r in range(rounds)]).sum(0)
    # Without replacement: the variance of a count is n·p·(1 - p), and the counts sum to a constant.
    chi = float(((counts - rounds / 4) ** 2 / (rounds * 3 / 16)).sum()) * (size - 1) / size
    assert stats.chi2.sf(chi, size - 1) > 1e-9


def test_rescaled_mask_keeps_the_mean_over_rounds() -> None:
    codec, v = Prune(0.25, rescale=True), torch.ones(16)
    mean = torch.stack([decode(codec, encode(codec, v, round=r), 16, r) for r in range(2000)]).mean()
    assert mean == pytest.approx(1.0)


def test_own_positions_are_the_largest() -> None:
    v = torch.tensor([0.1, -5.0, 2.0, 0.0, -3.0, 1.0])
    for fraction in (0.5, 0.02):
        codec = Prune(fraction, mask="own")
        big = torch.cat([v, torch.full((994,), 0.01)]) if fraction < 0.1 else v
        out = decode(codec, encode(codec, big), len(big))
        assert out[1] == -5.0
        assert out[2] == 2.0
        assert out[4] == -3.0
        assert out[0] == (0.1 if fraction < 0.1 else 0.0)


@pytest.mark.parametrize(
    "make",
    [
        lambda: Quantize(3),
        lambda: Quantize(True),
        lambda: Quantize(8, chunk=0),
        lambda: Prune(0.0),
        lambda: Prune(1.5),
        lambda: Prune(math.nan),
        lambda: Prune(0.1, mask="mine"),
        lambda: Prune(0.1, mask="own", rescale=True),
        lambda: Prune(0.1, seed="x"),
        lambda: encode(None, torch.ones(2, 2)),
        lambda: encode(None, torch.ones(0)),
        lambda: encode("gzip", torch.ones(2)),
        lambda: decode("gzip", {}, 2),
        lambda: decode(None, {}, 0),
    ],
)
def test_bad_arguments_are_refused(make: Any) -> None:
    with pytest.raises(ConfigurationError):
        make()


@pytest.mark.parametrize("bad", [math.nan, math.inf, 1e39])
@pytest.mark.parametrize("codec", CODECS, ids=str)
def test_a_diverged_update_is_a_matter_of_the_data(codec: Codec | None, bad: float) -> None:
    with pytest.raises(DataError):
        encode(codec, torch.tensor([1.0, bad], dtype=torch.float64))


SIZE = 101


def good(codec: Codec | None) -> dict[str, NDArray[Any]]:
    return encode(codec, vector(SIZE), generator())


def _broken(arrays: dict[str, NDArray[Any]], name: str) -> list[dict[str, Any]]:
    a = arrays[name]
    worse: list[Any] = [
        a[:-1], np.append(a, a[:1]), a.reshape(1, -1), a.astype(">f4"), a.astype(np.float64), a.astype(np.int64),
        a.astype(object), a.tolist(), None, 3, b"", a.tobytes(), np.array(7), a.view(np.matrix), np.ma.array(a),
        a[:0], torch.from_numpy(a.astype(np.float32)), np.array(["x"] * len(a)), np.zeros(len(a), "V8"),
        np.broadcast_to(a[0], (10**9,)), np.zeros(len(a), [("x", "f4")]), a.astype(np.complex64),
    ]  # fmt: skip
    if a.dtype == np.float32:
        middle = np.arange(len(a)) == len(a) // 2
        worse += [np.where(middle, np.float32(bad), a) for bad in (math.nan, math.inf, -math.inf)]
    return [arrays | {name: w} for w in worse]


@pytest.mark.parametrize("codec", [None, Quantize(8), Quantize(4), Quantize(1), *CODECS[4:8]], ids=str)
def test_malformed_arrays_raise_data_errors_only(codec: Codec | None) -> None:
    arrays = good(codec)
    decode(codec, arrays, SIZE)
    cases: list[Any] = [{}, None, [], "x", arrays | {"more": np.zeros(1)}, {f"x{k}": v for k, v in arrays.items()}]
    cases += [{k: v for k, v in arrays.items() if k != name} for name in arrays]
    cases += [{**{k: v for k, v in arrays.items() if k != name}, 5: arrays[name]} for name in arrays]
    cases += [case for name in arrays for case in _broken(arrays, name)]
    for case in cases:
        with pytest.raises(DataError):
            decode(codec, case, SIZE)


def test_values_out_of_the_range_of_a_codec() -> None:
    for codec, name, bad in (
        (Quantize(8), "codes", np.full(SIZE, 255, np.uint8)),
        (Quantize(4), "codes", np.full(51, 0x0F, np.uint8)),
        (Quantize(4), "codes", np.full(51, 0x10, np.uint8)),  # SIZE is odd: the last half byte is padding
        (Quantize(1), "codes", np.full(13, 0xFF, np.uint8)),
        (Quantize(8), "scales", np.array([-1.0], np.float32)),
        (Prune(0.25, mask="own"), "mask", np.full(13, 0xFF, np.uint8)),
        (Prune(0.25, mask="own"), "mask", np.zeros(13, np.uint8)),
        (Prune(0.25, rescale=True), "values", np.full(26, 3e38, np.float32)),
    ):
        with pytest.raises(DataError):
            decode(codec, good(codec) | {name: bad}, SIZE)


@pytest.mark.parametrize("index", [[5, 4], [4, 4], [3, 200], [0, 2**32 - 1], [200, 0]])
def test_positions_have_to_be_sorted_distinct_and_inside(index: list[int]) -> None:
    codec = Prune(0.01, mask="own")
    arrays = {"values": np.ones(2, np.float32), "index": np.array(index, np.uint32)}
    with pytest.raises(DataError):
        decode(codec, arrays, 200)
    assert decode(codec, arrays | {"index": np.array([3, 199], np.uint32)}, 200).nonzero().view(-1).tolist() == [3, 199]


_DTYPES = st.sampled_from(["float32", "uint8", "uint32", "float64", "int64", ">f4", "bool", "U3", "O", "complex64"])


@st.composite
def arrays_of_anybody(draw: st.DrawFn) -> dict[Any, Any]:
    names = st.sampled_from(["values", "codes", "scales", "index", "mask", "", "other", 3])
    out: dict[Any, Any] = {}
    for name in draw(st.lists(names, max_size=3)):
        raw = draw(st.binary(max_size=120))
        dtype = draw(_DTYPES)
        if dtype in ("U3", "O"):
            out[name] = np.array(list(raw), dtype)
        else:
            width = np.dtype(dtype).itemsize
            out[name] = np.frombuffer(raw[: len(raw) // width * width], dtype)
    return out


@settings(max_examples=300, deadline=None, derandomize=True)
@given(arrays=arrays_of_anybody(), codec=st.sampled_from(CODECS), size=st.integers(1, 40))
def test_fuzz_arrays_of_anybody(arrays: dict[Any, Any], codec: Codec | None, size: int) -> None:
    try:
        out = decode(codec, arrays, size)
    except DataError:
        return
    assert out.shape == (size,)
    assert torch.isfinite(out).all()


@settings(max_examples=300, deadline=None, derandomize=True)
@given(data=st.data(), codec=st.sampled_from(CODECS), size=st.integers(1, 40))
def test_fuzz_flipped_bits(data: st.DataObject, codec: Codec | None, size: int) -> None:
    arrays = {k: v.copy() for k, v in encode(codec, vector(size), generator()).items()}
    for array in arrays.values():
        raw = array.view(np.uint8)
        for _ in range(data.draw(st.integers(0, 3))):
            raw[data.draw(st.integers(0, len(raw) - 1))] ^= np.uint8(data.draw(st.integers(1, 255)))
    try:
        out = decode(codec, arrays, size)
    except DataError:
        return
    assert out.shape == (size,)
    assert torch.isfinite(out).all()


@pytest.mark.parametrize("codec", [Quantize(1), Prune(0.25, mask="own"), None], ids=str)
def test_huge_arrays_cost_nothing(codec: Codec | None) -> None:
    arrays = {k: np.broadcast_to(v[:1], (1 << 40,)) for k, v in good(codec).items()}
    tracemalloc.start()
    with pytest.raises(DataError):
        decode(codec, arrays, SIZE)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1 << 20


def test_decoded_arrays_do_not_alias_what_was_received() -> None:
    for codec in (None, Prune(1.0)):
        arrays = encode(codec, vector(SIZE))
        out = decode(codec, arrays, SIZE)
        arrays["values"][:] = 0
        assert (out != 0).all()
