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

from sfumato.errors import SfumatoError, UnsupportedError
from sfumato.ghost.capture import Capture
from sfumato.ghost.fallback import judge_by, refuse_hidden, suspended
from sfumato.ghost.outputs import alike, deep_leaves, merged
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

    held = _held(module)
    outs: list[Any] = []
    found: dict[int, Tag | None] = {}
    for ids in groups:
        with suspended(c, module):
            pieces = cut(ids)
        with c.branch(ids):
            for piece, tag in zip(pieces, tags, strict=True):
                if isinstance(tag, Rows):
                    c.set_tag(piece, tag)
            outs.append(_guarded(run, c, *tree_unflatten(pieces, spec)))
            found |= {id(t): c.own_tag(t) for t in deep_leaves(outs[-1])}
    _refuse_kept(module, held, c.where())
    place = torch.argsort(torch.cat(groups))
    shares = [len(ids) / len(each) if c.reduction == "mean" else 1.0 for ids in groups]
    order: list[tuple[Tag | None, ...]] = []

    def join(values: tuple[Tensor, ...]) -> Tensor:
        order.append(tuple(found[id(v)] for v in values))
        whole, tag = _joined(values, order[-1], place, shares, c.where())
        if tag is not None:
            c.set_tag(whole, tag)
        return whole

    with suspended(c, module):
        out = merged(outs, join, c.where())

    def natively() -> Any:
        parts = []
        for ids in groups:
            a, k = tree_unflatten([v.clone() if isinstance(v, Tensor) else v for v in cut(ids)], spec)
            parts.append(native(*a, **k))
        known = iter(order)
        return merged(parts, lambda values: _joined(values, next(known), place, shares, c.where())[0], c.where())

    judge_by(c, module, native, natively, args, kwargs)
    return out


def _guarded(run: Run, c: Capture, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    try:
        return run(args, kwargs)
    except (SfumatoError, NoRule):
        raise
    except Exception as error:
        raise UnsupportedError(
            "The forward raises an error for some records of this batch that are run apart, because they take another "
            f"branch than the others ({type(error).__name__}: {error}).",
            where=c.where(),
            fix="do not assert on the whole batch inside the forward.",
        ) from error


def _held(module: nn.Module) -> dict[int, Tensor]:
    """Tensors with a gradient that modules hold beside their parameters, also in lists and dicts."""
    tensors = (t for m in module.modules() for k, v in vars(m).items() if k[:1] != "_" for t in tree_flatten(v)[0])
    return {id(t): t for t in tensors if isinstance(t, Tensor) and t.grad_fn is not None}


def _refuse_kept(module: nn.Module, before: dict[int, Tensor], where: str) -> None:
    if any(before.get(key) is not t for key, t in _held(module).items()):
        raise UnsupportedError(
            "The forward keeps an activation in an attribute, and records that take different branches are run apart: "
            "it would hold the value of some of them only.",
            where=where,
            fix="return it from the forward.",
        )


def _joined(
    values: tuple[Tensor, ...], tags: tuple[Tag | None, ...], place: Tensor, shares: list[float], where: str
) -> tuple[Tensor, Tag | None]:
    """One tensor of the outputs of the groups, in the order of the batch."""
    if all(t is None for t in tags):
        return alike(values, where), None
    if all(isinstance(t, Reduced) for t in tags):
        return torch.stack([v * s for v, s in zip(values, shares, strict=True)]).sum(0), tags[0]
    rows = tags[0]
    if not isinstance(rows, Rows) or rows.owner is not None or rows.outer != 1 or any(t != rows for t in tags):
        raise NoRule("groups", "an output has no plain record axis")
    blocks = [v.unflatten(rows.axis, (-1, rows.inner)) for v in values]
    whole = torch.cat(blocks, rows.axis).index_select(rows.axis, place.to(values[0].device))
    return whole.flatten(rows.axis, rows.axis + 1), rows
