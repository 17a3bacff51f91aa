"""The ledger of one run: its own, or one shared with other runs on the same records."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from ..accounting import Event, Ledger, compose
from ..errors import BudgetExceeded, LedgerError, PrivacyError
from .run_folder import LEDGER_NAME, SIDE_FILES


class Spending:
    """``earlier``: what a shared ledger held before this run. Ledger files without a release are not left behind."""

    def __init__(self, shared: Path | None):
        self.shared = shared is not None
        self.path = Path() if shared is None else shared.absolute()
        self.earlier: Mapping[Event, int] = {}
        self.earlier_entries = 0
        self._fresh = not (self.shared and self.path.exists())
        self._ledger: Ledger | None = None
        if not self._fresh:
            self._ledger = Ledger(self.path)
            self.earlier_entries = self.verify()
            self.earlier = dict(self._ledger.events())

    def open(self, folder: Path) -> Ledger:
        """The ledger to charge; a run's own lives in ``folder``."""
        if not self.shared:
            self.path = folder / LEDGER_NAME
        if self._ledger is None:
            self._ledger = Ledger(self.path)
        return self._ledger

    def verify(self) -> int:
        """Number of entries; a broken chain is a failed guarantee, not bad usage."""
        if self._ledger is None:
            return 0
        try:
            return self._ledger.verify()
        except LedgerError as error:
            raise PrivacyError(f"ledger {self.path}: {error}") from error

    def refuse_spent(self, epsilon: float | None, delta: float) -> None:
        """Raise :class:`BudgetExceeded` if earlier runs left nothing of ``epsilon``."""
        already = float(compose(self.earlier, delta=delta))
        if epsilon is not None and already >= epsilon:
            raise BudgetExceeded(
                f"the budget epsilon = {epsilon:g} is already spent: ledger {self.path} stands at {already:.4g} "
                f"(delta = {delta:g}). Nothing was trained",
                found=already,
            )

    def close(self) -> bool:
        """Close the ledger; True if this run put entries into it. Removes a ledger made here that holds none."""
        if self._ledger is None:
            return False
        ledger, self._ledger = self._ledger, None
        spent = len(ledger.entries()) > self.earlier_entries
        ledger.close()
        if self._fresh and not spent:
            for suffix in ("", *SIDE_FILES):
                Path(f"{self.path}{suffix}").unlink(missing_ok=True)
        return spent
