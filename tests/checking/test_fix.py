"""sf.fix: what it replaces, what it keeps, what it refuses; the result has exact per-sample gradients and trains."""

from __future__ import annotations

import copy
import math
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tests.oracle.oracle import B, Case, R, check, per_record
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, parametrize
from torch.utils.data import DataLoader, TensorDataset

import sfumato as sf
from sfumato.checking import Change, FrozenBatchNorm

BATCH_NORMS = (nn.modules.batchnorm._BatchNorm,)


class Block(nn.Module):
    """A residual block as torchvision writes it, activations in place."""

    def __init__(self, inputs: int, outputs: int, stride: int):
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.downsample = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        out = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        out += self.downsample(x)
        return self.relu(out)


def resnet() -> nn.Module:
    stem = [nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(inplace=True)]
    return nn.Sequential(
        *stem, Block(8, 8, 1), Block(8, 12, 2), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(12, 3)
    )


class Logits(nn.Module):
    def __init__(self, inner: nn.Module):
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x).logits


def hf_resnet() -> nn.Module:
    tf = pytest.importorskip("transformers")
    config = tf.ResNetConfig(embedding_size=8, hidden_sizes=[8, 12], depths=[1, 1], num_labels=3, layer_type="basic")
    return Logits(tf.ResNetForImageClassification(config))


def efficientnet() -> nn.Module:
    tf = pytest.importorskip("transformers")
    config = tf.EfficientNetConfig(
        image_size=32, width_coefficient=0.25, depth_coefficient=0.3, hidden_dim=320, depthwise_padding=[],
        kernel_sizes=[3, 5], in_channels=[32, 16], out_channels=[16, 24], strides=[1, 2], num_block_repeats=[1, 1],
        expand_ratios=[1, 6], num_labels=3, dropout_rate=0.0, drop_connect_rate=0.0,
    )  # fmt: skip
    return Logits(tf.EfficientNetForImageClassification(config))


def learned(model: nn.Module) -> nn.Module:
    """Weights and statistics that differ from a fresh layer's, so that losing them would show."""
    for p in model.parameters():
        p.data += 0.1 * torch.randn_like(p)
    for name, b in model.named_buffers():
        if name.endswith("running_mean"):
            b.normal_()
        elif name.endswith("running_var"):
            b.uniform_(0.5, 2)
    return model


NETS: dict[str, Callable[[], nn.Module]] = {"ours": resnet, "ResNet": hf_resnet, "EfficientNet": efficientnet}


@pytest.mark.parametrize("batch_norm", ["group", "frozen"])
@pytest.mark.parametrize("name", NETS)
def test_image_models_have_exact_gradients_after_fix(name: str, batch_norm: Any) -> None:
    def build() -> nn.Module:
        return sf.fix(learned(NETS[name]()), batch_norm=batch_norm)

    # 33 pixels: later stages keep more than one position, and none of the sizes is B.
    tape = check(Case(build, lambda: (R(B, 3, 33, 33),)), torch.float64)
    assert set(tape.tiers.values()) == {"rule"}


@pytest.mark.parametrize("batch_norm", ["group", "instance", "frozen"])
def test_a_fixed_model_trains_through_the_engine_and_publishes_no_statistics(batch_norm: Any) -> None:
    model = sf.fix(learned(resnet()), batch_norm=batch_norm)
    buffers = {n: b.clone() for n, b in model.named_buffers()}
    assert bool(buffers) == (batch_norm == "frozen")
    x, y = torch.randn(24, 3, 12, 12), torch.randint(0, 3, (24,))
    for k in range(3):
        x[y == k] += 3 * torch.cos(torch.arange(12) * (k + 0.5))
    engine, before = sf.PrivacyEngine(), F.cross_entropy(model(x), y).item()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    model, optimizer, loader = engine.make_private(
        module=model,
        optimizer=optimizer,
        data_loader=DataLoader(TensorDataset(x, y), batch_size=12),
        noise_multiplier=0.0,
        max_grad_norm=1.0,
    )
    model.train()
    for _ in range(8):
        for a, b in loader:
            optimizer.zero_grad()
            F.cross_entropy(model(a), b).backward()
            optimizer.step()
    assert F.cross_entropy(model(x), y).item() < 0.7 * before
    assert {n: b.tolist() for n, b in model.named_buffers()} == {n: b.tolist() for n, b in buffers.items()}


