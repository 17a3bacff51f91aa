"""Schedules of σ and C, and every way of clipping: at each step one record moves the sum by at most the C of the step,
the noise is for that C, and the ledger holds that step's σ before it."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from tests.step.harness import World, chosen, data, distance, loss, mlp, norm, world

import sfumato as sf
from sfumato.clipping import Quantile
from sfumato.schedules import Cosine, Exponential, Lambda, Step

SCHEDULES = {
    "none": None,
    "exponential": Exponential(gamma=0.8),
    "growing": Exponential(gamma=1.3, every=2),
    "step": Step(gamma=0.5, every=2),
    "cosine": Cosine(steps=5, final=0.1),
    "lambda": Lambda(lambda t: 1.0 + 0.5 * (t % 3), steps=6),
}
CLIPS = ("flat", "per-layer", "automatic")
STEPS, N = 6, 8


def sums(indices: list[int], **options: Any) -> tuple[list[dict[str, torch.Tensor]], list[float]]:
    """The clipped sum of each of STEPS steps of a model that does not move, and the C of each."""
    torch.manual_seed(3)
    x, y = data(N)
    x = x * torch.logspace(-2, 3, N)[:, None]
    model = mlp()
    w = world(
        model,
        (x, y),
        indices=indices,
        batch_size=N,
        sampling=sf.Poisson(1 - 1e-10),
        noise_multiplier=0.0,
        optimizer=lambda p: torch.optim.SGD(p, lr=0.0),
        **options,
    )
    found, bounds = [], []
    for _ in range(STEPS):
        bounds.append(w.engine.max_grad_norm)
        for a, b in w.loader:
            loss(w.model, a, b).backward()
        found.append({n: g.double() * w.engine.plan.expected_batch_size for n, g in w.grads.items()})
        w.optimizer.zero_grad()
    return found, bounds


@pytest.mark.parametrize("clipping", CLIPS)
@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("physical", [None, 3])
def test_one_record_moves_each_sum_by_at_most_the_bound_of_its_step(
    clipping: str, name: str, physical: int | None
) -> None:
    options = {"clipping": clipping, "clip_schedule": SCHEDULES[name], "max_grad_norm": 0.7}
    whole, bounds = sums(list(range(N)), max_physical_batch_size=physical, **options)
    assert len(set(bounds)) == 1 if name == "none" else len(set(bounds)) > 1
    reached = 0.0
    for gone in range(N):
        less, again = sums([i for i in range(N) if i != gone], max_physical_batch_size=physical, **options)
        assert again == bounds
        for a, b, c in zip(whole, less, bounds, strict=True):
            assert distance(a, b) <= c * (1 + 1e-6)
            reached = max(reached, distance(a, b) / c)
    assert reached > 0.9  # the bound is not met by clipping everything away


def test_per_layer_sums_are_bounded_in_quadrature() -> None:
    whole, _ = sums(list(range(N)), clipping="per-layer", max_grad_norm=2.0)
    less, _ = sums(list(range(N - 1)), clipping="per-layer", max_grad_norm=2.0)
    moved = {n: whole[0][n] - less[0][n] for n in whole[0]}
    share = 2.0 / math.sqrt(len(moved))
    for name, change in moved.items():
        assert norm({name: change}) <= share * (1 + 1e-6)
    assert 1.5 < norm(moved) <= 2.0 * (1 + 1e-6)  # the last record is huge in nearly every layer


class Heard:
    """What the step asks of its source of noise, in order."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, source: sf.noise.Research):
        self.stds: list[tuple[int, float]] = []
        normal = source.normal

        def heard(shape: Any, *, std: float, **kwargs: Any) -> torch.Tensor:
            self.stds.append((math.prod(shape), std))
            return normal(shape, std=std, **kwargs)

        monkeypatch.setattr(source, "normal", heard)


def steps_of(w: World, count: int) -> None:
    while w.engine.steps < count:
        for x, y in w.loader:
            w.optimizer.zero_grad()
            loss(w.model, x, y).backward()
            w.optimizer.step()
            if w.engine.steps >= count:
                break


