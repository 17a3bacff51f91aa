"""Adapters: nothing changes until B is trained, gradients are exact for each record, merging gives a plain model."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from tests.oracle.oracle import microbatch_of_one, per_record
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import sfumato as sf
from sfumato.errors import ConfigurationError, UnsupportedError
from sfumato.federated.parameters.lora import Adapted, adapters, inject, merge
from sfumato.federated.parameters.selection import All, LoRA, prepare


class Attention(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.query, self.key, self.value = (nn.Linear(width, width) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(self.query(x), self.key(x), self.value(x))


class Net(nn.Module):
    """(B, T, 6) to (B, 3)."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 8)
        self.attention = Attention(8)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.attention(torch.tanh(self.first(x))).mean(1))


NAMES = ("attention.query", "attention.key", "attention.value")


def alive(model: nn.Module) -> nn.Module:
    """B as if it had been trained."""
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, Adapted):
                module.lora_b.normal_(std=0.3)
    return model


def tensors(n: int = 12) -> tuple[Tensor, Tensor]:
    return torch.randn(n, 5, 6), torch.randint(0, 3, (n,))


def test_attention_is_adapted_and_nothing_changes_at_first() -> None:
    model, (x, _) = Net(), tensors()
    before = model(x)
    objects = {id(p) for p in model.parameters()}
    trained = prepare(model, LoRA(rank=2))
    assert trained.names == tuple(f"{n}.lora_b" for n in NAMES)
    assert {n for n, p in model.named_parameters() if p.requires_grad} == set(trained.names)
    assert trained.schema.size == 3 * 8 * 2
    assert objects <= {id(p) for p in model.parameters()}
    assert torch.equal(model(x), before)
    assert not torch.equal(alive(model)(x), before)


def test_a_model_without_attention_is_adapted_everywhere_but_where_it_is_trained_whole() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    assert inject(copy.deepcopy(model)) == ("0", "2")
    trained = prepare(model, LoRA(rank=1, also=("2",)))
    assert trained.names == ("0.lora_b", "2.weight", "2.bias")
    assert prepare(copy.deepcopy(model), LoRA(rank=1, also=("2",))).schema == trained.schema


@pytest.mark.parametrize(
    ("targets", "names"),
    [
        (("query",), ("attention.query",)),
        (("attention.key", "head"), ("attention.key", "head")),
        (("attention.*",), NAMES),
        (("*",), ("first", *NAMES, "head")),
    ],
)
def test_targets_are_names_ends_and_patterns(targets: tuple[str, ...], names: tuple[str, ...]) -> None:
    assert inject(Net(), targets=targets) == names


def test_a_is_public_and_the_same_everywhere() -> None:
    models = [Net() for _ in range(3)]
    prepare(models[0], LoRA(rank=2))
    torch.rand(5)
    prepare(models[1], LoRA(rank=2, targets=("query",)))  # other layers do not shift its numbers
    prepare(models[2], LoRA(rank=2, seed=1))
    a, b, c = (m.attention.query.lora_a for m in models)
    assert torch.equal(a, b)
    assert not torch.equal(a, c)
    assert not torch.equal(a, models[0].attention.key.lora_a)
    # Fixed for good: A is not sent, and both sides may run different versions.
    torch.testing.assert_close(a[0, :3], torch.tensor(FROZEN), rtol=0, atol=1e-7)
    big = Adapted(nn.Linear(400, 3), "x", rank=50, alpha=1.0, freeze_a=True, seed=0).lora_a
    assert float(big.var()) * 400 == pytest.approx(1.0, rel=0.05)


FROZEN = [-0.4141172, 0.5348580, -0.5890722]


@pytest.mark.parametrize("freeze_a", [True, False])
def test_merge_gives_a_plain_model_that_computes_the_same(freeze_a: bool) -> None:
    plain = Net().double()
    model, x = copy.deepcopy(plain), torch.randn(4, 5, 6, dtype=torch.float64)
    weights = {id(p) for p in model.parameters()}
    prepare(model, LoRA(rank=3, freeze_a=freeze_a))
    want = alive(model)(x)
    assert merge(model) is model
    torch.testing.assert_close(model(x), want, rtol=1e-12, atol=1e-12)
    assert not torch.allclose(plain(x), want)
    assert {id(p) for p in model.parameters()} == weights
    assert set(model.state_dict()) == set(plain.state_dict())
    plain.load_state_dict(model.state_dict())
    assert merge(plain) is plain


