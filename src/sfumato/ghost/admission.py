"""The doors of a model: which inputs carry records, and what may leave or stay behind."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence
from torch.utils._pytree import tree_leaves

from sfumato.errors import RowsMismatch, UnknownBatchAxis, UnsupportedError
from sfumato.ghost import declared, indexing
from sfumato.ghost.rows import Coupled, Order, Rows, Unknown
from sfumato.ghost.rules import NoRule
from sfumato.ghost.writes import place, storage

if TYPE_CHECKING:
    from sfumato.ghost.capture import Capture


def admit(c: "Capture", door: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Tag the records among the inputs of the module ``door``; everything else is a constant."""
    slots = list(indexing.named_tensors((args, kwargs)))
    if torch._C._current_graph_task_id() != -1:
        _readmit(c, [t for _, t in slots])
    _admit_packed(c, args, kwargs)
    seen = [t for _, t in slots if c.own_tag(t) is not None]
    slots = [(i, t) for i, t in slots if not any(t is o for o in seen)]
    strayed = next(
        (t for _, t in slots if t.grad_fn is not None and c.known_target(t) is None and c.returned.get(id(t)) is not t),
        None,
    )
    if strayed is not None and torch._C._current_graph_task_id() == -1:
        raise UnknownBatchAxis(
            f"An activation of shape {tuple(strayed.shape)} was changed outside the model's forward and comes back in: "
            "what was done to its records there cannot be seen.",
            found=tuple(strayed.shape),
            where=c.where(),
            fix="put these operations into the forward of a module, and call that.",
        )
    if (declaration := declared.active(c)) is not None:
        _admit_declared(c, declaration, door, args, kwargs, bool(seen))
        return
    # An input that once did not have the size of the batch is a constant, whatever size the batch has now.
    slots = [(i, t) for i, t in slots if (door, i) not in c.constant and c.known_target(t) is None]
    dims = [t for _, t in slots if t.dim() > c.batch_dim]
    if c.tape.records is None:
        if c.expected is not None:
            c.tape.records = c.expected
        elif dims:
            c.tape.records = dims[0].shape[c.batch_dim]
        else:
            raise UnknownBatchAxis("The model was called without a tensor that has a batch axis.", where=c.where())
    carriers = [t for t in dims if t.shape[c.batch_dim] == c.records]
    if not carriers and not seen:
        raise RowsMismatch(
            f"The batch has {c.records} records, but the model got tensors of shape "
            f"{[tuple(t.shape) for t in dims]} with records on axis {c.batch_dim}; a row without a record of "
            "its own cannot be clipped.",
            found=[tuple(t.shape) for t in dims],
            where=c.where(),
            fix="pass the batch as the private loader gave it, or name its axis with batch_dim=.",
        )
    c.constant |= {
        (door, i)
        for i, t in slots
        if (t.dim() <= c.batch_dim or t.shape[c.batch_dim] != c.records) and storage(t) not in c.loaded
    }
    for _, tensor in slots:
        if storage(tensor) in c.loaded and not any(tensor is t for t in carriers):
            c.set_tag(tensor, Unknown("an input with other rows than records"))
    for tensor in carriers:
        _refuse_transposed(c, tensor)
        c.set_tag(tensor, Rows(c.batch_dim))


@contextmanager
def _unseen(c: "Capture") -> Iterator[None]:
    """Reading what says where records lie is no operation on them."""
    before, c.suspended = c.suspended, True
    try:
        yield
    finally:
        c.suspended = before


