"""Run the command line in process, and small data sets to run it on."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from tests.cli.helpers import Ran, Run, write_idx

from sfumato.cli import main


@pytest.fixture
def sfumato(capfd: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """``sfumato("train", "--epochs", 2)`` in an empty working directory."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments: object) -> Ran:
        capfd.readouterr()
        code = main([str(a) for a in arguments])
        out, err = capfd.readouterr()
        return Ran(code, out, err)

    return run


@pytest.fixture
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A CSV of 200 rows: age, income, town, active, label."""
    rng = np.random.default_rng(0)
    path = tmp_path_factory.mktemp("table") / "people.csv"
    lines = ["age,income,town,active,label"]
    for _ in range(200):
        age, income = rng.integers(18, 90), rng.normal(30_000, 9_000)
        town = rng.choice(["Rome", "Pisa", "Siena"])
        lines.append(f"{age},{income:.2f},{town},{rng.random() < 0.5},{'old' if age > 50 else 'young'}")
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.fixture
def idx(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An idx folder of 120 + 40 images, 28 x 28, half of the files gzipped."""
    rng = np.random.default_rng(0)
    folder = tmp_path_factory.mktemp("tiny-fashion")
    for part, n, ending in (("train", 120, ".gz"), ("t10k", 40, "")):
        y = (np.arange(n) % 10).astype(np.uint8)
        x = (rng.integers(0, 40, (n, 28, 28)) + 20 * y[:, None, None]).astype(np.uint8)
        write_idx(folder / f"{part}-images-idx3-ubyte{ending}", x)
        write_idx(folder / f"{part}-labels-idx1-ubyte{ending}", y)
    return folder


@pytest.fixture
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """ROOT/CLASS/*.png: two classes, 12 grey images each, 8 x 8."""
    from PIL import Image

    rng = np.random.default_rng(0)
    root = tmp_path_factory.mktemp("pictures")
    for level, name in ((40, "dark"), (200, "light")):
        (root / name).mkdir()
        for i in range(12):
            pixels = (level + rng.integers(0, 30, (8, 8))).astype(np.uint8)
            Image.fromarray(pixels).save(root / name / f"{i}.png")
    return root
