"""Built-in models and the user's own."""

from __future__ import annotations

import pytest
import torch

from sfumato.errors import ConfigurationError, CoupledRecords
from sfumato.models import BUILT_IN, Features, build, extract
from sfumato.models.filters import circular_basis, cosine_basis, gaussian_pool, morlet_bank

GREY_ONLY = ("scattering", "energy")


@pytest.mark.parametrize(
    ("name", "shape"),
    [(n, s) for n in BUILT_IN for s in [(1, 28, 28), (1, 16, 16), (3, 32, 32)] if s[0] == 1 or n not in GREY_ONLY],
)
def test_images(name: str, shape: tuple[int, ...]) -> None:
    assert build(name, shape, 7)(torch.randn(5, *shape)).shape == (5, 7)


@pytest.mark.parametrize("name", ["linear", "mlp"])
def test_rows(name: str) -> None:
    assert build(name, (12,), 3)(torch.randn(5, 12)).shape == (5, 3)


@pytest.mark.parametrize("name", ["cnn", "papernot", "tramer_boneh", "scattering", "energy"])
def test_rows_are_not_images(name: str) -> None:
    with pytest.raises(ConfigurationError, match="needs images"):
        build(name, (12,), 3)


@pytest.mark.parametrize(
    ("name", "side", "trained"),
    [("papernot", 28, 26_010), ("tramer-boneh", 28, 26_010), ("tramer_boneh", 28, 26_010), ("scattering", 28, 39_700),
     ("energy", 8, 1_930)],
)  # fmt: skip
def test_size(name: str, side: int, trained: int) -> None:
    assert sum(p.numel() for p in build(name, (1, side, side), 10).parameters() if p.requires_grad) == trained


@pytest.mark.parametrize(
    ("name", "shape", "says"),
    [("scattering", (1, 30, 30), "divisible by 4"), ("scattering", (3, 32, 32), "grey"), ("energy", (3, 8, 8), "grey")],
)
def test_what_fixed_features_cannot_take(name: str, shape: tuple[int, ...], says: str) -> None:
    with pytest.raises(ConfigurationError, match=says):
        build(name, shape, 10)


def test_fixed_features_depend_on_nothing_random() -> None:
    x = torch.rand(2, 1, 28, 28)
    first, second = (build("scattering", (1, 28, 28), 10) for _ in range(2))
    assert isinstance(first, Features)
    assert isinstance(second, Features)
    assert torch.equal(first.features(x), second.features(x))


def test_filters_are_what_they_claim() -> None:
    bank = morlet_bank(1, 8, 13)
    assert bank.sum(dim=(1, 2, 3)).abs().max() < 1e-6  # zero mean: blind to a constant image
    for basis in (cosine_basis(7), circular_basis(8)[0]):
        assert torch.allclose(basis @ basis.T, torch.eye(len(basis)), atol=1e-6)
    assert torch.allclose(gaussian_pool(28, 4, 3.2).sum(1), torch.ones(7))


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
