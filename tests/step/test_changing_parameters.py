"""Training that changes which parameters are trainable, or what they are: right for that step, or refused.

Right means: the release covers exactly the parameters that were trainable at the last forward, each record is clipped
by one norm over all parameters that were trainable at its own microbatch, and event and noise multiplier stay.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from tests.oracle.oracle import clipped_sums, microbatch_of_one
from tests.step.harness import World, data, loss, mlp, norm, released, train, world
from torch import Tensor, nn
from torch.nn import functional as F

import sfumato as sf

N, C = 24, 0.05  # C lies below every gradient here, so that every record is clipped

Sums = dict[str, Tensor]


def clipped_world(model: nn.Module | None = None, **options: Any) -> World:
    return world(model, **{"everybody": True, "noise_multiplier": 0.0, "max_grad_norm": C, **options})


def oracle(model: nn.Module, x: Tensor, y: Tensor) -> Sums:
    """The clipped sum of the parameters that are trainable now, by a loop over the records."""

    def one(pair: tuple[Tensor, Tensor]) -> Tensor:
        return F.cross_entropy(*pair, reduction="none")

    class WithLoss(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.m = plain(model).double()

        def forward(self, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
            return self.m(a), b

    grads = microbatch_of_one(WithLoss(), (x.double(), y), one)
    return {n.removeprefix("m."): g for n, g in clipped_sums(grads, C).items()}


def plain(model: nn.Module) -> nn.Module:
    return copy.deepcopy(model)


def sums(w: World) -> Sums:
    return {n: g.double() * w.engine.plan.expected_batch_size for n, g in w.grads.items()}


def same(got: Sums, want: Sums, tol: float = 1e-5) -> None:
    assert got.keys() == want.keys()
    for name, total in want.items():
        torch.testing.assert_close(got[name].double(), total.double(), rtol=0, atol=tol, msg=lambda m: f"{name}: {m}")  # noqa: B023


def step(w: World) -> tuple[Sums, Sums]:
    """(what one whole step released, what the oracle says)."""
    w.optimizer.zero_grad()
    x, y = w.loader.dataset.tensors
    want = oracle(w.model, x, y)
    before = w.engine.steps
    for a, b in w.loader:
        loss(w.model, a, b).backward()
        w.optimizer.step()
        if w.engine.steps > before:
            break
    return sums(w), want


def one_event(w: World) -> Any:
    (event,) = w.engine.ledger.events()
    return event


# ------------------------------------------------------------------------------------------------- freeze and unfreeze


def test_gradual_unfreezing_releases_the_trainable_parameters_of_each_step() -> None:
    model = mlp()
    model[0].requires_grad_(False)
    w = clipped_world(model)
    for thaw in (None, "0.bias", "0.weight"):
        if thaw is not None:
            model.get_parameter(thaw).requires_grad_(True)
        got, want = step(w)
        assert set(got) == {n for n, p in model.named_parameters() if p.requires_grad}
        same(got, want)
    assert w.charges == 3
    assert (one_event(w).noise_multiplier, one_event(w).sample_rate) == (0.0, w.engine.plan.sample_rate)


def test_freezing_layer_by_layer() -> None:
    w = clipped_world()
    for frozen in ([], ["0.weight"], ["0.weight", "0.bias", "2.bias"]):
        for name, p in w.model.named_parameters():
            p.requires_grad_(name not in frozen)
        before = {n: p.detach().clone() for n, p in w.model.named_parameters()}
        same(*step(w))
        for name, p in w.model.named_parameters():
            assert torch.equal(p, before[name]) == (name in frozen)


@pytest.mark.parametrize("frozen", [[], ["0.weight", "0.bias"], ["2.weight"]])
def test_noise_covers_exactly_the_trainable_parameters(frozen: list[str]) -> None:
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(20, 300), nn.ReLU(), nn.Linear(300, 40))
    w = world(model, (torch.randn(N, 20), torch.randint(0, 40, (N,))), everybody=True, noise_multiplier=3.0)
    for name in frozen:
        model.get_parameter(name).requires_grad_(False)
    released(w)
    assert set(w.grads) == {n for n, _ in model.named_parameters()} - set(frozen)
    for name, g in sums(w).items():
        if g.numel() > 1000:
            assert abs(float(g.std()) / 3.0 - 1) < 0.1, name  # records add at most 1 each, spread over thousands
    assert one_event(w).noise_multiplier == 3.0


def test_momentum_and_weight_decay_leave_a_frozen_parameter_alone() -> None:
    w = clipped_world(optimizer=lambda p: torch.optim.AdamW(p, lr=0.1, weight_decay=0.1))
    step(w)
    w.model[0].requires_grad_(False)
    before = [p.detach().clone() for p in w.model[0].parameters()]
    step(w)
    assert all(torch.equal(a, b) for a, b in zip(before, w.model[0].parameters(), strict=True))


@pytest.mark.parametrize("how", ["zeros", "kept"])
def test_a_gradient_that_was_released_before_freezing_is_no_violation(how: str) -> None:
    """``zero_grad(set_to_none=False)``, or a loop that only clears what is trainable: as in plain PyTorch."""
    w = clipped_world()
    for k in range(3):
        w.model[0].requires_grad_(k != 1)
        for x, y in w.loader:
            if how == "zeros":
                w.optimizer.zero_grad(set_to_none=False)
            for p in w.model.parameters():
                p.grad = p.grad if how == "zeros" or not p.requires_grad else None
            loss(w.model, x, y).backward()
            w.optimizer.step()
    assert w.charges == 3 * len(w.loader)


def test_frozen_all_the_way_trains_nothing() -> None:
    w = clipped_world()
    w.model.requires_grad_(False)
    for x, y in w.loader:
        with pytest.raises(RuntimeError, match="does not require grad"):
            loss(w.model, x, y).backward()
        break
    assert w.charges == 0


# --------------------------------------------------------------------------------------------------- within one step


def test_toggling_between_forward_and_backward_takes_effect_at_the_next_forward() -> None:
    w = clipped_world()
    w.model[0].weight.requires_grad_(False)
    want = oracle(w.model, *w.loader.dataset.tensors)
    for x, y in w.loader:
        value = loss(w.model, x, y)
        w.model[0].weight.requires_grad_(True)
        w.model[2].bias.requires_grad_(False)
        value.backward()
        break
    same(sums(w), want)


def test_freezing_inside_the_backward() -> None:
    w = clipped_world()
    want = oracle(w.model, *w.loader.dataset.tensors)
    for x, y in w.loader:
        value = loss(w.model, x, y)
        value.register_hook(lambda g: (w.model.requires_grad_(False), g)[1])
        value.backward()
        break
    same(sums(w), want)


@pytest.mark.parametrize("inside", [False, True])
def test_a_parameter_thawed_after_the_forward_cannot_be_trained_behind_the_guard(inside: bool) -> None:
    """Once its raw gradient stayed in ``p.grad``, and the next release was added to it."""
    model = mlp()
    model[0].weight.requires_grad_(False)
    w = clipped_world(model)
    for x, y in w.loader:
        value = loss(model, x, y)
        if inside:
            value.register_hook(lambda g: (model[0].weight.requires_grad_(True), g)[1])
        else:
            model[0].weight.requires_grad_(True)
            value = value + (model[0].weight * x.mean()).sum()
        if inside:
            value.backward()
        else:
            with pytest.raises(sf.errors.UnclippedGradient):
                value.backward()
        break
    assert (model[0].weight.grad is None) or not inside
    assert not w.grads if not inside else norm(sums(w)) <= N * C
    same(*step(w))


def test_a_gradient_written_while_nobody_watched_is_dropped() -> None:
    model = mlp()
    model[0].weight.requires_grad_(False)
    w = clipped_world(model)
    for x, _ in w.loader:
        model[0].weight.requires_grad_(True)
        (model[0].weight * x.mean()).sum().backward()  # no forward of the model: no tape, and not yet watched
        with pytest.raises(sf.errors.UnsupportedError, match="frozen or unknown"):
            w.optimizer.step()
        break
    x, y = w.loader.dataset.tensors
    want = oracle(model, x, y)
    same(released(w), want)  # without zero_grad()


@pytest.mark.parametrize("pattern", [(1, 0, 1), (0, 1, 1), (1, 1, 0), (0, 0, 1)])
def test_toggling_between_microbatches_clips_each_record_by_what_was_trainable_for_it(pattern: tuple[int, ...]) -> None:
    w = clipped_world(max_physical_batch_size=8)
    want: dict[str, Any] = {}
    for trainable, (x, y) in zip(pattern, w.loader, strict=False):
        w.model[0].requires_grad_(bool(trainable))
        for name, total in oracle(w.model, x, y).items():
            want[name] = want.get(name, 0) + total
        loss(w.model, x, y).backward()
    if not pattern[-1]:
        want = {n: t for n, t in want.items() if n.startswith("2.")}
    same(sums(w), want)
    assert w.charges == 1


def test_one_record_moves_a_batch_with_toggles_by_no_more_than_the_bound() -> None:
    x, y = data(N)

    def total(drawn: list[int]) -> Sums:
        torch.manual_seed(5)
        w = world(mlp(), (x, y), indices=drawn, noise_multiplier=0.0, max_grad_norm=C, max_physical_batch_size=8)
        for k, (a, b) in enumerate(w.loader):
            w.model[0].requires_grad_(k % 2 == 0)
            loss(w.model, a, b).backward()
            if w.engine.steps:
                break
        return sums(w)

    everybody = total(list(range(N)))
    # From the last microbatch, so that the others keep their places: those are another matter, of the draw alone.
    for gone in range(16, N):
        fewer = total([i for i in range(N) if i != gone])
        assert norm({n: everybody[n] - fewer[n] for n in everybody}) <= C * (1 + 1e-6)


def test_two_forwards_with_a_freeze_between_them() -> None:
    w = clipped_world()
    for x, y in w.loader:
        first = loss(w.model, x, y)
        w.model[0].requires_grad_(False)
        (first + loss(w.model, x, y)).backward()
        break
    assert set(w.grads) == {"2.weight", "2.bias"}
    assert 0 < norm(sums(w)) <= N * C


# -------------------------------------------------------------------------------------------- new and replaced modules


class Growing(nn.Module):
    """A body, and whatever heads were added since."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.heads = nn.Linear(5, 3), nn.ModuleList()

    def forward(self, x: Tensor) -> Tensor:
        h = self.body(x)
        for head in self.heads:
            h = h + head(torch.tanh(h))
        return h


