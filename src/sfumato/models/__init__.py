"""Built-in models of the command line, and the user's own by ``package.module:factory``."""

from .build import BUILT_IN, build

__all__ = ["BUILT_IN", "build"]
