"""The research source: reproducible, copyable, apart from the global generators."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch

from sfumato.errors import ConfigurationError
from sfumato.noise import Research


def test_a_seed_reproduces_noise_and_coins() -> None:
    a, b, c = Research(5), Research(5), Research(6)
    assert torch.equal(a.normal((9,), std=2.0), b.normal((9,), std=2.0))
    assert (a.uniform(9) == b.uniform(9)).all()
    assert not torch.equal(a.normal((9,), std=2.0), c.normal((9,), std=2.0))


def test_the_number_of_coins_does_not_shift_the_noise() -> None:
    a, b = Research(5), Research(5)
    a.uniform(10)
    b.uniform(11)
    assert torch.equal(a.normal((9,), std=1.0), b.normal((9,), std=1.0))


def test_without_a_seed_runs_differ_and_can_be_repeated() -> None:
    a, b = Research(), Research()
    assert a.seed != b.seed
    assert torch.equal(a.normal((9,), std=1.0), Research(a.seed).normal((9,), std=1.0))


def test_copies_continue_the_stream() -> None:
    a = Research(1)
    a.normal((3,), std=1.0)
    copies = [copy.deepcopy(a), pickle.loads(pickle.dumps(a))]
    expected = a.normal((9,), std=1.0)
    for other in copies:
        assert torch.equal(other.normal((9,), std=1.0), expected)


@pytest.mark.parametrize("seed", [-1, 2**64, 1.0, "1", True])
def test_bad_seeds(seed: int) -> None:
    with pytest.raises(ConfigurationError):
        Research(seed)
