"""Users with several records: drawn together, clipped together, charged per user."""

from __future__ import annotations

import datetime
import math
import uuid
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats
from tests.neighbors.models import CASES, Case
from tests.statistical.checks import ALPHA, check_rate
from tests.step.harness import chosen, data, distance, loss, mlp, norm, train, world
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset

import sfumato as sf
from sfumato.sampling import group, physical_units

USERS = [2, 0, 1, 0, 2, 0, 0, 3, 0, 1, 0]  # user 0 has six records, user 3 has one
ORDER = [2, 0, 1, 3]  # as they first occur


def draw(case: Case, x: Tensor, y: Tensor, users: list[int], taken: list[int] | None, **options: Any) -> Any:
    """(clipped sums, public facts) of one step that draws the units ``taken`` (None: all)."""
    torch.manual_seed(7)
    n = len(set(users))
    w = world(
        case.build(),
        (x, y),
        batch_size=len(x),
        sampling=sf.Poisson(1 - 1e-10),  # one step an epoch, and yet some may be left out
        noise=chosen(n, taken),
        privacy_unit=users,
        **{"noise_multiplier": 0.0, "max_grad_norm": 0.5, **options},
    )
    before = {k: p.detach().clone() for k, p in w.model.named_parameters()}
    sums: dict[str, Tensor] = {}
    sizes = []
    for xs, ys in w.loader:
        sizes.append(len(xs))
        F.cross_entropy(w.model(xs), ys, reduction=options.get("loss_reduction", "mean")).backward()
        sums = {k: g.double() * w.engine.plan.expected_batch_size for k, g in w.grads.items()}
        w.optimizer.step()
    if not sums:
        sums = {k: (before[k] - p.detach()).double() / 0.1 for k, p in w.model.named_parameters()}
    entries = [{k: e[k] for k in ("event", "step", "note")} for e in w.engine.ledger.entries()]
    facts = {"plan": asdict(w.engine.plan), "entries": entries, "length": len(w.loader), "steps": w.engine.steps}
    return sums, facts, sizes


def expected(case: Case, x: Tensor, y: Tensor, users: list[int], bound: float) -> dict[str, Tensor]:
    """Plain autograd: the summed loss of each user, clipped, summed."""
    torch.manual_seed(7)
    model = case.build()
    total: dict[str, Tensor] = {}
    for user in set(users):
        own = [i for i, u in enumerate(users) if u == user]
        value = F.cross_entropy(model(x[own]), y[own], reduction="sum")
        grads = torch.autograd.grad(value, list(model.parameters()))
        size = norm(dict(zip(map(str, range(99)), grads, strict=False)))
        for (name, _), g in zip(model.named_parameters(), grads, strict=True):
            total[name] = total.get(name, 0) + g.double() * min(1.0, bound / size)
    return total


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("physical", [None, 1, 3, 6, 8])
@pytest.mark.parametrize("name", [n for n, c in CASES.items() if c.loss == "cross_entropy"])
def test_sum_is_that_of_users_clipped_one_by_one(name: str, physical: int | None, reduction: str) -> None:
    case = CASES[name]
    torch.manual_seed(1)
    x, y = case.inputs(11), torch.randint(0, 3, (11,))
    for bound in (0.3, 1e6):
        sums, _, sizes = draw(
            case, x, y, USERS, None, max_grad_norm=bound, max_physical_batch_size=physical, loss_reduction=reduction
        )
        want = expected(case, x, y, USERS, bound)
        assert distance(sums, want) <= 1e-5 * max(1.0, norm(want))
        assert sum(sizes) == 11
        assert max(sizes) <= max(physical or 11, 6)