@pytest.mark.parametrize("of_noise", SCHEDULES)
@pytest.mark.parametrize("of_clip", ["none", "exponential", "lambda"])
def test_noise_clip_and_charge_move_together(of_noise: str, of_clip: str, monkeypatch: pytest.MonkeyPatch) -> None:
    source = chosen(24)
    heard = Heard(monkeypatch, source)
    w = world(
        noise=source,
        noise_multiplier=1.3,
        max_grad_norm=0.4,
        noise_schedule=SCHEDULES[of_noise],
        clip_schedule=SCHEDULES[of_clip],
    )
    bounds = []
    for k in range(STEPS):
        bounds.append(w.engine.max_grad_norm)
        steps_of(w, k + 1)
    charged = [e["event"]["noise_multiplier"] for e in w.engine.ledger.entries()]
    assert len(charged) == len(heard.stds) == STEPS
    for sigma, c, (size, std) in zip(charged, bounds, heard.stds, strict=True):
        assert size == sum(p.numel() for p in w.model.parameters())
        assert std * w.engine.plan.expected_batch_size == pytest.approx(sigma * c)
    assert (len(set(charged)) > 1) == (of_noise != "none")


def test_a_shuffled_epoch_pays_for_its_quietest_step() -> None:
    w = world(sampling=sf.Shuffle(), noise_schedule=Exponential(gamma=0.9), noise_multiplier=2.0)
    steps_of(w, 2 * len(w.loader))
    entries = [e["event"] for e in w.engine.ledger.entries()]
    for k in range(2):
        epoch = entries[k * len(w.loader) : (k + 1) * len(w.loader)]
        assert [e["mechanism"] for e in epoch] == ["gaussian"] + ["covered"] * (len(epoch) - 1)
        assert epoch[0]["noise_multiplier"] == min(e["noise_multiplier"] for e in epoch)
        assert epoch[1]["noise_multiplier"] > epoch[-1]["noise_multiplier"]


@pytest.mark.parametrize("target", [0.3, 0.5, 0.8])
@pytest.mark.parametrize("start", [0.1, 10.0])
def test_quantile_clipping_finds_the_quantile_from_both_sides(target: float, start: float) -> None:
    torch.manual_seed(0)
    n = 4000
    x = torch.randn(n, 1).abs() + 0.05
    model = torch.nn.Linear(1, 1, bias=False)
    true = float((2 * x.square()).flatten().quantile(target))  # the gradient of (w x)² at w = 1
    torch.nn.init.ones_(model.weight)
    w = world(
        model,
        (x, torch.zeros(n)),
        batch_size=1000,
        noise_multiplier=1.0,
        max_grad_norm=start * true,
        clip_schedule=Quantile(target=target),
        noise=sf.noise.Research(5),
        optimizer=lambda p: torch.optim.SGD(p, lr=0.0),
    )
    while w.engine.steps < 60:
        for a, _ in w.loader:
            w.model(a).square().mean().backward()
            w.optimizer.zero_grad()
            if w.engine.steps == 60:
                break
    assert w.engine.max_grad_norm == pytest.approx(true, rel=0.1)


def test_quantile_clipping_pays_for_its_count(monkeypatch: pytest.MonkeyPatch) -> None:
    source = chosen(400)
    heard = Heard(monkeypatch, source)
    w = world(tensors=data(400), batch_size=200, noise=source, noise_multiplier=1.0, clip_schedule=Quantile())
    bound = w.engine.max_grad_norm
    steps_of(w, 1)
    (_, gradient), (one, count) = heard.stds
    assert one == 1
    assert count == 200 / 20
    std = gradient * 200 / bound  # over the sensitivity of the sum
    assert std**-2 + (2 * count) ** -2 == pytest.approx(1.0)  # two queries of sensitivity C and 1/2 cost σ = 1
    assert w.engine.ledger.entries()[0]["event"]["noise_multiplier"] == 1.0
    assert w.engine.max_grad_norm != bound


