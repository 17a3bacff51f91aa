"""Predictions as one vector, and what a student makes of them."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from sfumato.errors import ConfigurationError
from sfumato.federated import Distill
from sfumato.federated.distillation.predictions import learn, probabilities, rows_of, scaled, simplex, unscaled


def test_certainty_has_norm_one_and_nothing_is_longer() -> None:
    certain = torch.eye(10)[torch.arange(25) % 10]
    assert scaled(certain).norm() == pytest.approx(1.0, abs=1e-6)
    soft = torch.softmax(torch.randn(25, 10, generator=torch.Generator().manual_seed(0)), 1)
    assert scaled(soft).norm() < 1.0
    assert torch.allclose(unscaled(scaled(soft), 10), soft, atol=1e-6)


def test_the_simplex_projection_is_the_closest_point() -> None:
    g = torch.Generator().manual_seed(0)
    rows = torch.randn(50, 6, generator=g) * 2
    found = simplex(rows)
    assert torch.allclose(found.sum(1), torch.ones(50), atol=1e-5)
    assert bool((found >= 0).all())
    others = torch.distributions.Dirichlet(torch.full((6,), 0.3)).sample((500, 50))
    assert bool(((found - rows).norm(dim=1) <= (others - rows).norm(dim=2) + 1e-5).all())
    assert torch.allclose(simplex(found), found, atol=1e-6)


def test_every_public_input_is_asked_before_one_is_asked_again() -> None:
    rows = torch.cat([rows_of(3, first, 20, 60) for first in (0, 20, 40)])
    assert sorted(rows.tolist()) == list(range(60))
    assert torch.equal(rows_of(3, 60, 20, 60), rows_of(3, 0, 20, 60))
    assert not torch.equal(rows_of(4, 0, 20, 60), rows_of(3, 0, 20, 60))


@pytest.mark.parametrize("loss", ["brier", "cross-entropy"])
@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_a_student_reproduces_predictions_without_noise(loss: str, temperature: float) -> None:
    torch.manual_seed(0)
    public = torch.randn(60, 6)
    student = nn.Linear(6, 3)
    targets = probabilities(nn.Linear(6, 3), public, temperature)
    optimizer = torch.optim.Adam(student.parameters(), lr=0.05)
    distill = Distill(epochs=120, temperature=temperature, loss=loss)
    learn(student, optimizer, public, targets, distill, torch.Generator().manual_seed(0))
    assert (probabilities(student, public, temperature) - targets).abs().max() < 0.02


@pytest.mark.parametrize("field", ["epochs", "lr", "temperature", "batch_size", "loss", "votes"])
def test_distill_refuses_nonsense(field: str) -> None:
    with pytest.raises(ConfigurationError):
        Distill(**{field: -1})  # type: ignore[arg-type]
