"""Which loader a ``--data`` value means."""

from __future__ import annotations

from pathlib import Path

from ..errors import ConfigurationError, DataError
from .clients import FederatedData, simulated
from .dataset import DataSet

TABLES = (".csv", ".csv.gz", ".tsv", ".tsv.gz", ".parquet", ".pq")
DEFAULT_TEST_FRACTION = 0.2
DEFAULT_PUBLIC_FRACTION = 0.1
DIGITS = "digits"
DEFAULT_CLIENTS = 20
DEFAULT_ALPHA = 0.5
CHEM97 = "chem97"


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


def load_federated(
    data: str,
    *,
    clients: int | None = None,
    client_column: str | None = None,
    alpha: float | None = None,
    public_fraction: float | None = None,
    label: str | None = None,
    bounds: str | None = None,
    test_fraction: float | None = None,
    image_size: int | None = None,
) -> FederatedData:
    """Like :func:`load`, and divided: by ``client_column`` of a table, or among ``clients`` simulated ones.

    ``chem97`` has clients of its own. ``public_fraction`` of the training records is set apart as public: by default a
    tenth where everybody has the data anyway, and none of anybody's own.
    """
    if public_fraction is None:
        public_fraction = DEFAULT_PUBLIC_FRACTION if data in (DIGITS, CHEM97) else 0.0
    if not 0 <= public_fraction < 1:
        raise ConfigurationError(f"--public-fraction must lie in [0, 1), got {public_fraction:g}")
    if data == CHEM97 or client_column is not None:
        _refuse("clients that the data itself names", ("--clients", clients), ("--alpha", alpha))
        _refuse("tables", ("--image-size", image_size))
        test = DEFAULT_TEST_FRACTION if test_fraction is None else test_fraction
        if not 0 < test < 1:
            raise ConfigurationError(f"--test-fraction must lie between 0 and 1, got {test:g}")
        from .natural import load_chem97, load_natural

        if data == CHEM97:
            _refuse(CHEM97, ("--label", label), ("--bounds", bounds))
            return load_chem97(column=client_column or "school", test_fraction=test, public_fraction=public_fraction)
        if _kind(data) != "table":
            raise ConfigurationError(f"--client-column names a column of a table; {data} is none")
        if not label:
            raise ConfigurationError(f"{data} is a table: say which column to predict with --label COLUMN")
        return load_natural(
            Path(data), label=label, column=client_column or "", bounds=bounds, test_fraction=test,
            public_fraction=public_fraction,
        )  # fmt: skip
    whole = load(data, label=label, bounds=bounds, test_fraction=test_fraction, image_size=image_size)
    return simulated(
        whole,
        clients=DEFAULT_CLIENTS if clients is None else clients,
        alpha=DEFAULT_ALPHA if alpha is None else alpha,
        public_fraction=public_fraction,
    )


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
