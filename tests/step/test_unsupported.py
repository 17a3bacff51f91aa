"""Models that cannot be made private are refused by name, before anything is changed."""

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import sfumato as sf


class _Complex(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(2, 2, dtype=torch.complex64))


def _models() -> dict[str, nn.Module]:
    return {
        "data parallel": nn.DataParallel(nn.Linear(2, 2)),
        "compiled": torch.compile(nn.Linear(2, 2), backend="eager"),
        "scripted": torch.jit.trace(nn.Linear(2, 2), torch.zeros(1, 2)),
        "complex": _Complex(),
    }


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("name", ["data parallel", "compiled", "scripted", "complex"])
def test_refused_by_name(name: str) -> None:
    model = _models()[name]
    loader = DataLoader(TensorDataset(torch.zeros(4, 2)), batch_size=2)
    with pytest.raises(sf.errors.UnsupportedError):
        sf.PrivacyEngine().make_private(
            module=model,
            optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
            data_loader=loader,
            noise_multiplier=1.0,
            max_grad_norm=1.0,
        )
    assert not any("forward" in vars(m) for m in model.modules() if not isinstance(m, torch.jit.ScriptModule)) or (
        name == "compiled"
    )
