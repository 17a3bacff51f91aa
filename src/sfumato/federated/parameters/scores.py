"""How much each parameter matters: scores by which :class:`.choices.TopK` chooses, from sources that are paid for.

The score of a tensor is the root mean square of its gradient or update: what training it gains for every number that
has to be noised.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from sfumato import _validate
from sfumato.errors import ConfigurationError, DataError

from ..client.participant import batches
from ..wire.schema import Schema

Loss = Callable[[Any, Any], Tensor]


def scores_from_public(
    model: nn.Module, data: Any, loss: Loss, *, granularity: str = "tensor", batch_size: int = 256
) -> Tensor:
    """Scores of the parameters with ``requires_grad``, from the gradient of ``loss`` on public (input, target) pairs.

    They cost nothing only because the data are public. ``loss`` is a mean over a batch; the model runs in eval mode
    and is left as it was. Returns (tensors,) or (numbers,) float32. Raises ``DataError`` if there are no data.
    """
    _validate.one_of("granularity", granularity, ("tensor", "coordinate"))
    gradients = _gradients(model, data, loss, batch_size)
    if granularity == "coordinate":
        return torch.cat([g.reshape(-1).abs() for g in gradients]).float()
    return _root_mean_squares(gradients)


def scores_from_released(vectors: Sequence[Tensor], schema: Schema, *, granularity: str = "tensor") -> Tensor:
    """Scores from noised updates (d,) that were released, and so charged, in earlier rounds: their mean.

    Free, as whatever is computed from releases; un-noised updates are no releases. Returns (tensors,) or (numbers,)
    float32. Raises ``ConfigurationError`` for no vectors, or vectors that are not those of ``schema``.
    """
    _validate.one_of("granularity", granularity, ("tensor", "coordinate"))
    if not vectors or any(tuple(vector.shape) != (schema.size,) for vector in vectors):
        raise ConfigurationError(
            f"scores need at least one released vector, each of {schema.size} numbers.",
            found=[tuple(vector.shape) for vector in vectors],
            where="vectors",
        )
    mean = torch.stack([vector.detach().double() for vector in vectors]).mean(0)
    if granularity == "coordinate":
        return mean.abs().float()
    return _root_mean_squares(mean.split([math.prod(shape) for _, shape in schema.entries]))


def client_score(model: nn.Module, data: Any, loss: Loss, *, norm: float = 1.0, batch_size: int = 256) -> Tensor:
    """(tensors,) float32 of length ``norm``: what a client answers when it is asked for scores.

    PRIVATE: it is only for a sum that is clipped, charged and noised. ``norm`` is the clip bound, so that clipping
    loses nothing and noise made for the bound drowns nothing. Adding or removing a client changes the clipped sum by at
    most the bound; a change within a client's data, by at most twice that. All 0 if no gradient is finite and not 0.
    """
    _validate.positive("norm", norm)
    scores = _root_mean_squares(_gradients(model, data, loss, batch_size)).double()
    length = float(torch.linalg.vector_norm(scores))
    return (scores * (norm / length)).float() if 0.0 < length < math.inf else torch.zeros(len(scores))


def _gradients(model: nn.Module, data: Any, loss: Loss, batch_size: int) -> list[Tensor]:
    """The mean gradient of each trained parameter over all of ``data``, float64; nothing of the model is changed."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    totals = [torch.zeros_like(p, dtype=torch.float64) for p in parameters]
    modes = {module: module.training for module in model.modules()}
    seen = 0
    try:
        model.eval()
        with torch.enable_grad():
            for x, y in batches(data, _validate.count("batch_size", batch_size), torch.Generator()):
                size = len(cast(Any, y))
                found = torch.autograd.grad(loss(model(x), y), parameters, allow_unused=True)
                for total, gradient in zip(totals, found, strict=True):
                    if gradient is not None:
                        total.add_(gradient.detach(), alpha=size)
                seen += size
    finally:
        for module, mode in modes.items():
            module.training = mode
    if seen == 0:
        raise DataError("there are no records to score parameters with.", where="data")
    return [total / seen for total in totals]


def _root_mean_squares(tensors: Sequence[Tensor]) -> Tensor:
    return torch.stack([t.double().square().mean().sqrt() for t in tensors]).float()
