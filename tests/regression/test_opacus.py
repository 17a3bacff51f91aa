"""One test for each failure that was found in another engine, named after the failure."""

from __future__ import annotations

import copy
import inspect
import io
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from tests.step.harness import World, chosen, data, distance, loss, mlp, norm, released, train, world
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import BatchSampler, DataLoader, IterableDataset, TensorDataset, WeightedRandomSampler

import sfumato as sf

B = 8


def clipped(model: nn.Module, x: Tensor, y: Tensor, compute: Any = loss, *, c: float = 0.1, **options: Any) -> World:
    """A world whose first batch was released without noise."""
    options = {"everybody": True, "noise_multiplier": 0.0, "batch_size": len(x), **options}
    w = world(model, (x, y), max_grad_norm=c, **options)
    released(w, compute)
    return w


def clipped_norm(w: World) -> float:
    return norm(w.grads) * w.engine.plan.expected_batch_size


# -- clipping that did not clip --------------------------------------------------------------------------------------


@pytest.mark.parametrize("criterion", ["mse", "bce"])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("scale", [1.0, 1e3])
def test_loss_of_shape_b1(criterion: str, reduction: str, scale: float) -> None:
    """(B,) coefficients times a (B, 1) loss broadcast to B × B: no clipping at all."""
    x = torch.randn(4, 3)
    x[0] *= scale
    y = torch.randint(0, 2, (4, 1)).float()
    measure = F.mse_loss if criterion == "mse" else F.binary_cross_entropy_with_logits
    w = clipped(
        nn.Linear(3, 1), x, y, lambda m, a, b: measure(m(a), b, reduction=reduction), c=0.01, loss_reduction=reduction
    )
    assert 0 < clipped_norm(w) <= 4 * 0.01


def test_loss_is_a_scalar_from_any_function() -> None:
    x, y = data(B)
    w = clipped(mlp(), x * 100, y, lambda m, a, b: (m(a)[:, 0] - b).square().mean().mul(3).add(1), c=0.01)
    assert 0 < clipped_norm(w) <= B * 0.01


@pytest.mark.parametrize("records", [1, 5])
def test_token_loss_of_one_record_is_one_record(records: int) -> None:
    """Flattened token losses of a physical batch of one were clipped token by token."""
    x, y = torch.randn(records, 50, 3) * 10, torch.randint(0, 4, (records, 50))
    w = clipped(nn.Linear(3, 4), x, y, lambda m, a, b: F.cross_entropy(m(a).flatten(0, 1), b.flatten()))
    assert 0 < clipped_norm(w) <= records * 0.1


