"""The tape: the factored per-sample gradients that one backward leaves behind.

Autograd accumulates the gradient of ``anchor`` after every Function that took it has run, so its hook fires
exactly when the tape is complete. Terms are kept per graph task: a partial pass (autograd.grad on an input)
never fires the anchor and its terms are dropped.
"""

import weakref
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from sfumato.errors import PrivacyError, UnsupportedError
from sfumato.ghost.targets import Derived, Target
from sfumato.terms import Term

if TYPE_CHECKING:
    from sfumato.ghost.declared import rows
    from sfumato.ghost.rows import Rows


class Tape:
    """Terms of one batch of ``records`` records. ``on_complete`` runs inside backward, once per pass."""

    def __init__(self, on_complete: Callable[["Tape"], None]):
        self._clear(None)
        self.anchor = torch.zeros((), requires_grad=True)
        self.zero = torch.zeros(())
        this, complete = weakref.ref(self), on_complete

        def fire(_: Tensor) -> None:
            tape = this()
            if tape is None:
                raise PrivacyError("This graph belongs to a step that has been discarded.", fix="run forward again.")
            complete(tape)

        self.anchor.register_post_accumulate_grad_hook(fire)

    def _clear(self, records: int | None) -> None:
        self.records = records
        self.half = False  # gradients in half precision reached it
        self.branches: list[tuple[Tensor, Tape]] = []
        self.declared: rows | None = None  # what the user said of the rows of this batch
        self.held: list[torch.UntypedStorage] = []
        self.spaces: list[Tensor] = []  # the owners in it
        self.taken: list[Rows] = []  # spaces of one size, of which one was taken for the other
        self._terms: dict[int, list[tuple[Target, Term]]] = {}
        self._rows: dict[int, list[tuple[Derived, int, Tensor, Tensor | None]]] = {}

    def branch(self, ids: Tensor) -> "Tape":
        """A tape of some of the records, by their positions in this one; it completes with this one."""
        branch = Tape.__new__(Tape)
        branch._clear(ids.numel())
        branch.anchor, branch.zero = self.anchor, self.zero
        self.branches.append((ids, branch))
        return branch

    def family(self) -> "Iterator[Tape]":
        """This tape and all its branches."""
        yield self
        for _, branch in self.branches:
            yield from branch.family()

    def add(self, target: Target, term: Term) -> None:
        """Called by a rule's backward."""
        self._terms.setdefault(_pass(), []).append((target, term))

    def add_rows(self, target: Derived, axis: int, grad: Tensor, owner: Tensor | None) -> None:
        """Gradient of a derived tensor whose rows along ``axis`` belong to different records."""
        self._rows.setdefault(_pass(), []).append((target, axis, grad, owner))

    def take(self) -> tuple[list[tuple[Target, Term]], list[tuple[Derived, int, Tensor, Tensor | None]]]:
        """The terms of the pass that is completing; everything else on the tape is void."""
        task = _pass()
        terms, rows = self._terms.pop(task, []), self._rows.pop(task, [])
        self._terms.clear()
        self._rows.clear()
        self.anchor.grad = None
        return terms, rows


def _pass() -> int:
    if torch.is_grad_enabled():
        raise UnsupportedError(
            "Double backward (create_graph=True) is not supported: the gradient of a gradient is not a sum of "
            "per-record gradients that can be clipped.",
            fix="remove create_graph=True.",
        )
    return int(torch._C._current_graph_task_id())
