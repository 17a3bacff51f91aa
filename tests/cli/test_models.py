"""Built-in models and the user's own."""

from __future__ import annotations

import pytest
import torch

from sfumato.errors import ConfigurationError, CoupledRecords
from sfumato.models import BUILT_IN, Features, build, extract


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


def test_stored_features_give_the_same_model() -> None:
    from torch import nn

    model = Features(nn.Sequential(nn.Conv2d(1, 4, 3), nn.Tanh(), nn.Flatten()), nn.Linear(4 * 36, 10))
    x = torch.randn(7, 1, 8, 8)
    assert [name for name, p in model.named_parameters() if p.requires_grad] == ["head.weight", "head.bias"]
    stored = extract(model.features, x, torch.device("cpu"))
    assert torch.allclose(model.head(stored), model(x), atol=1e-6)


def test_features_that_mix_records_are_refused() -> None:
    from torch import nn

    class Centre(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x - x.mean(0)

    with pytest.raises(CoupledRecords):
        extract(Centre(), torch.randn(7, 5), torch.device("cpu"))
