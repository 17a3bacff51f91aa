"""The noise that reaches p.grad: its size on every parameter, its independence, and that it is added exactly once."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.statistical.checks import ENOUGH, check_normal, check_std, check_uncorrelated
from tests.step.harness import World, chosen, released, world
from torch import Tensor, nn

import sfumato as sf

C, SIGMA = 0.37, 1.7
SIDE = 100_000


class Wide(nn.Module):
    """Four kinds of parameter, 10⁵ elements each."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(2000, 50)
        self.linear = nn.Linear(50, 2000, bias=False)
        self.bare = nn.Parameter(torch.zeros(SIDE))
        self.unused = nn.Parameter(torch.zeros(SIDE))

    def forward(self, ids: Tensor) -> Tensor:
        return self.linear(self.embed(ids)).sum((1, 2)) + (self.bare * ids[:, :1]).mean(1)


def no_gradient(model: nn.Module, ids: Tensor, _: Tensor) -> Tensor:
    """A loss whose gradient is zero: all that is released is noise."""
    return 0.0 * model(ids).sum()


def noise_of(w: World, steps: int) -> dict[str, list[Tensor]]:
    """What the optimizer saw, times the expected batch size, for each release; empty draws included."""
    seen: dict[str, list[Tensor]] = {n: [] for n, _ in w.model.named_parameters()}

    def look(*_: object) -> None:
        for n, g in w.grads.items():
            seen[n].append(g.detach().double().flatten() * w.engine.plan.expected_batch_size)

    handle = w.optimizer.register_step_pre_hook(look)
    while w.engine.steps < steps:
        for ids, y in w.loader:
            w.optimizer.zero_grad()
            no_gradient(w.model, ids, y).backward()
            w.optimizer.step()
            if w.engine.steps >= steps:
                break
    handle.remove()
    assert {len(v) for v in seen.values()} == {w.engine.steps}
    return seen


def ids(n: int = 6) -> tuple[Tensor, Tensor]:
    return torch.randint(0, 2000, (n, 2)), torch.zeros(n)


def private(tensors: tuple[Tensor, Tensor] | None = None, **options: Any) -> World:
    options = {"noise_multiplier": SIGMA, "max_grad_norm": C, "batch_size": 3, **options}
    return world(Wide(), ids() if tensors is None else tensors, **options)


VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "research": {"noise": "research"},
    "sum": {"loss_reduction": "sum"},
    "microbatches": {"max_physical_batch_size": 1},
    "microbatches, research, sum": {"max_physical_batch_size": 2, "noise": "research", "loss_reduction": "sum"},
    "shuffled": {"sampling": sf.Shuffle()},
    "empty draws": {"tensors": "two", "batch_size": 1},
}


@pytest.mark.parametrize("name", VARIANTS)
def test_std_on_every_parameter(name: str) -> None:
    options = dict(VARIANTS[name])
    if options.pop("tensors", None):
        options["tensors"] = ids(2)
    w = private(**options)
    steps = 12 if name == "plain" else 5
    if name == "empty draws":
        steps = 8
    for values in (seen := noise_of(w, steps)).values():
        pooled = torch.cat(values)
        assert pooled.numel() >= ENOUGH
        check_std(pooled, SIGMA * C)
        check_normal(pooled, SIGMA * C)
        for single in values:
            check_std(single, SIGMA * C)
    assert set(seen) == {n for n, _ in w.model.named_parameters()}


@pytest.mark.parametrize("noise", ["secure", "research"])
def test_std_around_real_gradients(noise: str) -> None:
    """The clipped sum of everybody is known, and what is left over is the noise; once for a logical batch."""

    def sums(sigma: float, physical: int | None) -> list[dict[str, Tensor]]:
        torch.manual_seed(0)
        w = world(
            nn.Linear(500, 200), (x, y), batch_size=6, sampling=sf.Poisson(1.0), noise=noise, noise_multiplier=sigma,
            max_grad_norm=C, max_physical_batch_size=physical,
        )  # fmt: skip
        out = []
        for _ in range(5 if sigma else 1):
            w.model.zero_grad()
            out.append(released(w))
        return out

    x, y = torch.randn(6, 500), torch.randint(0, 200, (6,))
    clean = sums(0.0, None)[0]
    for physical in (None, 2):
        left = torch.cat([(r["weight"] - clean["weight"]).flatten() for r in sums(SIGMA, physical)])
        check_std(left, SIGMA * C)


def test_a_freshly_privatised_model_after_detach() -> None:
    w = private()
    noise_of(w, 2)
    w.engine.detach()
    again = world(
        w.model, ids(), engine=w.engine, batch_size=2, noise_multiplier=0.6, max_grad_norm=2.5, noise="research"
    )
    for values in noise_of(again, 5).values():
        check_std(torch.cat(values), 0.6 * 2.5)


def test_divisor_is_the_expected_batch_size() -> None:
    """Not what was drawn: 2 of 1000 at a declared batch of 5."""
    w = world(Wide(), ids(1000), indices=[3, 7], batch_size=5, noise_multiplier=SIGMA, max_grad_norm=C)
    for batch in w.loader:
        no_gradient(w.model, *batch).backward()
        break
    for g in w.grads.values():
        check_std(g, SIGMA * C / 5)


@pytest.mark.parametrize("noise", ["secure", "research"])
def test_noise_is_independent_across_tensors_and_steps(noise: str) -> None:
    seen = noise_of(private(noise=noise), 3)
    samples = [v for values in seen.values() for v in values]
    for k, a in enumerate(samples):
        for b in samples[:k]:
            assert not torch.equal(a, b)
            check_uncorrelated(a, b)
    for a in samples:
        check_uncorrelated(a[:-1], a[1:])


def test_two_trainings_do_not_share_noise() -> None:
    torch.manual_seed(0)
    first = noise_of(private(), 1)
    torch.manual_seed(0)
    second = noise_of(private(), 1)
    for n in first:
        check_uncorrelated(first[n][0], second[n][0])


# -- the checks themselves ---------------------------------------------------------------------------------------------


def scaled(factor: float) -> sf.noise.Research:
    source = chosen(6)
    normal = source.normal
    source.normal = lambda *a, **k: normal(*a, **k) * factor  # type: ignore[method-assign]
    return source


@pytest.mark.parametrize("factor", [1.3, 0.7, 1.01, 0.99, 2**0.5, 0.5**0.5, C, 0.0])
def test_the_check_fails_on_a_source_of_another_scale(factor: float) -> None:
    """C, √2, 1/√2: noise scaled by C², added twice, or split between two."""
    for values in noise_of(private(noise=scaled(factor)), 12).values():
        with pytest.raises(AssertionError):
            check_std(torch.cat(values), SIGMA * C)


def test_the_check_passes_on_the_same_source_unscaled() -> None:
    for values in noise_of(private(noise=scaled(1.0)), 12).values():
        check_std(torch.cat(values), SIGMA * C)


def test_the_other_checks_fail_on_broken_samples() -> None:
    good = torch.randn(SIDE)
    with pytest.raises(AssertionError):
        check_uncorrelated(good, good * 0.05 + torch.randn(SIDE))
    with pytest.raises(AssertionError):
        check_normal(torch.rand(SIDE) * 12**0.5 - 3**0.5, 1.0)
    with pytest.raises(AssertionError):
        check_normal(good + 0.05, 1.0)
    check_normal(good, 1.0)
    check_uncorrelated(good, torch.randn(SIDE))