def test_weight_is_that_of_the_plain_layer() -> None:
    layer = nn.Sequential(nn.Linear(4, 3))
    inject(layer, rank=2)
    x = torch.randn(5, 4)
    torch.testing.assert_close(F.linear(x, alive(layer)[0].weight, layer[0].bias), layer(x))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["f64", "f32"])
@pytest.mark.parametrize(
    "train",
    [LoRA(rank=2), LoRA(rank=2, freeze_a=False), LoRA(rank=2, also=("head",)), LoRA(3, targets=("*",))],
    ids=str,
)
def test_per_sample_gradients_are_those_of_the_record_alone(train: LoRA, dtype: torch.dtype) -> None:
    model = Net().to(dtype)
    trained = prepare(model, train)
    alive(model)
    x = tensors(6)[0].to(dtype)
    with sf.record(model) as tape:
        per_record(model(x)).mean().backward()
    want = microbatch_of_one(copy.deepcopy(model).double(), (x.double(),), per_record)
    assert set(want) == set(trained.names)
    assert set(tape.tiers.values()) == {"rule"}, "a factored rule, no gradient is ever stored for each record"
    norms = sum(g.flatten(1).square().sum(1) for g in want.values())
    tol = 1e-9 if dtype == torch.float64 else 1e-4
    torch.testing.assert_close(tape.sq_norms().double(), norms, rtol=tol, atol=tol)
    factors = (0.7 / norms.sqrt()).clamp(max=1.0)
    for name, got in tape.clipped_sum(0.7).items():
        summed = (want[name] * factors.view(-1, *[1] * (want[name].dim() - 1))).sum(0)
        torch.testing.assert_close(got.double(), summed, rtol=tol, atol=tol)


@pytest.mark.parametrize("freeze_a", [True, False])
def test_private_training_moves_the_adapters_alone(freeze_a: bool) -> None:
    model, (x, y) = Net(), tensors(24)
    trained = prepare(model, LoRA(rank=2, freeze_a=freeze_a))
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    engine = sf.PrivacyEngine()
    _, optimizer, loader = engine.make_private(
        module=model,
        optimizer=optimizer,
        data_loader=DataLoader(TensorDataset(x, y), batch_size=8),
        noise_multiplier=0.5,
        max_grad_norm=1.0,
    )
    for _ in range(3):
        for a, b in loader:
            optimizer.zero_grad()
            F.cross_entropy(model(a), b).backward()
            optimizer.step()
    assert set(engine.tiers.values()) == {"rule"}
    engine.detach()
    changed = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert changed == set(trained.names)


def test_averaging_is_exact_with_a_frozen_and_not_otherwise() -> None:
    for freeze_a in (True, False):
        clients = []
        for k in range(2):
            model = nn.Sequential(nn.Linear(4, 3))
            trained = prepare(model, LoRA(rank=2, freeze_a=freeze_a))
            torch.manual_seed(k)
            trained.write(model, torch.randn(trained.schema.size))
            model[0].base.weight.data.zero_()
            clients.append(model)
        mean = copy.deepcopy(clients[0])
        trained.write(mean, sum(trained.read(m) for m in clients) / 2)
        exact = torch.allclose(mean[0].weight, (clients[0][0].weight + clients[1][0].weight) / 2, atol=1e-6)
        assert exact == freeze_a


# --------------------------------------------------------------------------------------------------- shapes of models


def test_a_layer_used_twice_stays_shared() -> None:
    model = nn.ModuleDict({"a": nn.Linear(3, 3), "b": nn.Tanh()})
    model["c"] = model["a"]
    inject(model)
    assert isinstance(model["a"], Adapted)
    assert model["a"] is model["c"]
    merge(model)
    assert type(model["c"]) is nn.Linear
    assert model["a"] is model["c"]


def _tied() -> nn.Module:
    model = nn.ModuleDict({"embed": nn.Embedding(7, 4), "mid": nn.Linear(4, 4), "out": nn.Linear(4, 7, bias=False)})
    model["out"].weight = model["embed"].weight
    return model


