"""SIMULATED pairwise masks: what a server sees under secure aggregation, not the protocol that makes it so.

Each client adds a key stream for some of the others and subtracts one for the rest; over the whole cohort they cancel
(Bonawitz et al. 2017; Bell et al. 2020 for a ring of neighbours in place of all pairs). Here all pairs derive their
keys from ONE secret that is simply there: no key agreement, no secret sharing, no second mask against a reply that
arrives after its client was declared missing, no protection from a server that knows the secret. Use it to measure
costs and to test; a deployment needs a real protocol, and the guarantee of the noise does not depend on masks.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from sfumato import _validate
from sfumato.errors import ConfigurationError
from sfumato.noise._keystream import aes_ctr

from .encoding import Residues

_BYTES = 1 << 20


@dataclass(frozen=True)
class Masks:
    """The masks of one cohort in one round, modulo 2**``bits``.

    Args:
        secret: at least 16 secret bytes.
        label: names this round, for ever: a label used twice reveals the difference of the two messages.
        cohort: ids of the clients, no one twice.
        size: numbers in a message.
        bits: 1 … 32.
        neighbours: with how many others each client shares a key: an even number, or all where the cohort is smaller.
    """

    secret: bytes = field(repr=False)
    label: str
    cohort: tuple[str, ...]
    size: int
    bits: int
    neighbours: int = 16

    def __post_init__(self) -> None:
        for name in ("size", "bits", "neighbours"):
            _validate.count(name, getattr(self, name))
        if self.bits > 32 or self.neighbours % 2:
            raise ConfigurationError("masks have at most 32 bits and an even number of neighbours.", where="masks")
        if not isinstance(self.secret, bytes) or len(self.secret) < 16:
            raise ConfigurationError("masks need a secret of at least 16 bytes.", where="secret")
        if not self.cohort or len(self._places) != len(self.cohort):
            raise ConfigurationError("a cohort has at least one client, and none twice.", where="cohort")

    @cached_property
    def _places(self) -> dict[str, int]:
        return {client: place for place, client in enumerate(self.cohort)}

    def hide(self, client: str, message: Residues) -> Residues:
        """``message`` plus all masks of ``client``. Raises ``ConfigurationError`` for one outside the cohort."""
        total = message.astype(np.uint32, copy=True)
        for other in self._peers(client):
            self._add(total, client, other)
        return total & np.uint32((1 << self.bits) - 1)

    def reveal(self, total: Residues, arrived: Collection[str]) -> Residues:
        """The sum of the messages of ``arrived``, out of the sum of what they sent.

        Takes off the masks they share with clients that did not arrive, whose keys a real protocol would recover. Do
        this once a round: two sets of arrived clients give away the message of the client they differ in.
        """
        left = total.astype(np.uint32, copy=True)
        missing = set(self.cohort) - set(arrived)
        for client in sorted(arrived):
            for other in self._peers(client):
                if other in missing:
                    self._add(left, other, client)  # of opposite sign
        return left & np.uint32((1 << self.bits) - 1)

    def _peers(self, client: str) -> Iterator[str]:
        if client not in self._places:
            raise ConfigurationError(f"{client!r} is not in this cohort.", found=client, where="client")
        place, count = self._places[client], len(self.cohort)
        if count <= self.neighbours + 1:
            yield from (other for other in self.cohort if other != client)
            return
        for step in range(1, self.neighbours // 2 + 1):
            yield self.cohort[(place + step) % count]
            yield self.cohort[(place - step) % count]

    def _add(self, total: Residues, client: str, other: str) -> None:
        """Add the mask of ``client`` for ``other``; it is the negative of the mask of ``other`` for ``client``."""
        first, second = sorted((client, other))
        info = json.dumps([self.label, first, second]).encode()
        key = HKDF(SHA256(), 32, salt=None, info=info).derive(self.secret)
        stream = np.empty(_BYTES + 15, np.uint8)
        for start in range(0, self.size, _BYTES // 4):
            part = total[start : start + _BYTES // 4]
            aes_ctr(key, (start // 4).to_bytes(16, "big"), 4 * len(part), stream)
            words = stream[: 4 * len(part)].view("<u4")
            if client == first:
                part += words
            else:
                part -= words
