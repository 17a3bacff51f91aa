"""Nothing un-noised becomes visible and nothing is released unpaid, whatever is done to model, optimizer or loader."""

from __future__ import annotations

import copy
import threading
from typing import Any

import pytest
import torch
from tests.step.harness import World, data, loss, mlp, norm, released, train, world
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F
from torch.overrides import _get_current_function_mode_stack
from torch.utils.data import DataLoader, TensorDataset

import sfumato as sf

C = 1e-3  # far below any gradient here: what is visible and larger was not clipped


def bounded(w: World) -> bool:
    """Every visible gradient is a clipped sum: at most C for each record drawn."""
    records = w.engine.last_step.batch_size
    return norm(w.grads) * w.engine.plan.expected_batch_size <= records * C * (1 + 1e-5)


def clipped_world(model: nn.Module | None = None, **options: Any) -> World:
    return world(model, everybody=True, noise_multiplier=0.0, max_grad_norm=C, **options)


def one_batch(w: World, step: Any) -> None:
    for x, y in w.loader:
        step(x, y)
        break


def _regularised(w: World, p: Tensor, x: Tensor, y: Tensor) -> None:
    (loss(w.model, x, y) + 100 * p.square().sum()).backward()
    w.optimizer.step()


def test_parameter_unfrozen_inside_the_loop_is_guarded_at_once() -> None:
    model = mlp()
    model[0].weight.requires_grad_(False)
    w = clipped_world(model)

    def step(x: Tensor, y: Tensor) -> None:
        model[0].weight.requires_grad_(True)
        _regularised(w, model[0].weight, x, y)

    with pytest.raises(sf.SfumatoError):
        one_batch(w, step)
    assert not w.grads


def test_parameter_replaced_inside_the_loop_is_guarded_at_once() -> None:
    w = clipped_world()

    def step(x: Tensor, y: Tensor) -> None:
        w.model[2].weight = nn.Parameter(torch.randn(3, 8))
        w.optimizer.add_param_group({"params": [w.model[2].weight]})
        _regularised(w, w.model[2].weight, x, y)

    with pytest.raises(sf.SfumatoError):
        one_batch(w, step)
    assert bounded(w)


def test_head_added_inside_the_loop_and_called_directly_is_not_trained_unclipped() -> None:
    w = clipped_world()
    before: list[Tensor] = []

    def step(x: Tensor, y: Tensor) -> None:
        head = nn.Linear(5, 3)
        before.append(head.weight.detach().clone())
        w.model.add_module("head", head)
        w.optimizer.add_param_group({"params": head.parameters()})
        F.cross_entropy(head(x), y).backward()
        w.optimizer.step()

    with pytest.raises(sf.SfumatoError):
        one_batch(w, step)
    assert torch.equal(w.model.head.weight, before[0])


def test_head_added_between_epochs_is_private() -> None:
    w = clipped_world()
    released(w)
    w.model.zero_grad()
    w.model.add_module("head", nn.Linear(3, 3))
    w.optimizer.add_param_group({"params": w.model.head.parameters()})
    released(w)
    assert set(w.grads) == {n for n, _ in w.model.named_parameters()}
    assert bounded(w)


@pytest.mark.parametrize("how", ["add_param_group", "append"])
def test_foreign_parameters_added_to_the_optimizer_are_refused_at_the_step(how: str) -> None:
    w, other = clipped_world(), nn.Linear(3, 3)
    if how == "append":
        w.optimizer.param_groups[0]["params"].extend(other.parameters())
    before = other.weight.detach().clone()

    def step(x: Tensor, y: Tensor) -> None:
        if how == "add_param_group":
            w.optimizer.add_param_group({"params": other.parameters()})
        F.cross_entropy(other(w.model(x)), y).backward()
        w.optimizer.step()

    with pytest.raises(sf.SfumatoError):
        one_batch(w, step)
    assert torch.equal(other.weight, before)


def test_own_parameters_may_get_a_group_of_their_own_later() -> None:
    w = world(optimizer=lambda _: torch.optim.SGD(list(mine[0].parameters()), lr=0.1), model=(mine := mlp()))
    w.optimizer.add_param_group({"params": mine[2].parameters(), "lr": 0.01})
    train(w)
    assert w.engine.steps == w.charges == len(w.loader)


