"""What every test starts from: one thread, fixed seeds for whatever is not the privacy noise."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch

# Many small operations on few cores: more threads only fight each other, and sums would depend on their number.
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seeds() -> None:
    """Initial weights and toy data repeat; secure noise never does, because no seed reaches it."""
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002  (libraries under test may still read the global generator)
    torch.manual_seed(0)