def test_quantile_clipping_under_zeroing_out_counts_a_whole_unit(monkeypatch: pytest.MonkeyPatch) -> None:
    source = sf.noise.Research(0)
    heard = Heard(monkeypatch, source)
    w = world(
        tensors=data(400),
        batch_size=200,
        noise=source,
        noise_multiplier=1.0,
        clip_schedule=Quantile(),
        sampling=sf.Shuffle(),
    )
    steps_of(w, 1)
    (_, gradient), (_, count) = heard.stds
    assert (gradient * 200) ** -2 + count**-2 == pytest.approx(1.0)


def test_a_count_that_cannot_be_spared_is_refused() -> None:
    with pytest.raises(sf.errors.ConfigurationError, match="count"):
        world(batch_size=4, noise_multiplier=1.0, clip_schedule=Quantile())
    with pytest.raises(sf.errors.ConfigurationError, match="flat"):
        world(batch_size=20, clipping="per-layer", clip_schedule=Quantile(count_noise=5.0))


@pytest.mark.parametrize("clipping", CLIPS)
def test_padding_changes_nothing_but_the_shape(clipping: str) -> None:
    plain, bounds = sums(list(range(N)), clipping=clipping, max_physical_batch_size=3)
    shapes: list[int] = []
    filled, _ = sums(list(range(N)), clipping=clipping, max_physical_batch_size=3, static_shapes=True)
    for a, b in zip(plain, filled, strict=True):
        assert distance(a, b) <= 1e-5 * bounds[0]
    w = world(everybody=True, max_physical_batch_size=7, static_shapes=True)
    for x, y in w.loader:
        shapes.append(len(x))
        loss(w.model, x, y).backward()
    assert shapes == [7] * 4 * len(w.loader)
    assert w.engine.last_step.batch_size == 24


def test_padding_with_a_record_that_is_not_finite_stays_out() -> None:
    torch.manual_seed(0)
    x, y = data(10)
    x[9] = float("nan")
    w = world(
        tensors=(x, y),
        everybody=True,
        batch_size=10,
        max_physical_batch_size=9,
        static_shapes=True,
        noise_multiplier=0.0,
    )
    for a, b in w.loader:
        loss(w.model, a, b).backward()
    assert all(g.isfinite().all() for g in w.grads.values())
    assert norm(w.grads) > 0


@pytest.mark.parametrize(
    "options",
    [
        {"static_shapes": True},
        {"static_shapes": 1},
        {"static_shapes": True, "max_physical_batch_size": 4, "privacy_unit": list(range(24))},
        {"noise_schedule": 0.9},
        {"clip_schedule": "cosine"},
        {"adjacency": "zero_out"},
        {"adjacency": "add-remove", "sampling": sf.Shuffle()},
        {"sampling": sf.CyclicPoisson(cycle=25)},
    ],
    ids=str,
)
def test_refused_before_anything_is_changed(options: dict[str, Any]) -> None:
    model = mlp()
    with pytest.raises(sf.errors.ConfigurationError):
        world(model, **options)
    assert "forward" not in vars(model)


@pytest.mark.parametrize("sampling", [sf.CyclicPoisson(cycle=4), sf.CyclicPoisson(0.5, cycle=3)], ids=str)
def test_a_cycle_is_paid_once_and_draws_each_group_once(sampling: sf.CyclicPoisson) -> None:
    x = torch.arange(24).float()[:, None].expand(24, 5)
    w = world(tensors=(x, torch.zeros(24, dtype=torch.long)), sampling=sampling, batch_size=6)
    drawn: list[set[int]] = []
    while w.engine.steps < 24:
        for a, b in w.loader:
            drawn.append({int(i) % sampling.cycle for i in a[:, 0]})
            loss(w.model, a, b).backward()
    assert all(len(groups) == 1 for groups in drawn)
    kinds = [e["event"]["mechanism"] for e in w.engine.ledger.entries()]
    assert kinds[: 2 * sampling.cycle] == (["poisson-gaussian"] + ["covered"] * (sampling.cycle - 1)) * 2
    assert kinds.count("poisson-gaussian") == math.ceil(len(kinds) / sampling.cycle)
