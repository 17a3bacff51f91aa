"""Cryptographic random bytes at memory speed: AES-256 in counter mode (NIST SP 800-38A §6.5)."""

from __future__ import annotations

import os

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from numpy.typing import NDArray

_BLOCK = 1 << 20
# Older releases of cryptography insist on room for a partial cipher block, which counter mode never writes.
_SLACK = 15
_ZEROS = memoryview(bytes(_BLOCK))


def aes_ctr(key: bytes, counter: bytes, count: int, out: NDArray[np.uint8]) -> None:
    """Write ``count`` (at most 1 MiB) bytes of the AES-CTR keystream of ``key`` from the 16-byte ``counter`` on.

    ``out`` must have room for ``count`` + 15 bytes; the last 15 stay as they were.
    """
    Cipher(algorithms.AES(key), modes.CTR(counter)).encryptor().update_into(_ZEROS[:count], out.data)


def random_bytes(count: int) -> NDArray[np.uint8]:
    """Return ``count`` bytes indistinguishable from uniform to anyone who cannot break AES-256 or the OS generator.

    Every block of at most 1 MiB has its own 256-bit key from the operating system, dropped as soon as the block is
    written. No state outlives the call, so there is nothing that a fork, a copy, a pickle or a restored checkpoint
    could repeat, and no counter that could wrap or be reset. A key costs about 4 microseconds.
    """
    out = np.empty(count + _SLACK, np.uint8)
    for start in range(0, count, _BLOCK):
        aes_ctr(os.urandom(32), bytes(16), min(_BLOCK, count - start), out[start : start + _BLOCK + _SLACK])
    return out[:count]
