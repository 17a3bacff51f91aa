"""Who is drawn, how often, and whether the ledger says so."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from scipy import stats
from tests.statistical.checks import ALPHA, check_rate
from tests.step.harness import World, data, loss, mlp, train, world

import sfumato as sf

N = 300


def draws(w: World, epochs: int) -> Iterator[set[int]]:
    """The records of each non-empty logical batch, read off what the loop is given."""
    for _ in range(epochs):
        batch: set[int] = set()
        for x, _ in w.loader:
            found = set(x[:, 0].long().tolist())
            assert not batch & found, "a record twice in one logical batch"
            batch |= found
            token = w.engine._session._token
            if token is not None and token.last:
                yield batch
                batch = set()


def numbered(n: int = N) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.arange(n).float().unsqueeze(1).expand(n, 5), torch.zeros(n, dtype=torch.long)


@pytest.mark.parametrize("noise", ["secure", "research"])
@pytest.mark.parametrize(("batch", "physical"), [(15, None), (15, 4)])
def test_inclusion_rate(noise: str, batch: int, physical: int | None) -> None:
    w = world(tensors=numbered(), batch_size=batch, noise=noise, max_physical_batch_size=physical)
    epochs = 60
    total, q = epochs * len(w.loader), w.engine.plan.sample_rate
    taken = np.zeros((total, N), bool)
    for k, batch_of in enumerate(draws(w, epochs)):
        taken[k, list(batch_of)] = True
    assert q == batch / N
    check_rate(int(taken.sum()), total * N, q)
    sizes = taken.sum(1)
    spread = sizes.var() / (N * q * (1 - q)) * total
    assert stats.chi2.ppf(ALPHA / 2, total - 1) <= spread <= stats.chi2.isf(ALPHA / 2, total - 1)
    for record in range(N):
        assert stats.binomtest(int(taken[:, record].sum()), total, q).pvalue >= ALPHA / N
    check_rate(int((taken[1:] & taken[:-1]).sum()), (total - 1) * N, q * q)  # steps are independent
    check_rate(int((taken[:, 1:] & taken[:, :-1]).sum()), total * (N - 1), q * q)  # and records


def test_explicit_rate() -> None:
    w = world(tensors=numbered(), batch_size=5, sampling=sf.Poisson(0.2))
    sizes = [len(b) for b in draws(w, 60)]
    check_rate(sum(sizes), len(sizes) * N, 0.2)
    assert w.engine.plan.event.sample_rate == 0.2
    assert w.engine.plan.expected_batch_size == 60


def test_shuffle_takes_everybody_once_an_epoch() -> None:
    w = world(tensors=numbered(), batch_size=32, sampling=sf.Shuffle(), max_physical_batch_size=10)
    orders = []
    for _ in range(3):
        epoch = list(draws(w, 1))
        assert [len(b) for b in epoch] == [32] * 9 + [12]
        assert set().union(*epoch) == set(range(N))
        orders.append(epoch)
    assert orders[0] != orders[1]


def test_epsilon_is_the_accounting_of_what_was_released() -> None:
    w = world(tensors=data(60), batch_size=4, noise_multiplier=1.2)
    train(w, 2)
    for x, y in w.loader:
        loss(w.model, x, y).backward()  # released and thrown away
        w.optimizer.zero_grad()
        break
    steps = w.engine.steps
    assert steps >= 31
    expected = sf.accounting.epsilon(noise_multiplier=1.2, sample_rate=4 / 60, steps=steps, delta=1e-5)
    assert float(w.engine.get_epsilon(delta=1e-5)) == pytest.approx(float(expected), rel=1e-9)
    w.engine.detach()
    again = world(w.model, data(60), engine=w.engine, batch_size=6, noise_multiplier=2.0)
    train(again)
    event = sf.Event("poisson-gaussian", 1.2, 4 / 60, "add-remove", sampler="poisson")
    other = sf.Event("poisson-gaussian", 2.0, 6 / 60, "add-remove", sampler="poisson")
    both = sf.accounting.compose({event: steps, other: len(again.loader)}, delta=1e-5)
    assert float(again.engine.get_epsilon(delta=1e-5)) == pytest.approx(float(both), rel=1e-9)


def test_epsilon_without_noise_is_infinite() -> None:
    w = world(noise_multiplier=0.0)
    assert float(w.engine.get_epsilon(delta=1e-5)) == 0.0
    train(w)
    assert float(w.engine.get_epsilon(delta=1e-5)) == float("inf")


@pytest.mark.parametrize("physical", [None, 2])
def test_the_budget_ends_the_loader_before_the_step_that_would_exceed_it(physical: int | None) -> None:
    limit = sf.Budget(epsilon=4.0, delta=1e-5)
    w = world(tensors=data(40), batch_size=4, noise_multiplier=0.9, budget=limit, max_physical_batch_size=physical)
    for _ in range(100):
        train(w)
        if w.engine.stopped:
            break
    assert w.engine.stopped
    event = w.engine.plan.event
    assert (
        float(w.engine.get_epsilon(delta=1e-5))
        <= 4.0
        < float(sf.accounting.compose({event: w.engine.steps + 1}, delta=1e-5))
    )
    before = w.engine.steps
    train(w)
    assert w.engine.steps == before


def test_target_epsilon_is_reached_from_below_and_counts_what_was_spent() -> None:
    ledger = sf.Ledger()
    for target, spent in ((2.0, 0.0), (3.0, 1.8)):
        model, engine = mlp(), sf.PrivacyEngine(ledger=ledger)
        base = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(*data(60)), batch_size=6)
        model, optimizer, loader = engine.make_private_with_epsilon(
            module=model,
            optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
            data_loader=base,
            target_epsilon=target,
            target_delta=1e-5,
            epochs=3,
            max_grad_norm=1.0,
        )
        assert float(ledger.epsilon(delta=1e-5)) >= spent
        for _ in range(3):
            for x, y in loader:
                optimizer.zero_grad()
                loss(model, x, y).backward()
                optimizer.step()
        assert engine.steps == 30
        assert target * 0.98 <= float(ledger.epsilon(delta=1e-5)) <= target
        engine.detach()
