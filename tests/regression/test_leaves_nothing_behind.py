"""The user's objects stay the user's: same identities, plain copies, nothing left on model, optimizer or mode stack."""

from __future__ import annotations

import copy
import gc
import io
import warnings
import weakref
from typing import Any

import pytest
import torch
from tests.step.harness import World, data, distance, loss, mlp, norm, released, train, world
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import _get_current_function_mode_stack
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, TensorDataset

import sfumato as sf

C = 1e-3


def footprint(model: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> dict[str, Any]:
    """Everything that an engine might leave on a model."""
    seen: dict[str, Any] = {"state": list(model.state_dict())}
    for name, m in model.named_modules():
        seen[name] = (type(m), {k: len(v) if isinstance(v, dict) else None for k, v in vars(m).items()})
    for name, p in model.named_parameters():
        hooks = (p._backward_hooks, getattr(p, "_post_accumulate_grad_hooks", None))
        seen["p:" + name] = (type(p), sorted(vars(p)), [len(h) if h else 0 for h in hooks], p.requires_grad)
    if optimizer is not None:
        seen["optimizer"] = {k: len(v) for k, v in vars(optimizer).items() if k.endswith("hooks")}
    return seen


def test_returned_objects_are_the_given_ones() -> None:
    model = mlp()
    optimizer = torch.optim.Adam(model.parameters())
    loader = DataLoader(TensorDataset(*data(8)), batch_size=2)
    types, step = [type(m) for m in model.modules()], torch.optim.Adam.step
    made = sf.PrivacyEngine().make_private(
        module=model, optimizer=optimizer, data_loader=loader, noise_multiplier=1.0, max_grad_norm=1.0
    )
    assert made[0] is model
    assert made[1] is optimizer
    assert isinstance(made[2], DataLoader)
    assert made[2].dataset is loader.dataset
    assert len(made[2]) == len(loader)
    assert [type(m) for m in model.modules()] == types
    assert type(optimizer) is torch.optim.Adam
    assert type(optimizer).step is step
    assert "step" not in vars(optimizer)


def test_parameters_and_state_dict_keys_are_unchanged() -> None:
    model = mlp()
    keys, attributes = list(model.state_dict()), [set(vars(p)) for p in model.parameters()]
    w = world(model)
    train(w)
    assert list(model.state_dict()) == keys
    assert [set(vars(p)) for p in model.parameters()] == attributes
    assert type(model[0].weight) is nn.Parameter


@pytest.mark.parametrize("how", ["detach", "with", "error", "twice"])
def test_detach_leaves_nothing_behind(how: str) -> None:
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    before = footprint(model, optimizer)
    engine = sf.PrivacyEngine()

    def use() -> None:
        *_, loader = engine.make_private(
            module=model,
            optimizer=optimizer,
            data_loader=DataLoader(TensorDataset(*data(24)), batch_size=6),
            noise_multiplier=1.0,
            max_grad_norm=1.0,
        )
        for x, y in loader:
            loss(model, x, y).backward()
            optimizer.step()
            optimizer.zero_grad()
            if how == "error":
                raise KeyError

    if how in ("with", "error"):
        try:
            with engine:
                use()
        except KeyError:
            assert how == "error"
    else:
        use()
        engine.detach()
        if how == "twice":
            engine.detach()
    model.zero_grad()
    assert footprint(model, optimizer) == before
    assert not _get_current_function_mode_stack()
    loss(model, *data(8)).backward()
    assert model[0].weight.grad is not None
    assert float(engine.get_epsilon(delta=1e-5)) > 0  # the ledger keeps what was spent


def test_forward_that_another_library_put_on_the_instance_comes_back() -> None:
    model = mlp()
    original = model[0].forward
    model[0].forward = mine = lambda x: original(x) * 2
    x, y = data(8)
    plain = model(x).detach().clone()
    w = world(model, (x, y), everybody=True, noise_multiplier=0.0, max_grad_norm=C)
    assert torch.equal(model(x), plain)
    assert torch.equal(copy.deepcopy(model)(x), plain)
    released(w)
    assert norm(w.grads) * w.engine.plan.expected_batch_size <= 8 * C
    w.engine.detach()
    assert model[0].forward is mine


@pytest.mark.parametrize("how", ["deepcopy", "torch.save", "deepcopy of a part", "deepcopy of a copy"])
def test_copies_are_plain(how: str) -> None:
    w = world(everybody=True, noise_multiplier=0.0, max_grad_norm=C)
    for x, y in w.loader:
        if how == "torch.save":
            stream = io.BytesIO()
            torch.save(w.model, stream)
            stream.seek(0)
            other = torch.load(stream, weights_only=False)
        elif how == "deepcopy of a part":
            other = nn.Sequential(*(copy.deepcopy(m) for m in w.model))
        else:
            other = copy.deepcopy(w.model)
            other = copy.deepcopy(other) if how == "deepcopy of a copy" else other
        loss(other, x, y).backward()
        assert norm({n: p.grad for n, p in other.named_parameters() if p.grad is not None}) > 10 * C
        assert not w.grads
        assert w.charges == 0
        assert not any(p._post_accumulate_grad_hooks for p in other.parameters())
        other(torch.randn(3, 5)).sum().backward()  # any number of rows
        loss(w.model, x, y).backward()
        assert norm(w.grads) <= len(x) * C
        break
    assert w.charges == 1


def test_copy_of_the_model_does_not_keep_the_engine_alive() -> None:
    w = world()
    train(w)
    other, session = copy.deepcopy(w.model), weakref.ref(w.engine._session)
    w.engine.detach()
    del w
    gc.collect()
    assert session() is None
    assert "_Forward" not in repr([vars(m).get("forward") for m in other.modules()])


def test_two_engines_on_one_model_are_refused() -> None:
    w = world()
    with pytest.raises(sf.errors.UnsupportedError, match="detach"):
        world(w.model)
    train(w)
    assert w.charges == w.engine.steps == len(w.loader)
    w.engine.detach()
    train(world(w.model, engine=w.engine))


def test_refused_arguments_change_nothing() -> None:
    model = mlp()
    before = footprint(model)
    for options in (
        {"noise_multiplier": -1.0},
        {"noise_multiplier": float("nan")},
        {"noise_multiplier": None},
        {"max_grad_norm": 0.0},
        {"max_grad_norm": float("inf")},
        {"clipping": "per_layer"},
        {"noise": "urandom"},
        {"sampling": "poisson"},
        {"loss_reduction": "none"},
        {"max_physical_batch_size": 0},
        {"max_physical_batch_size": 2.5},
        {"budget": 3.0},
        {"batch_dim": 0.5},
        {"batch_dim": -1},
        {"grad_scaler": 65536.0},
    ):
        with pytest.raises(sf.SfumatoError):
            world(model, **options)
        assert footprint(model) == before, options


def test_gradient_from_before_the_engine_is_wiped() -> None:
    model = mlp()
    loss(model, *data(8)).backward()
    w = world(model, everybody=True, noise_multiplier=0.0, max_grad_norm=C)
    assert not w.grads
    released(w)
    assert norm(w.grads) * w.engine.plan.expected_batch_size <= 24 * C


class Interrupted(nn.Module):
    def __init__(self, error: type[BaseException]):
        super().__init__()
        self.linear, self.error, self.on = nn.Linear(5, 3), error, True

    def forward(self, x: Tensor) -> Tensor:
        h = self.linear(x)
        if self.on:
            raise self.error
        return h


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError, SystemExit, GeneratorExit])
def test_ctrl_c_in_the_forward_leaves_the_mode_stack_empty(error: type[BaseException]) -> None:
    w = world(Interrupted(error), everybody=True, noise_multiplier=0.0, max_grad_norm=C)
    with pytest.raises(error):
        train(w)
    assert not _get_current_function_mode_stack()
    assert w.charges == 0
    w.model.on = False
    train(w)
    assert w.charges == len(w.loader)
    assert norm(w.grads) * w.engine.plan.expected_batch_size <= 24 * C


