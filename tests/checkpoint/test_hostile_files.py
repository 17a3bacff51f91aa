"""Damaged and forged files: only typed errors, nothing run, and a model that is whole, before or after."""

from __future__ import annotations

import copy
import hashlib
import io
import json
import pickle
import random
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.checkpoint.training import everything, net, save, train
from torch import nn

from sfumato.errors import DataError, SfumatoError
from sfumato.session import checkpoint

DANGEROUS = {"exec", "compile", "import", "os.system", "os.exec", "subprocess.Popen", "pickle.find_class", "os.remove"}
heard: list[str] | None = None


def listen(event: str, arguments: tuple[object, ...]) -> None:
    if heard is not None and event in DANGEROUS:
        heard.append(f"{event} {arguments}")


sys.addaudithook(listen)


@pytest.fixture
def whole(tmp_path: Path) -> bytes:
    model, optimizers = net(torch.optim.Adam)()
    train(model, optimizers, range(3))
    extra = {"scheduler": {"last_epoch": 3, "milestones": (1, 2)}, "mean": [torch.ones(2), float("inf")]}
    return save(tmp_path / "run.ckpt", model, optimizers, extra=extra).read_bytes()


@contextmanager
def silence() -> Iterator[None]:
    """Nothing is run, imported or deleted while a file is read and judged."""
    global heard
    heard = []
    try:
        yield
    finally:
        found, heard = heard, None
    assert not found


def refused(path: Path, match: str | None = None) -> None:
    with silence(), pytest.raises(DataError, match=match):
        checkpoint.load(path)


def mutated(data: bytes, other: bytes, rng: random.Random) -> bytes:
    at, length = rng.randrange(len(data)), int.from_bytes(data[:8], "little")
    early = rng.randrange(8 + length)
    match rng.randrange(10):
        case 0:
            return data[:at]
        case 1:
            return data[:at] + bytes([data[at] ^ 1 << rng.randrange(8)]) + data[at + 1 :]
        case 2:  # in the header, where the document is
            return data[:early] + rng.randbytes(1) + data[early + 1 :]
        case 3:
            return data[:early] + rng.randbytes(rng.randrange(1, 40)) + data[early:]
        case 4:
            return data[:early] + data[early + rng.randrange(1, 40) :]
        case 5:
            return data[:at] + other[at:]
        case 6:
            return rng.choice([0, length - 1, length + 1, len(data), 2**63, 2**64 - 1]).to_bytes(8, "little") + data[8:]
        case 7:
            return data + rng.randbytes(rng.randrange(1, 9))
        case 8:
            return data[:at] + bytes(min(64, len(data) - at)) + data[at + 64 :]
        case _:
            digits = [m.start() for m in re.finditer(rb"[0-9]", data[: 8 + length])]
            one = rng.choice(digits)
            return data[:one] + rng.choice(b"0123456789").to_bytes(1, "little") + data[one + 1 :]


def test_mutated_files_are_refused(whole: bytes, tmp_path: Path) -> None:
    rng, path, cases = random.Random(1), tmp_path / "mutated", 0
    model, optimizers = net(torch.optim.Adam)()
    other = save(tmp_path / "other", model, optimizers, extra=[1]).read_bytes()
    while cases < 1000:
        data = mutated(whole, other, rng)
        if data in (whole, other):
            continue
        path.write_bytes(data)
        refused(path)
        cases += 1


# -- forged: the digest is right, the content is not ----------------------------------------------------------------


def sealed(document: Any, tensors: dict[str, torch.Tensor], **metadata: str) -> bytes:
    """A file whose digest is right, as someone who knows the format would make it."""
    from safetensors.torch import save as safe

    text = document if isinstance(document, str) else json.dumps(document)
    blank = {"format": "sfumato-checkpoint", "version": "1", "sha256": "0" * 64, "document": text} | metadata
    data = safe(tensors, blank)
    return data.replace(b'"sha256":"' + b"0" * 64, b'"sha256":"' + hashlib.sha256(data).hexdigest().encode(), 1)


