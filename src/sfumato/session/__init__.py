"""One private training while it runs: tokens, the hot step, and the loader that drives them."""

from sfumato.session.loader import PrivateLoader, inspect
from sfumato.session.step import Session, StepFacts, Token
from sfumato.session.units import PrivacyUnit, units_of

__all__ = ["PrivacyUnit", "PrivateLoader", "Session", "StepFacts", "Token", "inspect", "units_of"]
