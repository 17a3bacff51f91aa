"""Image folders: ROOT/{train,test}/CLASS/*.png or ROOT/CLASS/*.png."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from ..errors import ConfigurationError, DataError
from .dataset import DataSet, Records, records, split

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".webp", ".ppm", ".pgm", ".tif", ".tiff")
GREY_MODES = ("1", "L")
DEFAULT_TEST_FRACTION = 0.2


def load_images(root: Path, *, test_fraction: float | None, image_size: int | None) -> DataSet:
    """Images of shape (channels, height, width), scaled from 0..255 to -1..1; class names are the folder names."""
    try:
        from PIL import Image  # noqa: F401
    except ImportError:
        raise ConfigurationError("image folders need Pillow.", fix="pip install 'sfumato[data]'") from None
    if (root / "train").is_dir() and (root / "test").is_dir():
        if test_fraction is not None:
            raise ConfigurationError(f"--test-fraction means nothing here: {root} has its own test folder")
        classes = _classes(root / "train")
        if unknown := sorted(set(_classes(root / "test")) - set(classes)):
            raise DataError(f"{root / 'test'}: classes without training images: {', '.join(unknown)}")
        files = [_files(root / part, classes) for part in ("train", "test")]
        pixels = _stack([path for part in files for path, _ in part], image_size)
        y = np.array([label for part in files for _, label in part])
        cut = len(files[0])
        rows = np.arange(cut), np.arange(cut, len(y))
    else:
        classes = _classes(root)
        listed = _files(root, classes)
        pixels = _stack([path for path, _ in listed], image_size)
        y = np.array([label for _, label in listed])
        rows = split(len(y), test_fraction or DEFAULT_TEST_FRACTION, where=str(root))
    train, test = (_part(pixels, y, part, str(root)) for part in rows)
    return DataSet(
        name=root.resolve().name,
        kind="images",
        train=train,
        test=test,
        classes=classes,
        checked=("Pixels are scaled from 0..255 to -1..1; nothing is fitted on the records.",),
        declared=("The class names (folder names), the image size and the number of channels are public.",),
    )


def _part(pixels: np.ndarray, y: np.ndarray, rows: np.ndarray, where: str) -> Records:
    return records(pixels[rows].astype(np.float32) / 127.5 - 1.0, y[rows], where=where)


def _classes(folder: Path) -> tuple[str, ...]:
    names = tuple(sorted(entry.name for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith(".")))
    if len(names) < 2:
        raise DataError(
            f"{folder} holds {len(names)} class folder(s); an image folder needs ROOT/CLASS/*.png, 2 or more"
        )
    return names


def _files(folder: Path, classes: tuple[str, ...]) -> list[tuple[Path, int]]:
    listed: list[tuple[Path, int]] = []
    for label, name in enumerate(classes):
        if (folder / name).is_dir():
            listed += [(p, label) for p in sorted((folder / name).iterdir()) if p.suffix.lower() in SUFFIXES]
    if not listed:
        raise DataError(f"{folder} holds no images ({', '.join(SUFFIXES)})")
    return listed


def _stack(paths: list[Path], image_size: int | None) -> np.ndarray:
    """(n, channels, height, width) uint8; one channel only if every image is grey."""
    from PIL import Image, UnidentifiedImageError

    grey, arrays = True, []
    for path in paths:
        try:
            with Image.open(path) as image:
                grey = grey and image.mode in GREY_MODES
                picture = image.convert("RGB")
        except (UnidentifiedImageError, OSError) as error:
            raise DataError(f"{path} cannot be read as an image: {error}") from None
        if image_size is not None:
            picture = picture.resize((image_size, image_size), Image.Resampling.BILINEAR)
        arrays.append(np.asarray(picture, dtype=np.uint8))
        if arrays[-1].shape != arrays[0].shape:
            raise DataError(
                f"{path} has another size than {paths[0].name}.", fix="resize the images, or pass --image-size N."
            )
    pixels = np.stack(arrays).transpose(0, 3, 1, 2)
    return pixels[:, :1] if grey else pixels