def opened(data: bytes) -> tuple[Any, dict[str, torch.Tensor]]:
    from safetensors.torch import load as safe

    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    return json.loads(header["__metadata__"]["document"]), safe(data)


HOSTILE: list[Any] = [
    None, True, -1, 0, 1e308, 10**400, "", "x", "0" * 64, [], {}, [[]], [[1, 2, 3]], {"dict": 3}, {"dict": [[[], 1]]},
    {"dict": [[{}, 1]]}, {"dict": [["params", 1]]}, {"float": "1"}, {"float": "nan"}, {"tensor": "no"}, {"tensor": []},
    {"tuple": {}}, {"counter": [["a", "b"]]}, {"pickle": "gASVJgAAAAAAAACMBXBvc2l4"}, {"tensor": "module.scale"},
    {"__reduce__": "os.system"}, {"dict": [["a", 1], ["a", 2]]}, {"counter": []},
]  # fmt: skip


def places(node: Any, here: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    yield here
    children = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    for key, child in children:
        yield from places(child, (*here, key))


def forged(document: Any, rng: random.Random, spots: list[tuple[Any, ...]]) -> Any:
    changed = copy.deepcopy(document)
    for _ in range(rng.choice([1, 1, 2, 5])):
        *way, last = rng.choice(spots)
        node = changed
        try:
            for key in way:
                node = node[key]
            match rng.randrange(4):
                case 0:
                    del node[last]
                case 1 if isinstance(node, list):
                    node.insert(last, copy.deepcopy(rng.choice(node)))
                case _:
                    node[last] = copy.deepcopy(rng.choice(HOSTILE))
        except (KeyError, IndexError, TypeError):
            continue  # an earlier change removed it
    return changed


def test_forged_documents_load_whole_or_not_at_all(whole: bytes, tmp_path: Path) -> None:
    document, tensors = opened(whole)
    spots = [place for place in places(document) if place]
    rng, path = random.Random(2), tmp_path / "forged"
    model, optimizers = net(torch.optim.Adam)()
    fresh = copy.deepcopy(model.state_dict()), copy.deepcopy(optimizers[0].state_dict())
    before, unfit = everything(model, optimizers), 0
    for _ in range(1000):
        path.write_bytes(sealed(forged(document, rng, spots), tensors))
        try:
            with silence():
                checkpoint.apply(checkpoint.load(path), model, optimizers)
        except SfumatoError:
            unfit += 1
            assert everything(model, optimizers) == before
        else:  # what was forged is a number or a part of ``extra``
            model.load_state_dict(fresh[0])
            optimizers[0].load_state_dict(fresh[1])
            before = everything(model, optimizers)
    assert unfit > 500


FORGED: dict[str, Any] = {
    "not JSON": "{",
    "a constant": '{"position":NaN}',
    "a row": [],
    "nothing": {},
    "deep": "[" * 100_000,
    "deep and closed": '{"extra":' * 900 + "1" + "}" * 900,
}


@pytest.mark.parametrize("document", FORGED.values(), ids=FORGED.keys())
def test_forged_text(document: Any, tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(sealed(document, {"a": torch.ones(1)}))
    refused(tmp_path / "x")


@pytest.mark.parametrize("part", ["extra", "position", "plan", "module", "optimizers"])
@pytest.mark.parametrize("depth", [300, 900, 5000])
def test_deep_parts(whole: bytes, part: str, depth: int, tmp_path: Path) -> None:
    document, tensors = opened(whole)
    document[part] = "HERE"
    text = json.dumps(document).replace('"HERE"', "[" * depth + "]" * depth)
    (tmp_path / "x").write_bytes(sealed(text, tensors))
    try:
        checkpoint.load(tmp_path / "x")
    except DataError:
        return
    assert (part, depth) == ("extra", 300), "only there may lists be nested"


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"position": {"steps": 3, "c": 1e999}}, "Infinity"),
        ({"position": {"steps": -3}}, "not a count"),
        ({"position": {}}, "not a count"),
        ({"ledger_head": "0" * 64}, "after 3 releases"),
        ({"ledger_head": 3}, "not a SHA-256"),
        ({"extra": None}, "tensors are not those"),
        ({"extra": {"tensor": "nowhere"}}, "tensors are not those"),
    ],
)
def test_documents_that_contradict_themselves(whole: bytes, change: dict[str, Any], match: str, tmp_path: Path) -> None:
    document, tensors = opened(whole)
    (tmp_path / "x").write_bytes(sealed(document | change, tensors))
    refused(tmp_path / "x", match)