def test_a_head_that_is_added_is_clipped_with_the_rest_and_trained() -> None:
    w = clipped_world(Growing())
    step(w)
    w.model.heads.append(nn.Linear(3, 3))
    w.optimizer.add_param_group({"params": w.model.heads.parameters(), "lr": 0.5})
    before = w.model.heads[0].weight.detach().clone()
    got, want = step(w)
    assert "heads.0.weight" in got
    same(got, want)
    torch.testing.assert_close(w.model.heads[0].weight, before - 0.5 * w.model.heads[0].weight.grad)


def test_a_new_parameter_that_the_optimizer_does_not_know_counts_and_stays() -> None:
    """Its gradient is released and nobody applies it: noise and norm are spent for nothing, the guarantee holds."""
    w = clipped_world(Growing())
    w.model.heads.append(nn.Linear(3, 3))
    before = w.model.heads[0].weight.detach().clone()
    same(*step(w))
    assert torch.equal(w.model.heads[0].weight, before)


class RuleLess(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.u, self.v = nn.Parameter(torch.randn(3, 3)), nn.Parameter(torch.randn(3, 3))

    def forward(self, x: Tensor) -> Tensor:
        return torch.linalg.multi_dot([x, self.u, self.v])


def test_a_new_module_runs_on_a_tier_of_its_own() -> None:
    """Without a door of its own it dragged the whole model down."""
    w = clipped_world(Growing())
    w.model.heads.append(RuleLess())
    w.optimizer.add_param_group({"params": w.model.heads.parameters()})
    same(*step(w), tol=1e-4)
    assert w.engine.tiers == {"body.weight": "rule", "body.bias": "rule", "heads.0.u": "vmap", "heads.0.v": "vmap"}
    w.model.heads[0] = nn.Linear(3, 3)
    w.optimizer.param_groups.pop()
    w.optimizer.add_param_group({"params": w.model.heads.parameters()})
    same(*step(w))
    assert w.engine.tiers["heads.0.weight"] == "rule"


def test_a_new_submodule_that_the_loop_calls_itself() -> None:
    w = clipped_world(Growing())
    w.model.heads.append(nn.Linear(3, 3))
    w.optimizer.add_param_group({"params": w.model.heads.parameters()})
    x, y = w.loader.dataset.tensors
    want = oracle(nn.Sequential(w.model.body, w.model.heads[0]), x, y)
    got = released(w, lambda m, a, b: F.cross_entropy(m.heads[0](m.body(a)), b))
    same({n.replace("body", "0").replace("heads.0", "1"): g for n, g in got.items()}, want)


def test_a_backward_hook_on_a_new_module_is_refused() -> None:
    """It mixed the gradients of the records unseen: the new module had no door."""
    w = clipped_world(Growing())
    head = nn.Linear(3, 3)
    head.register_full_backward_hook(lambda m, gi, go: (gi[0].sum(0).expand_as(gi[0]),))
    w.model.heads.append(head)
    with pytest.raises(sf.errors.UnsupportedError, match="backward hook"):
        released(w)
    assert w.charges == 0


def test_batch_statistics_in_a_new_module_are_refused_by_its_name() -> None:
    w = clipped_world(Growing())
    w.model.heads.append(nn.BatchNorm1d(3))
    with pytest.raises(sf.errors.CoupledRecords) as caught:
        released(w)
    assert caught.value.where == "heads.0"


def test_a_module_of_another_private_model_is_refused() -> None:
    w, other = clipped_world(Growing()), clipped_world(nn.Linear(3, 3))
    w.model.heads.append(other.model)
    with pytest.raises(sf.errors.UnsupportedError, match="already belongs"):
        released(w)
    assert not w.grads


def test_a_replaced_module_is_refused_until_the_optimizer_knows_it_and_the_remedy_works() -> None:
    w = clipped_world(Growing())
    step(w)
    w.model.body = nn.Linear(5, 3)
    with pytest.raises(sf.errors.UnsupportedError, match=r"no parameter of the private module.*detach"):
        step(w)
    w.engine.detach()
    w.model.zero_grad()
    again = clipped_world(w.model, engine=w.engine, tensors=w.loader.dataset.tensors)
    before, charges = again.model.body.weight.detach().clone(), again.charges
    same(*step(again))
    assert not torch.equal(again.model.body.weight, before)
    assert again.charges == charges + 1


def test_a_replaced_parameter_whose_group_was_exchanged_is_trained() -> None:
    w = clipped_world()
    w.model[2].weight = nn.Parameter(torch.randn(3, 8))
    w.optimizer.param_groups.clear()
    w.optimizer.add_param_group({"params": list(w.model.parameters()), "lr": 0.1})
    before = w.model[2].weight.detach().clone()
    same(*step(w))
    assert not torch.equal(w.model[2].weight, before)


def test_a_removed_module_is_plain_again() -> None:
    w = clipped_world()
    old = w.model[2]
    w.model[2] = nn.Linear(8, 3)
    for x, y in w.loader:
        loss(w.model, x, y).backward()
        old(torch.randn(4, 8)).sum().backward()  # within the loop: no door, no guard, no record
        break
    torch.testing.assert_close(old.bias.grad, torch.full((3,), 4.0))
    w.engine.detach()
    for module in (*w.model.modules(), old):
        assert "forward" not in vars(module)
        assert not any(p._post_accumulate_grad_hooks for p in module.parameters())


def test_a_shallow_copy_of_a_module_is_a_module_of_its_own() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear, self.scale = nn.Linear(3, 3), 1.0

        def forward(self, x: Tensor) -> Tensor:
            return self.linear(x) * self.scale

    model = Growing()
    model.heads.append(Scaled())
    w = clipped_world(model)
    twin = copy.copy(model.heads[0])  # the same parameters
    twin.scale = 3.0
    model.heads.append(twin)
    step(w)
    same(*step(w))
    x, _ = data(4, 3)
    torch.testing.assert_close(twin(x), 3 * model.heads[0](x))
    w.engine.detach()
    assert not any("forward" in vars(m) for m in model.modules())


def _same_shape(m: nn.Sequential) -> None:
    m[2] = nn.Linear(8, 3)


def _assigned(m: nn.Sequential) -> None:
    m.load_state_dict({k: v + 1 for k, v in m.state_dict().items()}, assign=True)


def _swapped(m: nn.Sequential) -> None:
    m[0], m[1] = m[1], m[0]
    m.insert(0, nn.Linear(5, 5))


@pytest.mark.parametrize("change", [_same_shape, _assigned, _swapped])
def test_replacing_between_microbatches_is_refused_whole(change: Callable[[nn.Sequential], None]) -> None:
    """The sums of the old parameter would have become the gradient of another one that has its name."""
    w = clipped_world(nn.Sequential(nn.Linear(5, 5), nn.Tanh(), nn.Linear(5, 3)) if change is _swapped else None,
                      max_physical_batch_size=8)  # fmt: skip
    errors = []
    for k, (x, y) in enumerate(w.loader):
        if k == 1:
            change(w.model)
        try:
            loss(w.model, x, y).backward()
        except sf.errors.PrivacyError as error:
            errors.append(error)
        if k == 2:  # the last of this logical batch
            assert w.charges == 0
            assert not w.grads
    assert [type(e) for e in errors] == [sf.errors.PrivacyError] * 2
    assert "replaced, tied or renamed" in str(errors[0])
    assert errors[0].fix == "change the model between logical batches only."
    assert w.charges == len(w.loader) - 1  # and the next batches are as ever


# ---------------------------------------------------------------------------------------------------- dtype and memory


@pytest.mark.parametrize(("dtype", "tol"), [(torch.float64, 1e-9), (torch.bfloat16, 5e-2)])
def test_a_model_that_changes_its_dtype_between_steps(dtype: torch.dtype, tol: float) -> None:
    w = clipped_world(loss_reduction="sum")

    def summed(m: nn.Module, a: Tensor, b: Tensor) -> Tensor:
        return F.cross_entropy(m(a.to(dtype)).double(), b, reduction="sum")

    for a, b in w.loader:
        F.cross_entropy(w.model(a), b, reduction="sum").backward()
        w.optimizer.step()
        break
    w.model.to(dtype)
    w.optimizer.zero_grad()
    x, y = w.loader.dataset.tensors
    want = oracle(w.model, x.to(dtype), y)
    got = released(w, summed)
    assert all(p.grad is not None and p.grad.dtype == dtype for p in w.model.parameters())
    same(got, want, tol)


def test_the_guard_survives_a_change_of_dtype() -> None:
    w = clipped_world()
    step(w)
    w.model.double()
    w.model.zero_grad()
    for x, y in w.loader:
        with pytest.raises(sf.errors.UnclippedGradient):
            (loss(w.model, x.double(), y) + w.model[0].weight.square().sum()).backward()
        break
    assert not w.grads


@contextmanager
def overwritten_on_conversion() -> Iterator[None]:
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    try:
        yield
    finally:
        torch.__future__.set_overwrite_module_params_on_conversion(False)


def test_a_conversion_that_makes_new_parameters_is_refused_at_the_step() -> None:
    w = clipped_world()
    with overwritten_on_conversion():
        w.model.double()
    for x, y in w.loader:
        loss(w.model, x.double(), y).backward()
        with pytest.raises(sf.errors.UnsupportedError, match="no parameter of the private module"):
            w.optimizer.step()
        break


# ------------------------------------------------------------------------------------------------------------- LoRA


def adapted() -> Any:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["0"], lora_dropout=0.0, init_lora_weights=False)
    return peft, peft.get_peft_model(mlp(), config)


