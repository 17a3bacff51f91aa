"""Which records take part in a step: public schemes, and draws from them. No torch here."""

from .draw import draw_poisson, physical, shuffle_epoch
from .schemes import Poisson, Shuffle

__all__ = ["Poisson", "Shuffle", "draw_poisson", "physical", "shuffle_epoch"]
