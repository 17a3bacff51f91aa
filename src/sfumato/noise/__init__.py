"""Where Gaussian noise, integer noise and secret coin flips come from, in named levels.

``secure`` is the production source; ``research`` is seedable, fast, and not private against a careful adversary.
A source knows nothing of clipping or sampling: the plan alone decides the standard deviation.
"""

from __future__ import annotations

from ..errors import ConfigurationError
from .research import Research
from .secure import Secure

__all__ = ["Research", "Secure", "Source", "source"]

Source = Secure | Research
_LEVELS: dict[str, type[Secure] | type[Research]] = {"secure": Secure, "research": Research}


def source(noise: str | Source) -> Source:
    """Return the source named ``"secure"`` or ``"research"``, or the given instance unchanged.

    Raises ``ConfigurationError`` for anything else. Subclasses are refused too: the ledger records the level, and an
    overridden method would make that record untrue.
    """
    if isinstance(noise, str) and noise in _LEVELS:
        return _LEVELS[noise]()
    if type(noise) in _LEVELS.values():
        return noise  # type: ignore[return-value]
    raise ConfigurationError(
        f"noise must be 'secure', 'research', or an instance of Secure or Research; got {noise!r}.",
        found=noise,
        where="noise",
        fix="pass noise='secure'; for a seeded, non-production run pass noise=Research(seed=0).",
    )
