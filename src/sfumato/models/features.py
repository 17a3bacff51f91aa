"""Frozen features under a trained head: the features of a record are computed once, not at every step."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..errors import CoupledRecords

CHUNK = 50  # small: a scattering network makes 81 maps of every image


class Features(nn.Module):
    """``head(features(x))``; ``features`` is frozen, the same for every record and free of the training data.

    Since nothing in ``features`` is trained, training the head on stored features is the same training, and a record's
    features depend on that record alone, so clipping the head's gradients bounds its whole influence.
    """

    def __init__(self, features: nn.Module, head: nn.Module):
        super().__init__()
        self.features = features.requires_grad_(False)
        self.head = head

    def forward(self, x: Tensor) -> Tensor:
        """(B, *record) -> (B, classes)."""
        result: Tensor = self.head(self.features(x))
        return result


def extract(features: nn.Module, x: Tensor, device: torch.device) -> Tensor:
    """Features of each record of ``x`` (n, *record), in evaluation mode, on the CPU.

    Raises :class:`CoupledRecords` if features of random records depend on what they are computed with.
    """
    features.eval()
    with torch.no_grad():
        probe = torch.rand(3, *x.shape[1:], device=device)
        together = features(probe)
        alone = torch.cat([features(record[None]) for record in probe])
        if not torch.allclose(together, alone, rtol=1e-3, atol=1e-4):
            raise CoupledRecords("The frozen features of a record depend on the other records of its batch.")
        return torch.cat([features(part.to(device)).cpu() for part in x.split(CHUNK)])
