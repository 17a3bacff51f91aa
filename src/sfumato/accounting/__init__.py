"""Privacy accounting without torch: certified epsilon, calibration, budgets and the durable ledger."""

from .budget import Budget
from .calibrate import max_steps, noise_multiplier
from .events import Event
from .ledger import Ledger
from .pld import Epsilon, compose, epsilon

__all__ = ["Budget", "Epsilon", "Event", "Ledger", "compose", "epsilon", "max_steps", "noise_multiplier"]
