"""Where a model enters the capture: ``forward`` of every module, overridden on the instance.

A ``with`` around the call is the only thing that pops the mode when Ctrl-C interrupts a forward: module hooks do
not run for it. Every module is a door, because users call submodules and activation checkpointing re-enters them.
Copies and pickles of a module hold its plain forward.
"""

import copy
import sys
import types
from collections.abc import Collection
from typing import Any, NoReturn

import torch
from torch import nn
from torch.overrides import _get_current_function_mode_stack

from sfumato.errors import SfumatoError, UnsupportedError
from sfumato.ghost import indexing
from sfumato.ghost.admission import admit, check_output, remember
from sfumato.ghost.capture import Capture
from sfumato.ghost.fallback import TIERS, judge, refuse_batch_statistics
from sfumato.ghost.groups import by_groups
from sfumato.ghost.probe import probe, wait
from sfumato.ghost.rules import NoRule, Split


class _Forward:
    """Stands in for ``module.forward``."""

    def __init__(self, capture: Capture, module: nn.Module, name: str):
        self.capture, self.module, self.name = capture, module, name
        self.own = module.__dict__.get("forward")  # another library's override, put back on removal
        self.__wrapped__ = module.forward

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        c = self.capture
        wait(c)
        if c.live and not c.suspended:
            self._refuse_side_effects()
        if not c.live or c.suspended or not torch.is_grad_enabled():
            return self.__wrapped__(*args, **kwargs)
        if any(mode is c for mode in _get_current_function_mode_stack()):
            remember(c, args, kwargs)
            return self._run(args, kwargs)
        if torch._C._current_graph_task_id() != -1:
            _refuse_reentrant_checkpoint(self.name)
        else:
            install(c)
        if _frozen(c) and _apart(c, args, kwargs):  # what was trainable counts on, for the step that is under way
            return self.__wrapped__(*args, **kwargs)
        c.refresh()
        with c, c.returning():
            admit(c, self.module, args, kwargs)
            if c.probing and self.module not in c.probed:
                probe(c, self.module, self.__wrapped__, args, kwargs)
            return self._run(args, kwargs, outermost=True)

    def _refuse_side_effects(self) -> None:
        """What a module does to records outside of its operations, with or without gradients."""
        if self.module._backward_hooks or self.module._backward_pre_hooks:
            raise UnsupportedError(
                "A backward hook on a module can mix the gradients of different records.",
                where=self.name or type(self.module).__name__,
                fix="remove register_full_backward_hook during private training.",
            )
        if isinstance(self.module, nn.modules.batchnorm._NormBase):
            refuse_batch_statistics(self.module, self.name)

    def _run(self, args: tuple[Any, ...], kwargs: dict[str, Any], outermost: bool = False) -> Any:
        c = self.capture
        c.path.append(self.name)
        try:
            tier, each = c.tiers.get(self.name, "rule"), None
            versions = [(t, t._version) for t in indexing.tensors(args, kwargs)]
            while True:
                try:
                    if tier == "rule":
                        out = self.__wrapped__(*args, **kwargs)
                        c.reraise()
                    elif each is not None:
                        run = lambda a, k: self._run(a, k, outermost=True)  # noqa: E731
                        return by_groups(c, self.module, each, run, self.__wrapped__, args, kwargs)
                    else:
                        judge(c, self.module, self.__wrapped__, tier, args, kwargs)
                        out = TIERS[tier](c, self.module, args, kwargs)
                        c.tiers[self.name] = tier
                    if outermost:
                        check_output(c, out)
                    return out
                except Split as decision:
                    c.raised = None
                    if not outermost:
                        raise
                    tier, each = "groups", decision.each
                except NoRule as reason:
                    c.raised = each = None
                    tier = self._lower(tier, reason, outermost)
                except SfumatoError:
                    raise
                except Exception as error:
                    # A lower tier runs other code than the user wrote; what fails there is a reason to go on down.
                    if tier == "rule" or torch._C._current_graph_task_id() != -1:  # a recomputation stops by raising
                        raise
                    failed = NoRule(tier, f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}")
                    failed.__cause__ = error
                    tier = self._lower(tier, failed, outermost)
                if any(t._version != v for t, v in versions):
                    self._refuse_overwritten()
        finally:
            c.path.pop()

    def _refuse_overwritten(self) -> NoReturn:
        raise UnsupportedError(
            "The forward has to be run again in another way, but it has already written into its own input.",
            where=self.name or type(self.module).__name__,
            fix="write into a clone() of the input.",
        )

    def _lower(self, tier: str, reason: NoRule, outermost: bool) -> str:
        """The next tier for this module, or up to the module that contains it."""
        reasons = self.capture.reasons
        reasons[self.name] = (
            str(reason) if tier in ("rule", "groups") else f"{reasons.get(self.name, '')}; {tier} failed: {reason}"
        )
        if tier in ("rule", "groups"):
            return "vmap"
        # What vmap cannot run at all (sizes that depend on the data) fails in every module around this one too.
        if tier == "vmap" and (outermost or reason.__cause__ is not None):
            return "microbatch"
        if not outermost:
            reason.args = (reasons[self.name],)  # what the tiers above failed for
            raise reason
        raise UnsupportedError(
            f"No exact per-sample gradient for this model: {reasons[self.name]}.",
            where=self.name or type(self.module).__name__,
        ) from reason

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        if self.own is not None:
            return copy.deepcopy(self.own, memo)
        owner = memo.get(id(self.module), self.module)
        return types.MethodType(type(owner).forward, owner)

    def __reduce__(self) -> Any:
        return getattr, (self.module, "forward")


