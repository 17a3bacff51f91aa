"""One file of tensors and a JSON document (safetensors), written whole or not at all, and sealed by a digest."""

import hashlib
import json
import os
import re
import stat
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import Any

from torch import Tensor

from sfumato.errors import ConfigurationError, DataError, UnsupportedError

FORMAT = "sfumato-checkpoint"
VERSION = "1"

_BLANK = "0" * 64
_SEAL = re.compile(rb'"sha256":"([0-9a-f]{64})"')  # JSON escapes quotes inside strings, so it matches nowhere else
_LONGEST_HEADER = 100_000_000  # bytes; what safetensors itself allows


def write(path: str | os.PathLike[str], document: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    """Put the file at ``path`` in one atomic step, durable when this returns, with mode 0600.

    On any failure whatever was at ``path`` is still there, unchanged.
    """
    library = _safetensors()
    target = Path(path).absolute()
    text = json.dumps(document, sort_keys=True, separators=(",", ":"), allow_nan=False)
    metadata = {"format": FORMAT, "version": VERSION, "sha256": _BLANK, "document": text}
    for name, tensor in {tensor.dtype: (name, tensor) for name, tensor in tensors.items()}.values():
        try:
            library.torch.save({"one": tensor.new_empty(0)})
        except KeyError as error:
            raise UnsupportedError(
                f"{name} is {tensor.dtype}, which a safetensors file cannot hold.", found=str(tensor.dtype), where=name
            ) from error
    data = library.torch.save(tensors, metadata)
    header = data[8 : 8 + int.from_bytes(data[:8], "little")]
    if len(header) > _LONGEST_HEADER:
        raise UnsupportedError(
            f"The document has {len(text)} characters, too many for a safetensors file.", where="extra"
        )
    (at,) = (8 + seal.start(1) for seal in _SEAL.finditer(header))
    digest = hashlib.sha256(data).hexdigest().encode()
    try:
        handle, draft = tempfile.mkstemp(prefix=f".{target.name[:100]}.", dir=target.parent)  # mode 0600
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(memoryview(data)[:at])
                file.write(digest)
                file.write(memoryview(data)[at + 64 :])
                file.flush()
                os.fsync(file.fileno())
            os.replace(draft, target)
        except BaseException:
            with suppress(FileNotFoundError):
                os.unlink(draft)
            raise
        folder = os.open(target.parent, os.O_RDONLY)
        try:
            os.fsync(folder)  # the file's name must be as durable as its content
        finally:
            os.close(folder)
    except (OSError, ValueError) as error:
        raise DataError(
            f"checkpoint {target} cannot be written: {error}; an earlier one of this name is unchanged.",
            found=str(target),
            where=str(target),
            fix="check the folder, its permissions and the room on the disk.",
        ) from error


def read(path: str | os.PathLike[str]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """(document, tensors) of an intact file of a known version; ``DataError`` for any other. Runs nothing of it."""
    library = _safetensors()
    where = str(path)
    data = _bytes(path)
    length = int.from_bytes(data[:8], "little")
    if len(data) < 8 or length > min(len(data) - 8, _LONGEST_HEADER):
        raise _unusable(where, "is not a Sfumato checkpoint, or was truncated")
    header = data[8 : 8 + length]
    metadata = _object(header, where).get("__metadata__")
    if not isinstance(metadata, dict) or metadata.get("format") != FORMAT:
        raise _unusable(where, "is not a Sfumato checkpoint", metadata)
    if metadata.get("version") != VERSION:
        raise DataError(
            f"{where} has checkpoint version {metadata.get('version')!r}; this release knows {VERSION!r}.",
            found=metadata.get("version"),
            where=where,
            fix="use the Sfumato release that wrote it, or a newer one.",
        )
    _check_seal(data, header, where)
    document = _object(metadata.get("document"), where)
    try:
        tensors = library.torch.load(data)
    except (library.SafetensorError, KeyError, TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise _unusable(where, f"holds tensors that cannot be read ({error})") from error
    return document, tensors


def _check_seal(data: bytes, header: bytes, where: str) -> None:
    seals = list(_SEAL.finditer(header))
    if len(seals) != 1:
        raise _unusable(where, f"has {len(seals)} digests instead of one", len(seals))
    at = 8 + seals[0].start(1)
    digest = hashlib.sha256(memoryview(data)[:at])
    digest.update(_BLANK.encode())
    digest.update(memoryview(data)[at + 64 :])
    if digest.hexdigest().encode() != seals[0][1]:
        raise _unusable(where, "was damaged or changed after it was written: its digest does not match")


def _bytes(path: str | os.PathLike[str]) -> bytes:
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise _unusable(str(path), "is not a regular file")
        return Path(path).read_bytes()
    except FileNotFoundError as error:
        raise DataError(f"There is no checkpoint {path}.", found=str(path), where=str(path)) from error
    except OSError as error:
        raise _unusable(str(path), f"cannot be read: {error}") from error
    except DataError:
        raise
    except ValueError as error:  # a null byte in the path
        raise _unusable(repr(path), f"cannot be read: {error}") from error


def _object(text: object, where: str) -> dict[str, Any]:
    try:
        found = json.loads(text, parse_constant=_no_constant)  # type: ignore[arg-type]
    except (TypeError, ValueError, RecursionError) as error:
        raise _unusable(where, f"does not hold the JSON it should ({error})") from error
    if not isinstance(found, dict):
        raise _unusable(where, "does not hold the JSON it should", type(found).__name__)
    return found


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is no number of JSON")


def _unusable(where: str, what: str, found: object = None) -> DataError:
    return DataError(f"{where} {what}.", found=found, where=where, fix="load another checkpoint of this run.")


def _safetensors() -> Any:
    try:
        import safetensors
        import safetensors.torch
    except ImportError as error:
        raise ConfigurationError(
            "A checkpoint is a safetensors file, and safetensors is not installed.",
            found="safetensors",
            fix="pip install safetensors",
        ) from error
    return safetensors
