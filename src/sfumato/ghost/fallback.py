"""The lower tiers of the ladder, exact for any module: vmap of the module, then one record at a time.

Both run the module natively on its own copy of the parameters for each record (``spread``), so autograd itself
delivers per-sample gradients; dropout masks and control flow are those of the one forward that was run.
"""

import itertools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from sfumato.errors import CoupledRecords, UnsupportedError
from sfumato.ghost import copies, indexing
from sfumato.ghost.admission import refuse_buffer
from sfumato.ghost.capture import Capture
from sfumato.ghost.outputs import deep_leaves, merged
from sfumato.ghost.rows import Reduced, Rows
from sfumato.ghost.rules import NoRule


def refuse_batch_statistics(module: nn.Module, where: str) -> None:
    """BatchNorm of a single record would train on its own statistics and publish them: refused on every tier."""
    for name, child in module.named_modules():
        stats = isinstance(child, nn.modules.batchnorm._BatchNorm) and (child.training or child.running_mean is None)
        if stats:
            raise CoupledRecords(
                f"{type(child).__name__} normalises each record by statistics of the whole batch, so clipping cannot "
                "bound one record's influence.",
                found=type(child).__name__,
                where=".".join(p for p in (where, name) if p),
                fix="replace it by GroupNorm (sf.fix does so), or put the layer in eval() mode.",
            )
        tracks = isinstance(child, nn.modules.instancenorm._InstanceNorm) and child.track_running_stats
        if tracks and child.training:
            raise UnsupportedError(
                f"{type(child).__name__} with track_running_stats=True publishes statistics of private records, "
                "un-noised.",
                found=type(child).__name__,
                where=".".join(p for p in (where, name) if p),
                fix="build it with track_running_stats=False (sf.fix switches it off).",
            )


class suspended:
    """The mode lets everything through while a lower tier runs; no buffer may change meanwhile."""

    def __init__(self, c: Capture, module: nn.Module, alone: bool = False):
        self.c, self.module, self.alone = c, module, alone
        self.before = c.suspended, c.alone
        self.buffers = {n: (b, b._version) for n, b in module.named_buffers()}
        self.kept = _kept(module) if alone else {}

    def __enter__(self) -> None:
        self.c.suspended, self.c.alone = True, self.alone

    def __exit__(self, kind: object, *exc: object) -> None:
        self.c.suspended, self.c.alone = self.before
        if kind is None:
            for name, buffer in self.module.named_buffers():
                before, version = self.buffers.get(name, (None, 0))
                if before is not buffer or buffer._version != version:
                    refuse_buffer(name)
            for (owner, name), tensor in _kept(self.module).items() if self.alone else ():
                if tensor.requires_grad and self.kept.get((owner, name)) is not tensor:
                    raise UnsupportedError(
                        f"{type(owner).__name__}.{name} is set by a forward that runs one record at a time: it would "
                        "hold the value of the last record only.",
                        where=name,
                        fix="return it from the forward.",
                    )


def _kept(module: nn.Module) -> dict[tuple[nn.Module, str], Tensor]:
    """Tensors that modules hold as plain attributes."""
    return {(m, k): v for m in module.modules() for k, v in vars(m).items() if isinstance(v, Tensor)}


def _copies(c: Capture, module: nn.Module) -> dict[str, Tensor]:
    """{name in module: (B, *shape)} for the trainable parameters of the module."""
    return {n: copies.spread(c, p) for n, p in module.named_parameters() if c.target(p) is not None}


def _joined_loss(c: Capture, values: Tensor) -> Tensor:
    """A loss that the module computed itself, one for each record."""
    out = values.mean() if c.reduction == "mean" else values.sum()
    c.set_tag(out, Reduced("a loss inside the module"))
    return out


def refuse_hidden(c: Capture, flat: list[Any]) -> None:
    """Records inside an object that is not a plain container cannot be handed out one at a time."""
    for value in flat:
        if not isinstance(value, Tensor) and any(c.tag(t) is not None for t in indexing.deep_tensors((value,))):
            raise UnsupportedError(
                f"Records are inside a {type(value).__name__}, which cannot be split into records.",
                found=type(value).__name__,
                where=c.where(),
                fix="pass the tensors themselves, in a tuple, list or dict.",
            )