# ------------------------------------------------------------------------------------------------------ what is kept

LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "1d, (B, C)": (lambda: nn.BatchNorm1d(32), (32,)),
    "1d, (B, C, L)": (lambda: nn.BatchNorm1d(32), (32, 5)),
    "2d": (lambda: nn.BatchNorm2d(8, eps=1e-3), (8, 3, 3)),
    "3d": (lambda: nn.BatchNorm3d(8), (8, 2, 2, 2)),
    "synchronised": (lambda: nn.SyncBatchNorm(32), (32, 3, 3)),
    "no affine": (lambda: nn.BatchNorm2d(8, affine=False), (8, 3, 3)),
    "no statistics": (lambda: nn.BatchNorm2d(8, track_running_stats=False), (8, 3, 3)),
    "double": (lambda: nn.BatchNorm2d(8).double(), (8, 3, 3)),
    "prime": (lambda: nn.BatchNorm2d(37), (37, 3, 3)),
    "one channel": (lambda: nn.BatchNorm2d(1), (1, 3, 3)),
}


@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_keeps_its_very_parameters_and_treats_each_record_alone(name: str) -> None:
    build, shape = LAYERS[name]
    layer = learned(build())
    if layer.bias is not None:
        layer.bias.requires_grad_(False)
    weights = list(layer.parameters())
    fixed = sf.fix(layer)
    assert isinstance(fixed, nn.GroupNorm)
    assert [id(p) for p in fixed.parameters()] == [id(p) for p in weights]
    assert [p.requires_grad for p in fixed.parameters()] == [True, False][: len(weights)]
    assert fixed.affine == bool(weights)
    assert fixed.eps == layer.eps
    assert not list(fixed.buffers())
    x = torch.randn(5, *shape, dtype=next((p.dtype for p in weights), torch.float32))
    torch.testing.assert_close(fixed(x)[2:3], fixed(x[2:3]))
    spread = ((fixed(x) - (0 if fixed.bias is None else fixed.bias.view(-1, *[1] * (x.dim() - 2)))) ** 2).mean()
    assert spread.item() > 0.5  # a normalisation, not zeros


def test_statistics_are_gone_and_weights_unchanged_in_the_state_dict() -> None:
    model = learned(resnet())
    before = {k: v.clone() for k, v in model.state_dict().items()}
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    fixed = sf.fix(model)
    assert fixed is model
    after = fixed.state_dict()
    assert set(before) - set(after) == {k for k in before if k.endswith(("mean", "var", "num_batches_tracked"))}
    assert all(torch.equal(v, before[k]) for k, v in after.items())
    fixed(torch.randn(2, 3, 8, 8)).sum().backward()
    optimizer.step()  # built before the fix: still trains this model
    assert all(not torch.equal(v, before[k]) for k, v in fixed.state_dict().items())


@pytest.mark.parametrize("training", [True, False])
def test_training_flags_and_everything_else_stay_as_they_were(training: bool) -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8), nn.ReLU(inplace=True), nn.Dropout(), nn.Flatten(2),
        nn.LSTM(9, 4), nn.MultiheadAttention(4, 2), nn.LayerNorm(4), nn.GroupNorm(2, 4), nn.InstanceNorm1d(4),
    )  # fmt: skip
    model.train(training)
    others = [m for m in model if not isinstance(m, nn.BatchNorm2d)]
    fixed = sf.fix(model)
    assert all(m.training == training for m in fixed.modules())
    assert [m for m in fixed if not isinstance(m, nn.GroupNorm) or m.num_channels == 4] == others
    assert fixed[2].inplace


