"""One client moves the sum by at most C, whatever it sends: replayed on neighbouring cohorts of hostile clients."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from sfumato.clipping import Flat, Grouped, PerLayer
from sfumato.errors import ConfigurationError
from sfumato.federated.contributions import Bound, Sum, weights_of
from sfumato.federated.wire.compression import Prune, Quantize, encode
from sfumato.federated.wire.messages import Reply, Task
from sfumato.federated.wire.schema import Schema

SCHEMA = Schema((("a.weight", (2, 3)), ("a.bias", (2,)), ("b.weight", (3,))))
D = SCHEMA.size
TASK = Task("run", 7, "nonce", "train", "base", SCHEMA.digest, np.zeros(D, np.float32))
COHORT = frozenset(f"c{i}" for i in range(8))
CODECS = (None, Quantize(8, 4), Quantize(4, 4), Quantize(1, 4), Prune(0.5), Prune(0.5, rescale=True), Prune(0.4, "own"))
CLIPS = (Flat(), PerLayer(), Grouped({"a": ("a.weight", "a.bias"), "b": ("b.weight",)}, {"a": 3.0, "b": 4.0}))
C = 0.7


def honest(client: str, arrays: Any) -> Reply:
    return Reply(client, TASK.run, TASK.round, TASK.nonce, TASK.base, TASK.schema, arrays)


def vectors(rng: np.random.Generator) -> np.ndarray:
    """A vector as an attacker, a broken client, or an honest one would send it."""
    v = rng.standard_normal(D).astype(np.float32)
    kind = rng.integers(12)
    scales = (1e30, 3e38, 1e-45, 1e-38, 0.0, 1.0, 7e4, 1e4, 1e-8)
    if kind < len(scales):
        with np.errstate(over="ignore", under="ignore"):
            return np.clip(v * np.float32(scales[kind]), -3.4e38, 3.4e38).astype(np.float32)
    if kind == 9:  # exactly C
        return (v / np.linalg.norm(v.astype(np.float64)) * C).astype(np.float32)
    if kind == 10:
        return np.full(D, rng.choice([np.nan, np.inf, -np.inf]), np.float32)
    v[rng.integers(D)] = rng.choice([np.nan, np.inf, -np.inf, 3.4e38, 1e-45])
    return v


def malformed(rng: np.random.Generator, v: np.ndarray) -> dict[Any, Any]:
    """Payloads that no client of ours sends without a codec."""
    with np.errstate(over="ignore", invalid="ignore"):
        return [
            {"values": v.reshape(D, 1)},
            {"values": v.reshape(1, D)},
            {"values": v[:-1]},
            {"values": np.append(v, v)},
            {"values": v.astype(np.float64)},
            {"values": v.astype(np.float16)},
            {"values": np.zeros(D, np.int64)},
            {"values": v.astype(">f4")},
            {"values": v.astype(complex)},
            {"values": np.array([object()] * D)},
            {"values": v.tolist()},
            {"values": np.float32(3.0)},
            {"values": np.ma.masked_array(v)},
            {"a.weight": v[:6], "a.bias": v[6:8], "b.weight": v[8:]},
            {"values": v, "more": v},
            {"valuez": v},
            {},
            {"values": None},
            {3: v},
        ][rng.integers(19)]


def hostile(rng: np.random.Generator, client: str, codec: Any) -> list[Reply]:
    """What one client sends, in one or more messages."""
    v = vectors(rng)
    arrays: Any = {"values": v}
    if codec is not None and np.isfinite(v).all():
        arrays = encode(codec, torch.from_numpy(v), torch.Generator().manual_seed(int(rng.integers(99))), TASK.round)
        if rng.random() < 0.3:
            name = rng.choice(sorted(arrays))
            raw = arrays[name].copy()
            raw.view(np.uint8)[rng.integers(raw.nbytes)] ^= np.uint8(1 << rng.integers(8))
            arrays[name] = raw
    if rng.random() < 0.1:
        arrays = malformed(rng, v)
    first = honest(client, arrays)
    twist = rng.integers(40)
    changes: dict[int, dict[str, Any]] = {
        0: {"round": TASK.round - 1},
        1: {"nonce": "of the round before"},
        2: {"base": "other"},
        3: {"schema": "other"},
        4: {"client": "nobody"},
        5: {"run": "other"},
        6: {"error": "ValueError"},
        7: {"round": np.array([7, 7])},
        8: {"base": np.zeros(3)},
        9: {"client": ["c0"]},
    }
    if twist in changes:
        first = replace(first, **changes[int(twist)])
    if twist == 10:  # a replay, and a second opinion
        return [first, first, honest(client, {"values": vectors(rng)})]
    return [first]


def total(messages: list[list[Reply]], clip: Any, codec: Any, settings: dict[str, tuple[float, float]]) -> Sum:
    found = Sum(SCHEMA, Bound(C, clip))
    for sent in messages:
        for message in sent:
            own = settings.get(message.client, (1.0, 1.0)) if isinstance(message.client, str) else (1.0, 1.0)
            found.add(message, TASK, COHORT, codec, weight=own[0], scale=own[1])
    return found


@pytest.mark.parametrize("clip", CLIPS, ids=lambda c: type(c).__name__)
def test_one_client_moves_the_sum_by_at_most_c(clip: Any) -> None:
    """10⁴ neighbouring cohorts in all; with per-layer bounds, C is met in quadrature."""
    rng = np.random.default_rng(1)
    worst, heard = 0.0, 0
    for trial in range(3400):
        codec = CODECS[trial % len(CODECS)]
        ids = [f"c{i}" for i in rng.permutation(8)[: rng.integers(1, 6)]]
        settings = {c: (float(rng.choice([1.0, 1.0, 0.3, 0.0])), float(rng.choice([1.0, 0.25]))) for c in ids}
        messages = [hostile(rng, c, codec) for c in ids]
        at = int(rng.integers(len(ids)))
        weight, scale = settings[ids[at]]
        with_, without = (total(m, clip, codec, settings) for m in (messages, messages[:at] + messages[at + 1 :]))
        assert bool(with_.total.isfinite().all())
        moved = float(torch.linalg.vector_norm(with_.total - without.total))
        assert moved <= C * weight * scale * (1 + 1e-6), (trial, messages[at])
        assert abs(with_.votes - without.votes) <= 0.5 * weight * scale * (1 + 1e-12)
        replaced = total([*messages[:at], hostile(rng, ids[at], codec), *messages[at + 1 :]], clip, codec, settings)
        assert float(torch.linalg.vector_norm(replaced.total - with_.total)) <= 2 * C * weight * scale * (1 + 1e-6)
        heard += moved > 0
        worst = max(worst, moved / C)
    assert heard > 900  # or nothing was tested
    assert worst > 0.999


def test_the_replay_notices_a_sum_that_does_not_clip(monkeypatch: pytest.MonkeyPatch) -> None:
    """The test above must be able to fail: with an accumulation that is 1 % too long, it does."""
    from sfumato.federated import contributions

    real = contributions._accumulate
    monkeypatch.setattr(contributions, "_accumulate", lambda into, v, factor: real(into, v, factor * 1.01))
    with pytest.raises(AssertionError):
        test_one_client_moves_the_sum_by_at_most_c(Flat())


@pytest.mark.parametrize("clip", CLIPS, ids=lambda c: type(c).__name__)
@pytest.mark.parametrize("length", [1e-45, 1e-30, 0.5, C, C * (1 + 1e-7), 1.0, 65504.0, 7e4, 1e15, 1e30, 1e38])
def test_lengths(clip: Any, length: float) -> None:
    """Short vectors pass as they are, long ones come out with length C, at any scale float32 can hold."""
    v = np.zeros(D, np.float32)
    v[0] = length
    found = total([[honest("c0", {"values": v})]], clip, None, {})
    norm = float(found.total.norm())
    bound = C if isinstance(clip, Flat) else C / math.sqrt(3) if isinstance(clip, PerLayer) else 0.6 * C
    assert norm <= bound * (1 + 1e-9)
    assert norm == pytest.approx(min(float(v[0]), bound), rel=1e-5)
    assert found.accepted == {"c0"}


def test_the_short_way_to_a_clip_factor_is_the_long_one() -> None:
    """One flat bound is computed without tensors; up to the last bit as everywhere else in the library."""
    from sfumato.clipping import weights
    from sfumato.federated.contributions import _flat

    rng = np.random.default_rng(0)
    squares = [0.0, 1e-90, 1e-45, 0.49, 0.49 * (1 + 1e-15), 1.0, 1e10, 1e60, 1e77, math.inf, math.nan]
    squares += [float(v) for v in np.exp(rng.uniform(-200, 170, 500))]
    for square in squares:
        for bound in (1e-6, 0.7, 1e6):
            wide = torch.tensor([[square]], dtype=torch.float64)
            found = _flat(square, bound)
            assert found == pytest.approx(float(weights(Flat(), wide, bound, torch.float64)), rel=2**-51, abs=0.0)
            assert not found * math.sqrt(square) > bound


def test_huge_vectors_are_clipped_in_float64() -> None:
    """10⁶ numbers whose float16 and float32 sums of squares overflow or lose digits."""
    schema = Schema((("w", (1_000_000,)),))
    for value in (1e-23, 1e-3, 300.0, 1e19):
        found = Sum(schema, Bound(1.0))
        task = replace(TASK, schema=schema.digest)
        message = replace(honest("c0", {"values": np.full(10**6, value, np.float32)}), schema=schema.digest)
        assert found.add(message, task, COHORT, None)
        assert float(found.total.norm()) == pytest.approx(min(1.0, value * 1e3), rel=1e-5)
        assert float(found.total.norm()) <= 1 + 1e-9


REASONS: list[tuple[dict[str, Any], str]] = [
    ({"client": "nobody"}, "unknown client"),
    ({"client": "c9"}, "unknown client"),
    ({"run": "old"}, "other round"),
    ({"round": 6}, "other round"),
    ({"nonce": "old"}, "other round"),
    ({"error": "ValueError"}, "client error"),
    ({"base": "other"}, "other base"),
    ({"schema": "other"}, "other schema"),
    ({"arrays": {}}, "malformed"),
    ({"arrays": {"values": np.zeros((D, 1), np.float32)}}, "malformed"),
    ({"arrays": {"values": np.zeros(D, np.int64)}}, "malformed"),
    ({"arrays": {"values": np.zeros(D, np.float32), "bias": np.zeros(1, np.float32)}}, "malformed"),
    ({"arrays": None}, "malformed"),
]


@pytest.mark.parametrize(("changes", "reason"), REASONS, ids=lambda x: str(x)[:40])
def test_reasons(changes: dict[str, Any], reason: str) -> None:
    """Each fault has its word, adds nothing, and leaves the others as they are."""
    good = [honest("c1", {"values": np.ones(D, np.float32)})]
    bad = [replace(honest("c0", {"values": np.ones(D, np.float32)}), **changes)]
    alone, both = total([good], Flat(), None, {}), total([bad, good], Flat(), None, {})
    assert torch.equal(alone.total, both.total)
    assert dict(both.rejected) == {reason: 1}
    assert both.accepted == {"c1"}


def test_a_rejected_reply_does_not_use_up_the_client() -> None:
    """A broken message is not its client's only one: the good one that follows counts, once."""
    bad = honest("c0", {"values": np.full(D, np.nan, np.float32)})
    good = honest("c0", {"values": np.ones(D, np.float32)})
    found = total([[bad, good, good]], Flat(), None, {})
    assert dict(found.rejected) == {"malformed": 1, "second reply": 1}
    assert float(found.total.norm()) == pytest.approx(C)


