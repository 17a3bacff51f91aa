"""Built-in models and the user's own."""

from __future__ import annotations

import pytest
import torch

from sfumato.errors import ConfigurationError
from sfumato.models import BUILT_IN, build


@pytest.mark.parametrize("name", BUILT_IN)
@pytest.mark.parametrize("shape", [(1, 28, 28), (3, 32, 32)])
def test_images(name: str, shape: tuple[int, ...]) -> None:
    assert build(name, shape, 7)(torch.randn(5, *shape)).shape == (5, 7)


@pytest.mark.parametrize("name", ["linear", "mlp"])
def test_rows(name: str) -> None:
    assert build(name, (12,), 3)(torch.randn(5, 12)).shape == (5, 3)


@pytest.mark.parametrize("name", ["cnn", "papernot", "tramer_boneh"])
def test_rows_are_not_images(name: str) -> None:
    with pytest.raises(ConfigurationError, match="needs images"):
        build(name, (12,), 3)


@pytest.mark.parametrize("name", ["papernot", "tramer-boneh", "tramer_boneh"])
def test_published_size(name: str) -> None:
    assert sum(p.numel() for p in build(name, (1, 28, 28), 10).parameters()) == 26_010


@pytest.mark.parametrize("name", BUILT_IN)
def test_no_model_mixes_records(name: str) -> None:
    model, x = build(name, (1, 28, 28), 10), torch.randn(4, 1, 28, 28)
    together, alone = model(x), torch.cat([model(row[None]) for row in x])
    assert torch.allclose(together, alone, atol=1e-5)


def test_models_keep_their_mode() -> None:
    assert build("cnn", (1, 8, 8), 10).training
