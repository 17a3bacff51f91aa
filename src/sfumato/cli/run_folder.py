"""A run folder that appears whole or not at all.

Everything is written to a hidden sibling, ``.OUT.partial-XXXXXX``, and renamed to OUT when it is complete. When a run
fails, the sibling is removed, with one exception: once gradients were released, privacy is spent whether or not the
run succeeded, so the ledger alone is kept, as ``OUT.spent-ledger.db``, for use with ``--ledger``. Only a killed
process leaves the sibling itself, with its ledger, which was on disk before every release.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from pathlib import Path

from ..errors import ConfigurationError

LEDGER_NAME = "ledger.db"
LEDGERS_NAME = "ledgers"  # a folder with one ledger for each client
SIDE_FILES = ("-wal", "-shm", ".seal")


def check_free(out: Path) -> None:
    """Raise :class:`ConfigurationError` if ``out`` cannot become a run folder; changes nothing."""
    if out.is_dir():
        if any(out.iterdir()):
            raise ConfigurationError(f"--out {out} exists and is not empty.", fix="choose another folder.")
    elif out.exists() or out.is_symlink():
        raise ConfigurationError(f"--out {out} exists and is not a folder.", fix="choose another name.")


def abandoned(out: Path) -> list[Path]:
    """Ledgers that killed runs to the same ``out`` left behind."""
    left = f".{out.absolute().name}.partial-*"
    return sorted(p for name in (LEDGER_NAME, LEDGERS_NAME) for p in out.absolute().parent.glob(f"{left}/{name}"))


class RunFolder:
    """``path`` is where files go until :meth:`publish`; after :meth:`abandon` nothing but a spent ledger is left."""

    def __init__(self, out: Path):
        check_free(out)
        self.out = out.absolute()
        self._made_parents = _make_parents(self.out.parent)
        try:
            self.path = Path(tempfile.mkdtemp(prefix=f".{self.out.name}.partial-", dir=self.out.parent))
        except OSError as error:
            self._remove_parents()
            raise ConfigurationError(f"--out {out} cannot be written: {error}") from None

    def publish(self) -> Path:
        """Rename to ``out``; the files in ``path`` must be closed."""
        check_free(self.out)
        mask = _umask()
        self.path.chmod(0o777 & ~mask)
        for entry in self.path.rglob("*"):
            entry.chmod((0o777 if entry.is_dir() else 0o666) & ~mask)
        with contextlib.suppress(FileNotFoundError):
            self.out.rmdir()
        os.replace(self.path, self.out)
        return self.out

    def abandon(self, *, keep_ledger: bool) -> Path | None:
        """Remove everything; with ``keep_ledger`` move the (closed) ledger, or the folder of ledgers, beside ``out``.

        Returns its new path.
        """
        kept = None
        if keep_ledger and (self.path / LEDGERS_NAME).is_dir():
            kept = _unused(self.out.with_name(f"{self.out.name}.spent-{LEDGERS_NAME}"))
            os.replace(self.path / LEDGERS_NAME, kept)
        elif keep_ledger and (self.path / LEDGER_NAME).exists():
            kept = _unused(self.out.with_name(f"{self.out.name}.spent-{LEDGER_NAME}"))
            for suffix in SIDE_FILES:  # first, so that the ledger never stands without its journal
                if (side := self.path / f"{LEDGER_NAME}{suffix}").exists():
                    os.replace(side, f"{kept}{suffix}")
            os.replace(self.path / LEDGER_NAME, kept)
        shutil.rmtree(self.path, ignore_errors=True)
        if kept is None:
            self._remove_parents()
        return kept

    def _remove_parents(self) -> None:
        for parent in self._made_parents:
            with contextlib.suppress(OSError):
                parent.rmdir()


def _make_parents(parent: Path) -> list[Path]:
    """Create missing parents; returns those created, deepest first."""
    missing = []
    while not parent.exists():
        missing.append(parent)
        parent = parent.parent
    try:
        for folder in reversed(missing):
            folder.mkdir()
    except OSError as error:
        raise ConfigurationError(f"--out: {error}") from None
    return missing


def _unused(path: Path) -> Path:
    candidate, number = path, 1
    while candidate.exists():
        number += 1
        candidate = path.with_name(f"{path.stem}-{number}{path.suffix}")
    return candidate


def _umask() -> int:
    mask = os.umask(0o077)
    os.umask(mask)
    return mask