def test_loader_of_a_detached_engine_is_dead() -> None:
    w = world(tensors=data(2), batch_size=1, noise_multiplier=50.0)
    w.engine.detach()
    before = [p.detach().clone() for p in w.model.parameters()]
    with pytest.raises(sf.SfumatoError):
        [list(w.loader) for _ in range(30)]
    assert all(torch.equal(a, b) for a, b in zip(before, w.model.parameters(), strict=True))
    assert w.charges == 0
    assert not any(p._post_accumulate_grad_hooks for p in w.model.parameters())
    loss(w.model, *data(4)).backward()  # plain again


def test_detach_in_the_middle_of_a_loop_ends_it() -> None:
    w = world(tensors=data(40), batch_size=10)
    iterator = iter(w.loader)
    next(iterator)
    w.engine.detach()
    with pytest.raises((sf.SfumatoError, StopIteration)):
        next(iterator)
    assert not any(p._post_accumulate_grad_hooks for p in w.model.parameters())
    loss(w.model, *data(4)).backward()


def test_detach_between_forward_and_backward_leaves_no_raw_gradient() -> None:
    """The graph of before still belongs to the private training."""
    w = clipped_world()
    with pytest.raises(sf.SfumatoError):
        one_batch(w, lambda x, y: (value := loss(w.model, x, y), w.engine.detach(), value.backward()))
    assert not w.grads


@pytest.mark.parametrize("bad", ["nan", "threads"])
def test_spent_token_is_charged_once(bad: str) -> None:
    w = clipped_world()
    errors: list[BaseException] = []

    def backward(x: Tensor, y: Tensor) -> None:
        try:
            loss(w.model, x * (float("nan") if bad == "nan" else 1), y).backward()
        except sf.SfumatoError as error:
            errors.append(error)

    for x, y in w.loader:
        workers = [threading.Thread(target=backward, args=(x, y)) for _ in range(1 if bad == "nan" else 8)]
        for t in workers:
            t.start()
        for t in workers:
            t.join()
        break
    assert w.engine.steps == w.charges
    assert w.charges <= 1
    assert len(errors) == (0 if bad == "nan" else 7)
    assert bounded(w)


def test_two_engines_share_one_budget_without_exceeding_it() -> None:
    ledger, budget = sf.Ledger(), sf.Budget(epsilon=3.0, delta=1e-5)
    a = world(engine=sf.PrivacyEngine(ledger=ledger), budget=budget, batch_size=4)
    b = world(engine=sf.PrivacyEngine(ledger=ledger), budget=budget, batch_size=4)
    while not a.engine.stopped:
        other = iter(b.loader)
        for x, y in a.loader:
            loss(a.model, x, y).backward()
            for x2, y2 in other:
                loss(b.model, x2, y2).backward()
                break
    assert float(ledger.epsilon(delta=1e-5)) <= 3.0
    assert a.engine.steps + b.engine.steps == sum(ledger.events().values())


def test_two_loops_over_one_loader() -> None:
    """A stale iterator raises, and the live one keeps its own tokens: sizes, ends and charges stay its own."""
    w = world(tensors=data(30), batch_size=2, max_physical_batch_size=2, noise_multiplier=0.0)
    stale = iter(w.loader)
    next(stale)
    before = w.charges  # empty draws on the way to the first batch
    live = iter(w.loader)
    stepped = 0
    for x, y in live:
        with pytest.raises((sf.SfumatoError, StopIteration)):
            next(stale)
        loss(w.model, x, y).backward()
        stepped += 1
    assert w.engine.steps == w.charges == before + len(w.loader)
    assert stepped > 0


def test_next_of_iter_and_list_of_the_loader_release_nothing() -> None:
    w = clipped_world()
    x, y = next(iter(w.loader))
    with pytest.raises(sf.errors.PrivacyError):
        loss(w.model, x, y).backward()
    for x, y in list(w.loader):
        with pytest.raises(sf.errors.PrivacyError):
            loss(w.model, x, y).backward()
    assert w.charges == 0
    assert not w.grads