def test_merging_and_unmerging_an_adapter_between_steps() -> None:
    _, model = adapted()
    w = clipped_world(model)
    same(*step(w))
    x, _ = data(4)
    with torch.no_grad():
        apart = model(x)
        model.merge_adapter()
        torch.testing.assert_close(model(x), apart)
        model.unmerge_adapter()
    got, want = step(w)
    same(got, want)
    assert all("lora" in name for name in got)


def test_an_adapter_that_is_added_to_a_private_model() -> None:
    peft = pytest.importorskip("peft")
    model = mlp()
    w = clipped_world(model)
    step(w)
    wrapped = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["2"], init_lora_weights=False))
    w.optimizer.add_param_group({"params": [p for p in wrapped.parameters() if p.requires_grad]})
    w.optimizer.zero_grad()
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    got, want = step(w)
    assert set(got) == {"2.lora_A.default.weight", "2.lora_B.default.weight"}
    same(got, want)
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name]) == ("lora" not in name)


def test_disabling_an_adapter_for_some_forwards() -> None:
    _, model = adapted()
    w = clipped_world(model)
    want = oracle(model, *w.loader.dataset.tensors)
    for x, y in w.loader:
        with model.disable_adapter(), torch.no_grad():
            reference = model(x)
        loss(model, x, y).backward()
        assert not torch.equal(reference, model(x))
        break
    same(sums(w), want)


def test_a_merged_and_unloaded_adapter_leaves_an_optimizer_that_is_refused() -> None:
    _, model = adapted()
    w = clipped_world(model)
    step(w)
    base = model.merge_and_unload()
    base.requires_grad_(True)
    with pytest.raises(sf.errors.UnsupportedError, match="no parameter of the private module"):
        step(w)


# ----------------------------------------------------------------------------------------------------------- optimizer


def test_another_optimizer_in_the_middle_of_training_applies_clipped_gradients_only() -> None:
    w = clipped_world()
    step(w)
    w.optimizer.zero_grad()
    w.optimizer = torch.optim.Adam(w.model.parameters())
    same(*step(w))


def test_training_with_changes_under_noise_goes_on_to_the_end_and_charges_every_step() -> None:
    w = world(tensors=data(40), batch_size=8, max_physical_batch_size=4)
    for k in range(4):
        w.model[0].requires_grad_(k % 2 == 0)
        train(w)
    assert w.charges == w.engine.steps == 4 * len(w.loader)
