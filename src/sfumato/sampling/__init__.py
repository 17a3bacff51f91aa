"""Which records take part in a step: public schemes, and draws from them. No torch here."""

from .draw import draw_poisson, physical, shuffle_epoch
from .schemes import Poisson, Shuffle
from .units import Units, group, physical_units

__all__ = ["Poisson", "Shuffle", "Units", "draw_poisson", "group", "physical", "physical_units", "shuffle_epoch"]
