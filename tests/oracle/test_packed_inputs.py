"""A packed sequence as the model's own input, as a collate function makes it."""

from collections import UserDict
from types import SimpleNamespace

import pytest
import torch
from tests.oracle.oracle import B, R, agree
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pack_sequence, pad_packed_sequence
from torch.utils.data import DataLoader, Dataset

import sfumato as sf

T, D, H = 6, 3, 4
SORTED, MIXED = torch.tensor([6, 5, 3, 2]), torch.tensor([3, 6, 2, 5])


class Reader(nn.Module):
    """Reads a packed batch to its last state, or pads the outputs again."""

    def __init__(self, kind: type[nn.Module], padded: bool):
        super().__init__()
        self.r, self.o, self.padded = kind(D, H, 2, bidirectional=True), nn.Linear(2 * H, 2), padded

    def forward(self, packed: PackedSequence) -> Tensor:
        out, state = self.r(packed)
        if self.padded:
            return self.o(pad_packed_sequence(out, batch_first=True, total_length=T + 1)[0]).sum(1)
        last = state[0] if isinstance(state, tuple) else state
        return self.o(torch.cat([last[-1], last[-2]], 1))


def one_by_one(model: nn.Module, x: Tensor, lengths: Tensor) -> dict[str, Tensor]:
    rows = []
    for b in range(B):
        single = pack_padded_sequence(x[b : b + 1, : lengths[b]], lengths[b : b + 1], batch_first=True)
        grads = torch.autograd.grad(model(single).square().sum(), list(model.parameters()))
        rows.append(grads)
    return {n: torch.stack([r[k] for r in rows]) for k, (n, _) in enumerate(model.named_parameters())}


@pytest.mark.parametrize("padded", [False, True], ids=["state", "padded"])
@pytest.mark.parametrize("lengths", [SORTED, MIXED], ids=["sorted", "mixed"])
@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_rows_of_a_packed_input_have_their_owners(kind: type[nn.Module], lengths: Tensor, padded: bool) -> None:
    model, x = Reader(kind, padded).double(), R(B, T, D).double()
    want = one_by_one(model, x, lengths)
    packed = pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=lengths is SORTED)
    with sf.record(model, loss_reduction="sum") as tape:
        model(packed).square().sum().backward()
    agree(tape, want, 1e-9)
    assert set(tape.tiers.values()) == {"rule"}


@pytest.mark.parametrize("kind", ["dict", "tuple", "mapping", "object"])
def test_packed_inputs_are_found_in_containers(kind: str) -> None:
    model, x = Reader(nn.GRU, False).double(), R(B, T, D).double()
    want = one_by_one(model, x, MIXED)
    forward = model.forward
    taken = {"tuple": lambda v: v[1][0], "object": lambda v: v.p}.get(kind, lambda v: v["p"])
    model.forward = lambda given: forward(taken(given))
    packed = pack_padded_sequence(x, MIXED, batch_first=True, enforce_sorted=False)
    given = {
        "dict": {"p": packed},
        "tuple": (R(B, 1), [packed]),
        "mapping": UserDict(p=packed),
        "object": SimpleNamespace(p=packed),
    }[kind]
    with sf.record(model, loss_reduction="sum") as tape:
        model(given).square().sum().backward()
    agree(tape, want, 1e-9)


def test_padding_a_packed_input_to_the_longest_is_refused() -> None:
    model = Reader(nn.LSTM, padded=False)
    model.forward = lambda p: model.o(pad_packed_sequence(model.r(p)[0], batch_first=True)[0]).sum(1)
    packed = pack_padded_sequence(R(B, T, D), MIXED, batch_first=True, enforce_sorted=False)
    with pytest.raises(sf.errors.CoupledRecords, match="total_length"), sf.record(model):
        model(packed)


class Ragged(Dataset):
    def __len__(self) -> int:
        return 8

    def __getitem__(self, i: int) -> tuple[Tensor, int]:
        generator = torch.Generator().manual_seed(i)
        return 100 * torch.randn(2 + i % 4, D, generator=generator), i % 2


def packing(rows: list[tuple[Tensor, int]]) -> tuple[PackedSequence, Tensor]:
    return pack_sequence([x for x, _ in rows], enforce_sorted=False), torch.tensor([y for _, y in rows])


def test_a_loader_that_packs_trains_and_clips() -> None:
    model = Reader(nn.LSTM, padded=False)
    with sf.PrivacyEngine() as engine:
        model, optimizer, loader = engine.make_private(
            module=model,
            optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
            data_loader=DataLoader(Ragged(), batch_size=8, collate_fn=packing),
            noise_multiplier=0.0,
            max_grad_norm=0.1,
        )
        for x, y in loader:
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x), y).backward()
            norm = sum(float(p.grad.square().sum()) for p in model.parameters()) ** 0.5
            assert 0 < norm <= 0.1 * (1 + 1e-6)
            optimizer.step()
        assert engine.steps >= 1


def test_a_packed_batch_of_another_size_is_refused() -> None:
    model = Reader(nn.LSTM, padded=False)
    with sf.PrivacyEngine() as engine:
        model, _, loader = engine.make_private(
            module=model,
            optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
            data_loader=DataLoader(Ragged(), batch_size=8, collate_fn=packing),
            noise_multiplier=0.0,
            max_grad_norm=0.1,
        )
        batches = iter(loader)
        next(batches)
        with pytest.raises(sf.errors.RowsMismatch):
            model(packing([Ragged()[i] for i in range(3)])[0])
