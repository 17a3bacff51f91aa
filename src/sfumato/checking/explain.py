"""From evidence to words: where the records meet, why that matters, and what to do about it."""

import re
from dataclasses import replace
from typing import Any

from torch import nn

from sfumato.checking.independence import Movement, Verdict
from sfumato.checking.locate import criterion_mixes, first_mixing
from sfumato.checking.report import Problem
from sfumato.checking.subject import Subject
from sfumato.errors import CoupledRecords, SfumatoError

WHY = (
    "Private training bounds how much one record can contribute by clipping its gradient. If a record also changes the "
    "gradients of others, its real influence is larger than the bound, and the promised epsilon does not hold."
)
WHY_STATE = (
    "What a model keeps from private records is published with it, or carried into later batches, without clipping and "
    "without noise: the guarantee does not cover it."
)
_ROUTING = re.compile("expert|moe|router|routing|capacity|gating", re.IGNORECASE)
_OWN = (
    "compute it for each record on its own: statistics over features or positions (LayerNorm, GroupNorm), not records."
)
_OUTSIDE = (
    "let the model return its outputs and compute the loss outside, one value for each record, then .mean(); switch "
    "off auxiliary losses over the batch (balancing of experts), num_items_in_batch, in-batch negatives."
)


def from_error(error: SfumatoError) -> Problem:
    """The engine's own words."""
    text = str(error)
    what = text if error.fix is None else text.removesuffix(f" Fix: {error.fix}")
    fix = error.fix or "change what the message names, and check again."
    return Problem(error.where or "model", what, "The engine refuses what it cannot make private exactly.", fix)


def refused(s: Subject, error: CoupledRecords) -> Problem:
    """The engine saw a dependence that this batch does not show."""
    problem = from_error(error)
    why = "The engine refuses what it cannot show to be independent. On this batch no dependence was seen, but another "
    why += "batch may have one (records with different numbers of tokens, for example)."
    return replace(problem, why=why, fix=_OUTSIDE if s.criterion is None else problem.fix)


def from_movement(s: Subject, v: Verdict, m: Movement, criterion: Any) -> Problem:
    """Records that depend on each other: in the forward, the reduction, the loss or the backward."""
    if m.output is not None:
        return _forward(s, m)
    if (wrong := _reduction(s, m)) is not None:
        return wrong
    if m.criterion or v.random or criterion_mixes(s, m, v.axes):
        return _loss(s, m, criterion)
    return Problem(
        m.parameters[0],
        f"The gradients of different records are mixed in the backward pass (outputs and loss treat each record by "
        f"itself, but the gradient of {len(m.parameters)} parameters over the batch is not the sum of the gradients "
        "of its records).",
        WHY,
        "look for a custom autograd Function, a gradient hook or a detach that depends on the whole batch, between "
        "this parameter and the loss.",
    )


def _forward(s: Subject, m: Movement) -> Problem:
    s.constant = m.constant
    try:
        name = first_mixing(s, m)
    finally:
        s.constant = False
    module = s.model.get_submodule(name) if name else s.model
    kind = type(module).__name__
    where = name or kind
    what = f"What {kind} computes for a record changed when {m.probe}."
    if name is None:
        what = f"What the model returns for a record changed when {m.probe}."
    return Problem(where, what, WHY, _remedy(module, kind))


def _remedy(module: nn.Module, kind: str) -> str:
    if isinstance(module, nn.modules.batchnorm._BatchNorm):
        return "replace it by GroupNorm (sf.fix does so), or put the layer in eval() mode."
    if getattr(module, "batch_first", True) is False:
        return (
            "it takes the first axis for time: build it with batch_first=True, or pass batch_dim=1 to every call here."
        )
    if any(_ROUTING.search(type(m).__name__) for m in module.modules()):
        return "route each record by itself: no capacity limit that is shared over the batch, no balancing over it."
    return _OWN


def _reduction(s: Subject, m: Movement) -> Problem | None:
    size = len(m.first)
    if m.factor is None or size < 2:
        return None
    for declared, really, factor in (("mean", "sum", size), ("sum", "mean", 1 / size)):
        if s.reduction == declared and abs(m.factor - factor) <= 1e-3 * factor:
            return Problem(
                "loss_reduction",
                f"The loss is the {really} over the records, but loss_reduction={declared!r} was declared.",
                "The engine undoes the reduction that you declare. With the wrong one every record's gradient is "
                "scaled by the number of records that were drawn, so one record moves all others.",
                f"say loss_reduction={really!r} here and in make_private, or change the criterion.",
            )
    return None


def _loss(s: Subject, m: Movement, criterion: Any) -> Problem:
    own = criterion is None
    where = "criterion" if not own else f"the loss inside {type(s.model).__name__}"
    what = f"The loss joins the records: what it contributes for one record depends on others (seen when {m.probe})."
    if m.factor is not None:
        what = (
            f"The loss depends on the size of the batch: over {len(m.first)} records its gradient is {m.factor:.3g} "
            "times what loss_reduction promises."
        )
    fix = (
        "compute one loss for each record from that record alone (reduction='none', its own tokens averaged), then "
        "take .mean() over the records."
    )
    if isinstance(criterion, nn.modules.loss._Loss):
        if getattr(criterion, "weight", None) is not None:
            what += " Its class weights are divided by their sum over the batch."
            fix = "use reduction='none', multiply by the weights, and take .mean() over the records."
        elif hasattr(criterion, "ignore_index"):
            what += " It averages over all targets that are not ignored, and records have different numbers of them."
            fix = "use reduction='none', average over each record's own targets, and take .mean() over the records."
    elif own:
        fix = _OUTSIDE
    return Problem(where, what, WHY, fix)


def unreproducible() -> Problem:
    """Nothing can be compared."""
    return Problem(
        "model",
        "The same batch, weights and random seed gave different results.",
        "The model keeps something outside of itself from one batch to the next, or draws random numbers that no seed "
        "controls. Whether records are independent cannot be seen then, and what is kept may be private.",
        "keep no global state in the forward, and draw random numbers with torch only.",
    )


def unjudged() -> Problem:
    """Not one comparison took place."""
    return Problem(
        "model",
        "Whether records are independent could not be judged: no two gradients of this batch could be compared (they "
        "are not finite, or every run draws other random numbers).",
        WHY,
        "use a batch and weights for which loss and gradients are finite, draw random numbers with torch, as many for "
        "each batch of one size, and pass the criterion apart from the model.",
    )


def fails(where: str, error: BaseException) -> Problem:
    """The user's own error."""
    first = str(error).splitlines()[0] if str(error) else ""
    return Problem(
        where,
        f"The model or the criterion fails on this batch: {type(error).__name__}: {first}",
        "Nothing could be checked, and training would stop with the same error.",
        "make loss = criterion(model(inputs), target) work on this batch first, without any privacy.",
    )
