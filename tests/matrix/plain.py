"""Models of plain torch, one dictionary of them all."""

from tests.matrix.plain_layers import LAYERS
from tests.matrix.plain_sequence import SEQUENCE
from tests.matrix.plain_tricks import TRICKS
from tests.matrix.plain_vision import VISION
from tests.oracle.oracle import Case

MODELS: dict[str, Case] = LAYERS | VISION | SEQUENCE | TRICKS
