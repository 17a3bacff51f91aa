"""The end of a step: noise on the clipped sums, and the line that the log may show."""

import logging
from collections.abc import Mapping

import torch
from torch import Tensor

from sfumato.ghost import wide_dtype
from sfumato.noise import Research, Secure
from sfumato.plan import Plan, StepPlan
from sfumato.session.charging import Charging

LOG = logging.getLogger("sfumato")
FEW, EVERY = 16, 50
DELTA = 1e-5  # at which ε is logged when there is no budget to say so


def noised(
    sums: dict[str, Tensor], parameters: Mapping[str, Tensor], std: float, source: Secure | Research
) -> dict[str, Tensor]:
    """``sums`` (emptied) plus N(0, std²), for every trainable parameter: one draw a dtype and device, cut to shape."""
    kinds: dict[tuple[torch.dtype, torch.device], list[str]] = {}
    for name, p in parameters.items():
        kinds.setdefault((wide_dtype([p]), p.device), []).append(name)
    out: dict[str, Tensor] = {}
    for (dtype, device), names in kinds.items():
        sizes = [parameters[n].numel() for n in names]
        flat = source.normal((sum(sizes),), std=std, dtype=dtype, device=device)
        for name, piece in zip(names, flat.split(sizes), strict=True):
            out[name] = piece.view_as(parameters[name])
            if name in sums:
                out[name] += sums.pop(name)
    return out


def log(charging: Charging, plan: Plan, now: StepPlan, steps: int) -> None:
    """One line at INFO for each step; nothing in it is computed from records without noise."""
    if not LOG.isEnabledFor(logging.INFO):
        return
    budget = charging.budget
    delta = DELTA if budget is None else budget.delta
    line = f"step {steps}:"
    # Many kinds of releases take up to a second to compose, which is too long for every step.
    if steps % EVERY == 0 or len(charging.ledger.events()) <= FEW:
        line += f" epsilon = {charging.ledger.epsilon(delta=delta):.4f} at delta = {delta:g},"
    if budget is not None:
        line += f" {charging.left(plan, steps)} charges left within {budget.epsilon:g},"
    LOG.info(
        "%s noise multiplier %.4g, max_grad_norm %.4g, sample rate %.4g",
        line,
        now.noise_multiplier,
        now.max_grad_norm,
        plan.sample_rate,
    )


__all__ = ["log", "noised"]
