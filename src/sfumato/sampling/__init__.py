"""Which records take part in a step: public schemes, and draws from them. No torch here."""

from .capped import cyclic_group, draw_cyclic, draw_truncated, pad, truncation
from .draw import draw_poisson, physical, shuffle_epoch
from .schemes import CyclicPoisson, Poisson, Shuffle, TruncatedPoisson
from .units import Units, group, physical_units

__all__ = [
    "CyclicPoisson",
    "Poisson",
    "Shuffle",
    "TruncatedPoisson",
    "Units",
    "cyclic_group",
    "draw_cyclic",
    "draw_poisson",
    "draw_truncated",
    "group",
    "pad",
    "physical",
    "physical_units",
    "shuffle_epoch",
    "truncation",
]
