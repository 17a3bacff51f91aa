"""Recurrent networks: lstm, gru, rnn_tanh, rnn_relu over padded or packed sequences, and their single-step cells."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional as F

from sfumato.ghost import copies
from sfumato.ghost.cells import RUN, Steps
from sfumato.ghost.functions import Use
from sfumato.ghost.propagation.recurrent import Call, as_call, cell, sequences
from sfumato.ghost.recurrent import Layer, RecurrentFn
from sfumato.ghost.rows import Order, Rows
from sfumato.ghost.rules.table import RULES, NoRule, rule

if TYPE_CHECKING:
    from sfumato.ghost.capture import Capture

# Operations that may take an arrangement of the records beside parameters.
ORDERED = {*RUN, "index_select"}


def _weights(params: Sequence[Tensor], biases: bool) -> tuple[Tensor | None, ...]:
    """(W_ih, W_hh, b_ih, b_hh, W_hr) of one layer and direction."""
    projection = params[-1] if len(params) % 2 else None
    return (*params[:4], projection) if biases else (*params[:2], None, None, projection)


def _run(
    c: "Capture",
    kind: str,
    x: Tensor,
    states: list[Tensor],
    weights: tuple[Tensor | None, ...],
    steps: Steps,
    rows: Rows,
) -> tuple[Tensor, ...]:
    """One layer and direction: x (N, d) and the states (B, ·) to outputs (N, ·) and the last states."""
    if any(c.tag(w) is not None for w in weights):
        raise NoRule(kind, "a weight depends on the records")
    w_ih, w_hh, b_ih, b_hh, w_hr = weights
    uses = [
        Use(c.tape, rows, c.records, c.target(w), c.target(b)) for w, b in ((w_ih, b_ih), (w_hh, b_hh), (w_hr, None))
    ]
    h0, c0 = (*states, None)[:2]
    plain = (None if w is None else w.detach() for w in weights)
    out = RecurrentFn.apply(x, h0, c0, *plain, c.tape.anchor, Layer(kind, steps, *uses))  # type: ignore[no-untyped-call]
    dtype = w_ih.dtype if w_ih is not None else x.dtype
    return tuple(o.to(dtype) for o in out if o is not None)


def _as_rows(c: "Capture", value: Tensor, rows: Rows) -> Tensor:
    return copies.as_rows(c, value, rows) if c.target(value) is not None else value


def _layers(c: "Capture", kind: str, call: Call, x: Tensor, sizes: tuple[int, ...], rows: Rows, batch: Rows) -> Any:
    """All layers over x (N, d), whose rows are stored step after step."""
    states = [_as_rows(c, s, batch.at(1)) for s in call.states]
    if any(s.shape[1] != sizes[0] for s in states):
        raise NoRule(kind, "an initial state of another batch size")
    directions = 2 if call.bidirectional else 1
    per = len(call.params) // (call.num_layers * directions)
    last: list[tuple[Tensor, ...]] = []
    for layer in range(call.num_layers):
        outs = []
        for reverse in range(directions):
            k = len(last)
            weights = _weights(call.params[k * per : (k + 1) * per], call.has_biases)
            out, *ends = _run(c, kind, x, [s[k] for s in states], weights, Steps(sizes, bool(reverse)), rows)
            outs.append(out)
            last.append(tuple(ends))
        x = outs[0] if directions == 1 else torch.cat(outs, -1)
        if call.train and call.dropout and layer < call.num_layers - 1:
            x = F.dropout(x, call.dropout)
    return x, *(c.tagged(torch.stack(ends), batch.at(1)) for ends in zip(*last, strict=True))


def _sequence(kind: str) -> Callable[..., Any]:
    def run(c: "Capture", *args: Any, **kwargs: Any) -> Any:
        call = as_call(args, kwargs)
        found = sequences(kind, call, c.tag, c.records)
        if not isinstance(found, tuple):
            c.refuse_mixed(kind, found)
        rows, batch = found
        x = _as_rows(c, call.input, rows)
        if call.sizes is not None:
            sizes = tuple(call.sizes.tolist())
            out, *states = _layers(c, kind, call, x, sizes, rows, batch)
            return c.tagged(out, rows), *states
        x = x.transpose(0, 1) if call.batch_first else x
        steps, width = x.shape[:2]
        if steps == 0:
            raise NoRule(kind, "no time steps")
        owner = None if rows.owner is None else rows.owner.repeat(steps)
        flat = replace(rows, axis=0, outer=rows.outer * steps, owner=owner)
        out, *states = _layers(c, kind, call, x.flatten(0, 1), (width,) * steps, flat, batch)
        out = out.unflatten(0, (steps, width))
        return c.tagged(out.transpose(0, 1) if call.batch_first else out, rows), *states

    return run


def _cell(kind: str, name: str) -> Callable[..., Any]:
    def run(
        c: "Capture",
        input: Tensor,
        hx: Tensor | Sequence[Tensor],
        w_ih: Tensor,
        w_hh: Tensor,
        b_ih: Tensor | None = None,
        b_hh: Tensor | None = None,
    ) -> Any:
        states = [hx] if isinstance(hx, Tensor) else list(hx)
        rows = cell(name, input, states, c.tag, c.records)
        if not isinstance(rows, Rows):
            c.refuse_mixed(name, rows)
        x, *states = (_as_rows(c, v, rows) for v in (input, *states))
        if any(len(s) != len(x) for s in states):
            raise NoRule(name, "a state of another batch size")
        _, *last = _run(c, kind, x, states, (w_ih, w_hh, b_ih, b_hh, None), Steps((len(x),)), rows)
        last = [c.tagged(s, rows) for s in last]
        return last[0] if isinstance(hx, Tensor) else tuple(last)

    return run


for _kind in RUN:
    RULES[_kind] = _sequence(_kind)
    RULES[f"{_kind}_cell"] = _cell(_kind, f"{_kind}_cell")


@rule("index_select")
def index_select(c: "Capture", input: Tensor, dim: int, index: Tensor) -> Tensor:
    """A learned initial state, put in the order of a packed batch."""
    dim = dim % input.dim()
    if isinstance(c.tag(index), Rows) and c.target(input) is not None:
        return RULES["getitem"](c, input, (*[slice(None)] * dim, index))
    if not isinstance(c.tag(index), Order) or c.target(input) is None or input.shape[dim] != c.records:
        raise NoRule("index_select", "parameters selected by records")
    out: Tensor = c.call(torch.index_select, copies.as_rows(c, input, Rows(dim)), dim, index)
    return out
