"""Steps charged in advance with one write."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from types import TracebackType
from typing import NoReturn

from ..errors import LedgerError
from .events import Event


def uncopied(what: str, where: str) -> LedgerError:
    """The error for copying or pickling what counts: two copies would count apart."""
    return LedgerError(
        f"A {what} cannot be copied or pickled: each copy would count releases without the other.",
        found=what,
        where=where,
        fix="pass the object itself; in another process, open the ledger again.",
    )


class Reservation:
    """``left`` releases of ``event`` that the ledger already holds; made by :meth:`Ledger.reserve`.

    Guarantee: every release for which :meth:`use` returned is in the ledger. What is left when the process dies stays
    charged. Usable from every thread, and only in the process that reserved.
    """

    def __init__(self, event: Event, seq: int, count: int, give_back: Callable[[int], object]) -> None:
        self.event, self.seq, self._left = event, seq, count
        self._give_back = give_back
        self._lock, self._pid = threading.Lock(), os.getpid()

    @property
    def left(self) -> int:
        """How many more times :meth:`use` may be called."""
        return self._left

    def use(self) -> None:
        """Take one release, before it is released. Raises ``LedgerError`` when none is left, or in a forked child."""
        if os.getpid() != self._pid:  # before the lock: a forked child inherits it as it was, perhaps held
            raise self._none_left()
        with self._lock:
            if self._left <= 0:
                raise self._none_left()
            self._left -= 1

    def _none_left(self) -> LedgerError:
        return LedgerError(
            "No reserved release is left in this process: the ledger would not hold this one.",
            found=self._left,
            where=f"reservation {self.seq}",
            fix="reserve again, in the process that releases.",
        )

    def close(self) -> int:
        """Give back what was not used, and return how much that was; later calls, and a forked child, give back 0."""
        if os.getpid() != self._pid:
            return 0
        with self._lock:
            unused, self._left = self._left, 0
            if unused:
                self._give_back(unused)
            return unused

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        raise uncopied("reservation", str(self.seq))

    def __enter__(self) -> Reservation:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()
