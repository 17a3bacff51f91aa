"""Rounding is bounded too: sums of many records, and gradients in half precision."""

import contextlib
from collections.abc import Callable

import pytest
import torch
from tests.step.harness import distance, mlp, released, world
from torch import Tensor, nn
from torch.nn import functional as F

import sfumato as sf

C = 1.0


def alike(n: int) -> tuple[Tensor, Tensor]:
    """n times the same record: every clipped gradient points the same way."""
    return torch.full((n, 5), 0.37), torch.ones(n, dtype=torch.long)


def clipped_sum(n: int, **options: object) -> dict[str, Tensor]:
    torch.manual_seed(3)
    return released(world(mlp(), alike(n), everybody=True, noise_multiplier=0.0, max_grad_norm=C, **options))


@pytest.mark.parametrize("physical", [None, 100], ids=["at once", "in microbatches"])
@pytest.mark.parametrize("n", [4129, 16401])
def test_one_record_of_very_many_still_moves_the_sum_by_its_own_clipped_gradient(n: int, physical: int | None) -> None:
    """In one float32 sum over 16,400 equal records, removing one moved it by three times the bound."""
    many, fewer = (clipped_sum(k, batch_size=k, max_physical_batch_size=physical) for k in (n, n - 1))
    assert distance(many, fewer) <= C * 1.01


HALF: dict[str, Callable[[], contextlib.AbstractContextManager[object]]] = {
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "parameters": contextlib.nullcontext,
}


@pytest.mark.parametrize("name", HALF)
def test_a_mean_before_half_precision_is_refused(name: str) -> None:
    """Dividing by the number drawn decides how every gradient is rounded: one record moved the sum by 21 C."""
    model = mlp() if name == "autocast" else mlp().bfloat16()
    dtype = torch.float32 if name == "autocast" else torch.bfloat16
    w = world(model, (torch.randn(8, 5, dtype=dtype), torch.zeros(8, dtype=torch.long)), everybody=True)
    with pytest.raises(sf.errors.UnsupportedError, match='loss_reduction="sum"'), HALF[name]():
        released(w, lambda m, x, y: F.cross_entropy(m(x).float(), y))
    assert not w.grads
    assert w.charges == 0


def test_half_precision_in_a_frozen_part_counts() -> None:
    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(5, 5)
            self.frozen = nn.Linear(5, 3).bfloat16().requires_grad_(False)

        def forward(self, x: Tensor) -> Tensor:
            return self.frozen(self.a(x).bfloat16()).float()

    w = world(Mixed(), everybody=True)
    with pytest.raises(sf.errors.UnsupportedError, match="half precision"):
        released(w)


def test_a_sum_in_half_precision_keeps_the_bound() -> None:
    def summed(m: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return F.cross_entropy(m(x).float(), y, reduction="sum")

    def run(n: int) -> dict[str, Tensor]:
        torch.manual_seed(3)
        options = {"noise_multiplier": 0.0, "max_grad_norm": C, "loss_reduction": "sum", "batch_size": n}
        return released(world(mlp(), alike(n), everybody=True, **options), summed)

    for n in (513, 1029, 4126):
        assert distance(run(n), run(n - 1)) <= C * 1.01
