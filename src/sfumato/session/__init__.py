"""One private training while it runs: tokens, the hot step, charges, and the loader that drives them."""

from sfumato.session.admission import check_model, refuse_module
from sfumato.session.charging import Charging, Scope, charging_of, target_noise
from sfumato.session.loader import PrivateLoader, inspect, plain
from sfumato.session.population import scope_of
from sfumato.session.step import Session
from sfumato.session.token import StepFacts, Token
from sfumato.session.units import PrivacyUnit, units_of

__all__ = [
    "Charging",
    "PrivacyUnit",
    "PrivateLoader",
    "Scope",
    "Session",
    "StepFacts",
    "Token",
    "charging_of",
    "check_model",
    "inspect",
    "plain",
    "refuse_module",
    "scope_of",
    "target_noise",
    "units_of",
]
