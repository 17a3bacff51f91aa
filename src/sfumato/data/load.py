"""Which loader a ``--data`` value means."""

from __future__ import annotations

from pathlib import Path

from ..errors import ConfigurationError, DataError
from .dataset import DataSet

TABLES = (".csv", ".csv.gz", ".tsv", ".tsv.gz", ".parquet", ".pq")
DEFAULT_TEST_FRACTION = 0.2


def load(
    data: str,
    *,
    label: str | None = None,
    bounds: str | None = None,
    test_fraction: float | None = None,
    image_size: int | None = None,
) -> DataSet:
    """Load ``digits``, an idx folder, a CSV/Parquet table or an image folder.

    An option that the kind of data has no use for raises :class:`ConfigurationError`; data that cannot be read or
    trusted raises :class:`DataError`. Scaling is fixed in advance or declared, never fitted on the records.
    """
    if test_fraction is not None and not 0 < test_fraction < 1:
        raise ConfigurationError(f"--test-fraction must lie between 0 and 1, got {test_fraction}")
    if image_size is not None and image_size < 1:
        raise ConfigurationError(f"--image-size must be at least 1, got {image_size}")
    kind = _kind(data)
    if kind != "table":
        _refuse(kind, ("--label", label), ("--bounds", bounds))
    if kind != "images":
        _refuse(kind, ("--image-size", image_size))
    if kind == "digits":
        from .digits import load_digits

        return load_digits(test_fraction)
    path = Path(data)
    if kind == "idx":
        from .idx import load_idx

        _refuse("an idx folder, which has its own test part", ("--test-fraction", test_fraction))
        return load_idx(path)
    if kind == "images":
        from .images import load_images

        return load_images(path, test_fraction=test_fraction, image_size=image_size)
    from .table import load_table

    if not label:
        raise ConfigurationError(f"{data} is a table: say which column to predict with --label COLUMN")
    return load_table(path, label=label, bounds=bounds, test_fraction=test_fraction or DEFAULT_TEST_FRACTION)


def _kind(data: str) -> str:
    if data == "digits":
        return "digits"
    path = Path(data)
    if path.is_dir():
        return "idx" if any(path.glob("train-images*")) else "images"
    if not path.exists():
        raise DataError(f"no such file or folder: {data}.", fix="give a path, or 'digits' for the embedded data set.")
    if path.name.lower().endswith(TABLES):
        return "table"
    raise DataError(
        f"{data} is not a kind of file that can be read (known: {', '.join(TABLES)}, idx and image folders)"
    )


def _refuse(kind: str, *options: tuple[str, object]) -> None:
    for flag, value in options:
        if value is not None:
            raise ConfigurationError(f"{flag} means nothing for {kind}")
