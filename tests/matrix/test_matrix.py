"""Every model of the matrix: per-sample gradients equal to the oracle's, on the tier that is promised, and one private
step whose released sum is the clipped one. What cannot be done exactly is refused by name."""

import copy
from pathlib import Path

import pytest
import torch
from tests.matrix import adapters, language, perception, plain
from tests.matrix.language import ROUTED
from tests.matrix.pretrained import logits, picture, text
from tests.oracle.oracle import TIERS, B, Case, Net, agree, call, check, microbatch_of_one, per_record, recorded, to
from torch import Tensor, nn
from torch.utils._pytree import tree_map
from torch.utils.data import DataLoader, Dataset

import sfumato as sf

FAMILIES = {"language": language, "perception": perception, "adapters": adapters, "plain": plain}
MODELS: dict[str, Case] = {name: case for family in FAMILIES.values() for name, case in family.MODELS.items()}
LIBRARIES = [name for name in MODELS if name not in plain.MODELS]  # the plain ones have a file of their own
# What runs one record at a time, and why nothing faster is exact.
ONE_BY_ONE = {
    **{f"{name}, eager": "visits only the experts that someone in the batch chose" for name in ROUTED},
    "Llama + LoHa": "its weight comes from an autograd Function, whose inputs cannot be seen",
    "Llama + OFT": "writes its parameters into a matrix in place",
}