@pytest.mark.parametrize(
    ("old", "new", "match"),
    [
        ('["lr", 0.02]', '["lr", "0.02"]', "lr is '0.02'"),
        ('["betas", {"tuple": [0.9, 0.999]}]', '["betas", true]', "betas is True"),
        ('["params", [0, 1]]', '["params", [1, 0]]', "other parameters than it names"),
        ('["params", [0, 1]]', '["params", 3]', "does not fit"),
        ('[[0, {"dict"', '[[99, {"dict"', "does not fit"),
    ],
)
def test_forged_optimizers(whole: bytes, old: str, new: str, match: str, tmp_path: Path) -> None:
    """Judged before anything changes: a state of another kind or shape would only fail in a later step."""
    document, tensors = opened(whole)
    text = json.dumps(document)
    assert old in text
    not_applied(tmp_path / "x", sealed(text.replace(old, new, 1), tensors), match)


def test_a_position_beyond_the_largest_number(whole: bytes, tmp_path: Path) -> None:
    document, tensors = opened(whole)
    text = json.dumps(document)
    assert '"max_grad_norm": 1.25' in text
    (tmp_path / "x").write_bytes(sealed(text.replace('"max_grad_norm": 1.25', '"max_grad_norm": 1e999'), tensors))
    refused(tmp_path / "x", "position.max_grad_norm is inf")


def test_forged_shapes_of_a_state(whole: bytes, tmp_path: Path) -> None:
    document, tensors = opened(whole)
    sums = [name for name in tensors if name.endswith("['exp_avg']")]
    small, large = (next(n for n in sums if tensors[n].shape == shape) for shape in [(6,), (6, 6)])
    tensors[large] = tensors[small].clone()
    not_applied(tmp_path / "x", sealed(document, tensors), "exp_avg of .* has shape")


def not_applied(path: Path, data: bytes, match: str) -> None:
    path.write_bytes(data)
    model, optimizers = net(torch.optim.Adam)()
    before = everything(model, optimizers)
    with silence(), pytest.raises(SfumatoError, match=match):
        checkpoint.apply(checkpoint.load(path), model, optimizers)
    assert everything(model, optimizers) == before


@pytest.mark.parametrize(
    ("metadata", "match"),
    [
        ({"format": "other"}, "is not a Sfumato checkpoint"),
        ({"version": "2"}, "this release knows '1'"),
        ({"sha256": "f" * 64}, "digest does not match"),
        ({"sha256": "x"}, "0 digests"),
    ],
)
def test_foreign_and_newer_files(whole: bytes, metadata: dict[str, str], match: str, tmp_path: Path) -> None:
    document, tensors = opened(whole)
    (tmp_path / "x").write_bytes(sealed(document, tensors, **metadata))
    refused(tmp_path / "x", match)


class Payload:
    def __reduce__(self) -> Any:
        return exec, ("raise SystemExit('ran')",)


def plain_weights() -> bytes:
    from safetensors.torch import save as safe

    return safe({"weight": torch.ones(2)})


def pickled() -> bytes:
    file = io.BytesIO()
    torch.save({"model": nn.Linear(1, 1).state_dict(), "x": Payload()}, file)
    return file.getvalue()


@pytest.mark.parametrize(
    "make",
    [bytes, lambda: b"\0" * 8, lambda: b"\0" * 100, plain_weights, pickled, lambda: pickle.dumps(Payload())],
    ids=["empty", "eight", "zeros", "safetensors", "torch.save", "pickle"],
)
def test_files_of_other_kinds(make: Any, tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(make())
    refused(tmp_path / "x", "not a Sfumato checkpoint|does not hold")
