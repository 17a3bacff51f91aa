"""The two tanh networks against which private image training is usually measured.

Sources: Papernot, Thakurta, Song, Chien, Erlingsson, "Tempered Sigmoid Activations for Deep Learning with
Differential Privacy", AAAI 2021, tables 1 and 2; Tramèr, Boneh, "Differentially Private Learning Needs Better
Features (or Much More Data)", ICLR 2021, appendix. Both give the small network for grey images and the deeper one
for colour images; for 28 x 28 they differ in the padding of the first convolution (3, "same", against 2).
"""

from __future__ import annotations

from torch import nn

from ._shapes import flat_size, require_image


def tramer_boneh(input_shape: tuple[int, ...], classes: int) -> nn.Module:
    """26,010 parameters for 28 x 28 grey images and 10 classes."""
    return _build("tramer_boneh", input_shape, classes, padding=2)


def papernot(input_shape: tuple[int, ...], classes: int) -> nn.Module:
    """26,010 parameters for 28 x 28 grey images and 10 classes."""
    return _build("papernot", input_shape, classes, padding=3)


def _build(name: str, input_shape: tuple[int, ...], classes: int, *, padding: int) -> nn.Module:
    channels, _, _ = require_image(name, input_shape)
    features = _deep() if channels == 3 else _small(channels, padding)
    hidden = 128 if channels == 3 else 32
    size = flat_size(name, features, input_shape)
    return nn.Sequential(*features, nn.Linear(size, hidden), nn.Tanh(), nn.Linear(hidden, classes))


def _small(channels: int, padding: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(channels, 16, 8, stride=2, padding=padding),
        nn.Tanh(),
        nn.MaxPool2d(2, stride=1),
        nn.Conv2d(16, 32, 4, stride=2),
        nn.Tanh(),
        nn.MaxPool2d(2, stride=1),
        nn.Flatten(),
    )


def _deep() -> nn.Sequential:
    layers: list[nn.Module] = []
    channels = 3
    for width in (32, 64, 128):
        for _ in range(2):
            layers += [nn.Conv2d(channels, width, 3, padding=1), nn.Tanh()]
            channels = width
        layers.append(nn.MaxPool2d(2))
    return nn.Sequential(*layers, nn.Flatten())