def test_error_in_a_users_own_hook_leaves_the_mode_stack_empty() -> None:
    w = world()

    def fail(*_: object) -> None:
        raise ValueError

    handle = w.model[0].register_forward_hook(fail)
    with pytest.raises(ValueError):
        train(w)
    handle.remove()
    handle = w.model[0].register_forward_pre_hook(fail)
    with pytest.raises(ValueError):
        train(w)
    handle.remove()
    assert not _get_current_function_mode_stack()
    train(w)
    assert w.charges == len(w.loader)


def test_users_hooks_keep_working() -> None:
    w = world(everybody=True, check_first_batch=False)  # its forwards run the hooks as well
    seen: list[str] = []
    w.model[0].register_forward_hook(lambda *_: seen.append("forward"))
    w.model[2].register_forward_pre_hook(lambda *_: seen.append("pre"))
    released(w)
    assert seen == ["forward", "pre"]


def test_scripted_layer_is_exact_or_refused_before_an_update() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch announces the end of scripting
        model = nn.Sequential(nn.Linear(5, 8), torch.jit.script(nn.Linear(8, 3)))
    plain = nn.Sequential(nn.Linear(5, 8), nn.Linear(8, 3))
    plain.load_state_dict(model.state_dict())
    x, y = data(6)
    with sf.record(plain) as want:
        F.cross_entropy(plain(x), y).backward()
    try:
        with sf.record(model) as got:
            F.cross_entropy(model(x), y).backward()
    except sf.SfumatoError:
        assert all(p.grad is None for p in model.parameters())
        return
    for name, total in want.clipped_sum(C).items():
        torch.testing.assert_close(got.clipped_sum(C)[name], total)


