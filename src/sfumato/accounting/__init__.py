"""Privacy accounting without torch: certified epsilon, calibration, budgets and the durable ledger."""

from . import renyi
from .budget import Budget
from .calibrate import max_steps, noise_multiplier, sample_rate, steps
from .events import Event
from .filter import Filter
from .ledger import Ledger
from .ledger_reservation import Reservation
from .ledger_scope import Records
from .pld import Epsilon, compose, delta, epsilon
from .selection import repeat_and_select
from .tradeoff import advantage, trade_off, true_positive_rate

__all__ = [
    "Budget",
    "Epsilon",
    "Event",
    "Filter",
    "Ledger",
    "Records",
    "Reservation",
    "advantage",
    "compose",
    "delta",
    "epsilon",
    "max_steps",
    "noise_multiplier",
    "renyi",
    "repeat_and_select",
    "sample_rate",
    "steps",
    "trade_off",
    "true_positive_rate",
]
