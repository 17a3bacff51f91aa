"""The privacy report: facts of one run -> ``report.json`` and a self-contained ``report.html``."""

from .everyone import covering, envelope, largest_meaning
from .explain import attack_sentence, percent, plain_text
from .facts import Data, EpochRow, Guarantee, LedgerFacts, Meaning, Mechanism, RunFacts, StepRow, Training
from .federated import client_range, federated_html, federated_json, write_federated
from .federated_facts import (
    FederatedFacts,
    FederatedTraining,
    Federation,
    Ledgers,
    Level,
    RoundRow,
)
from .federated_words import TRUST, UNITS, costs
from .markdown import as_card, as_markdown
from .read import read_metrics, read_report
from .risk import meaning, profile, trade_off
from .words import at_least, at_most, plain_sentence
from .write import HTML_NAME, JSON_NAME, as_html, as_json, meaning_json, strict, write

__all__ = [
    "HTML_NAME",
    "JSON_NAME",
    "TRUST",
    "UNITS",
    "Data",
    "EpochRow",
    "FederatedFacts",
    "FederatedTraining",
    "Federation",
    "Guarantee",
    "LedgerFacts",
    "Ledgers",
    "Level",
    "Meaning",
    "Mechanism",
    "RoundRow",
    "RunFacts",
    "StepRow",
    "Training",
    "as_card",
    "as_html",
    "as_json",
    "as_markdown",
    "at_least",
    "at_most",
    "attack_sentence",
    "client_range",
    "costs",
    "covering",
    "envelope",
    "federated_html",
    "federated_json",
    "largest_meaning",
    "meaning",
    "meaning_json",
    "percent",
    "plain_sentence",
    "plain_text",
    "profile",
    "read_metrics",
    "read_report",
    "strict",
    "trade_off",
    "write",
    "write_federated",
]