def test_tied_weights_and_multi_head_attention_are_left_out_or_refused() -> None:
    assert inject(_tied()) == ("mid",)
    with pytest.raises(UnsupportedError, match="shares its weight"):
        inject(_tied(), targets=("out",))
    layer = nn.TransformerEncoderLayer(8, 2, 12, batch_first=True, dropout=0.0)
    with pytest.raises(UnsupportedError, match="MultiheadAttention"):
        inject(layer, targets=("out_proj",))
    assert inject(layer) == ("linear1", "linear2")
    alive(layer)
    x = torch.randn(3, 5, 8)
    slow = layer(x)
    layer.eval()
    with torch.no_grad():  # the fast path reads the weights of linear1 and linear2 instead of calling them
        torch.testing.assert_close(layer(x), slow, rtol=1e-4, atol=1e-5)


def test_refusals_leave_the_model_as_it_was() -> None:
    for model, train, error in (
        (Net(), LoRA(targets=("query", "nothing")), ConfigurationError),
        (Net(), LoRA(targets=("query",), also=("attention",)), UnsupportedError),
        (nn.Linear(3, 3), LoRA(), ConfigurationError),
        (nn.Linear(3, 3), LoRA(targets=("*",)), UnsupportedError),
        (nn.Sequential(nn.Conv1d(2, 2, 1)), LoRA(), ConfigurationError),
    ):
        with pytest.raises(error):
            prepare(model, train)
        assert not any(isinstance(m, Adapted) for m in model.modules())
        assert all(p.requires_grad for p in model.parameters())


def test_preparing_again_keeps_the_adapters_and_refuses_other_ones() -> None:
    model = Net()
    prepare(model, LoRA(rank=2))
    held = prepare(alive(model), LoRA(rank=2)).read(model)
    assert held.any()
    assert torch.equal(prepare(copy.deepcopy(model), LoRA(rank=2)).read(model), held)
    for other in (LoRA(rank=3), LoRA(rank=2, seed=1), LoRA(rank=2, alpha=1.0), LoRA(rank=2, targets=("query",))):
        with pytest.raises(ConfigurationError, match="adapters already"):
            prepare(model, other)
    merge(model)
    assert adapters(model) == ()
    assert prepare(model, LoRA(rank=3)).schema.size == 3 * 8 * 3


def test_parametrized_and_changed_linear_layers_are_no_targets() -> None:
    class Noisy(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            return super().forward(input).square()

    model = nn.Sequential(Noisy(3, 3), nn.utils.parametrizations.weight_norm(nn.Linear(3, 3)), nn.Linear(3, 3))
    assert inject(model) == ("2",)


# --------------------------------------------------------------------------------------------------------- transformers

HF: dict[str, dict[str, Any]] = {
    "BERT classifier": {"also": ("classifier",)},
    "GPT-2, tied head": {},
    "Llama": {},
    "T5, tied, relative bias": {"targets": ("q", "v", "wo")},
}


@pytest.mark.parametrize("name", HF)
def test_transformers(name: str) -> None:
    pytest.importorskip("transformers")
    from tests.matrix.language import MODELS
    from tests.oracle.oracle import call, to

    case = MODELS[name]
    model = to_double(case.build())
    inputs = to(case.inputs(), torch.float64)
    before = case.loss(call(model, inputs))
    trained = prepare(model, LoRA(rank=2, **HF[name]))
    assert all("attn" in n or "attention" in n.lower() or name.startswith("T5") or "class" in n for n in trained.names)
    torch.testing.assert_close(case.loss(call(model, inputs)), before)
    alive(model)
    with sf.record(model) as tape:
        case.loss(call(model, inputs)).mean().backward()
    want = microbatch_of_one(model, inputs, case.loss)
    assert set(want) == set(trained.names)
    assert set(tape.tiers.values()) == {"rule"}
    norms = sum(g.flatten(1).square().sum(1) for g in want.values())
    torch.testing.assert_close(tape.sq_norms(), norms, rtol=1e-8, atol=1e-8)
    for key, got in tape.clipped_sum(1e9).items():
        torch.testing.assert_close(got, want[key].sum(0), rtol=1e-8, atol=1e-8)
    out = case.loss(call(model, inputs))
    torch.testing.assert_close(case.loss(call(merge(model), inputs)), out, rtol=1e-9, atol=1e-9)
    prepare(model.requires_grad_(True), All())


def to_double(model: nn.Module) -> nn.Module:
    return model.double().train()
