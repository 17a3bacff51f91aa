"""Records that decide a branch of the forward differently run apart: ``if mask.all()`` must not let one record choose
for the others.

Each group takes the way that its records would take alone, as a batch of its own on a branch of the tape. What the
groups return is put together again in the order of the batch.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from sfumato.ghost.capture import Capture
from sfumato.ghost.fallback import judge_by, refuse_hidden, suspended
from sfumato.ghost.rows import Reduced, Rows, Tag
from sfumato.ghost.rules import NoRule

Run = Callable[[tuple[Any, ...], dict[str, Any]], Any]


def by_groups(
    c: Capture,
    module: nn.Module,
    each: Tensor,
    run: Run,
    native: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Any:
    """``run`` for the records where ``each`` (B,) is true, then for the others."""
    groups = [each.nonzero()[:, 0], (~each).nonzero()[:, 0]]
    flat, spec = tree_flatten((args, kwargs))
    refuse_hidden(c, flat)
    tags = [c.tag(v) for v in flat]
    if any(t is not None and not (isinstance(t, Rows) and t.plain) for t in tags):
        raise NoRule("groups", "an input has no plain record axis")

    def cut(ids: Tensor) -> list[Any]:
        return [
            v.index_select(t.axis, ids.to(v.device)) if isinstance(t, Rows) else v
            for v, t in zip(flat, tags, strict=True)
        ]

    outs, found = [], []
    for ids in groups:
        with suspended(c, module):
            pieces = cut(ids)
        with c.branch(ids):
            for piece, tag in zip(pieces, tags, strict=True):
                if isinstance(tag, Rows):
                    c.set_tag(piece, tag)
            out = run(*tree_unflatten(pieces, spec))
            outs.append(tree_flatten(out))
            found.append([c.own_tag(v) for v in outs[-1][0]])
    place = torch.argsort(torch.cat(groups))
    shares = [len(ids) / len(each) if c.reduction == "mean" else 1.0 for ids in groups]

    def natively() -> Any:
        with torch.no_grad():
            parts = []
            for ids in groups:
                a, k = tree_unflatten([v.clone() if isinstance(v, Tensor) else v for v in cut(ids)], spec)
                parts.append(tree_flatten(native(*a, **k))[0])
        columns = zip(zip(*parts, strict=True), zip(*found, strict=True), strict=True)
        return [_joined(values, rows, place, shares)[0] for values, rows in columns]

    judge_by(c, module, native, natively, args, kwargs)
    leaves = []
    for values, rows in zip(zip(*(o[0] for o in outs), strict=True), zip(*found, strict=True), strict=True):
        with suspended(c, module):
            value, tag = _joined(values, rows, place, shares)
        if tag is not None:
            c.set_tag(value, tag)
        leaves.append(value)
    return tree_unflatten(leaves, outs[0][1])


def _joined(
    values: tuple[Any, ...], tags: tuple[Tag | None, ...], place: Tensor, shares: list[float]
) -> tuple[Any, Tag | None]:
    """One leaf of the outputs of the groups, in the order of the batch."""
    first = values[0]
    if not isinstance(first, Tensor) or all(t is None for t in tags):
        return first, None
    if all(isinstance(t, Reduced) for t in tags):
        return torch.stack([v * s for v, s in zip(values, shares, strict=True)]).sum(0), tags[0]
    rows = tags[0]
    if not isinstance(rows, Rows) or rows.owner is not None or rows.outer != 1 or any(t != rows for t in tags):
        raise NoRule("groups", "an output has no plain record axis")
    blocks = [v.unflatten(rows.axis, (-1, rows.inner)) for v in values]
    whole = torch.cat(blocks, rows.axis).index_select(rows.axis, place.to(first.device))
    return whole.flatten(rows.axis, rows.axis + 1), rows