pytestmark = [
    pytest.mark.filterwarnings("ignore:There is a performance drop"),
    pytest.mark.filterwarnings("ignore:Using padding='same'"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning:peft"),
]


def test_the_matrix_is_large_and_almost_all_of_it_is_fast() -> None:
    """At least 45 models, at least 95 % of their trainable parameters above the tier of one record at a time."""
    fast = {n for n, case in MODELS.items() if case.tier != "microbatch"}
    assert len(MODELS) >= 45
    assert len(MODELS) == sum(len(family.MODELS) for family in FAMILIES.values())  # no name twice
    assert fast == MODELS.keys() - ONE_BY_ONE.keys()


@pytest.mark.parametrize("name", LIBRARIES)
def test_exact_in_float64(name: str) -> None:
    tape = check(MODELS[name], torch.float64)
    assert tape.tiers.keys() == {n for n, p in call_model(name).named_parameters() if p.requires_grad}


def call_model(name: str) -> nn.Module:
    torch.manual_seed(1)
    return MODELS[name].build()


@pytest.mark.parametrize("name", LIBRARIES[::3])
def test_exact_in_float32(name: str) -> None:
    check(MODELS[name], torch.float32)


@pytest.mark.parametrize("model", ROUTED)
def test_grouped_products_of_experts(model: str) -> None:
    """The default way of transformers, for which there is no float64 kernel."""
    config, head, more = ROUTED[model]
    torch.manual_seed(1)
    net, exact = (language.routed(config, head, way, **more).build() for way in ("grouped_mm", "batched_mm"))
    exact.load_state_dict(net.state_dict())
    given = text()
    want = microbatch_of_one(exact.double(), given, logits)
    tape, _ = recorded(net, given, logits)
    agree(tape, want, 1e-4)
    assert set(tape.tiers.values()) == {"rule"}


class Records(Dataset):
    """The rows of one batch of arguments."""

    def __init__(self, inputs: object, axis: int):
        self.inputs, self.axis = inputs, axis

    def __len__(self) -> int:
        return B

    def __getitem__(self, b: int) -> object:
        return tree_map(lambda v: v.select(self.axis, b) if isinstance(v, Tensor) else v, self.inputs)


@pytest.mark.parametrize("name", MODELS)
def test_one_private_step_releases_the_clipped_sum(name: str) -> None:
    """Everyone is drawn (rate 1), no noise: p.grad is the clipped sum over the expected batch size, to the letter."""
    case = MODELS[name]
    torch.manual_seed(1)
    model, inputs = case.build().train(case.train).double(), to(case.inputs(), torch.float64)
    if not all(isinstance(v, Tensor) for v in (inputs.values() if isinstance(inputs, dict) else inputs)):
        pytest.skip("not a batch of tensors: covered by the oracle")
    twin = copy.deepcopy(model)
    bound = 0.5
    tape, _ = recorded(twin, inputs, case.loss, "mean", case.batch_dim)
    want = tape.clipped_sum(bound)
    loader = DataLoader(
        Records(inputs, case.batch_dim), batch_size=B, collate_fn=lambda rows: stacked(rows, case.batch_dim)
    )
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    with sf.PrivacyEngine() as engine:
        model, optimizer, loader = engine.make_private(
            module=model,
            optimizer=optimizer,
            data_loader=loader,
            noise_multiplier=0.0,
            max_grad_norm=bound,
            batch_dim=case.batch_dim,
        )
        for batch in loader:
            optimizer.zero_grad()
            case.loss(call(model, batch)).mean().backward()
            released = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
            optimizer.step()
            break
    total = sum(float(w.double().square().sum()) for w in want.values()) ** 0.5
    for n, sum_of_clipped in want.items():
        error = float((released[n] * B - sum_of_clipped).double().norm())
        assert error <= 1e-4 * max(total, bound), n


def stacked(rows: list[object], axis: int) -> object:
    return tree_map(lambda *vs: torch.stack(vs, axis), *rows)


def clip_itself() -> Case:
    return Case(perception.clip, lambda: {**text(), **picture(16)()}, loss=lambda out: per_record(out.logits_per_text))


def reentrant() -> Case:
    def build() -> nn.Module:
        model = language.MODELS["GPT-2, tied head"].build()
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
        return model

    return Case(build, text, loss=logits)


def with_batch_norm() -> Case:
    return perception.entry(
        "ResNetConfig",
        "ResNetForImageClassification",
        picture(32),
        embedding_size=8,
        hidden_sizes=[8, 12],
        depths=[1, 1],
        layer_type="basic",
    )


def router_loss() -> Case:
    """Mixtral's load balancing loss is a product of two means over all tokens of the batch."""
    config, head, more = ROUTED["Mixtral"]
    base = language.routed(config, head, "batched_mm", **more, output_router_logits=True)
    return Case(base.build, lambda: (lambda t: t | {"labels": t["input_ids"]})(text()), loss=lambda out: out.loss[None])


REFUSED = {
    "CLIP, texts against pictures of the batch": (clip_itself, sf.errors.CoupledRecords, "mixed the records"),
    "GPT-2, reentrant checkpointing": (reentrant, sf.errors.UnsupportedError, "use_reentrant=False"),
    "ResNet, not fixed": (with_batch_norm, sf.errors.CoupledRecords, "GroupNorm"),
    "Mixtral with its router loss": (router_loss, sf.SfumatoError, "mixed|expert"),
    "GPT-2 + DoRA": (lambda: adapters.dora_of_conv1d, sf.errors.UnsupportedError, "not registered"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_by_name(name: str) -> None:
    case, error, says = REFUSED[name]
    made = case()
    torch.manual_seed(1)
    model = made.build().train()
    with pytest.raises(error, match=says):
        recorded(model, made.inputs(), made.loss)
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("name", ["GPT-2, tied head", "BERT classifier", "Llama", "ViT"])
def test_checkpointing_without_reentrance_is_exact(name: str) -> None:
    case = MODELS[name]

    def build() -> nn.Module:
        model = case.build()
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        return model

    check(Case(build, case.inputs, case.tier, loss=case.loss, same_forward=False), torch.float64)


@pytest.mark.parametrize("name", ["BERT classifier", "Llama", "ViT"])
def test_trained_with_dropout_the_masks_are_those_of_one_forward(name: str) -> None:
    """The same seed with and without the capture gives the same output: what was run is what is measured."""
    case = MODELS[name]
    torch.manual_seed(1)
    model, inputs = case.build().double(), to(case.inputs(), torch.float64)
    if isinstance(inputs, dict):
        inputs.pop("attention_mask", None)  # records that decide alike run in the order of the plain forward
    for module in model.modules():
        for key, value in vars(module).items():
            if "dropout" in key and isinstance(value, float):
                setattr(module, key, 0.3)
        if isinstance(module, nn.Dropout):
            module.p = 0.3
    torch.manual_seed(7)
    native = case.loss(call(copy.deepcopy(model), inputs))
    torch.manual_seed(7)
    tape, out = recorded(model, inputs, case.loss)
    torch.testing.assert_close(case.loss(out), native)
    assert all(TIERS.index(t) == 0 for t in tape.tiers.values())


def test_a_frozen_part_stays_plain() -> None:
    """Only what is trained is captured: a frozen tower may do what it likes with constants."""
    net = Net(lambda s, x: s.head(s.tower(x)), tower=nn.Linear(4, 4).requires_grad_(False), head=nn.Linear(4, 2))
    tape, _ = recorded(net, (torch.randn(B, 4),))
    assert tape.tiers == {"head.weight": "rule", "head.bias": "rule"}


def test_the_documented_table_is_that_of_the_matrix() -> None:
    text = (Path(__file__).parents[2] / "docs" / "models.md").read_text()
    rows = [line.split(" | ")[0].removeprefix("| ") for line in text.splitlines() if line.startswith("| ")]
    assert sorted(r for r in rows if r != "model") == sorted([*MODELS, *REFUSED])