@pytest.mark.parametrize("physical", [None, 3])
@pytest.mark.parametrize("poison", [None, float("nan"), 1e38, 1e15])
@pytest.mark.parametrize("name", ["mlp", "attention", "conv", "tied"])
def test_one_user_moves_the_sum_by_at_most_the_bound(name: str, poison: float | None, physical: int | None) -> None:
    case, c = CASES[name], 0.05
    torch.manual_seed(2)
    x, y = case.inputs(11), torch.randint(0, 3, (11,))
    if poison is not None and not case.words:
        x[3] = poison
    sums, facts, _ = draw(case, x, y, USERS, None, max_grad_norm=c, max_physical_batch_size=physical)
    for gone in range(4):
        left = [k for k in range(4) if k != gone]
        others, same, _ = draw(case, x, y, USERS, left, max_grad_norm=c, max_physical_batch_size=physical)
        assert facts == same
        assert math.isfinite(moved := distance(sums, others))
        assert moved <= c * (1 + 1e-6)


def test_clipping_by_record_would_let_a_user_move_the_sum_further() -> None:
    """The replay has power: the same data, protected record by record."""
    case = CASES["mlp"]
    torch.manual_seed(2)
    x, y = case.inputs(11)[:1].expand(11, -1).clone(), torch.zeros(11, dtype=torch.long)
    everybody = [0] * 11
    sums, _, _ = draw(case, x, y, list(range(11)), None, max_grad_norm=0.05)
    none, _, _ = draw(case, x, y, list(range(11)), [], max_grad_norm=0.05)
    assert distance(sums, none) > 0.5
    sums, _, _ = draw(case, x, y, everybody, None, max_grad_norm=0.05)
    assert distance(sums, none) <= 0.05 * (1 + 1e-6)


def test_dropout_masks_differ_between_the_records_of_a_user() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 64), nn.Dropout(0.5), nn.Linear(64, 3))
    x = torch.randn(1, 4).expand(6, 4).clone()
    w = world(
        model,
        (x, torch.zeros(6).long()),
        noise=chosen(2),
        batch_size=6,
        noise_multiplier=0.0,
        privacy_unit=[0] * 3 + [1] * 3,
    )
    for xs, ys in w.loader:
        assert not torch.equal(model[1](model[0](xs))[0], model[1](model[0](xs))[1])
        F.cross_entropy(model(xs), ys).backward()
    assert 0 < norm(w.grads) * w.engine.plan.expected_batch_size <= 2


# ------------------------------------------------------------------------------------------------------- sampling


def test_users_are_drawn_with_all_their_records_at_the_rate_that_is_charged() -> None:
    rng = np.random.default_rng(0)
    users = rng.integers(0, 80, 300).tolist()
    w = world(
        mlp(),
        (torch.arange(300.0).unsqueeze(1).expand(300, 5), torch.zeros(300).long()),
        batch_size=30,
        privacy_unit=users,
    )
    plan = w.engine.plan
    names = list(dict.fromkeys(users))
    assert (plan.unit, plan.dataset_size, plan.sample_rate, len(w.loader)) == ("user", len(names), 0.1, 10)
    assert plan.expected_batch_size == round(0.1 * len(names))
    taken, epochs = [], 60
    for _ in range(epochs):
        for x, _ in w.loader:
            rows = set(x[:, 0].long().tolist())
            found = {users[i] for i in rows}
            assert rows == {i for i, u in enumerate(users) if u in found}
            taken.append([name in found for name in names])
    missing = epochs * len(w.loader) - len(taken)  # empty draws never reach the loop
    hits = np.concatenate([np.array(taken), np.zeros((missing, len(names)), bool)])
    check_rate(int(hits.sum()), hits.size, 0.1)
    for k in range(len(names)):
        assert stats.binomtest(int(hits[:, k].sum()), len(hits), 0.1).pvalue >= ALPHA / len(names)
    check_rate(int((hits[:, 1:] & hits[:, :-1]).sum()), len(hits) * (len(names) - 1), 0.01)


