"""The secure source: the cipher, the tail, and that no stream is ever repeated."""

from __future__ import annotations

import copy
import math
import os
import pickle
import threading

import numpy as np
import pytest
import torch

from sfumato.noise import Secure
from sfumato.noise._box_muller import box_muller
from sfumato.noise._keystream import aes_ctr, random_bytes


def test_keystream_is_the_nist_vector() -> None:
    """NIST SP 800-38A, F.5.5 CTR-AES256.Encrypt: the keystream is plaintext xor ciphertext."""
    key = bytes.fromhex("603deb1015ca71be2b73aef0857d77811f352c073b6108d72d9810a30914dff4")
    counter = bytes.fromhex("f0f1f2f3f4f5f6f7f8f9fafbfcfdfeff")
    plain = bytes.fromhex(
        "6bc1bee22e409f96e93d7e117393172aae2d8a571e03ac9c9eb76fac45af8e51"
        "30c81c46a35ce411e5fbc1191a0a52eff69f2445df4f9b17ad2b417be66c3710"
    )
    cipher = bytes.fromhex(
        "601ec313775789a5b7a7f504bbf3d228f443e3ca4d62b59aca84e990cacaf5c5"
        "2b0930daa23de94ce87017ba2d84988ddfc9c58db67aada613c2dd08457941a6"
    )
    out = np.full(64 + 15, 7, np.uint8)
    aes_ctr(key, counter, 64, out)
    assert bytes(out[:64]) == bytes(p ^ c for p, c in zip(plain, cipher, strict=True))
    assert (out[64:] == 7).all()


@pytest.mark.parametrize("count", [0, 1, 15, 16, 17, (1 << 20) - 1, (1 << 20) + 1, (3 << 20) + 5])
def test_every_byte_is_written_under_a_fresh_key(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    keys: list[bytes] = []
    real = os.urandom

    def urandom(size: int) -> bytes:
        keys.append(real(size))
        return keys[-1]

    monkeypatch.setattr(os, "urandom", urandom)
    out = random_bytes(count)
    assert len(out) == count
    assert len(set(keys)) == len(keys) == -(-count // (1 << 20))
    assert all(len(key) == 32 for key in keys)
    if count > 1000:  # a byte value as frequent as 1.2 % would be over 6 sigma off at 1 MiB
        assert np.bincount(out, minlength=256).max() < 0.012 * count
        assert out[-1000:].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_tail_keeps_relative_precision_and_never_overflows(dtype: torch.dtype) -> None:
    ks = sorted({0, 1, 2, 3, 2**63 - 1, *(int(2 ** (e / 3)) for e in range(189))})
    angle = torch.zeros(len(ks), dtype=torch.int32 if dtype == torch.float32 else torch.int64)  # cos = 1, sin = 0
    cosine, sine = box_muller(torch.tensor(ks), angle, 1.0, dtype)
    expected = torch.tensor([math.sqrt(max(0.0, 2 * math.log(2**64 / (2 * k + 1)))) for k in ks], dtype=torch.float64)
    assert torch.isfinite(cosine).all()
    assert (sine == 0).all()
    assert abs(float(cosine[0]) - 9.4193) < 1e-3
    outer = expected > 0.1  # nearer to zero the radius is a difference of two numbers close to 1
    relative = ((cosine.double() - expected).abs() / expected)[outer].max()
    assert relative < (1e-4 if dtype == torch.float32 else 1e-12)
    far = expected > 1
    assert ((cosine.double() - expected).abs() / expected)[far].max() < (1e-6 if dtype == torch.float32 else 1e-14)


def test_the_top_bit_of_the_radius_is_ignored_and_angles_cover_the_circle() -> None:
    bits = torch.tensor([5 - 2**63, 5, -1, -(2**63)])
    quarter = torch.tensor([0, 0, 2**30, -(2**31)], dtype=torch.int32)
    x, y = box_muller(bits, quarter, 2.0, torch.float32)
    assert x[0] == x[1] > 18
    assert abs(float(x[2])) < 1e-3
    assert x[3] < -18  # half a turn
    assert torch.isfinite(y).all()


def test_there_is_no_seed_and_no_state() -> None:
    for arguments in ((1,), (None,)):
        with pytest.raises(TypeError):
            Secure(*arguments)  # type: ignore[call-arg]
    with pytest.raises(TypeError):
        Secure(seed=1)  # type: ignore[call-arg]
    with pytest.raises(AttributeError):
        Secure().seed = 1  # type: ignore[attr-defined]
    torch.manual_seed(0)
    first = Secure().normal((8,), std=1.0)
    torch.manual_seed(0)
    assert not torch.equal(first, Secure().normal((8,), std=1.0))


def test_copies_and_pickles_carry_nothing_to_repeat() -> None:
    noise = Secure()
    stored = pickle.dumps(noise)
    assert len(stored) < 100
    draws = [s.normal((8,), std=1.0) for s in (noise, copy.copy(noise), copy.deepcopy(noise), pickle.loads(stored))]
    assert len({tuple(d.tolist()) for d in draws}) == 4


def test_a_forked_child_draws_something_else() -> None:
    noise = Secure()
    noise.uniform(4)
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.write(write, noise.normal((4,), std=1.0).numpy().tobytes() + noise.uniform(4).tobytes())
        finally:
            os._exit(0)
    os.close(write)
    mine = noise.normal((4,), std=1.0).numpy().tobytes() + noise.uniform(4).tobytes()
    with os.fdopen(read, "rb") as pipe:
        theirs = pipe.read()
    os.waitpid(child, 0)
    assert len(theirs) == len(mine) == 48
    assert not np.isin(np.frombuffer(theirs[:16], np.float32), np.frombuffer(mine[:16], np.float32)).any()
    assert not np.isin(np.frombuffer(theirs[16:]), np.frombuffer(mine[16:])).any()


def test_threads_share_an_instance() -> None:
    noise, found = Secure(), []

    def work() -> None:
        found.extend(noise.uniform(1000).tolist())

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(found)) == 8000