def _admit_packed(c: "Capture", args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Packed sequences say whose their rows are: step by step, the records in the order in which they were sorted."""
    for _, packed in indexing.named(PackedSequence, (args, kwargs)):
        if c.own_tag(packed.data) is not None or packed.data.grad_fn is not None or declared.active(c) is not None:
            continue  # seen already, or refused as what it is
        order = packed.sorted_indices
        with _unseen(c):
            sizes = packed.batch_sizes.tolist()
            first = list(range(sizes[0])) if order is None else order.tolist()
        if c.tape.records is None:
            c.tape.records = sizes[0] if c.expected is None else c.expected
        if sizes[0] != c.records or sorted(first) != list(range(c.records)):
            raise RowsMismatch(
                f"The batch has {c.records} records, but the packed sequence {sizes[0]}.",
                found=sizes[0],
                where=c.where(),
                fix="pack the batch as the private loader gave it.",
            )
        owner = torch.tensor([record for n in sizes for record in first[:n]])
        c.set_tag(packed.data, Rows(0, owner=owner, arranged=True))
        for index in (packed.batch_sizes, order, packed.unsorted_indices):
            if index is not None:
                c.loaded.pop(storage(index), None)  # how many are in the first step is how many were drawn
                c.set_tag(index, Order("a packed input", permuted=order is not None))


def _admit_declared(
    c: "Capture",
    declaration: declared.rows,
    door: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    seen: bool,
) -> None:
    with torch._C.DisableTorchFunction():
        found = declared.admitted(c, declaration, door.forward, args, kwargs)
    if not seen and not any(rows is not None for _, rows, _ in found):
        raise RowsMismatch("sf.rows: no input of the model carries records.", where=c.where())
    for tensor, rows, named in found:
        if rows is not None:
            if not named:
                _refuse_transposed(c, tensor)
            c.set_tag(tensor, rows)


def remember(c: "Capture", args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Inside a checkpoint, note what the inputs of a module are: a constant may lie where a record once lay."""
    if torch._C._autograd._top_saved_tensors_default_hooks(False) is not None:
        for _, t in indexing.named_tensors((args, kwargs)):
            c.places[place(t)] = c.own_tag(t), c.tape


def _readmit(c: "Capture", inputs: list[Tensor]) -> None:
    """Checkpointing kept the memory of the inputs alive, but hands it back as other tensors.

    What a recomputation leaves on a tape is never used: the first forward's operations run the backward. It only has to
    take the same way, so a tensor made outside of every module finds its tape by its size.
    """
    found = False
    for t in inputs:
        tag, tape = c.places.get(place(t), (None, None))
        if tag is not None:
            found = True
            c.resume(tape)
            if c.own_tag(t) is None:
                c.set_tag(t, tag)
    sizes = [t.shape[c.batch_dim] for t in inputs if t.dim() > c.batch_dim]
    if not found and sizes:
        c.resume(next((tape for tape in c.tape.family() if tape.records == sizes[0]), None))


def _refuse_transposed(c: "Capture", x: Tensor) -> None:
    """A transposed batch with T == B has the right size on the wrong axis; its strides give it away."""
    axis, records = c.batch_dim, x.shape[c.batch_dim]
    if records < 2 or x.numel() == 0 or axis != 0:  # another axis than the first was declared on purpose
        return
    # An activation that left the capture may come back with any of its axes first.
    twins = [
        k
        for k in range(x.dim())
        if k != axis and x.shape[k] == records and (x.stride(k) > x.stride(axis) > 0 or x.grad_fn is not None)
    ]
    if twins:
        raise UnknownBatchAxis(
            f"An input of shape {tuple(x.shape)} and strides {tuple(x.stride())} looks transposed: axis {axis} and "
            f"axis {twins[0]} both have {records} entries.",
            found=tuple(x.stride()),
            where=c.where(),
            fix=f"pass batch_dim={twins[0]}, or .contiguous() if axis {axis} does hold the records.",
        )


def check_output(c: "Capture", out: Any) -> None:
    """What leaves the model with a gradient is per record, or a plain sum or mean of them; nothing stays behind."""
    for tensor in tree_leaves(out):
        tag = c.tag(tensor) if isinstance(tensor, Tensor) and tensor.requires_grad else None
        if isinstance(tag, (Coupled, Unknown)):
            c.refuse_mixed("the output", tag)
        if isinstance(tag, Rows) and tag.plain:
            c.returned[id(tensor)] = tensor
        lost = isinstance(tensor, Tensor) and tensor.requires_grad and tag is None and c.known_target(tensor) is None
        if lost and c.records > 0:
            raise NoRule("the output", "it comes from an operation that cannot be seen")
        if isinstance(tag, Rows):
            with torch._C.DisableTorchFunction():
                declared.check_leaving(c, tag)
    for name, buffer in c.module.named_buffers():
        if c.tag(buffer) is not None:
            refuse_buffer(name)
    for name, parameter in c.module.named_parameters():
        if c.tainted and storage(parameter) in c.tainted:
            refuse_buffer(name)


def refuse_buffer(name: str) -> NoReturn:
    """State that the forward writes is published with the model, without noise."""
    raise UnsupportedError(
        f"The forward writes values of private records into {name}, which the model publishes un-noised.",
        where=name,
        fix="do not update it during private training (running statistics, moving averages, memory banks).",
    )