class Custom(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return x @ weight.t()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, Tensor]:
        x, weight = ctx.saved_tensors
        return g @ weight, g.t() @ x


def test_custom_function_that_takes_a_parameter_is_exact_or_refused() -> None:
    class Uses(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inp, self.weight = nn.Linear(5, 5), nn.Parameter(torch.randn(3, 5))

        def forward(self, x: Tensor) -> Tensor:
            return Custom.apply(self.inp(x), self.weight)

    w = world(Uses(), everybody=True, noise_multiplier=0.0, max_grad_norm=C)
    try:
        sums = released(w)
    except sf.SfumatoError:
        assert not w.grads
        return
    assert norm(sums) <= 24 * C


@pytest.mark.parametrize("path", ["forward", "type.forward", "class forward of a bare parameter"])
def test_model_called_through_forward(path: str) -> None:
    class Bare(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(3, 5))

        def forward(self, x: Tensor) -> Tensor:
            return x @ self.weight.t()

    model: nn.Module = Bare() if path.startswith("class") else mlp()
    w = world(model, everybody=True, noise_multiplier=0.0, max_grad_norm=C)
    for x, y in w.loader:
        out = model.forward(x) if path == "forward" else type(model).forward(model, x)
        value = nn.functional.cross_entropy(out, y)
        if path.startswith("class"):
            with pytest.raises(sf.errors.PrivacyError):
                value.backward()
            assert not w.grads
        else:
            value.backward()
            assert norm(w.grads) * w.engine.plan.expected_batch_size <= 24 * C
        break


def test_second_backward() -> None:
    for retain in (True, False):
        w = world(everybody=True)
        for x, y in w.loader:
            value = loss(w.model, x, y)
            value.backward(retain_graph=retain)
            assert w.grads
            with pytest.raises(sf.errors.TokenError, match="sum the losses"):
                (value if retain else loss(w.model, x, y)).backward()
            assert not w.grads
            break
        assert w.charges == w.engine.steps == 1


def test_autograd_grad_before_backward() -> None:
    w = world(everybody=True, noise_multiplier=0.0, max_grad_norm=C)
    for x, y in w.loader:
        x.requires_grad_()
        value = loss(w.model, x, y)
        towards, *_ = torch.autograd.grad(value, x, retain_graph=True)
        assert float(towards.abs().sum()) > 0
        assert not w.grads
        value.backward()
        break
    torch.manual_seed(0)
    assert norm(w.grads) * w.engine.plan.expected_batch_size <= 24 * C
    assert w.charges == 1


def test_double_backward_is_refused() -> None:
    w = world(everybody=True)

    def penalty(m: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        x.requires_grad_()
        value = loss(m, x, y)
        (towards,) = torch.autograd.grad(value, x, create_graph=True)
        return value + towards.square().sum()

    with pytest.raises(sf.SfumatoError):
        train(w, compute=penalty)
    assert not w.grads
    assert w.charges == 0


def test_batch_the_private_loader_did_not_draw() -> None:
    w, (x, y) = world(), data(6)
    for _ in range(2):
        with pytest.raises(sf.errors.TokenError, match="drawn"):
            loss(w.model, x, y).backward()
        assert not w.grads
        train(w)
        w.model.zero_grad()
    assert w.charges == 2 * len(w.loader)


def test_backward_of_the_previous_batch() -> None:
    w = world(everybody=True, max_physical_batch_size=5)
    held: list[Tensor] = []

    def skip() -> None:
        for x, y in w.loader:
            held.append(loss(w.model, x, y))

    with pytest.raises(sf.errors.TokenError):  # a batch that ran forward is not skipped
        skip()
    assert len(held) == 1
    with pytest.raises(sf.errors.TokenError):
        held[0].backward()
    assert w.charges == 0
    assert not w.grads


@pytest.mark.parametrize("mode", ["no_grad", "inference_mode", "eval with gradients"])
def test_evaluation_inside_and_outside_the_loop(mode: str) -> None:
    w, (x_test, _) = world(everybody=True, noise_multiplier=0.0), data(50)
    plain = copy.deepcopy(w.model)
    context = {"no_grad": torch.no_grad, "inference_mode": torch.inference_mode}.get(mode, torch.enable_grad)
    with context():
        assert torch.equal(w.model(x_test), plain(x_test))
    if mode == "eval with gradients":
        return
    for x, y in w.loader:
        value = loss(w.model, x, y)
        with context():
            assert torch.equal(w.model(x_test), plain(x_test))
            w.model(x)
        value.backward()
        break
    assert w.charges == 1
    assert w.grads


def test_two_forwards_of_one_batch_are_one_record_each() -> None:
    w = world(everybody=True, noise_multiplier=0.0, max_grad_norm=C)
    sums = released(w, lambda m, x, y: loss(m, x, y) + loss(m, x + 1, y))
    assert 0 < norm(sums) <= 24 * C


def test_checkpointed_activations() -> None:
    class Checkpointed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Linear(5, 5), nn.Linear(5, 5), nn.Linear(5, 3)
            self.on, self.reentrant = True, False

        def part(self, x: Tensor) -> Tensor:
            return self.b(self.a(x).tanh())

        def forward(self, x: Tensor) -> Tensor:
            x = x.requires_grad_()
            return self.c(checkpoint(self.part, x, use_reentrant=self.reentrant) if self.on else self.part(x))

    def run(on: bool, reentrant: bool = False) -> World:
        torch.manual_seed(8)
        model = Checkpointed()
        model.on, model.reentrant = on, reentrant
        w = world(model, data(), everybody=True, noise_multiplier=0.0, max_grad_norm=C)
        released(w)
        return w

    assert distance(run(True).grads, run(False).grads) < 1e-9
    with pytest.raises(sf.SfumatoError):
        run(True, reentrant=True)