def test_layers_are_found_wherever_they_are_and_stay_shared() -> None:
    class Holder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            shared = nn.BatchNorm2d(8)
            self.whatever, self.again = shared, shared
            self.items = nn.ModuleList([nn.Sequential(nn.BatchNorm2d(4)), shared])
            self.table = nn.ModuleDict({"a": nn.BatchNorm1d(32)})

    changes: list[Change] = []
    fixed = sf.fix(Holder(), changes=changes)
    assert not [m for m in fixed.modules() if isinstance(m, BATCH_NORMS)]
    assert isinstance(fixed.whatever, nn.GroupNorm)
    assert fixed.whatever is fixed.again is fixed.items[1]
    assert [c.paths for c in changes] == [("whatever", "again", "items.1"), ("items.0.0",), ("table.a",)]
    assert "BatchNorm2d(8" in str(changes[0])
    assert "GroupNorm(2, 8" in str(changes[0])
    assert "statistics dropped" in str(changes[0])


def test_a_second_fix_and_a_compatible_model_change_nothing() -> None:
    changes: list[Change] = []
    for model in (sf.fix(resnet()), sf.fix(resnet(), batch_norm="frozen"), nn.Linear(2, 2)):
        kinds = [type(m) for m in model.modules()]
        assert sf.fix(model, changes=changes) is model
        assert [type(m) for m in model.modules()] == kinds
    assert changes == []


@pytest.mark.parametrize("dims", [1, 2, 3])
def test_instance_norm_keeps_weights_and_stops_tracking(dims: int) -> None:
    kind = getattr(nn, f"InstanceNorm{dims}d")
    layer = learned(kind(6, affine=True, track_running_stats=True))
    x = torch.randn(4, 6, *[3] * dims)
    want = F.instance_norm(x, weight=layer.weight, bias=layer.bias)
    fixed = sf.fix(layer)
    assert type(fixed) is kind
    assert fixed.weight is layer.weight
    assert not list(fixed.buffers())
    torch.testing.assert_close(fixed(x), want)
    as_instance = sf.fix(getattr(nn, f"BatchNorm{dims}d")(6), batch_norm="instance")
    assert type(as_instance) is kind
    torch.testing.assert_close(as_instance(x), F.instance_norm(x))


def test_instance_norm_that_tracks_is_exact_after_fix() -> None:
    def build() -> nn.Module:
        return sf.fix(nn.Sequential(nn.Conv1d(2, 3, 1), nn.InstanceNorm1d(3, affine=True, track_running_stats=True)))

    check(Case(build, lambda: (R(B, 2, 5),)), torch.float64)


# ------------------------------------------------------------------------------------------------------------ groups


@pytest.mark.parametrize(
    ("kind", "channels", "groups"),
    [
        (nn.BatchNorm2d, 2048, 32),
        (nn.BatchNorm2d, 128, 32),
        (nn.BatchNorm2d, 64, 16),
        (nn.BatchNorm2d, 40, 10),
        (nn.BatchNorm2d, 37, 1),
        (nn.BatchNorm2d, 3, 1),
        (nn.BatchNorm3d, 96, 24),
        (nn.BatchNorm1d, 512, 32),
        (nn.BatchNorm1d, 64, 4),
        (nn.BatchNorm1d, 10, 1),
        (nn.SyncBatchNorm, 64, 4),
    ],
)
def test_default_groups(kind: type[nn.Module], channels: int, groups: int) -> None:
    assert sf.fix(kind(channels)).num_groups == groups