def test_permuted_layers_mean_another_schema() -> None:
    """Two models whose tensors come in another order agree on the numbers, and must not be mixed up."""
    other = Schema(tuple(reversed(SCHEMA.entries)))
    assert other.size == SCHEMA.size
    assert other.digest != SCHEMA.digest
    assert Schema((("a.weight", (3, 2)), *SCHEMA.entries[1:])).digest != SCHEMA.digest


@pytest.mark.parametrize("value", [1e9, -0.1, math.nan, math.inf, True, "1", None, 1.0000001])
def test_weights_are_in_the_unit_interval(value: Any) -> None:
    with pytest.raises(ConfigurationError) as caught:
        weights_of({"a": 1.0, "b": value}, ("a", "b"))
    assert caught.value.where == "weights"


def test_weights_of_zero_for_all_or_for_nobody() -> None:
    with pytest.raises(ConfigurationError):
        weights_of({"a": 0, "b": 0.0}, ("a", "b"))
    with pytest.raises(ConfigurationError):
        weights_of({"a": 1}, ("a", "b"))
    assert weights_of({"a": 1, "b": 0.5, "gone": 7.0}, ("a", "b")) == {"a": 1.0, "b": 0.5}


@pytest.mark.parametrize(("weight", "scale"), [(1.1, 1.0), (-1.0, 1.0), (math.nan, 1.0), (1.0, 0.0), (1.0, 2.0)])
def test_sums_refuse_other_weights(weight: float, scale: float) -> None:
    with pytest.raises(ConfigurationError):
        Sum(SCHEMA, Bound(C)).add(honest("c0", {}), TASK, COHORT, None, weight=weight, scale=scale)


def test_order_of_arrival_does_not_matter() -> None:
    """To float64 rounding: a transport cannot choose the outcome by its order."""
    rng = np.random.default_rng(3)
    messages = [[honest(f"c{i}", {"values": rng.standard_normal(D).astype(np.float32)})] for i in range(8)]
    one = total(messages, Flat(), None, {}).total
    other = total(messages[::-1], Flat(), None, {}).total
    assert float((one - other).abs().max()) < 1e-14


@pytest.mark.parametrize("make", [lambda: None, lambda: "reply", lambda: {"client": "c0"}, object], ids=str)
def test_what_is_no_reply_at_all(make: Callable[[], Any]) -> None:
    found = Sum(SCHEMA, Bound(C))
    assert not found.add(make(), TASK, COHORT, None)
    assert found.rejected["unknown client"] == 1
