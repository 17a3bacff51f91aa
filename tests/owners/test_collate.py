"""With users, which record a row is depends on its place: a collate_fn must keep the order of its list."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from tests.step.harness import chosen
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_sequence, pad_sequence
from torch.utils.data import DataLoader, default_collate

import sfumato as sf
from sfumato.session.collate import in_order

Records = list[tuple[Tensor, Tensor]]


@dataclass
class Batch:
    x: Tensor
    y: Tensor


@dataclass(slots=True)
class Slotted:
    x: Tensor
    y: Tensor


def records(n: int = 6) -> Records:
    lengths = [1 + (5 * i) % 7 for i in range(n)]
    return [(torch.full((length, 2), float(i)), torch.tensor(i)) for i, length in enumerate(lengths)]


def _padded(b: Records) -> tuple[Tensor, Tensor]:
    return pad_sequence([r[0] for r in b], batch_first=True), torch.stack([r[1] for r in b])


def _packed(b: Records) -> dict[str, Any]:
    return {"x": pack_sequence([r[0] for r in b], enforce_sorted=False), "y": torch.stack([r[1] for r in b])}


def _arrays(b: Records) -> tuple[Any, ...]:
    return np.stack([r[1].numpy() for r in b]), [str(int(r[1])) for r in b], [r[0] for r in b], len(b)


def _graphs(b: Records) -> dict[str, Tensor]:
    owner = torch.arange(len(b)).repeat_interleave(torch.tensor([len(r[0]) for r in b]))
    return {"nodes": torch.cat([r[0] for r in b]), "owner": owner, "y": torch.stack([r[1] for r in b])}


def _taken_apart(b: Records) -> Tensor:
    own = [list(r) for r in b]
    b.clear()
    return torch.stack([r.pop() for r in own])


KEEPING: dict[str, Callable[[Records], Any]] = {
    "padded": _padded,
    "time first": lambda b: pad_sequence([r[0] for r in b]),
    "packed": _packed,
    "object": lambda b: Batch(*_padded(b)),
    "slots": lambda b: Slotted(*_padded(b)),
    "arrays and lists": _arrays,
    "with a constant": lambda b: (_padded(b)[1], torch.ones(6, 6)),
    "graphs": _graphs,
    "one row each": lambda b: _graphs([(r[0][:1], r[1]) for r in b]),
    "same noise for all": lambda b: _padded(b)[0] + torch.rand(()) + random.random(),
    "taken apart": _taken_apart,
    "nan": lambda b: _padded(b)[1] * torch.nan,
}


@pytest.mark.parametrize("name", KEEPING)
def test_collate_that_keeps_the_order_passes(name: str) -> None:
    for n in (1, 2, 3, 6):
        before = torch.get_rng_state()
        in_order(KEEPING[name])(records(n))
        once = torch.get_rng_state()
        torch.set_rng_state(before)
        KEEPING[name](records(n))
        assert torch.equal(once, torch.get_rng_state())


def _longest_first(b: Records) -> Records:
    return sorted(b, key=lambda r: -len(r[0]))


REORDERING: dict[str, Callable[[Records], Any]] = {
    "sorted": lambda b: _padded(_longest_first(b)),
    "sorted, time first": lambda b: pad_sequence([r[0] for r in _longest_first(b)]),
    "sorted and packed": lambda b: {"x": [pack_sequence([r[0] for r in _longest_first(b)])]},
    "reversed": lambda b: _padded(b[::-1]),
    "swapped": lambda b: _padded([b[1], b[0], *b[2:]]),
    "shuffled": lambda b: _padded(random.sample(b, len(b))),
    "one of two": lambda b: (_padded(b)[0], _padded(b[::-1])[1]),
    "object": lambda b: Batch(*_padded(b[::-1])),
    "slots": lambda b: Slotted(*_padded(b[::-1])),
    "array": lambda b: np.stack([r[1].numpy() for r in b[::-1]]),
    "strings": lambda b: [str(int(r[1])) for r in b[::-1]],
    "graphs": lambda b: _graphs(b[::-1]),
    "noise for each": lambda b: _padded(b)[1] + torch.randn(len(b)),
}


@pytest.mark.parametrize("name", REORDERING)
def test_collate_that_changes_the_order_is_refused(name: str) -> None:
    for n in (3, 6):
        with pytest.raises(sf.errors.UnsupportedError, match="enforce_sorted=False"):
            _ = [in_order(REORDERING[name])(records(n)) for _ in range(20)]


def test_collate_that_fails_on_another_order_is_refused() -> None:
    b = _longest_first(records())
    with pytest.raises(sf.errors.UnsupportedError, match="another order"):
        in_order(lambda b: pack_sequence([r[0] for r in b]))(b)


def test_errors_of_collate_are_its_own() -> None:
    with pytest.raises(ZeroDivisionError):
        in_order(lambda b: 1 // 0)(records())


def test_collate_of_torch_is_left_alone() -> None:
    assert in_order(default_collate) is default_collate


def by_value(b: Records) -> Any:
    return default_collate(sorted(b, key=lambda r: -float(r[0][0])))


def in_place(b: Records) -> Any:
    return default_collate(list(b))


@pytest.mark.parametrize("workers", [0, 2])
def test_private_loader_with_users_checks_every_batch(workers: int) -> None:
    x = torch.rand(40, 4)
    rows = [(x[i], x[i].sum()) for i in range(40)]
    for collate, users in ((in_place, True), (by_value, False), (by_value, True)):
        model = nn.Linear(4, 1)
        engine = sf.PrivacyEngine()
        model, _, loader = engine.make_private(
            module=model,
            optimizer=torch.optim.SGD(model.parameters(), lr=0.0),
            data_loader=DataLoader(rows, batch_size=20, collate_fn=collate, num_workers=workers),  # type: ignore[arg-type]
            noise_multiplier=0.0,
            max_grad_norm=1.0,
            noise=chosen(14 if users else 40),
            privacy_unit=[0] * 10 + [1 + i // 3 for i in range(29)] + [13] if users else None,
        )
        got = iter(loader)
        if collate is by_value and users:
            with pytest.raises(sf.errors.UnsupportedError, match="keep the order"):
                next(got)
        else:
            assert len(next(got)[0]) == 40
        del got
        engine.detach()
