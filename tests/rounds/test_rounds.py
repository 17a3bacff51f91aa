"""Rounds of training: the same model privatised again, on the same, on disjoint and on overlapping records."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, Subset, TensorDataset

import sfumato as sf
from sfumato.errors import ConfigurationError, PrivacyError, UnsupportedError

SHARD, ROUNDS, STEPS, DELTA = 40, 10, 20, 1e-5  # rate 0.05: batches of 2


def records() -> TensorDataset:
    torch.manual_seed(0)
    n = SHARD * ROUNDS
    return TensorDataset(torch.randn(n, 4), torch.randint(0, 3, (n,)))


class Opaque(Dataset[Any]):
    """Records that cannot be known again by their content."""

    def __init__(self, data: TensorDataset):
        self.data = data

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, i: int) -> Any:
        return self.data[i]


def train(engine: sf.PrivacyEngine, model: nn.Module, data: Dataset[Any], **options: Any) -> DataLoader[Any]:
    """One round of STEPS steps at rate 0.05 and noise multiplier 1."""
    size = max(1, round(0.05 * len(data)))  # type: ignore[arg-type]
    model, optimizer, loader = engine.make_private(
        module=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
        data_loader=DataLoader(data, batch_size=size),
        noise_multiplier=1.0,
        max_grad_norm=1.0,
        sampling=sf.Poisson(0.05),
        **options,
    )
    assert len(loader) == STEPS
    for x, y in loader:
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    assert engine.steps == STEPS
    return loader


def shard(data: Dataset[Any], r: int) -> Subset[Any]:
    return Subset(data, range(SHARD * r, SHARD * (r + 1)))


def rounds(subsets: list[Any], **options: Any) -> sf.Epsilon:
    engine, model = sf.PrivacyEngine(), nn.Linear(4, 3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for subset in subsets:
            train(engine, model, subset, **options)
    assert len(engine.ledger.entries()) == len(subsets) * STEPS
    assert engine.ledger.verify() == len(subsets) * STEPS
    return engine.get_epsilon(DELTA)


def test_ten_rounds_on_the_same_records_compose() -> None:
    data = records()
    assert rounds([data] * ROUNDS) == pytest.approx(4.77, abs=0.01)
    assert rounds([shard(data, 0)] * ROUNDS) == pytest.approx(4.77, abs=0.01)


def test_ten_rounds_on_disjoint_shards_cost_one() -> None:
    data = records()
    assert rounds([shard(data, r) for r in range(ROUNDS)]) == pytest.approx(1.99, abs=0.01)


@pytest.mark.parametrize(("shared", "expected"), [(2, 2.47), (3, 2.86), (5, 3.50)])
def test_records_in_some_of_the_rounds_cost_what_they_take_part_in(shared: int, expected: float) -> None:
    data = records()
    fixed = list(range(SHARD // 2))
    subsets = [
        Subset(data, (fixed if r < shared else []) + list(range(SHARD * (r + 1) - 20, SHARD * (r + 1))))
        for r in range(ROUNDS)
    ]
    assert rounds(subsets) == pytest.approx(expected, abs=0.01)


def test_a_subset_of_a_subset_and_the_whole_are_known_by_their_records() -> None:
    data = records()
    nested = Subset(Subset(data, range(100, 200)), range(40))  # 100..139
    assert rounds([nested, Subset(data, range(140, 180))]) == pytest.approx(1.99, abs=0.01)
    assert rounds([nested, Subset(data, range(139, 180))]) == pytest.approx(2.47, abs=0.01)
    assert rounds([nested, Subset(data, range(-400 + 139, -220))]) == pytest.approx(2.47, abs=0.01)
    assert rounds([nested, data]) == pytest.approx(2.47, abs=0.01)


def test_equal_content_is_the_same_data_set_and_other_content_is_unknown_overlap() -> None:
    data, again = records(), records()
    assert rounds([shard(data, 0), shard(again, 1)]) == pytest.approx(1.99, abs=0.01)
    scaled = TensorDataset(data.tensors[0] * 2, data.tensors[1])
    assert rounds([shard(data, 0), shard(scaled, 1)]) == pytest.approx(2.47, abs=0.01)


def test_records_that_cannot_be_known_again_add_up_unless_the_caller_names_them() -> None:
    data = Opaque(records())
    shards = [shard(data, r) for r in range(3)]
    assert rounds(shards) == pytest.approx(2.86, abs=0.01)
    assert rounds(shards, dataset="ward 7") == pytest.approx(1.99, abs=0.01)


def test_groups_are_disjoint_by_declaration() -> None:
    data = records()
    engine, model = sf.PrivacyEngine(), nn.Linear(4, 3)
    train(engine, model, shard(data, 0), group="north")
    train(engine, model, shard(data, 0), group="south")
    assert engine.get_epsilon(DELTA) == pytest.approx(1.99, abs=0.01)
    train(engine, model, shard(data, 0), group="south")
    assert engine.get_epsilon(DELTA) == pytest.approx(2.47, abs=0.01)
    assert engine.ledger.epsilon(delta=DELTA, group="north") == pytest.approx(1.99, abs=0.01)
    train(engine, model, data)  # anybody
    assert engine.get_epsilon(DELTA) == pytest.approx(2.86, abs=0.01)


def test_one_budget_over_rounds_counts_the_records_of_the_round() -> None:
    data = records()
    engine, model = sf.PrivacyEngine(), nn.Linear(4, 3)
    budget = sf.Budget(epsilon=2.0, delta=DELTA)
    for r in range(3):
        train(engine, model, shard(data, r), budget=budget)
    with pytest.raises(AssertionError):  # the records of round 0 have no 20 steps left
        train(engine, model, shard(data, 0), budget=budget)
    assert engine.stopped
    assert engine.get_epsilon(DELTA) <= 2.0


def test_privatising_again_ends_the_earlier_loader_and_keeps_the_object() -> None:
    data, engine, model = records(), sf.PrivacyEngine(), nn.Linear(4, 3)
    first = train(engine, model, shard(data, 0))
    second = train(engine, model, shard(data, 1))
    with pytest.raises(PrivacyError, match="detached"):
        next(iter(first))
    private, _, third = engine.make_private(  # a private loader stands for the one behind it
        module=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
        data_loader=second,
        noise_multiplier=2.0,
        max_grad_norm=0.5,
    )
    assert private is model
    assert third.dataset is second.dataset
    engine.detach()
    assert "forward" not in vars(model)


def test_another_engine_is_refused_and_nothing_is_changed() -> None:
    data, engine, model = records(), sf.PrivacyEngine(), nn.Linear(4, 3)
    train(engine, model, shard(data, 0))
    hooks = len(model.weight._post_accumulate_grad_hooks)
    with pytest.raises(UnsupportedError, match="already belongs"):
        train(sf.PrivacyEngine(), model, shard(data, 0))
    assert len(model.weight._post_accumulate_grad_hooks) == hooks
    with pytest.raises(UnsupportedError, match="already belongs"):
        train(engine, nn.Sequential(model), shard(data, 0))
    train(engine, model, shard(data, 0))


@pytest.mark.parametrize("options", [{"dataset": ""}, {"dataset": 3}, {"group": ""}, {"group": b"x"}])
def test_bad_names(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigurationError):
        train(sf.PrivacyEngine(), nn.Linear(4, 3), records(), **options)


def test_a_record_that_a_subset_lists_twice_is_refused() -> None:
    data = records()
    for again in ([0, 1, 2, 0], [1, 5, -399]):
        with pytest.raises(UnsupportedError, match="2 times"):
            train(sf.PrivacyEngine(), nn.Linear(4, 3), Subset(data, again))
    twice = Subset(data, [*range(40), 0])
    train(sf.PrivacyEngine(), nn.Linear(4, 3), twice, privacy_unit=list(twice.indices))


def test_a_subset_changed_under_its_loader_is_refused() -> None:
    data, engine, model = records(), sf.PrivacyEngine(), nn.Linear(4, 3)
    subset = Subset(data, list(range(40)))
    loader = train(engine, model, subset)
    subset.indices[:] = range(40, 80)
    with pytest.raises(PrivacyError, match="other records"):
        next(iter(loader))


def test_a_list_and_a_table_of_the_same_tensors_are_two_data_sets() -> None:
    x = torch.randn(40, 40, 4)
    engine, model = sf.PrivacyEngine(), nn.Sequential(nn.Flatten(), nn.LazyLinear(1))
    model(x[:1])
    for data in (TensorDataset(x, x), [x, x]):
        engine.make_private(
            module=model,
            optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
            data_loader=DataLoader(data, batch_size=1),
            noise_multiplier=1.0,
            max_grad_norm=1.0,
        )
    scopes = [s.charging.scope.dataset for s in engine._sessions]
    engine.make_private(
        module=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
        data_loader=DataLoader(TensorDataset(x, x), batch_size=1),
        noise_multiplier=1.0,
        max_grad_norm=1.0,
    )
    assert scopes[0] != engine._session.charging.scope.dataset


class Gan(nn.Module):
    """Both players in one module."""

    def __init__(self) -> None:
        super().__init__()
        self.generator, self.critic = nn.Linear(2, 4), nn.Linear(4, 1)

    def forward(self, x: Tensor, z: Tensor) -> Tensor:
        return self.critic(x) - self.critic(self.generator(z))


def test_one_engine_with_several_optimizers() -> None:
    data, engine, model = records(), sf.PrivacyEngine(), Gan()
    built = [torch.optim.Adam(model.generator.parameters()), torch.optim.SGD(model.critic.parameters(), lr=0.1)]
    _, optimizers, loader = engine.make_private(
        module=model,
        optimizer=built,
        data_loader=DataLoader(data, batch_size=20),
        noise_multiplier=1.0,
        max_grad_norm=1.0,
    )
    assert optimizers is built
    before = [p.clone() for p in model.parameters()]
    for x, _ in loader:
        for optimizer in optimizers:
            optimizer.zero_grad()
        model(x, torch.randn(len(x), 2)).mean().backward()
        for optimizer in optimizers:
            optimizer.step()
    assert all(not torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    assert engine.ledger.verify() == len(loader)


def test_a_generator_learns_through_a_private_critic_without_a_charge() -> None:
    data, engine = records(), sf.PrivacyEngine()
    generator, critic = nn.Linear(2, 4), nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 1))
    fake_optimizer = torch.optim.Adam(generator.parameters())
    critic, optimizer, loader = engine.make_private(
        module=critic,
        optimizer=torch.optim.Adam(critic.parameters()),
        data_loader=DataLoader(data, batch_size=20),
        noise_multiplier=1.0,
        max_grad_norm=1.0,
    )
    start = generator.weight.clone()
    for x, _ in loader:
        optimizer.zero_grad()
        fake = generator(torch.randn(len(x), 2)).detach()
        (F.softplus(-critic(x)) + F.softplus(critic(fake))).mean().backward()
        optimizer.step()
        critic.requires_grad_(False)
        fake_optimizer.zero_grad()
        F.softplus(-critic(generator(torch.randn(16, 2)))).mean().backward()
        fake_optimizer.step()
        critic.requires_grad_(True)
    assert engine.steps == len(loader) == engine.ledger.verify()
    assert not torch.equal(start, generator.weight)


def test_two_private_models_side_by_side_share_the_ledger() -> None:
    data, engine = records(), sf.PrivacyEngine()
    models = [nn.Linear(4, 3), nn.Linear(4, 3)]
    made = [
        engine.make_private(
            module=m,
            optimizer=torch.optim.SGD(m.parameters(), lr=0.1),
            data_loader=DataLoader(data, batch_size=20),
            noise_multiplier=1.0,
            max_grad_norm=1.0,
        )
        for m in models
    ]
    for batches in zip(*(loader for _, _, loader in made), strict=True):
        for (model, optimizer, _), (x, y) in zip(made, batches, strict=True):
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
    assert engine.ledger.verify() == 40
    alone = sf.accounting.epsilon(noise_multiplier=1.0, sample_rate=0.05, steps=40, delta=DELTA)
    assert engine.get_epsilon(DELTA) == pytest.approx(alone)


@pytest.mark.parametrize("part", ["whole", "first layer"])
def test_an_empty_draw_moves_what_is_frozen_between_its_steps(part: str) -> None:
    """Else the number of moves would tell which draws were empty."""
    engine, critic = sf.PrivacyEngine(), nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 1))
    toggled = critic if part == "whole" else critic[0]
    critic, optimizer, loader = engine.make_private(
        module=critic,
        optimizer=torch.optim.SGD(critic.parameters(), lr=0.1),
        data_loader=DataLoader(TensorDataset(torch.randn(3, 4)), batch_size=1),
        noise_multiplier=1.0,
        max_grad_norm=1.0,
    )
    generator = nn.Linear(2, 4)
    steps, empty, before = 0, 0, critic[0].weight.clone()
    for epoch in range(100):  # some 40 draws of nobody in the middle of an epoch
        for i, (x,) in enumerate(loader):
            if engine.steps > steps and (i or part == "whole" or not epoch):
                assert not torch.equal(before, critic[0].weight)
                empty += 1
            toggled.requires_grad_(True)
            optimizer.zero_grad()
            critic(x).mean().backward()
            optimizer.step()
            toggled.requires_grad_(False)
            if part == "whole":
                critic(generator(torch.randn(5, 2))).mean().backward()
            before, steps = critic[0].weight.clone(), engine.steps
    assert engine.steps == 300
    assert empty


def test_freezing_between_epochs_counts_for_an_empty_first_draw() -> None:
    model, engine = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 1)), sf.PrivacyEngine()
    model, optimizer, loader = engine.make_private(
        module=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
        data_loader=DataLoader(TensorDataset(torch.randn(3, 4)), batch_size=1),
        noise_multiplier=1.0,
        max_grad_norm=1.0,
    )
    for epoch in range(20):
        if epoch == 5:
            model[0].requires_grad_(False)
            frozen = model[0].weight.clone()
        for (x,) in loader:
            optimizer.zero_grad()
            model(x).mean().backward()
            optimizer.step()
    assert torch.equal(frozen, model[0].weight)