def _frozen(c: Capture) -> bool:
    return not any(p.requires_grad for p in c.module.parameters())


def _apart(c: Capture, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether another model learns through this one, frozen as a whole: nothing private can be reached from here."""
    computed = [t.grad_fn for t in indexing.tensors(args, kwargs) if t.grad_fn is not None]
    anchor = c.tape.anchor.expand_as(c.tape.anchor).grad_fn
    if not computed or anchor is None:
        return False
    end, seen = anchor.next_functions[0][0], set()
    while computed:
        node = computed.pop()
        if node is end:
            return False
        if node not in seen:
            seen.add(node)
            computed += [n for n, _ in node.next_functions if n is not None]
    return True


def _refuse_reentrant_checkpoint(name: str) -> None:
    frame = sys._getframe(2)
    while frame is not None:
        if frame.f_code.co_name == "backward" and frame.f_code.co_filename.endswith("checkpoint.py"):
            raise UnsupportedError(
                "Reentrant activation checkpointing runs a backward inside the backward, so a step cannot be clipped "
                "as a whole.",
                where=name,
                fix="use torch.utils.checkpoint.checkpoint(..., use_reentrant=False).",
            )
        frame = frame.f_back  # type: ignore[assignment]


def refuse_owned(module: nn.Module, but_by: Collection[Capture] = ()) -> None:
    """A model that another engine, or ``record``, has a part of."""
    for name, part in module.named_modules():
        door = part.__dict__.get("forward")
        if isinstance(door, _Forward) and door.capture not in but_by:
            raise UnsupportedError(
                "The model already belongs to a private engine or record().",
                where=name or type(part).__name__,
                fix="call engine.detach() first.",
            )


def install(capture: Capture) -> None:
    """Open every module of the model to the capture, and close those that have left the model since."""
    modules = dict(capture.module.named_modules())
    doors = {name: module.__dict__.get("forward") for name, module in modules.items()}
    refuse_owned(capture.module, (capture,))
    now = {module: name for name, module in modules.items() if not isinstance(module, torch.jit.ScriptModule)}
    if now == capture.opened:
        return
    for module in capture.opened.keys() - now.keys():
        _close(capture, module)
    for module, name in now.items():
        door = doors[name]
        if not isinstance(door, _Forward):
            module.__dict__["forward"] = _Forward(capture, module, name)
        elif door.module is not module:  # copy.copy() of a module of this model
            _close(capture, module)
            module.__dict__["forward"] = _Forward(capture, module, name)
        else:
            door.name = name
    capture.opened = now
    capture.tiers.clear()  # by name: another module may bear it now


def remove(capture: Capture) -> None:
    """Put every forward back as it was."""
    for module in (*capture.opened, *capture.module.modules()):
        _close(capture, module)
    capture.opened = {}


def _close(capture: Capture, module: nn.Module) -> None:
    override = module.__dict__.get("forward")
    if isinstance(override, _Forward) and override.capture is capture:
        del module.__dict__["forward"]
        if override.own is not None:
            module.__dict__["forward"] = override.own