@pytest.mark.parametrize("build", [lambda: nn.BatchNorm1d(96), lambda: nn.BatchNorm2d(24)])
def test_groups_keep_a_signal_where_there_is_one_position(build: Callable[[], nn.Module]) -> None:
    """One channel in a group would give zeros, two would give ±1."""
    layer = build()
    x = torch.randn(6, layer.num_features, *[1] * (0 if isinstance(layer, nn.BatchNorm1d) else 2))
    out = sf.fix(layer)(x)
    assert out.std() > 0.8
    assert len(out.abs().mul(1e3).round().unique()) > 50


def test_explicit_groups() -> None:
    assert sf.fix(nn.BatchNorm2d(24), num_groups=6).num_groups == 6
    model = resnet()  # 8 and 12 channels
    with pytest.raises(sf.errors.ConfigurationError, match=r"num_groups=8 .* 12 channels of 4.bn1"):
        sf.fix(model, num_groups=8)
    assert sum(isinstance(m, BATCH_NORMS) for m in model.modules()) == 7  # nothing was changed


# ------------------------------------------------------------------------------------------------------------ frozen


@pytest.mark.parametrize("name", [n for n in LAYERS if n != "no statistics"])
def test_frozen_statistics_are_what_eval_mode_computes_and_survive_train(name: str) -> None:
    build, shape = LAYERS[name]
    layer = learned(build())
    x = torch.randn(4, *shape, dtype=layer.running_mean.dtype)
    want, state = layer.eval()(x), layer.state_dict()
    fixed = sf.fix(layer.train(), batch_norm="frozen")
    for model in (
        fixed,
        nn.Sequential(fixed).train()[0],
        copy.deepcopy(fixed).train(),
        pickle.loads(pickle.dumps(fixed)),
    ):
        torch.testing.assert_close(model(x), want)
        assert model.state_dict().keys() == state.keys()
        assert not model.training
    assert [p.requires_grad for p in fixed.parameters()] == [p.requires_grad for p in layer.parameters()]
    fresh = build()
    fresh.load_state_dict(fixed.state_dict())
    torch.testing.assert_close(fresh.eval()(x), want)


def test_constants_are_left_alone_unless_frozen_is_asked_for() -> None:
    def build() -> nn.Module:
        return nn.Sequential(nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8).eval().requires_grad_(False))

    assert type(sf.fix(build())[1]) is nn.BatchNorm2d
    assert type(sf.fix(build(), batch_norm="frozen")[1]) is FrozenBatchNorm
    trained, untracked = build(), build()
    trained[1].weight.requires_grad_(True)
    untracked[1] = nn.BatchNorm2d(8, affine=False, track_running_stats=False).eval()
    assert isinstance(sf.fix(trained)[1], nn.GroupNorm)
    assert isinstance(sf.fix(untracked)[1], nn.GroupNorm)


# ---------------------------------------------------------------------------------------------------------- refusals


