"""Per-sample gradients of any model, in one backward: capture, rules, tape, fallback ladder."""

from sfumato.ghost.capture import Capture
from sfumato.ghost.clip import Norms, Weighed, clipped, total_norms, wide_dtype
from sfumato.ghost.entry import install, refuse_owned, remove
from sfumato.ghost.fallback import refuse_batch_statistics
from sfumato.ghost.guard import Guard
from sfumato.ghost.pullback import Parts, by_unit, collect
from sfumato.ghost.recording import record
from sfumato.ghost.tape import Tape

__all__ = [
    "Capture",
    "Guard",
    "Norms",
    "Parts",
    "Tape",
    "Weighed",
    "by_unit",
    "clipped",
    "collect",
    "install",
    "record",
    "refuse_batch_statistics",
    "refuse_owned",
    "remove",
    "total_norms",
    "wide_dtype",
]
