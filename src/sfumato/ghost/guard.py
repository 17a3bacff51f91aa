"""The guard: autograd may never write into a trainable parameter while its model is private.

A scripted layer, a custom Function, a regulariser or a forward that bypassed the capture adds its gradient natively,
possibly after the clipped sum was released; coverage at the end of the tape cannot see that, a hook on each leaf can.
"""

from collections.abc import Callable, Iterable
from typing import NoReturn

from torch import Tensor
from torch.utils.hooks import RemovableHandle

from sfumato.errors import CoupledRecords
from sfumato.ghost.rows import Coupled, Unknown


class Guard:
    """Calls ``violated(name)`` from inside backward; it must raise."""

    def __init__(self, violated: Callable[[str], None]):
        self._violated = violated
        self._handles: dict[int, tuple[Tensor, RemovableHandle]] = {}

    def watch(self, parameters: Iterable[tuple[str, Tensor]], owned: Iterable[Tensor] = ()) -> None:
        """Watch these, and go on watching what is frozen of ``owned``: it may thaw before the backward."""
        wanted = {id(p): (n, p) for n, p in parameters}
        if left := self._handles.keys() - wanted.keys():
            for key in left - {id(p) for p in owned}:
                self._handles.pop(key)[1].remove()
        for key, (name, parameter) in wanted.items():
            if key not in self._handles:
                handle = parameter.register_post_accumulate_grad_hook(self._hook(name))
                self._handles[key] = (parameter, handle)

    def watches(self, parameter: Tensor) -> bool:
        """Whether a native gradient on this parameter would be noticed."""
        return id(parameter) in self._handles

    def _hook(self, name: str) -> Callable[[Tensor], None]:
        return lambda _: self._violated(name)

    def release(self) -> None:
        self.watch(())


def mixed_gradient(tag: Coupled | Unknown) -> Callable[[Tensor], NoReturn]:
    """A backward that reaches a mixture, by whatever way it left the model, ends here."""

    def refuse(_: Tensor) -> NoReturn:
        raise CoupledRecords(
            f"The loss depends on a value in which {tag.by} has mixed the records of the batch (it left the forward by "
            "another way than its output), so clipping cannot bound one record's influence.",
            fix="compute it for each record on its own, or detach it.",
        )

    return refuse