def test_flattened_tokens_inside_the_model_stay_one_record() -> None:
    class Flat(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(3, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.linear(x.reshape(-1, 3)).reshape(len(x), -1, 4).mean(1)

    w = clipped(Flat(), torch.randn(1, 50, 3) * 100, torch.zeros(1, dtype=torch.long))
    assert clipped_norm(w) <= 0.1


@pytest.mark.parametrize("t", [7, B])
def test_time_first_layout_is_clipped_by_record(t: int) -> None:
    """(T, B, d), T == B included: the records are on the axis that was declared."""

    def run(first: bool, indices: list[int]) -> dict[str, Tensor]:
        torch.manual_seed(2)
        x, y, model = torch.randn(B, t, 3) * 5, torch.randint(0, 4, (B,)), nn.Linear(3, 4)

        def compute(m: nn.Module, a: Tensor, b: Tensor) -> Tensor:
            return F.cross_entropy(m(a.transpose(0, 1).contiguous()).mean(0) if first else m(a).mean(1), b)

        options: dict[str, Any] = {"batch_dim": 1} if first else {}
        w = world(model, (x, y), indices=indices, noise_multiplier=0.0, max_grad_norm=0.1, **options)
        return released(w, compute)

    everybody = list(range(B))
    assert distance(run(True, everybody), run(False, everybody)) < 1e-6
    assert distance(run(True, everybody), run(True, everybody[1:])) <= 0.1 * (1 + 1e-6)


def test_transposed_batch_with_two_equal_axes_is_refused() -> None:
    x, y = torch.randn(B, B, 3), torch.randint(0, 4, (B,))
    with pytest.raises(sf.errors.UnknownBatchAxis):
        clipped(nn.Linear(3, 4), x, y, lambda m, a, b: F.cross_entropy(m(a.transpose(0, 1)).mean(0), b))


def test_clip_bound_is_the_noise_bound() -> None:
    """One C for both; nothing can change one of them later."""
    w = world(max_grad_norm=0.25, noise_multiplier=2.0)
    assert w.engine.plan.sensitivity == w.engine.plan.max_grad_norm == 0.25
    assert w.engine.plan.noise_std == 0.5
    for name in ("max_grad_norm", "noise_multiplier", "expected_batch_size"):
        with pytest.raises(AttributeError):
            setattr(w.engine.plan, name, 7.0)


class Head(nn.Module):
    """The embedding's weight is used outside its module, as the head."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(6, 4)

    def forward(self, ids: Tensor) -> Tensor:
        return F.linear(self.embed(ids).mean(1), self.embed.weight)


def test_weight_used_outside_its_module() -> None:
    x, y = torch.randint(0, 6, (1, 9)), torch.randint(0, 6, (1,))
    assert 0 < clipped_norm(clipped(Head(), x, y, c=0.01)) <= 0.01 * (1 + 1e-6)


def test_embedding_bag_with_repeated_ids() -> None:
    bag = nn.EmbeddingBag(6, 4, mode="sum")
    x, y = torch.full((B, 9), 3), torch.randint(0, 4, (B,))
    try:
        w = clipped(bag, x, y, c=0.1)
    except sf.SfumatoError:
        return
    assert clipped_norm(w) <= B * 0.1


@pytest.mark.parametrize("mode", ["zeros", "circular", "reflect", "replicate"])
def test_convolution_padding_modes(mode: str) -> None:
    torch.manual_seed(3)
    build = nn.Sequential(nn.Conv2d(1, 2, 3, padding=1, padding_mode=mode), nn.Flatten(), nn.Linear(32, 3))
    x, y = torch.randn(B, 1, 4, 4), torch.randint(0, 3, (B,))
    plain = copy.deepcopy(build)
    loss(plain, x, y).backward()
    expected = {n: p.grad for n, p in plain.named_parameters() if p.grad is not None}
    w = clipped(build, x, y, c=1e6)
    assert distance(expected, w.grads) < 1e-5


def test_unfreezing_after_make_private() -> None:
    model = mlp()
    model[0].requires_grad_(False)
    w = world(model, everybody=True, noise_multiplier=0.0, max_grad_norm=1e-3)
    released(w)
    assert set(w.grads) == {"2.weight", "2.bias"}
    w.model.zero_grad()
    model[0].requires_grad_(True)
    released(w)
    assert set(w.grads) == {n for n, _ in model.named_parameters()}
    assert norm(w.grads) * w.engine.plan.expected_batch_size <= 24 * 1e-3


@pytest.mark.parametrize("ended", ["break", "error", "second iterator"])
def test_broken_loop_that_is_restarted(ended: str) -> None:
    """The partial sum of an abandoned logical batch counted its records twice in the next one."""
    w = world(tensors=data(B), everybody=True, noise_multiplier=0.0, max_grad_norm=0.1, max_physical_batch_size=3)
    kept: list[Iterator[Any]] = []
    try:
        kept.append(iter(w.loader))
        for x, y in kept[0]:
            loss(w.model, x, y).backward()
            if ended == "error":
                raise KeyError
            break
    except KeyError:
        kept.clear()
    if ended != "second iterator":
        kept.clear()
    assert w.charges == 0
    assert not w.grads
    again = released(w)
    torch.manual_seed(0)
    whole = world(
        copy_plain(w.model), (w.loader.dataset.tensors), everybody=True, noise_multiplier=0.0, max_grad_norm=0.1
    )
    assert w.charges == 1
    assert norm(again) <= B * 0.1
    assert distance(again, released(whole)) < 1e-5


def copy_plain(model: nn.Module) -> nn.Module:
    other = mlp()
    other.load_state_dict(model.state_dict())
    return other


def test_error_between_microbatches_discards_the_batch() -> None:
    w = world(tensors=data(B), everybody=True, noise_multiplier=0.0, max_physical_batch_size=3)
    for count, (x, y) in enumerate(w.loader):
        try:
            (loss(w.model, x, y) + (w.model[0].weight.sum() if count == 0 else 0)).backward()
        except sf.errors.PrivacyError:
            assert not w.grads
        if w.engine.plan.steps_per_epoch == w.engine.steps:
            break
        w.optimizer.step()
    assert w.engine.steps == w.charges
    if w.charges:
        assert norm(w.grads) * w.engine.plan.expected_batch_size <= B


def test_regulariser_in_the_loss() -> None:
    w = world(everybody=True, noise_multiplier=0.0)
    before = [p.detach().clone() for p in w.model.parameters()]
    with pytest.raises(sf.errors.UnclippedGradient, match="weight_decay"):
        train(w, compute=lambda m, x, y: loss(m, x, y) + sum(p.square().sum() for p in m.parameters()))
    assert not w.grads
    assert all(torch.equal(a, b) for a, b in zip(before, w.model.parameters(), strict=True))


def test_cat_augmentation_in_the_loop() -> None:
    w = world()
    with pytest.raises(sf.errors.RowsMismatch):
        train(w, compute=lambda m, x, y: loss(m, torch.cat([x, x + 1]), torch.cat([y, y])))
    assert w.charges == 0


@pytest.mark.parametrize("affine", [True, False])
def test_batch_norm_in_training_mode(affine: bool) -> None:
    model = nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8, affine=affine), nn.Linear(8, 3))
    with pytest.raises(sf.errors.CoupledRecords, match="GroupNorm"):
        world(model)
    assert not any("forward" in vars(m) for m in model.modules())
    model[1].eval()
    w = world(model, everybody=True, noise_multiplier=0.0)
    mean = model[1].running_mean.clone()
    released(w)
    assert torch.equal(mean, model[1].running_mean)
    w.model.train()
    with pytest.raises(sf.errors.CoupledRecords):
        released(w)


def test_frozen_batch_norm_in_training_mode_is_refused_too() -> None:
    model = nn.Sequential(nn.BatchNorm1d(5), nn.Linear(5, 3))
    model[0].requires_grad_(False)
    with pytest.raises(sf.errors.CoupledRecords):
        world(model)


def test_instance_norm_with_running_statistics_is_refused() -> None:
    with pytest.raises(sf.errors.UnsupportedError):
        world(nn.Sequential(nn.InstanceNorm1d(2, track_running_stats=True), nn.Flatten(), nn.Linear(10, 3)))


def test_divisor_does_not_depend_on_the_draw_or_the_data() -> None:
    sizes = {}
    for n in (99, 100, 101):
        w = world(tensors=data(n), batch_size=10)
        sizes[n] = w.engine.plan.expected_batch_size
        train(w)
        assert w.engine.plan.expected_batch_size == 10
    assert set(sizes.values()) == {10}


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf"), 1e38])
def test_nan_injection(bad: float) -> None:
    x, y = data(B)
    x[2] = bad
    w = world(mlp(), (x, y), everybody=True, noise_multiplier=0.0, max_grad_norm=0.5)
    sums = released(w)
    assert norm(sums) <= B * 0.5
    w.optimizer.step()
    assert all(bool(p.isfinite().all()) for p in w.model.parameters())


def test_shuffling_is_not_accounted_as_poisson() -> None:
    options: dict[str, Any] = {"batch_size": 2, "tensors": data(40), "noise_multiplier": 1.0}
    a, b = world(**options), world(sampling=sf.Shuffle(), **options)
    train(a)
    train(b)
    assert float(b.engine.get_epsilon(delta=1e-5)) > 2 * float(a.engine.get_epsilon(delta=1e-5))
    assert float(b.engine.get_epsilon(delta=1e-5)) == pytest.approx(4.377, abs=0.01)  # one Gaussian at σ = 1
    assert b.engine.plan.adjacency == "zero-out"
    assert [len(x) for x, _ in b.loader] == [2] * 20


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_noise_and_sum_are_not_taken_in_the_parameters_precision(dtype: torch.dtype) -> None:
    """bf16 noise had 2983 distinct values among 200 000."""
    model = nn.Linear(200, 500, bias=False).to(dtype)
    x, y = torch.randn(4, 200, dtype=dtype), torch.randint(0, 500, (4,))
    seen: list[torch.dtype] = []
    source = chosen(4)
    normal = source.normal

    def spy(shape: Any, *, std: float, dtype: torch.dtype, device: Any) -> Tensor:
        seen.append(dtype)
        return normal(shape, std=std, dtype=dtype, device=device)

    source.normal = spy  # type: ignore[method-assign]
    w = world(model, (x, y), noise=source, max_grad_norm=0.1, loss_reduction="sum")
    released(w, lambda m, a, b: F.cross_entropy(m(a), b, reduction="sum"))
    assert seen == [torch.float32]
    assert w.grads["weight"].dtype == dtype


def test_same_seed_does_not_repeat_secure_noise() -> None:
    def run(noise: Any) -> tuple[dict[str, Tensor], list[int]]:
        torch.manual_seed(1)
        w = world(noise=noise, sampling=sf.Poisson(1.0))
        return released(w), [len(x) for x, _ in world(noise=noise, tensors=data(200), batch_size=50).loader]

    first, second = run("secure"), run("secure")
    assert distance(first[0], second[0]) > 1
    assert first[1] != second[1]
    assert distance(run(sf.noise.Research(3))[0], run(sf.noise.Research(3))[0]) == 0
    assert distance(run("research")[0], run("research")[0]) > 1


# -- state, shapes and plumbing ----------------------------------------------------------------------------------------


def test_unused_branch_leaves_no_norms() -> None:
    """A row of step 1 changed the clipped gradient of step 2, through norms that were never cleared."""

    class Branches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.use = nn.Linear(5, 3), nn.Linear(5, 3), "b"

        def forward(self, x: Tensor) -> Tensor:
            return (self.a if self.use == "a" else self.b)(x)

    def second(scale: float) -> dict[str, Tensor]:
        torch.manual_seed(0)
        model, x, y = Branches(), torch.randn(B, 5), torch.randint(0, 3, (B,))
        w = world(model, (x, y), everybody=True, noise_multiplier=0.0, max_grad_norm=0.1)
        w.loader.dataset.tensors[0][0] *= scale
        released(w)
        w.loader.dataset.tensors[0][0] /= scale
        model.use = "a"
        model.zero_grad()
        return released(w)

    first = second(1.0)
    assert distance(first, second(1e3)) < 1e-6
    assert float(first["b.weight"].abs().sum()) == 0
    assert float(first["a.weight"].abs().sum()) > 0


def test_unused_branch_gets_its_noise() -> None:
    """Whether the data reached a branch must not show."""

    class Unused(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(5, 3), nn.Linear(5, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.a(x)

    w = world(Unused(), everybody=True)
    released(w)
    assert float(w.grads["b.weight"].abs().min()) > 0


@pytest.mark.parametrize("rank", [1, 2, 3, 4, 5])
def test_rank4_linear(rank: int) -> None:
    """Any rank: the norm rule once fell through for rank 4 and used stale norms (10.4 for 16 236)."""
    x = torch.randn(B, *[2] * (rank - 1), 3) if rank > 1 else torch.randn(B)
    model: nn.Module = nn.Linear(3, 4) if rank > 1 else nn.Sequential(nn.Unflatten(0, (B, 1)), nn.Linear(1, 4))
    y = torch.randint(0, 4, (B,))

    def compute(m: nn.Module, a: Tensor, b: Tensor) -> Tensor:
        return F.cross_entropy(m(a).reshape(len(a), -1, 4).mean(1), b)

    for scale in (1.0, 1e4):
        w = clipped(copy.deepcopy(model), x * scale, y, compute)
        assert 0 < clipped_norm(w) <= B * 0.1


@pytest.mark.parametrize("name", ["secure_mod", "noise_multiplyer", "poisson_sampling", "max_grad_norms"])
def test_unknown_keyword_raises(name: str) -> None:
    with pytest.raises(TypeError, match=name):
        world(**{name: 1.0})
    with pytest.raises(TypeError):
        sf.PrivacyEngine(accountant="rdp")  # type: ignore[call-arg]


def test_arguments_are_keyword_only() -> None:
    model = mlp()
    with pytest.raises(TypeError):
        sf.PrivacyEngine().make_private(model, torch.optim.SGD(model.parameters(), lr=1.0))  # type: ignore[misc]
    for method in (sf.PrivacyEngine.make_private, sf.PrivacyEngine.make_private_with_epsilon):
        kinds = {p.kind for n, p in inspect.signature(method).parameters.items() if n != "self"}
        assert kinds == {inspect.Parameter.KEYWORD_ONLY}


def test_accounting_cannot_be_detached() -> None:
    """Users' own hooks on the optimizer once replaced the accountant's."""
    w = world()
    calls: list[int] = []
    w.optimizer.register_step_pre_hook(lambda *_: calls.append(1))
    w.optimizer.register_step_post_hook(lambda *_: calls.append(2))
    w.optimizer.step_hook = None  # type: ignore[attr-defined]
    train(w, 2)
    assert calls
    assert w.engine.steps == w.charges == 2 * len(w.loader)


def test_empty_batch_every_clip() -> None:
    """Empty draws are charged, noised and stepped, and never reach the loop."""
    w = world(tensors=data(2), batch_size=1, max_grad_norm=0.5)
    sizes: list[int] = []
    for _ in range(20):
        for x, y in w.loader:
            sizes.append(len(x))
            w.optimizer.zero_grad()
            loss(w.model, x, y).backward()
            assert not w.engine.last_step.empty
            w.optimizer.step()
    assert min(sizes) > 0
    assert len(sizes) < 40
    assert w.engine.steps == w.charges == 40


def test_empty_draw_steps_with_noise_alone() -> None:
    w = world(indices=[], max_grad_norm=0.5, noise_multiplier=4.0)
    before = {n: p.detach().clone() for n, p in w.model.named_parameters()}
    assert not list(w.loader)
    assert w.engine.steps == w.charges == len(w.loader)
    assert w.engine.last_step.empty
    assert all(bool((before[n] != p).any()) for n, p in w.model.named_parameters())
    assert not w.grads


def test_inplace_activations() -> None:
    """torchvision's in-place ReLUs raised after layers with backward hooks."""

    def sums(inplace: bool) -> dict[str, Tensor]:
        torch.manual_seed(4)
        x, y = torch.randn(B, 5), torch.randint(0, 3, (B,))
        layers = nn.Sequential(
            nn.Linear(5, 8), nn.ReLU(inplace), nn.Linear(8, 8), nn.Hardtanh(inplace=inplace), nn.Linear(8, 3)
        )
        return released(world(layers, (x, y), everybody=True, noise_multiplier=0.0, max_grad_norm=0.1))

    assert distance(sums(True), sums(False)) < 1e-7


def test_residual_added_in_place() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.scale = nn.Linear(5, 5), nn.Linear(5, 3), nn.Parameter(torch.ones(5))

        def forward(self, x: Tensor) -> Tensor:
            h = self.a(x)
            h += x * self.scale
            h[:, 1:] *= 2
            return self.b(h.relu_())

    torch.manual_seed(5)
    model, (x, y) = Block(), data(B)
    plain = copy.deepcopy(model)
    loss(plain, x, y).backward()
    w = clipped(model, x, y, c=1e6)
    assert distance({n: p.grad for n, p in plain.named_parameters() if p.grad is not None}, w.grads) < 1e-6


def test_padding_row_is_not_trained() -> None:
    model = nn.Sequential(nn.Embedding(6, 4, padding_idx=0), nn.Flatten(), nn.Linear(12, 3))
    w = clipped(model, torch.zeros(B, 3, dtype=torch.long), torch.randint(0, 3, (B,)))
    assert float(w.grads["0.weight"][0].abs().sum()) == 0


def test_layer_norm_without_bias_and_keyword_inputs() -> None:
    class Keywords(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.out = nn.LayerNorm(5, bias=False), nn.Linear(5, 3)

        def forward(self, *, x: Tensor, scale: float) -> Tensor:
            return self.out(self.norm(x) * scale)

    x, y = data(B)
    w = clipped(Keywords(), x, y, lambda m, a, b: F.cross_entropy(m(x=a, scale=2.0), b))
    assert 0 < clipped_norm(w) <= B * 0.1


def test_own_parameter_on_the_root_with_dropout_and_two_inputs() -> None:
    """One bare parameter made the whole model a single vmapped layer, which dropout then broke."""

    class Root(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.token, self.linear = nn.Parameter(torch.randn(1, 1, 5)), nn.Linear(5, 3)
            self.drop = nn.Dropout(0.3)

        def forward(self, x: Tensor, weight: Tensor) -> Tensor:
            rows = torch.cat([self.token.expand(len(x), -1, -1), x.unsqueeze(1)], 1)
            return self.linear(self.drop(rows * weight[:, None, None]).mean(1))

    x, y = data(B)
    w = clipped(Root(), x, y, lambda m, a, b: F.cross_entropy(m(a, torch.ones(len(a))), b))
    assert set(w.engine.tiers.values()) == {"rule"}
    assert 0 < clipped_norm(w) <= B * 0.1


def test_recurrent_networks_and_attention_as_torch_ships_them() -> None:
    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lstm, self.attend = nn.LSTM(3, 4, batch_first=True), nn.MultiheadAttention(4, 2, batch_first=True)
            self.out = nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            h, _ = self.lstm(x)
            return self.out(self.attend(h, h, h, need_weights=False)[0].mean(1))

    x, y = torch.randn(4, 5, 3) * 10, torch.randint(0, 3, (4,))
    w = clipped(Recurrent(), x, y, c=0.1)
    assert 0 < clipped_norm(w) <= 4 * 0.1


def test_mse_of_a_class_of_layers_nobody_registered() -> None:
    class Mine(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return x @ self.weight.mT * 2 + self.bias

    x, y = data(B)
    w = clipped(Mine(5, 3), x, y)
    assert 0 < clipped_norm(w) <= B * 0.1


# -- loaders and optimizers ------------------------------------------------------------------------------------------


class Stream(IterableDataset[Tensor]):
    def __iter__(self) -> Iterator[Tensor]:
        return iter(torch.randn(8, 5))


def _loader(kind: str) -> DataLoader[Any]:
    table = TensorDataset(*data(8))
    if kind == "stream":
        return DataLoader(Stream(), batch_size=2)
    if kind == "weighted":
        return DataLoader(table, batch_size=2, sampler=WeightedRandomSampler([1.0] * 8, 8))
    if kind == "replacement":
        return DataLoader(table, batch_size=2, sampler=torch.utils.data.RandomSampler(table, replacement=True))
    if kind == "subset":
        return DataLoader(table, batch_size=2, sampler=torch.utils.data.SubsetRandomSampler([0, 1]))
    if kind == "list":
        return DataLoader(table, batch_size=2, sampler=[0, 0, 0])
    if kind == "batch sampler":
        return DataLoader(table, batch_sampler=BatchSampler(range(8), 2, False))
    return DataLoader(table, batch_size=None)


@pytest.mark.parametrize("kind", ["stream", "weighted", "replacement", "subset", "list", "batch sampler", "unbatched"])
def test_custom_samplers_are_refused_not_dropped(kind: str) -> None:
    model = mlp()
    engine = sf.PrivacyEngine()
    with pytest.raises(sf.errors.UnsupportedError) as caught:
        engine.make_private(
            module=model,
            optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
            data_loader=_loader(kind),
            noise_multiplier=1.0,
            max_grad_norm=1.0,
        )
    assert caught.value.fix
    assert "forward" not in vars(model)


def test_private_loader_given_again_stands_for_the_one_behind_it() -> None:
    w = world()
    w.engine.detach()
    _, _, again = w.engine.make_private(
        module=w.model, optimizer=w.optimizer, data_loader=w.loader, noise_multiplier=1.0, max_grad_norm=1.0
    )
    assert again is not w.loader
    assert w.engine.plan.sample_rate == w.engine.plan.expected_batch_size / len(again.dataset)


def test_sampling_rate_is_that_of_the_draws() -> None:
    """int(1/q) once gave the accountant 1/92 and the sampler 1/93."""
    for n, b in ((930, 10), (100, 7), (8, 16)):
        w = world(tensors=data(n), batch_size=b)
        assert w.engine.plan.sample_rate == w.engine.plan.event.sample_rate == min(1.0, b / n)


def test_lbfgs_is_refused_by_name() -> None:
    with pytest.raises(sf.errors.UnsupportedError, match="LBFGS"):
        world(optimizer=torch.optim.LBFGS)


def test_optimizer_with_foreign_parameters_is_refused() -> None:
    with pytest.raises(sf.errors.UnsupportedError, match="not parameters of the module"):
        world(optimizer=lambda p: torch.optim.SGD([*p, nn.Parameter(torch.zeros(3))], lr=0.1))


OPTIMIZERS = [
    n
    for n, c in sorted(vars(torch.optim).items())
    if inspect.isclass(c) and issubclass(c, torch.optim.Optimizer) and n not in ("Optimizer", "LBFGS", "SparseAdam")
]


@pytest.mark.parametrize("closure", [False, True])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer(name: str, closure: bool) -> None:
    """Microbatches that do not end a logical batch move nothing, neither momentum nor weight decay."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 6, bias=False), nn.Tanh(), nn.Linear(6, 3, bias=False))
    w = world(
        model,
        optimizer=lambda p: getattr(torch.optim, name)(list(p), lr=0.01),
        everybody=True,
        batch_size=24,
        max_physical_batch_size=10,
    )
    for _ in range(2):
        for x, y in w.loader:
            before, steps = [p.detach().clone() for p in model.parameters()], w.engine.steps

            def evaluate(x: Tensor = x, y: Tensor = y) -> Tensor:
                w.optimizer.zero_grad()
                value = loss(model, x, y)
                value.backward()
                return value

            if closure:
                w.optimizer.step(evaluate)
            else:
                evaluate()
                w.optimizer.step()
            moved = any(not torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
            assert moved == (w.engine.steps > steps)
    assert w.engine.steps == w.charges == 2


def test_closure_that_evaluates_twice_is_refused() -> None:
    w = world(everybody=True)
    for x, y in w.loader:
        loss(w.model, x, y).backward()
        with pytest.raises(sf.errors.TokenError):
            w.optimizer.step(lambda x=x, y=y: loss(w.model, x, y).backward())
        break
    assert w.charges == 1
    assert not w.grads


def test_update_loop_written_by_hand() -> None:
    w = world(everybody=True, batch_size=24, max_physical_batch_size=10)
    steps = 0
    for x, y in w.loader:
        loss(w.model, x, y).backward()
        with torch.no_grad():
            for p in w.model.parameters():
                if p.grad is not None:
                    p -= 0.1 * p.grad
                    p.grad = None
                    steps += 1
    assert steps == 4
    assert w.charges == 1


@pytest.mark.parametrize("physical", [None, 5])
def test_zero_grad_that_leaves_zeros(physical: int | None) -> None:
    """Zeros let momentum and weight decay move on a microbatch that releases nothing."""
    w = world(
        optimizer=lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.1),
        everybody=True,
        batch_size=24,
        max_physical_batch_size=physical,
    )
    moves = 0
    for _ in range(2):
        for x, y in w.loader:
            before = w.model[0].weight.detach().clone()
            w.optimizer.zero_grad(set_to_none=False)
            loss(w.model, x, y).backward()
            w.optimizer.step()
            moves += not torch.equal(before, w.model[0].weight)
    assert moves == w.engine.steps == w.charges == 2


def test_zero_grad_after_backward_throws_the_release_away_and_it_stays_charged() -> None:
    w = world(everybody=True)
    before = w.model[0].weight.detach().clone()
    for x, y in w.loader:
        loss(w.model, x, y).backward()
        w.optimizer.zero_grad()
        w.optimizer.step()
    assert torch.equal(before, w.model[0].weight)
    assert w.charges == w.engine.steps == len(w.loader)


def test_gradients_accumulate_over_releases_like_in_torch() -> None:
    w = world(everybody=True, batch_size=24, noise_multiplier=0.0, max_physical_batch_size=7)
    once = released(w)
    twice = released(w)
    assert distance(twice, {n: 2 * g for n, g in once.items()}) < 1e-5


@pytest.mark.parametrize("scale", [2.0**4, 2.0**16])
@pytest.mark.parametrize("physical", [None, 5])
def test_grad_scaler_is_divided_out_before_clipping(scale: float, physical: int | None) -> None:
    """Unscaling p.grad alone made steps 370 times too large."""

    def weights(scaled: bool) -> list[Tensor]:
        torch.manual_seed(6)
        model, tensors = mlp(), data(B)
        scaler = torch.amp.GradScaler("cpu", init_scale=scale) if scaled else None
        w = world(
            model, tensors, everybody=True, batch_size=B, max_grad_norm=0.1, grad_scaler=scaler,
            max_physical_batch_size=physical, noise_multiplier=0.5,
        )  # fmt: skip
        for x, y in w.loader:
            w.optimizer.zero_grad()
            value = loss(model, x, y)
            if scaler is None:
                value.backward()
                w.optimizer.step()
            elif w.engine.steps == 0:
                scaler.scale(value).backward()
                if w.engine.steps:
                    scaler.step(w.optimizer)
                    scaler.update()
        assert w.charges == 1
        return list(model.parameters())

    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(weights(True), weights(False), strict=True))


def test_facts_of_the_last_step() -> None:
    w = world(tensors=data(B), everybody=True, max_grad_norm=1e-6, max_physical_batch_size=3)
    released(w)
    assert (w.engine.last_step.batch_size, w.engine.last_step.clip_fraction, w.engine.last_step.empty) == (
        B,
        1.0,
        False,
    )
    w = world(tensors=data(B), everybody=True, max_grad_norm=1e6)
    assert w.engine.last_step.empty
    released(w)
    assert w.engine.last_step.clip_fraction == 0.0


def test_engine_tells_what_it_is_doing() -> None:
    w = world(tensors=data(24), batch_size=6)
    plan = w.engine.plan
    assert (plan.sample_rate, plan.expected_batch_size, plan.steps_per_epoch) == (0.25, 6, 4)
    assert (plan.noise_level, plan.adjacency, len(w.loader)) == ("secure", "add-remove", 4)
    assert isinstance(w.loader, DataLoader)
    with pytest.raises(sf.errors.PrivacyError):
        _ = sf.PrivacyEngine().plan
    train(w)
    assert set(w.engine.tiers) == {n for n, _ in w.model.named_parameters()}


def test_epsilon_is_pure() -> None:
    w = world()
    train(w)
    before = w.charges
    values = {float(w.engine.get_epsilon(delta=1e-5)) for _ in range(5)}
    assert len(values) == 1
    assert w.charges == before


def test_saving_needs_no_pickle_of_ours(tmp_path: Any) -> None:
    w = world()
    train(w)
    torch.save(w.model.state_dict(), tmp_path / "state.pt")
    other = mlp()
    other.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert all(torch.equal(a, b) for a, b in zip(other.parameters(), w.model.parameters(), strict=True))
    stream = io.BytesIO()
    torch.save(w.model, stream)
    stream.seek(0)
    loaded = torch.load(stream, weights_only=False)
    loss(loaded, *data(4)).backward()
    assert w.charges == w.engine.steps
