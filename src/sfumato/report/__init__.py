"""The privacy report: facts of one run -> ``report.json`` and a self-contained ``report.html``."""

from .facts import Data, EpochRow, Guarantee, LedgerFacts, Mechanism, RunFacts, StepRow, Training
from .words import at_least, at_most, plain_sentence
from .write import HTML_NAME, JSON_NAME, write

__all__ = [
    "HTML_NAME",
    "JSON_NAME",
    "Data",
    "EpochRow",
    "Guarantee",
    "LedgerFacts",
    "Mechanism",
    "RunFacts",
    "StepRow",
    "Training",
    "at_least",
    "at_most",
    "plain_sentence",
    "write",
]
