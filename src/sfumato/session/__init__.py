"""One private training while it runs: tokens, the hot step, and the loader that drives them."""

from sfumato.session.loader import PrivateLoader, inspect
from sfumato.session.step import Session, StepFacts, Token

__all__ = ["PrivateLoader", "Session", "StepFacts", "Token", "inspect"]
