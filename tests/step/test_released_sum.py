"""What is released under noise is the clipped sum plus the noise, and nothing else."""

import importlib

import pytest
import torch
from tests.step.harness import data
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import sfumato as sf
from sfumato.session import Token


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("physical", [None, 3])
def test_release_is_the_clipped_sum_plus_little_noise(physical: int | None, dtype: torch.dtype) -> None:
    x, y = data(12)
    x = x.to(dtype)
    model = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3)).to(dtype)
    with sf.record(model) as tape:
        F.cross_entropy(model(x), y).backward()
    want = {n: g / 12 for n, g in tape.clipped_sum(0.5).items()}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    engine = sf.PrivacyEngine()
    _, _, loader = engine.make_private(
        module=model,
        optimizer=optimizer,
        data_loader=DataLoader(TensorDataset(x, y), batch_size=12),
        noise_multiplier=1e-6,
        max_grad_norm=0.5,
        sampling=sf.Poisson(1.0),
        max_physical_batch_size=physical,
    )
    for a, b in loader:
        optimizer.zero_grad()
        F.cross_entropy(model(a), b).backward()
    for name, p in model.named_parameters():
        assert p.grad is not None
        torch.testing.assert_close(p.grad, want[name], rtol=0, atol=1e-6)
        assert not torch.equal(p.grad, want[name])


class _RuleLess(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.u, self.v = nn.Parameter(torch.randn(5, 5)), nn.Parameter(torch.randn(5, 5))

    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(torch.linalg.multi_dot([x, self.u, self.v]), 0.5, self.training)


def test_dropout_on_the_vmap_tier_draws_a_mask_for_each_record() -> None:
    torch.manual_seed(0)
    model = _RuleLess()
    x = torch.randn(1, 5).expand(6, 5).clone()
    with sf.record(model) as tape:
        model(x).square().sum(1).mean().backward()
    assert set(tape.tiers.values()) == {"vmap"}
    assert tape.sq_norms().unique().numel() > 1


def test_loss_scale_that_changes_within_a_logical_batch_keeps_the_bound() -> None:
    x, y = data(12)
    x = x * 100
    model = nn.Linear(5, 3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    _, _, loader = sf.PrivacyEngine().make_private(
        module=model,
        optimizer=optimizer,
        data_loader=DataLoader(TensorDataset(x, y), batch_size=12),
        noise_multiplier=0.0,
        max_grad_norm=0.01,
        sampling=sf.Poisson(1.0),
        max_physical_batch_size=6,
        grad_scaler=scaler,
    )
    for a, b in loader:
        scaler.scale(F.cross_entropy(model(a), b)).backward()
        if model.weight.grad is None:
            scaler.update(1.0)  # from 1024 to 1 between two microbatches
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    assert torch.cat([g.flatten() for g in grads]).norm() <= 0.01 * (1 + 1e-6)


def _two_records(**options: object) -> tuple[nn.Linear, sf.PrivacyEngine, DataLoader]:
    x, y = data(2)
    model = nn.Linear(5, 3)
    engine = sf.PrivacyEngine()
    _, _, loader = engine.make_private(
        module=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
        data_loader=DataLoader(TensorDataset(x, y), batch_size=2),
        noise_multiplier=1.0,
        max_grad_norm=1.0,
        **options,
    )
    return model, engine, loader


def test_failure_while_summing_a_microbatch_discards_the_logical_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    model, engine, loader = _two_records(sampling=sf.Poisson(1.0), max_physical_batch_size=1)
    step = importlib.import_module("sfumato.session.step")
    whole, calls = step.clipped, iter([True])

    def once(*args: object, **options: object) -> object:
        if next(calls, False):
            raise RuntimeError("out of memory")
        return whole(*args, **options)

    monkeypatch.setattr(step, "clipped", once)
    errors = []
    for a, b in loader:
        try:
            F.cross_entropy(model(a), b).backward()
        except (RuntimeError, sf.SfumatoError) as error:
            errors.append(type(error))
    assert errors == [RuntimeError, sf.errors.PrivacyError]
    assert engine.steps == 0
    assert all(p.grad is None for p in model.parameters())


def test_empty_draw_before_the_scaler_was_used() -> None:
    scaler = torch.amp.GradScaler("cpu")
    _, engine, loader = _two_records(sampling=sf.Poisson(1e-9), grad_scaler=scaler)
    iterator = iter(loader)
    loader._session.empty(Token(0, first=True, last=True))
    assert engine.steps == 1
    del iterator
