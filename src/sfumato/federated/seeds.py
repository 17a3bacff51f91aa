"""Every random stream of a federation has its own seed, derived by name: neither order nor transport matter."""

from __future__ import annotations

import hashlib

from sfumato.noise import Research, Secure, source


def derive(seed: int, *names: str | int) -> int:
    """A 63-bit seed for the stream called ``names`` (SHA-256)."""
    text = "\x1f".join(str(name) for name in (seed, *names))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def stream(level: str, seed: int, *names: str | int) -> Secure | Research:
    """The noise source of the stream called ``names``; ``secure`` takes no seed and never repeats."""
    return Research(derive(seed, "noise", *names)) if level == "research" else source(level)