def test_shuffled_users_take_part_once_an_epoch_and_pay_without_amplification() -> None:
    users = np.random.default_rng(0).integers(0, 20, 100)
    w = world(mlp(), data(100), batch_size=25, sampling=sf.Shuffle(), privacy_unit=torch.tensor(users))
    assert w.engine.plan.expected_batch_size == 5
    seen = [t.unit for t in _tokens(w)]
    assert [int(u[-1]) + 1 for u in seen] == [5, 5, 5, 5]
    train(w)
    (paid, covered) = sorted(w.engine.ledger.events(), key=lambda e: e.mechanism, reverse=True)
    assert (paid.mechanism, paid.unit, paid.adjacency, covered.unit) == ("gaussian", "user", "zero-out", "user")


def _tokens(w: Any) -> list[Any]:
    w.loader.batch_sampler.tokens.clear()
    for _ in w.loader.batch_sampler:
        pass
    found = list(w.loader.batch_sampler.tokens)
    w.loader.batch_sampler.tokens.clear()
    return found


def test_event_and_epsilon_are_those_of_users() -> None:
    w = world(tensors=data(60), batch_size=6, noise_multiplier=1.2, privacy_unit=[i // 4 for i in range(60)])
    train(w)
    (event,) = w.engine.ledger.events()
    assert event == sf.Event("poisson-gaussian", 1.2, 0.1, "add-remove", "user", "poisson")
    want = sf.accounting.epsilon(noise_multiplier=1.2, sample_rate=0.1, steps=10, delta=1e-5)
    assert float(w.engine.get_epsilon(delta=1e-5)) == pytest.approx(float(want), rel=1e-9)


def test_ledgers_of_records_and_of_users_do_not_mix() -> None:
    ledger = sf.Ledger()
    first = world(engine=sf.PrivacyEngine(ledger=ledger))
    train(first)
    first.engine.detach()
    with pytest.raises(sf.errors.UnsupportedError, match="protect one record"):
        world(engine=sf.PrivacyEngine(ledger=ledger), privacy_unit=list(range(24)))


def test_target_epsilon_for_users() -> None:
    model, engine = mlp(), sf.PrivacyEngine()
    base = DataLoader(torch.utils.data.TensorDataset(*data(60)), batch_size=6)
    model, optimizer, loader = engine.make_private_with_epsilon(
        module=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
        data_loader=base,
        target_epsilon=2.0,
        target_delta=1e-5,
        epochs=2,
        max_grad_norm=1.0,
        privacy_unit=lambda record: int(record[1]) + 10 * int(record[0][0] > 0),
    )
    for _ in range(2):
        for x, y in loader:
            optimizer.zero_grad()
            loss(model, x, y).backward()
            optimizer.step()
    assert 1.9 <= float(engine.get_epsilon(delta=1e-5)) <= 2.0
    assert {e.unit for e in engine.ledger.events()} == {"user"}


@pytest.mark.parametrize("physical", [None, 2])
def test_capped_users_bring_a_fresh_choice_of_their_records(physical: int | None) -> None:
    users = [0] * 9 + [1, 1, 2]
    w = world(
        mlp(),
        (torch.arange(12.0).unsqueeze(1).expand(12, 5), torch.zeros(12).long()),
        batch_size=6,
        privacy_unit=users,
        max_records_per_unit=3,
        max_physical_batch_size=physical,
        sampling=sf.Poisson(1.0),
        noise="research",
    )
    drawn: list[int] = []
    for _ in range(200):
        batch: list[int] = []
        for x, y in w.loader:
            batch += x[:, 0].long().tolist()
            loss(w.model, x, y).backward()
        assert len(batch) == len(set(batch)) == 6
        assert sum(i < 9 for i in batch) == 3
        drawn += batch
    for i in range(9):
        check_rate(drawn.count(i), 200, 1 / 3)
    assert w.engine.plan.expected_batch_size == 3


def test_empty_draws_of_users() -> None:
    w = world(mlp(), data(12), batch_size=2, noise=chosen(3, []), privacy_unit=[i % 3 for i in range(12)])
    before = [p.detach().clone() for p in w.model.parameters()]
    train(w)
    assert w.engine.steps == w.charges == 6
    assert all(not torch.equal(a, b) for a, b in zip(before, w.model.parameters(), strict=True))
    assert w.engine.last_step.batch_size == 0


def test_last_step_counts_users() -> None:
    w = world(
        mlp(), data(12), batch_size=12, noise=chosen(3), privacy_unit=[i % 3 for i in range(12)], max_grad_norm=1e-3
    )
    train(w)
    assert (w.engine.last_step.batch_size, w.engine.last_step.clip_fraction) == (3, 1.0)


# ------------------------------------------------------------------------------------------- with declared rows


def test_users_and_views_together() -> None:
    torch.manual_seed(0)
    x, y = data(6)
    users = [0, 0, 1, 2, 2, 2]
    model = mlp()
    views = torch.stack([x, x + 0.1, -x], 1)  # (6, 3, 5)
    w = world(
        model, (views, y), noise=chosen(3), batch_size=6, noise_multiplier=0.0, max_grad_norm=0.2, privacy_unit=users
    )
    want: dict[str, Tensor] = {}
    for user in range(3):
        own = [i for i in range(6) if users[i] == user]
        value = F.cross_entropy(model(views[own].flatten(0, 1)), y[own].repeat_interleave(3), reduction="sum") / 3
        grads = dict(
            zip([n for n, _ in model.named_parameters()], torch.autograd.grad(value, model.parameters()), strict=True)
        )
        for n, g in grads.items():
            want[n] = want.get(n, 0) + g.double() * min(1.0, 0.2 / norm(grads))
    for xs, ys in w.loader:
        with sf.rows(views=3):
            F.cross_entropy(model(xs.flatten(0, 1)), ys.repeat_interleave(3)).backward()
    got = {n: g.double() * w.engine.plan.expected_batch_size for n, g in w.grads.items()}
    assert distance(got, want) <= 1e-5


# ------------------------------------------------------------------------------------------------------ arguments


class Fields(Dataset[Any]):
    def __len__(self) -> int:
        return 4

    def __getitem__(self, i: int) -> dict[str, Any]:
        return {"x": torch.randn(5), "user": torch.tensor(i // 2)}


def _units(given: Any, dataset: Any = None) -> Any:
    model = mlp()
    engine = sf.PrivacyEngine()
    base = DataLoader(torch.utils.data.TensorDataset(*data(4)) if dataset is None else dataset, batch_size=2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    engine.make_private(
        module=model, optimizer=optimizer, data_loader=base, noise_multiplier=1.0, max_grad_norm=1.0, privacy_unit=given
    )
    return engine.plan.dataset_size


@pytest.mark.parametrize(
    "given",
    [
        [7, 7, 8, 8],
        ("a", "a", "b", "b"),
        torch.tensor([1, 1, 0, 0]),
        np.array([1.5, 1.5, 2, 2]),
        [(1, 2), (1, 2), (3,), (3,)],
        [torch.tensor([i // 2]) for i in range(4)],
        [(torch.tensor(i // 2), "a") for i in range(4)],
        [frozenset({torch.tensor([[i // 2]])}) for i in range(4)],
        [np.array([i // 2]) for i in range(4)],
        [uuid.UUID(int=i // 2) for i in range(4)],
        [datetime.date(2020, 1, 1 + i // 2) for i in range(4)],
    ],
)
def test_ids_of_many_kinds(given: Any) -> None:
    assert _units(given) == 2


def test_field_of_the_records() -> None:
    assert _units("user", Fields()) == 2
    assert _units(lambda record: record["user"], Fields()) == 2


@pytest.mark.parametrize(
    "given", [[1, 2, 3], [1, 1, None, 2], [1.0, float("nan"), 2.0, 2.0], [[1], [1], [2], [2]], 5, "user"]
)
def test_ids_that_name_nobody_are_refused(given: Any) -> None:
    with pytest.raises(sf.errors.ConfigurationError, match="privacy_unit"):
        _units(given)


class Person:
    """Equal to itself only."""


@pytest.mark.parametrize(
    "name",
    [
        torch.tensor([1, 2]),
        torch.tensor(torch.nan),
        np.array([1, 2]),
        Person(),
        Person,
        (1, Person()),
        (1, None),
        (1, math.nan),
        ((torch.tensor([1, 2]),), 1),
        frozenset({torch.tensor([1, 2])}),
    ],
    ids=repr,
)
def test_ids_that_are_equal_to_no_other_are_refused(name: Any) -> None:
    with pytest.raises(sf.errors.ConfigurationError, match="of record 3") as raised:
        _units([1, 1, 2, name])
    assert raised.value.where == "privacy_unit"
    with pytest.raises(sf.errors.ConfigurationError, match="of record 0"):
        _units(lambda record: name)


def test_missing_ids_of_tables_are_refused() -> None:
    pandas = pytest.importorskip("pandas")
    for missing in (pandas.NA, pandas.NaT, None):
        with pytest.raises(sf.errors.ConfigurationError, match="of record 1"):
            _units(pandas.Series([1, missing, 2, 2], dtype=object))


class Frame:
    """As a table with four columns."""

    columns = tuple("abcd")

    def __len__(self) -> int:
        return 4

    def __iter__(self) -> Iterator[str]:
        return iter(self.columns)


@pytest.mark.parametrize(
    "given",
    [
        dict.fromkeys(range(4), 1),
        dict.fromkeys(range(4), 1).keys(),
        set(range(4)),
        frozenset(range(4)),
        Frame(),
        (i for i in range(4)),
    ],
    ids=lambda given: type(given).__name__,
)
def test_ids_without_the_order_of_the_records_are_refused(given: Any) -> None:
    with pytest.raises(sf.errors.ConfigurationError, match="one id for each of the 4 records"):
        _units(given)


def test_column_of_another_length_is_refused() -> None:
    class Short(Fields):
        column_names = ("user",)

        def __getitem__(self, i: Any) -> Any:
            return [0, 0, 1] if i == "user" else super().__getitem__(i)

    with pytest.raises(sf.errors.ConfigurationError, match="found 3"):
        _units("user", Short())


def test_units_of_another_data_set_are_refused() -> None:
    with pytest.raises(sf.errors.ConfigurationError, match="found 3"):
        _units(group([1, 1, 2]))


def test_trainings_begun_together_do_not_mix_units_in_a_ledger() -> None:
    ledger = sf.Ledger()
    one, other = (
        world(engine=sf.PrivacyEngine(ledger=ledger), privacy_unit=unit) for unit in (None, [i // 2 for i in range(24)])
    )
    train(one)
    spent, before = one.engine.get_epsilon(1e-5), {k: p.clone() for k, p in other.model.named_parameters()}
    with pytest.raises(sf.errors.LedgerError, match="one record"):
        train(other)
    assert one.engine.get_epsilon(1e-5) == spent
    assert all(torch.equal(before[k], p) for k, p in other.model.named_parameters())


def test_cap_without_units_is_refused() -> None:
    with pytest.raises(sf.errors.ConfigurationError, match="max_records_per_unit"):
        world(max_records_per_unit=3)


def test_grouping_and_cutting() -> None:
    units = group(USERS)
    parts = units.drawn(np.arange(4), lambda n: np.zeros(n))
    assert [p.tolist() for p in parts] == [[i for i, u in enumerate(USERS) if u == name] for name in ORDER]
    cut = physical_units(parts, 3)
    assert [[len(p) for p in c] for c in cut] == [[2], [6], [2, 1]]
    assert physical_units([], 3) == physical_units([], None) == []
