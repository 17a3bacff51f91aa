"""The command line ``sfumato``. Sub-commands import what they need when they run, so ``--help`` stays fast."""

from .main import main

__all__ = ["main"]
