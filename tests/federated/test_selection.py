"""What is trained: exactly the chosen parameters, read and written as one vector; choices are public or paid for."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

import sfumato as sf
from sfumato.errors import ConfigurationError, DataError, UnsupportedError
from sfumato.federated.parameters.selection import (
    All,
    LastLayers,
    LoRA,
    Named,
    TopK,
    Train,
    Trained,
    choose,
    client_score,
    prepare,
    scores_from_public,
    scores_from_released,
)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 5))
        self.norm = nn.LayerNorm(5)
        self.head = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.body(x)))


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(7, 4)
        self.middle = nn.Linear(4, 4)
        self.out = nn.Linear(4, 7, bias=False)
        self.out.weight = self.embedding.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.middle(self.embedding(x)))


def trainable(model: nn.Module) -> set[str]:
    return {n for n, p in model.named_parameters() if p.requires_grad}


def data(n: int = 40) -> TensorDataset:
    return TensorDataset(torch.randn(n, 4), torch.randint(0, 3, (n,)))


CHOICES: list[tuple[Train, list[str]]] = [
    (All(), [n for n, _ in Net().named_parameters()]),
    (LastLayers(1), ["head.weight", "head.bias"]),
    (LastLayers(2), ["norm.weight", "norm.bias", "head.weight", "head.bias"]),
    (Named(("body.2",)), ["body.2.weight", "body.2.bias"]),
    (Named(("*.bias",)), ["body.0.bias", "body.2.bias", "norm.bias", "head.bias"]),
    (Named(("head.bias", "norm")), ["norm.weight", "norm.bias", "head.bias"]),
    (Named("head.bias"), ["head.bias"]),  # type: ignore[arg-type]
]


@pytest.mark.parametrize(("train", "names"), CHOICES, ids=str)
def test_exactly_the_chosen_parameters_are_trained(train: Train, names: list[str]) -> None:
    model = Net()
    before = {n: p.clone() for n, p in model.named_parameters()}
    trained = prepare(model, train)
    assert list(trained.names) == names
    assert trained.index is None
    assert trainable(model) == set(names)
    assert trained.schema.entries == tuple((n, tuple(before[n].shape)) for n in names)
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())
    assert torch.equal(trained.read(model), torch.cat([before[n].flatten() for n in names]))


@pytest.mark.parametrize(("train", "names"), CHOICES[1:], ids=str)
def test_write_changes_exactly_the_chosen_numbers_in_place(train: Train, names: list[str]) -> None:
    model = Net()
    trained = prepare(model, train)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    objects = {n: id(p) for n, p in model.named_parameters()}
    vector = torch.randn(trained.schema.size)
    trained.write(model, vector)
    assert torch.equal(trained.read(model), vector)
    assert objects == {n: id(p) for n, p in model.named_parameters()}
    changed = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert changed == set(names)
    got = trained.schema.unflatten(vector)
    assert all(torch.equal(model.get_parameter(n), got[n]) for n in names)


def test_read_is_a_copy() -> None:
    model = nn.Sequential(nn.Linear(2, 2, bias=False))
    vector = prepare(model, All()).read(model)
    vector.zero_()
    assert model[0].weight.any()


def test_other_dtypes_are_exchanged_in_float32() -> None:
    model = Net().double()
    trained = prepare(model, LastLayers(1))
    assert trained.read(model).dtype == torch.float32
    trained.write(model, torch.ones(trained.schema.size))
    assert model.head.weight.dtype == torch.float64
    assert (model.head.weight == 1).all()


@pytest.mark.parametrize("shape", [(3,), (18, 1), (19,), ()])
def test_vector_of_another_shape_is_refused(shape: tuple[int, ...]) -> None:
    model = Net()
    trained = prepare(model, LastLayers(1))
    before = trained.read(model)
    with pytest.raises(ConfigurationError):
        trained.write(model, torch.ones(shape))
    assert torch.equal(trained.read(model), before)


def test_all_respects_what_is_frozen_already() -> None:
    model = Net()
    model.body.requires_grad_(False)
    assert prepare(model, All()).names == ("norm.weight", "norm.bias", "head.weight", "head.bias")


def test_preparing_twice_and_a_copy_give_the_same_schema() -> None:
    for train in (All(), LastLayers(1), Named(("norm",)), LoRA(rank=2), TopK(count=2)):
        model = Net()
        first = prepare(model, train)
        assert prepare(copy.deepcopy(model), train).schema.digest == first.schema.digest
        assert prepare(model, train).schema == first.schema


def test_tied_weight_goes_by_its_first_name_once() -> None:
    model = Tied()
    assert prepare(model, All()).names == ("embedding.weight", "middle.weight", "middle.bias")
    trained = prepare(model, Named(("out.weight",)))
    assert trained.names == ("embedding.weight",)
    assert prepare(model, LastLayers(1)).names == ("embedding.weight",)
    trained.write(model, torch.ones(28))
    assert (model.out.weight == 1).all()
    assert model.out.weight is model.embedding.weight


def _shared_memory() -> nn.Module:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    model[1].weight = nn.Parameter(model[0].weight.detach())
    return model


def _statistics(build: Any) -> nn.Module:
    return nn.Sequential(nn.Conv2d(1, 2, 3), build(2), nn.Flatten(), nn.Linear(8, 2))


@pytest.mark.parametrize(
    "build",
    [
        lambda: _statistics(nn.BatchNorm2d),
        lambda: _statistics(nn.BatchNorm2d).eval(),  # local training calls train()
        lambda: _statistics(lambda n: nn.InstanceNorm2d(n, track_running_stats=True)),
        lambda: _statistics(lambda n: nn.BatchNorm2d(n, affine=False)),
        _shared_memory,
        lambda: nn.Sequential(nn.LazyLinear(3)),
    ],
)
def test_models_that_cannot_be_exchanged_are_refused_unchanged(build: Any) -> None:
    model = build()
    flags, modes = trainable(model), [m.training for m in model.modules()]
    with pytest.raises(UnsupportedError) as caught:
        prepare(model, All())
    assert caught.value.where or caught.value.fix
    assert trainable(model) == flags
    assert [m.training for m in model.modules()] == modes


@pytest.mark.parametrize("how", ["group", "instance", "frozen"])
def test_what_fix_makes_of_running_statistics_is_accepted(how: Any) -> None:
    model = sf.fix(_statistics(nn.BatchNorm2d), batch_norm=how)
    trained = prepare(model, All())
    buffers = {n: b.clone() for n, b in model.named_buffers()}
    model.train()
    model(torch.randn(4, 1, 4, 4) * 9).sum().backward()
    assert all(torch.equal(b, buffers[n]) for n, b in model.named_buffers())
    assert not any("running" in n for n in trained.names)


def test_statistics_of_the_batch_alone_leave_nothing_behind() -> None:
    assert prepare(_statistics(lambda n: nn.BatchNorm2d(n, track_running_stats=False)), All()).schema.size > 0


class _Complex(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(3, dtype=torch.complex64))


@pytest.mark.parametrize(
    "call",
    [
        lambda: prepare(Net(), Named(("nothing",))),
        lambda: prepare(Net(), Named(("head", "nothing"))),
        lambda: prepare(Net(), LastLayers(9)),
        lambda: prepare(nn.Tanh(), All()),
        lambda: prepare(Net().requires_grad_(False), All()),
        lambda: prepare(_Complex(), All()),
        lambda: prepare(Net(), "all"),  # type: ignore[arg-type]
        lambda: prepare(Net(), LoRA(targets=("nothing",))),
        lambda: prepare(Net(), LoRA(also=("nothing",))),
        lambda: Named(()),
        lambda: Named((3,)),  # type: ignore[arg-type]
        lambda: LastLayers(0),
        lambda: LoRA(rank=0),
        lambda: LoRA(alpha=-1.0),
        lambda: LoRA(targets=()),
        lambda: TopK(),
        lambda: TopK(0.1, 3),
        lambda: TopK(0.0),
        lambda: TopK(1.1),
        lambda: TopK(count=0),
        lambda: TopK(0.1, granularity="row"),
        lambda: TopK(0.1, by="private", granularity="coordinate"),
    ],
)
def test_bad_choices_are_refused(call: Any) -> None:
    with pytest.raises(ConfigurationError):
        call()


def test_refused_names_leave_the_model_as_it_was() -> None:
    model = Net()
    for train in (Named(("head", "nothing")), LoRA(also=("nothing",)), LoRA(targets=("head", "nothing"))):
        with pytest.raises(ConfigurationError):
            prepare(model, train)
        assert trainable(model) == {n for n, _ in Net().named_parameters()}


def test_raw_scores_are_refused_with_the_reason() -> None:
    with pytest.raises(ConfigurationError, match="probability 1 on a data set and 0 on its neighbour"):
        TopK(0.1, by="raw")


# ---------------------------------------------------------------------------------------------------------- scores


def _oracle(model: nn.Module, records: TensorDataset) -> list[Tensor]:
    """The mean gradient, record by record."""
    model = copy.deepcopy(model).double().eval()
    named = [p for p in model.parameters() if p.requires_grad]
    total = [torch.zeros_like(p) for p in named]
    for x, y in records:
        loss = F.cross_entropy(model(x[None].double()), y[None])
        for t, g in zip(total, torch.autograd.grad(loss, named), strict=True):
            t += g / len(records)
    return total


@pytest.mark.parametrize("batch_size", [7, 256])
def test_public_scores_are_mean_gradients(batch_size: int) -> None:
    model, records = Net(), data()
    prepare(model, TopK(count=2))
    want = _oracle(model, records)
    got = scores_from_public(model, records, F.cross_entropy, batch_size=batch_size)
    rms = torch.stack([g.square().mean().sqrt() for g in want]).float()
    torch.testing.assert_close(got, rms, rtol=1e-4, atol=1e-7)
    fine = scores_from_public(model, records, F.cross_entropy, granularity="coordinate", batch_size=batch_size)
    torch.testing.assert_close(fine, torch.cat([g.abs().flatten() for g in want]).float(), rtol=1e-4, atol=1e-6)
    mine = client_score(model, records, F.cross_entropy, batch_size=batch_size)
    torch.testing.assert_close(mine, rms / rms.norm(), rtol=1e-4, atol=1e-6)


def test_scoring_leaves_the_model_as_it_was() -> None:
    model = nn.Sequential(nn.Linear(4, 3), nn.Dropout(0.5))
    model[1].eval()
    prepare(model, TopK(count=1))
    before = copy.deepcopy(model.state_dict())
    first, second = (client_score(model, data_, F.cross_entropy) for data_ in [data()] * 2)
    assert torch.equal(first, second)
    assert model.training
    assert not model[1].training
    assert all(p.grad is None for p in model.parameters())
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_client_score_has_norm_one_whatever_the_data() -> None:
    model = Net()
    prepare(model, TopK(count=2))
    for scale in (1e-6, 1.0, 1e6):
        x, y = data().tensors
        score = client_score(model, TensorDataset(x * scale, y), F.cross_entropy)
        assert score.shape == (8,)
        assert float(score.norm()) == pytest.approx(1.0, abs=1e-6)
        scaled = client_score(model, TensorDataset(x * scale, y), F.cross_entropy, norm=0.3)
        torch.testing.assert_close(scaled, score * 0.3)
    x, y = data().tensors
    assert not client_score(model, TensorDataset(x * math.nan, y), F.cross_entropy).any()


def test_parameters_without_a_gradient_score_zero() -> None:
    model = Net()
    model.idle = nn.Linear(2, 2)
    prepare(model, TopK(count=2))
    assert (scores_from_public(model, data(), F.cross_entropy)[-2:] == 0).all()


def test_scores_need_data() -> None:
    with pytest.raises(DataError):
        scores_from_public(Net(), TensorDataset(torch.zeros(0, 4), torch.zeros(0, dtype=torch.long)), F.cross_entropy)


def test_released_scores_rank_by_the_mean_update() -> None:
    model = Net()
    trained = prepare(model, TopK(count=1, by="released"))
    vectors = []
    for _ in range(20):
        pieces = trained.schema.unflatten(torch.randn(trained.schema.size))
        pieces["norm.bias"] += 1.0  # below the noise of one release
        vectors.append(trained.schema.flatten(pieces))
    scores = scores_from_released(vectors, trained.schema)
    assert choose(TopK(count=1, by="released"), scores, trained, model).names == ("norm.bias",)
    fine = scores_from_released(vectors, trained.schema, granularity="coordinate")
    torch.testing.assert_close(fine, torch.stack(vectors).mean(0).abs())
    for bad in ([], [torch.ones(3)]):
        with pytest.raises(ConfigurationError):
            scores_from_released(bad, trained.schema)


def test_larger_tensors_have_no_advantage_under_pure_noise() -> None:
    trained = prepare(nn.Sequential(nn.Linear(100, 100), nn.Linear(100, 1)), All())
    scores = scores_from_released([torch.randn(trained.schema.size)], trained.schema)
    assert scores[0] == pytest.approx(scores[2], rel=0.5)


# ---------------------------------------------------------------------------------------------------------- choose


def chosen(train: TopK, scores: list[float] | Tensor, model: nn.Module) -> Trained:
    return choose(train, torch.as_tensor(scores), prepare(model, train), model)


def test_choose_takes_the_highest_tensors_in_the_order_of_the_model() -> None:
    model = Net()
    trained = chosen(TopK(count=3), [0.1, 5.0, 0.2, 0.0, 9.0, 4.0, 0.3, 0.4], model)
    assert trained.names == ("body.0.bias", "norm.weight", "norm.bias")
    assert trainable(model) == set(trained.names)
    assert chosen(TopK(0.01), [1.0, 1.0, 1.0], model).names == ("body.0.bias",)  # ties: the first; at least one
    assert len(chosen(TopK(count=9), [1.0], model).names) == 1


@pytest.mark.parametrize("scores", [[1.0], [1.0] * 9, [math.nan] + [1.0] * 7, [[1.0] * 8]])
def test_scores_that_do_not_fit_are_refused(scores: Any) -> None:
    with pytest.raises(ConfigurationError):
        chosen(TopK(count=1), scores, Net())


def test_coordinates_are_read_and_written_and_the_rest_is_put_back() -> None:
    model = Net()
    train = TopK(0.1, granularity="coordinate")
    everything = prepare(model, train)
    scores = torch.rand(everything.schema.size)
    base = everything.read(model)
    trained = choose(train, scores, everything, model)
    count = math.ceil(0.1 * everything.schema.size)
    assert trained.schema.size == count
    assert trained.index is not None
    whole = torch.cat([torch.full((model.get_parameter(n).numel(),), n in trained.names) for n in everything.names])
    top = scores.topk(count).indices.sort().values
    assert torch.equal(whole.nonzero().view(-1)[trained.index], top)
    assert torch.equal(trained.read(model), base[top])

    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(1.0)  # what local training may do
    assert torch.equal(trained.read(model), base[top] + 1)
    trained.write(model, trained.read(model))
    want = base.clone()
    want[top] += 1
    assert torch.equal(everything.read(model), want)


def test_schema_of_coordinates_tells_other_coordinates_apart() -> None:
    train = TopK(count=2, granularity="coordinate")
    digests = set()
    for positions in ([0, 1], [0, 2], [1, 2]):
        model = nn.Sequential(nn.Linear(2, 2))
        prepared = prepare(model, train)
        scores = torch.zeros(prepared.schema.size)
        scores[positions] = 1.0
        digests.add(choose(train, scores, prepared, model).schema.digest)
    assert len(digests) == 3


def test_a_tensor_with_all_its_coordinates_keeps_its_name() -> None:
    model = nn.Sequential(nn.Linear(2, 2))
    prepared = prepare(model, All())
    train = TopK(count=4, granularity="coordinate")
    trained = choose(train, torch.tensor([1.0, 1, 1, 0, 1, 0]), prepared, model)
    assert [shape for _, shape in trained.schema.entries] == [(3,), (1,)]
    trained = choose(train, torch.tensor([1.0, 1, 1, 1, 0, 0]), prepared, model)
    assert trained.schema.entries == (("0.weight", (2, 2)),)


def test_choice_from_private_scores_is_made_from_a_noised_sum_only_by_the_caller() -> None:
    """One client's score moves a clipped sum by at most 1, which is what the noise is made for."""
    model = Net()
    train = TopK(count=2, by="private")
    trained = prepare(model, train)
    clients = [client_score(model, data(), F.cross_entropy) for _ in range(5)]
    assert all(c.norm() <= 1 + 1e-6 for c in clients)
    total = torch.stack(clients).sum(0) + torch.randn(len(trained.names))
    assert len(choose(train, total, trained, model).names) == 2
