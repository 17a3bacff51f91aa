"""Squared per-sample norms to clip weights; nothing here knows about noise."""

from sfumato.clipping.flat import flat_weights

__all__ = ["flat_weights"]