def judge(
    c: Capture,
    module: nn.Module,
    native: Callable[..., Any],
    tier: str,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> None:
    """Once for each module on a lower tier: seeing one record at a time must not change what it computes."""

    def apart() -> Any:
        return TIERS[tier](c, module, tree_map(_copy_tagged(c), args), tree_map(_copy_tagged(c), kwargs))

    judge_by(c, module, native, apart, args, kwargs)


def judge_by(
    c: Capture,
    module: nn.Module,
    native: Callable[..., Any],
    apart: Callable[[], Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> None:
    """Once for each module: its forward must not change when records are run apart, one by one or in groups.

    Otherwise it mixes records (``h - h[0]`` would become zero). Compared in eval mode, without gradients; a module that
    is random even then cannot be judged so, and is left to the rest of the checks.
    """
    if module in c.judged or c.records < 2:
        return
    training = [m for m in module.modules() if m.training]
    devices = sorted({t.device.index or 0 for t in module.parameters() if t.is_cuda})
    with torch.random.fork_rng(devices), torch.no_grad(), suspended(c, module):
        for m in training:
            m.training = False
        try:
            first, second = (native(*tree_map(_copy, args), **tree_map(_copy, kwargs)) for _ in range(2))
            once, twice = _plain(first), _plain(second)
            c.native_shapes |= {(module, i): v.shape for i, v in enumerate(deep_leaves(first))}
            split = _plain(apart())
        finally:
            for m in training:
                m.training = True
    if len(once) == len(split) and all(a.shape == b.shape for a, b in zip(once, split, strict=True)):
        if any(not torch.allclose(a, b, equal_nan=True) for a, b in zip(once, twice, strict=True)):
            return
        if all(_alike(a, b) for a, b in zip(once, split, strict=True)):
            c.judged.add(module)
            return
    raise CoupledRecords(
        f"{type(module).__name__} computes something else for a record alone than within its batch, so its records are "
        "mixed and one record's influence cannot be bounded.",
        where=c.where(),
        fix="make the forward treat each record on its own; sf.check(model, criterion, batch) shows which does not.",
    )


def _alike(a: Tensor, b: Tensor) -> bool:
    if not a.numel():
        return True
    r = {torch.float64: torch.finfo(torch.float64).eps ** 0.5, torch.float32: 1e-3}.get(a.dtype, 5e-2)
    return torch.allclose(a, b, rtol=r, atol=r * float(a.abs().max()), equal_nan=True)


def _plain(out: Any) -> list[Tensor]:
    return [t.detach() for t in deep_leaves(out) if t.is_floating_point()]


def _copy(value: Any) -> Any:
    return value.detach().clone() if isinstance(value, Tensor) else value


def _copy_tagged(c: Capture) -> Callable[[Any], Any]:
    def copy(value: Any) -> Any:
        if not isinstance(value, Tensor) or c.target(value) is not None:
            return value
        new, tag = value.detach().clone(), c.tag(value)
        if tag is not None:
            c.set_tag(new, tag)
        return new

    return copy


NO_BLOCKS = "an input has no plain record axis"


def _blocks(c: Capture, flat: list[Any], tier: str) -> list[Rows | None]:
    """The records of each argument: one block of consecutive rows each, or nothing."""
    tags = [c.tag(v) for v in flat]
    if any(t is not None and not (isinstance(t, Rows) and t.owner is None and t.outer == 1) for t in tags):
        raise NoRule(tier, NO_BLOCKS)
    if not any(tags):
        raise NoRule(tier, "no input carries records")
    return tags  # type: ignore[return-value]


def vmapped(c: Capture, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The module for every record at once under vmap, each with its own copy of the parameters."""
    refuse_batch_statistics(module, c.where())
    if c.records == 0:
        return _empty(c, module, args, kwargs)
    flat, spec = tree_flatten((args, kwargs))
    refuse_hidden(c, flat)
    tags = _blocks(c, flat, "vmap")
    given: list[Tensor] = []
    for value, tag in zip(flat, tags, strict=True):
        if isinstance(value, Tensor) and c.target(value) is not None:
            if tag is not None:
                raise NoRule("vmap", "an input is parameter and record at once")
            given.append(copies.spread(c, value))
        elif isinstance(value, Tensor):
            given.append(value if tag is None else value.unflatten(tag.axis, (c.records, tag.inner)))
    own = [c.target(v) is not None for v in flat if isinstance(v, Tensor)]
    axes = [t.axis if t else None for v, t in zip(flat, tags, strict=True) if isinstance(v, Tensor)]
    in_dims = [0 if o else a for o, a in zip(own, axes, strict=True)]
    others: list[Any] = []

    def one(parameters: dict[str, Tensor], *inputs: Tensor) -> tuple[Tensor, ...]:
        it = iter(inputs)
        rebuilt = [next(it) if isinstance(v, Tensor) else v for v in flat]
        a, k = tree_unflatten(rebuilt, spec)
        leaves, shape = tree_flatten(functional_call(module, parameters, a, k))
        others[:] = [shape, [None if isinstance(v, Tensor) else v for v in leaves]]
        others.append([isinstance(v, Tensor) for v in leaves])
        return tuple(v for v in leaves if isinstance(v, Tensor))

    own_weights = _copies(c, module)
    with suspended(c, module, alone=True):
        outs = iter(torch.vmap(one, in_dims=(0, *in_dims), randomness="different")(own_weights, *given))
    shape, rest, present = others
    default = next(t for t in tags if t is not None)
    if any(True for value in rest for _ in deep_leaves(value)):
        raise NoRule("vmap", "an output object holds tensors")
    joined: list[Any] = []
    for value, real in zip(rest, present, strict=True):
        joined.append(_joined(c, module, sum(present[: len(joined)]), next(outs), default) if real else value)
    return tree_unflatten(joined, shape)


def _joined(c: Capture, module: nn.Module, leaf: int, out: Tensor, default: Rows) -> Tensor:
    """One output of vmap, which puts the records first, as the module itself would have given it."""
    if out.dim() == 1:
        return _joined_loss(c, out)
    rows = _output_rows(c, module, leaf, out.shape[1:], default)
    whole = out.movedim(0, rows.axis).flatten(rows.axis, rows.axis + 1)
    c.set_tag(whole, rows)
    return whole


def _output_rows(c: Capture, module: nn.Module, leaf: int, one: torch.Size, default: Rows) -> Rows:
    """Where the records are in a module's output, from the shape that the module itself gave (see ``judge``)."""
    native = c.native_shapes.get((module, leaf))
    if (module, leaf) not in c.output_axes:
        plain = default.inner == 1
        fits = [
            k
            for k in range(len(one))
            if (one[k] == 1 or not plain) and native in (None, (*one[:k], c.records * one[k], *one[k + 1 :]))
        ]
        if not fits:
            raise NoRule("output", "an output of the module has no batch axis")
        axis = default.axis if default.axis in fits else fits[0]
        if native is None:
            return Rows(axis, inner=one[axis])
        c.output_axes[module, leaf] = axis
    axis = c.output_axes[module, leaf]
    return Rows(axis, inner=one[axis])


def _empty(c: Capture, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """No records: the shapes of the native forward, and a graph that ends in nothing but the tape."""
    forward = module.forward.__wrapped__ if hasattr(module.forward, "__wrapped__") else module.forward

    def connect(value: Any) -> Any:
        if not isinstance(value, Tensor) or not value.is_floating_point():
            return value
        value = value + 0 * c.tape.anchor.to(value)
        if 0 in value.shape:
            c.set_tag(value, Rows(list(value.shape).index(0)))
        return value

    with suspended(c, module):
        with torch.no_grad():
            out = forward(*args, **kwargs)
        return tree_map(connect, out)


def microbatched(c: Capture, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The module one record at a time: slowest, and exact for anything that runs on a batch of one."""
    refuse_batch_statistics(module, c.where())
    flat, spec = tree_flatten((args, kwargs))
    refuse_hidden(c, flat)
    tags = _blocks(c, flat, "microbatch")
    own_weights = {n: p.unbind(0) for n, p in _copies(c, module).items()}
    with suspended(c, module):  # pieces are cut unseen: a tagged tensor inside is one that the module caught elsewhere
        pieces = [
            [v if t is None else v.narrow(t.axis, b * t.inner, t.inner) for v, t in zip(flat, tags, strict=True)]
            for b in range(c.records)
        ]
    outs = []
    with suspended(c, module, alone=True):
        for b, piece in enumerate(pieces):
            a, k = tree_unflatten(piece, spec)
            outs.append(functional_call(module, {n: p[b] for n, p in own_weights.items()}, a, k))
    if not outs:
        return _empty(c, module, args, kwargs)
    default = next(t for t in tags if t is not None)
    leaf = itertools.count()

    def join(values: tuple[Tensor, ...]) -> Tensor:
        place = next(leaf)
        if values[0].dim() == 0:
            return _joined_loss(c, torch.stack(values))
        if any(v.shape != values[0].shape for v in values):
            raise NoRule("output", "the records have outputs of different shapes")
        rows = _output_rows(c, module, place, values[0].shape, default)
        whole = torch.cat(values, rows.axis)
        c.set_tag(whole, rows)
        return whole

    return merged(outs, join, c.where())


Tier = Callable[[Capture, nn.Module, tuple[Any, ...], dict[str, Any]], Any]
TIERS: dict[str, Tier] = {"vmap": vmapped, "microbatch": microbatched}
