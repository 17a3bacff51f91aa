"""Built-in models of the command line, and the user's own by ``package.module:factory``."""

from .build import BUILT_IN, build
from .features import Features, extract

__all__ = ["BUILT_IN", "Features", "build", "extract"]