@pytest.mark.parametrize("leaf", [True, False])
def test_functional_call_leaks_nothing(leaf: bool) -> None:
    w = clipped_world()
    own = dict(w.model.named_parameters())
    swapped = {n: p.detach().clone().requires_grad_() if leaf else p * 1.0 for n, p in own.items()}

    def step(x: Tensor, y: Tensor) -> None:
        F.cross_entropy(functional_call(w.model, swapped, (x,)), y).backward()

    try:
        one_batch(w, step)
    except sf.SfumatoError:
        assert not w.grads
        return
    assert bounded(w)
    if leaf:
        assert norm({n: p.grad for n, p in swapped.items() if p.grad is not None}) <= 4.1 * C


def test_returned_parameter_is_guarded() -> None:
    class Returns(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(5, 3)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return self.linear(x), self.linear.weight * 2

    def penalised(m: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        logits, weight = m(x)
        return F.cross_entropy(logits, y) + weight.square().sum()

    w = clipped_world(Returns())
    with pytest.raises(sf.errors.PrivacyError):
        released(w, penalised)
    assert not w.grads


def test_backward_towards_chosen_inputs_releases_nothing() -> None:
    w = clipped_world()

    def step(x: Tensor, y: Tensor) -> None:
        x.requires_grad_()
        value = loss(w.model, x, y)
        value.backward(inputs=[x], retain_graph=True)
        assert not w.grads
        assert w.charges == 0
        value.backward()

    one_batch(w, step)
    assert w.charges == 1
    assert bounded(w)


def test_gradients_asked_of_autograd_directly_are_not_there() -> None:
    w = clipped_world()
    for x, y in w.loader:
        grads = torch.autograd.grad(loss(w.model, x, y), list(w.model.parameters()), allow_unused=True)
        assert all(g is None for g in grads)
        break


def test_state_carried_with_its_graph_releases_nothing_of_the_old_batch() -> None:
    w = clipped_world(max_physical_batch_size=8)
    carried: list[Tensor] = []
    for count, (x, y) in enumerate(w.loader):
        carried.append(loss(w.model, x, y))
        if count == 1:
            with pytest.raises((sf.SfumatoError, RuntimeError)):
                sum(carried[1:], carried[0]).backward()
            break
        carried[0].backward(retain_graph=True)
    assert not w.grads
    assert w.charges == w.engine.steps


def test_dtype_and_freezing_may_change_between_microbatches() -> None:
    w = clipped_world(max_physical_batch_size=7)
    for n, (x, y) in enumerate(w.loader):
        if n % 4 == 1:
            w.model.double()
        w.model[0].requires_grad_(n % 4 != 2)
        loss(w.model, x.to(w.model[0].weight.dtype), y).backward()
    assert w.charges == 4
    assert bounded(w)


def test_module_of_another_shape_between_microbatches_is_a_typed_error() -> None:
    w = clipped_world(max_physical_batch_size=7)
    for n, (x, y) in enumerate(w.loader):
        if n == 1:
            w.model[2] = nn.Linear(8, 4)
            with pytest.raises(sf.SfumatoError):
                loss(w.model, x, y).backward()
            break
        loss(w.model, x, y).backward()
    assert not w.grads


def test_weights_tied_later_are_clipped_together() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.head = nn.Embedding(7, 4), nn.Linear(4, 7, bias=False)

        def forward(self, ids: Tensor) -> Tensor:
            return self.head(self.embed(ids).mean(1))

    ids, y = torch.randint(0, 7, (12, 3)), torch.randint(0, 7, (12,))
    w = clipped_world(Tied(), tensors=(ids, y))
    w.model.head.weight = w.model.embed.weight
    released(w)
    assert set(w.grads) == {"embed.weight"}
    assert bounded(w)


def test_weights_loaded_in_the_middle_of_training() -> None:
    w = clipped_world()
    state = {k: v.clone() for k, v in w.model.state_dict().items()}
    released(w)
    w.model.load_state_dict(state)
    w.model.load_state_dict({k: v + 1 for k, v in state.items()}, assign=True)
    w.model.zero_grad()
    released(w)
    assert bounded(w)
    assert w.charges == 2


def test_shallow_copy_is_captured_and_then_plain() -> None:
    w = clipped_world()
    other = copy.copy(w.model)
    one_batch(w, lambda x, y: loss(other, x, y).backward())
    assert w.charges == 1
    assert bounded(w)
    w.engine.detach()
    w.model.zero_grad()
    loss(other, *data(8)).backward()
    assert norm(w.grads) > C


def test_two_private_models_in_one_loss() -> None:
    x, y = data(8)
    a = clipped_world(nn.Linear(5, 5), tensors=(x, y))
    b = clipped_world(nn.Sequential(nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 1)), tensors=(x, y))
    for (real, _), _ in zip(a.loader, b.loader, strict=True):
        b.model(a.model(real)).mean().backward()
        break
    assert (a.charges, b.charges) == (1, 1)
    assert bounded(a)
    assert bounded(b)


@pytest.mark.parametrize("inner", [True, False])
def test_a_model_inside_another_private_model_is_refused(inner: bool) -> None:
    model = mlp()
    outer, part = nn.Sequential(model), model[0]
    world(model)
    with pytest.raises(sf.errors.UnsupportedError):
        world(part if inner else outer)


def test_workers_that_persist_and_prefetch_keep_tokens_in_step() -> None:
    w = world(tensors=data(30), batch_size=3, max_physical_batch_size=2, workers=2)
    train(w)
    assert w.engine.steps == w.charges == len(w.loader)
    for count, (x, y) in enumerate(w.loader):
        loss(w.model, x, y).backward()
        if count == 2:
            break
    before = w.engine.steps
    train(w)
    assert w.engine.steps == w.charges == before + len(w.loader)
    assert not _get_current_function_mode_stack()


@pytest.mark.parametrize("skipped", ["continue", "error", "no backward", "every epoch"])
def test_shuffled_epoch_is_paid_by_its_first_release(skipped: str) -> None:
    """Not by its first batch, which may never be released."""
    w = world(sampling=sf.Shuffle())
    for _ in range(2 if skipped == "every epoch" else 1):
        for count, (x, y) in enumerate(w.loader):
            if count == 0 and skipped == "error":
                with pytest.raises(sf.errors.PrivacyError):
                    (loss(w.model, x, y) + w.model[0].weight.sum()).backward()
                continue
            if count == 0:
                continue
            loss(w.model, x, y).backward()
    paid = {e.mechanism: c for e, c in w.engine.ledger.events().items()}
    assert paid["gaussian"] >= (2 if skipped == "every epoch" else 1)
    assert sum(paid.values()) == w.engine.steps


def test_shuffled_epochs_stop_at_the_budget() -> None:
    w = world(sampling=sf.Shuffle(), budget=sf.Budget(epsilon=8.0, delta=1e-5))
    for _ in range(20):
        for count, (x, y) in enumerate(w.loader):
            if count:
                loss(w.model, x, y).backward()
    assert w.engine.stopped
    assert 0 < float(w.engine.get_epsilon(delta=1e-5)) <= 8.0


def test_sparse_adam_is_refused_by_name() -> None:
    with pytest.raises(sf.errors.UnsupportedError, match="SparseAdam"):
        world(optimizer=lambda p: torch.optim.SparseAdam(list(p)))


def test_a_loader_of_another_engine_pays_for_nothing() -> None:
    x, y = data(8)
    a, b = clipped_world(tensors=(x, y)), clipped_world(tensors=(x, y))
    for xs, ys in b.loader:
        with pytest.raises(sf.errors.PrivacyError):
            loss(a.model, xs, ys).backward()
        break
    assert a.charges == 0
    assert not a.grads


def test_plain_loader_inside_the_private_loop() -> None:
    w, plain = clipped_world(), DataLoader(TensorDataset(*data(50)), batch_size=50)
    with pytest.raises(sf.errors.RowsMismatch):
        one_batch(w, lambda *_: [loss(w.model, x, y).backward() for x, y in plain])
    assert w.charges == 0
