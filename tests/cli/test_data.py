"""Loaders: shapes, fixed splits, and no number that was fitted on the records."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from sfumato.data import DataSet, load
from sfumato.errors import ConfigurationError, DataError


def test_digits() -> None:
    data = load("digits")
    assert (len(data.train), len(data.test), data.input_shape) == (1437, 360, (1, 8, 8))
    assert data.train.x.min() == 0
    assert data.train.x.max() == 1
    assert torch.equal(data.train.x, load("digits").train.x)
    counts = torch.bincount(data.test.y)
    assert counts.min() >= 34  # stratified: about 36 of each


def test_batches_are_gathered_at_once() -> None:
    data = load("digits")
    x, y = data.train.__getitems__([3, 1])
    assert torch.equal(x[0], data.train[3][0])
    assert y.tolist() == [int(data.train[3][1]), int(data.train[1][1])]


def test_idx(idx: Path) -> None:
    data = load(str(idx))
    assert (len(data.train), len(data.test), data.input_shape) == (120, 40, (1, 28, 28))
    assert data.classes[0] == "T-shirt/top"
    raw = data.train.x * 0.3530 + 0.2860  # the published constants, undone
    assert raw.min() >= 0
    assert raw.max() <= 1
    with pytest.raises(ConfigurationError, match="own test part"):
        load(str(idx), test_fraction=0.5)


def test_images(pictures: Path) -> None:
    data = load(str(pictures), test_fraction=0.25)
    assert (len(data.train), len(data.test), data.input_shape) == (18, 6, (1, 8, 8))
    assert data.classes == ("dark", "light")
    assert load(str(pictures), image_size=16).input_shape == (1, 16, 16)


def test_images_with_their_own_test_part(pictures: Path, tmp_path: Path) -> None:
    for part in ("train", "test"):
        (tmp_path / part).mkdir()
        for name in ("dark", "light"):
            (tmp_path / part / name).symlink_to(pictures / name)
    data = load(str(tmp_path))
    assert (len(data.train), len(data.test)) == (24, 24)


def test_images_of_two_sizes(pictures: Path) -> None:
    from PIL import Image

    Image.new("RGB", (9, 9)).save(pictures / "dark" / "z.png")
    with pytest.raises(DataError, match="--image-size"):
        load(str(pictures))
    assert load(str(pictures), image_size=8).input_shape == (3, 8, 8)


def columns(data: DataSet) -> torch.Tensor:
    return torch.cat([data.train.x, data.test.x])


def test_table(table: Path) -> None:
    data = load(str(table), label="label")
    assert (len(data.train), len(data.test)) == (160, 40)
    assert data.classes == ("old", "young")
    assert data.input_shape == (1 + 1 + 16 + 1,)  # two numbers, hashed town, true or false
    assert len(data.warnings) == 2


def test_one_record_does_not_change_how_another_is_encoded(table: Path) -> None:
    """Nothing is fitted: an outlier and a new town in one row leave every other row as it was."""
    before = columns(load(str(table), label="label"))
    lines = table.read_text().splitlines()
    lines[1] = "900,1e9,Atlantis,True,old"
    table.write_text("\n".join(lines) + "\n")
    after = columns(load(str(table), label="label"))
    assert int((before != after).any(dim=1).sum()) == 1


def test_declared_bounds_and_categories(table: Path, tmp_path: Path) -> None:
    (tmp_path / "b.yaml").write_text("age: [0, 100]\nincome: [0, 1e5]\ntown: [Rome, Pisa]\nlabel: [young, old]\n")
    data = load(str(table), label="label", bounds=str(tmp_path / "b.yaml"))
    assert data.classes == ("young", "old")
    assert data.warnings == ()
    assert data.input_shape == (1 + 1 + 2 + 1,)
    assert columns(data).abs().max() <= 1
    towns = columns(data)[:, 2:4].sum(dim=1)
    assert set(towns.tolist()) == {0.0, 1.0}  # Siena was not declared


@pytest.mark.parametrize("ending", ["parquet", "tsv", "csv.gz"])
def test_other_tables(table: Path, tmp_path: Path, ending: str) -> None:
    import pandas as pd

    frame, path = pd.read_csv(table), tmp_path / f"t.{ending}"
    if ending == "parquet":
        frame.to_parquet(path)
    else:
        frame.to_csv(path, index=False, sep="\t" if ending == "tsv" else ",")
    assert torch.allclose(columns(load(str(path), label="label")), columns(load(str(table), label="label")))


@pytest.mark.parametrize("value", [np.inf, np.nan])
def test_values_that_are_no_numbers(tmp_path: Path, value: float) -> None:
    (tmp_path / "t.csv").write_text(f"a,y\n1,0\n{value},1\n2,0\n3,1\n")
    with pytest.raises(DataError, match="column 'a'"):
        load(str(tmp_path / "t.csv"), label="y")


def test_unknown_kind(tmp_path: Path) -> None:
    (tmp_path / "t.txt").write_text("hello")
    with pytest.raises(DataError, match="not a kind of file"):
        load(str(tmp_path / "t.txt"))
    with pytest.raises(DataError, match="class folder"):
        load(str(tmp_path))