class WithActivation(nn.BatchNorm2d):
    """As timm's BatchNormAct2d."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input).relu()


class Named(nn.BatchNorm2d):
    """Nothing of its own but the name."""


def hooked() -> nn.Module:
    layer = nn.BatchNorm2d(8)
    layer.register_forward_hook(lambda m, args, out: out * 2)
    return layer


def parametrized() -> nn.Module:
    layer = nn.BatchNorm2d(8)
    parametrize.register_parametrization(layer, "weight", nn.Softplus())
    return layer


def overridden() -> nn.Module:
    layer = nn.BatchNorm2d(8)
    layer.forward = lambda x: x * 2
    return layer


def extended() -> nn.Module:
    layer = nn.BatchNorm2d(8)
    layer.register_parameter("gate", nn.Parameter(torch.ones(8)))
    return layer


REFUSED: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "lazy": (lambda: nn.LazyBatchNorm2d(), "not initialised"),
    "own forward": (lambda: WithActivation(8), "forward of its own"),
    "hook": (hooked, "hooks"),
    "parametrization": (parametrized, "parametrizations"),
    "overridden forward": (overridden, "overridden"),
    "more parameters": (extended, "gate"),
    "one feature": (lambda: nn.BatchNorm1d(1), "one channel"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_would_be_lost_is_refused_by_name_and_nothing_is_changed(name: str) -> None:
    build, reason = REFUSED[name]
    model = nn.Sequential(nn.BatchNorm2d(4), nn.ModuleDict({"odd": build()}))
    kinds = [type(m) for m in model.modules()]
    changes: list[Change] = []
    with pytest.raises(sf.errors.UnsupportedError, match=rf"1\.odd .*{reason}") as caught:
        sf.fix(model, changes=changes)
    assert caught.value.fix
    assert [type(m) for m in model.modules()] == kinds
    assert changes == []


def test_a_subclass_that_only_has_another_name_is_replaced() -> None:
    assert isinstance(sf.fix(Named(8)), nn.GroupNorm)


def test_an_odd_layer_that_is_constant_is_left_alone() -> None:
    layer = WithActivation(8).eval().requires_grad_(False)
    assert sf.fix(layer) is layer


def test_a_lazy_layer_is_replaced_once_it_has_seen_its_input() -> None:
    layer = nn.LazyBatchNorm2d()
    layer(torch.randn(2, 8, 3, 3))
    assert sf.fix(layer).num_channels == 8


@pytest.mark.parametrize("how", ["attribute", "list", "dict"])
def test_a_layer_that_is_also_held_where_it_cannot_be_seen_is_refused(how: str) -> None:
    model = resnet()
    model.__dict__["spare"] = {"attribute": model[1], "list": [model[1]], "dict": {"a": model[1]}}[how]
    with pytest.raises(sf.errors.UnsupportedError, match="spare"):
        sf.fix(model)
    assert isinstance(model[1], nn.BatchNorm2d)


@pytest.mark.parametrize("layer", [nn.SyncBatchNorm(8)])
def test_instance_of_an_unknown_number_of_axes_is_refused(layer: nn.Module) -> None:
    with pytest.raises(sf.errors.UnsupportedError, match="how many axes"):
        sf.fix(layer, batch_norm="instance")


def test_frozen_without_statistics_is_refused() -> None:
    with pytest.raises(sf.errors.UnsupportedError, match="no running statistics"):
        sf.fix(nn.BatchNorm2d(8, track_running_stats=False), batch_norm="frozen")


def test_a_model_that_is_private_already_is_refused() -> None:
    model = resnet().eval()
    engine = sf.PrivacyEngine()
    x, y = torch.randn(4, 3, 8, 8), torch.randint(0, 3, (4,))
    engine.make_private(
        module=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
        data_loader=DataLoader(TensorDataset(x, y), batch_size=2),
        noise_multiplier=1.0,
        max_grad_norm=1.0,
    )
    with pytest.raises(sf.errors.UnsupportedError, match="detach"):
        sf.fix(model)
    engine.detach()
    assert isinstance(sf.fix(model)[1], nn.GroupNorm)


@pytest.mark.parametrize(
    "options",
    [{"batch_norm": "layer"}, {"num_groups": 0}, {"num_groups": 2.0}, {"batch_norm": "frozen", "num_groups": 2}],
)
def test_bad_arguments(options: dict[str, Any]) -> None:
    with pytest.raises(sf.errors.ConfigurationError):
        sf.fix(resnet(), **options)
    with pytest.raises(sf.errors.ConfigurationError):
        sf.fix("model")  # type: ignore[arg-type]


def test_spectral_norm_beside_a_batch_norm_is_no_obstacle() -> None:
    model = nn.Sequential(parametrizations.spectral_norm(nn.Conv2d(3, 8, 1)), nn.BatchNorm2d(8))
    assert isinstance(sf.fix(model)[1], nn.GroupNorm)
    assert math.isfinite(per_record(model(torch.randn(2, 3, 4, 4))).sum().item())
