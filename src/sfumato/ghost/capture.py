"""Capture: the torch-function mode that sees every operation of the forward.

Tensors fall in three kinds: *tagged* (they carry records; see ``rows``), *targets* (a trainable parameter, or derived
from parameters and constants alone) and constants. Records alone propagate their tag, targets alone run natively
under autograd, and where the two meet a rule takes over.
"""

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, ClassVar, NoReturn

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from sfumato.errors import CoupledRecords, UnsupportedError
from sfumato.ghost import indexing, rules
from sfumato.ghost.calls import DECISIONS, ESCAPES, METADATA, name_of
from sfumato.ghost.functions import HALF, Use
from sfumato.ghost.guard import mixed_gradient
from sfumato.ghost.landing import LANDINGS, follow
from sfumato.ghost.propagation import clean, is_pointwise, propagate
from sfumato.ghost.rows import Coupled, Histogram, Order, Reduced, Rows, Tag, Unknown, Verdict, Whole
from sfumato.ghost.rules import NoRule, Split
from sfumato.ghost.tape import Tape
from sfumato.ghost.targets import RESHAPES, SWAPS, Derived, Param, Target, derive_from
from sfumato.ghost.writes import after_setitem, place, same, storage, taint, written_by


class Capture(TorchFunctionMode):
    """State of one private model: its trainable parameters, the current tape, and where the records are."""

    # What private models returned, one row a record: the only activations that may enter a model from outside.
    returned: ClassVar[weakref.WeakValueDictionary[int, Tensor]] = weakref.WeakValueDictionary()

    def __init__(
        self,
        module: nn.Module,
        batch_dim: int = 0,
        reduction: str = "mean",
        on_refresh: Callable[[dict[str, Tensor]], None] = lambda _: None,
    ):
        super().__init__()
        self.on_refresh = on_refresh
        self.module = module
        self.batch_dim = batch_dim
        self.reduction = reduction  # of the loss; joins losses that a model computes itself on the lower tiers
        self.native_shapes: dict[tuple[nn.Module, int], torch.Size] = {}  # of the outputs of a judged module
        self.output_axes: dict[tuple[nn.Module, int], int] = {}
        self.judged: set[nn.Module] = set()  # modules on a lower tier that were seen to treat each record alone
        self.tiers: dict[str, str] = {}  # modules that run below the rule tier
        self.reasons: dict[str, str] = {}  # why a module left the tiers above
        self.probing = False  # judge every door natively at its first batch
        self.probed: set[nn.Module] = set()
        self.prober: int | None = None  # the thread that probes now
        self.live = False  # a tape is wanted
        self.suspended = False  # inside a lower tier: operations run natively
        self.alone = False  # inside a lower tier that runs one record at a time
        self.path: list[str] = []
        self.raised: NoRule | Split | None = None  # on its way to the module that will handle it
        self.opened: dict[nn.Module, str] = {}  # modules whose forward leads here, by the name they have now
        self.constant: set[tuple[nn.Module, str]] = set()  # inputs known to carry no records
        self.loaded: dict[int, object] = {}  # memory of the batch that the private loader yielded, held
        self.expected: int | None = None  # rows that the current batch must have
        self.parameters: dict[str, Tensor] = {}
        self._ids: dict[int, Param] = {}
        self.tags: dict[int, tuple[weakref.ref[Tensor], Tag]] = {}
        self.places: dict[tuple[object, ...], tuple[Tag | None, Tape | None]] = {}  # by memory, for recomputations
        self.tainted: dict[int, Tag] = {}  # storages written to behind the back of their tags
        self._stale: dict[int, weakref.ref[Tensor]] = {}  # tensors of an earlier batch that are still alive
        self._derived: dict[int, Derived] = {}
        self._tape: Tape | None = None

    # -- batches ------------------------------------------------------------------------------------------------

    @property
    def tape(self) -> Tape:
        if self._tape is None:
            raise UnsupportedError("No tape is open.")
        return self._tape

    @property
    def records(self) -> int:
        return self.tape.records or 0

    def open(self, on_complete: Callable[[Tape], None], expected: int | None) -> Tape:
        """Start a batch of ``expected`` records (None: taken from the model's first tensor)."""
        self.close()
        self._tape = Tape(on_complete)
        self.expected = expected
        self.live = True
        return self._tape

    def close(self) -> None:
        self.live = False
        self._tape = None
        self._stale = {k: r for k, r in self._stale.items() if r() is not None}
        self._stale |= {k: r for k, (r, _) in self.tags.items() if r() is not None}
        self.tags.clear()
        self.tainted.clear()
        self.places.clear()
        self._derived.clear()

    def load(self, batch: object) -> None:
        """Note the tensors of a drawn batch: records even if their objects were seen in an earlier one."""
        tensors = list(indexing.deep_tensors(batch))
        self.loaded = {storage(t): t for t in tensors}
        for t in tensors:
            self._stale.pop(id(t), None)

    def refresh(self) -> None:
        """Read the trainable parameters again: freezing, unfreezing and new heads take effect at the next forward."""
        self.parameters = {n: p for n, p in self.module.named_parameters() if p.requires_grad}
        self._ids = {id(p): Param(n, p) for n, p in self.parameters.items()}
        computed = next((n for n, p in self.parameters.items() if not p.is_leaf), None)
        if computed is not None:
            raise UnsupportedError(
                f"{computed} is a computed tensor in the place of a parameter, so there is no parameter to release to.",
                where=computed,
                fix="call the model itself, not torch.func.functional_call with computed parameters.",
            )
        imaginary = next((n for n, p in self.parameters.items() if p.is_complex()), None)
        if imaginary is not None:
            raise UnsupportedError(
                f"{imaginary} is complex, for which clipping and noise are not defined here.",
                where=imaginary,
                fix="hold its real and imaginary part as two parameters (torch.view_as_complex joins them).",
            )
        self.on_refresh(self.parameters)

    def parameter_tiers(self) -> dict[str, str]:
        """{parameter: the tier that computes its per-sample gradient}."""
        return {
            name: next((t for m, t in self.tiers.items() if not m or name.startswith(m + ".")), "rule")
            for name in self.parameters
        }

    # -- what a tensor is -----------------------------------------------------------------------------------------

    def own_tag(self, value: object) -> Tag | None:
        """The tag that was given to this very tensor."""
        entry = self.tags.get(id(value))
        return entry[1] if entry is not None and entry[0]() is value else None

    def tag(self, value: object) -> Tag | None:
        """What is known of the records in a tensor; None for constants and parameters."""
        if (own := self.own_tag(value)) is not None:
            return own
        if self.tainted and isinstance(value, Tensor):
            return self.tainted.get(storage(value))
        stale = self._stale.get(id(value))
        if stale is not None and stale() is value:
            return Coupled("an earlier batch")
        if isinstance(value, Tensor) and self.loaded and storage(value) in self.loaded:
            return Unknown("a tensor of the batch that is no argument of the model")
        return None

    def set_tag(self, value: Tensor, tag: Tag) -> None:
        if isinstance(tag, (Coupled, Unknown)) and value.requires_grad and not value.is_leaf:
            value.register_hook(mixed_gradient(tag))
        if value.dtype in HALF and value.requires_grad and self._tape is not None:
            self._tape.half = True
        self.tags[id(value)] = (weakref.ref(value), tag)
        self.places[place(value)] = tag, self._tape

    def tagged(self, value: Any, rows: Rows) -> Any:
        for t in (value,) if isinstance(value, Tensor) else value or ():
            self.set_tag(t, rows)
        return value

    def known_target(self, value: object) -> Target | None:
        """The parameter, or tensor derived from parameters, that this is."""
        found = self._ids.get(id(value)) or self._derived.get(id(value))
        return found if found is not None and found.tensor is value else None

    def target(self, value: object) -> Target | None:
        """``known_target``, and refuses whatever else would collect gradients."""
        if (found := self.known_target(value)) is not None:
            return found
        if isinstance(value, nn.Parameter) and value.requires_grad and torch.is_grad_enabled():
            raise UnsupportedError(
                f"The forward uses a trainable parameter of shape {tuple(value.shape)} that is not registered in the "
                "model, so it would be trained without clipping.",
                where=self.where(),
                fix="register it (an attribute, nn.ParameterList or nn.ModuleList), or freeze it.",
            )
        if isinstance(value, Tensor) and value.requires_grad and value.is_leaf and self.tag(value) is None:
            raise UnsupportedError(
                f"The forward uses a {tuple(value.shape)} tensor that requires gradients but is no parameter of the "
                "model, so it would collect them unclipped.",
                where=self.where(),
                fix="make it an nn.Parameter of the model, or drop requires_grad.",
            )
        return None

    def where(self) -> str:
        return next((p for p in reversed(self.path) if p), type(self.module).__name__)

    # -- operations -----------------------------------------------------------------------------------------------

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if self.suspended or self._tape is None:
            if self.suspended:
                if (screen := rules.SCREENS.get(clean(name_of(func)))) is not None:
                    screen(self, *args, **(kwargs or {}))
                caught = (
                    self.alone
                    and name_of(func) not in METADATA
                    and any(self.own_tag(t) is not None for t in indexing.tensors(args, kwargs))
                )
                if caught:
                    raise NoRule(name_of(func), "a value of the whole batch that is no argument of the module")
            return func(*args, **(kwargs or {}))
        try:
            return self.call(func, *args, **(kwargs or {}))
        except (NoRule, Split) as reason:
            self.raised = reason
            raise

    def reraise(self) -> None:
        """A forward that swallowed the reason to run it in another way went its own way because of it."""
        if (reason := self.raised) is not None:
            self.raised = None
            raise reason

    def call(self, func: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Run one operation as the mode sees it."""
        name = name_of(func)
        if name in METADATA and func is not torch.autograd.grad:
            return Whole(func(*args)) if name == "numel" else func(*args, **kwargs)
        operands = list(indexing.tensors(args, kwargs))
        tagged = any(self.tag(t) is not None for t in operands)
        base = clean(name)
        if tagged and (own := rules.user.find(func)) is not None:
            return rules.user.run(self, func, own, args, kwargs)
        if tagged and base in rules.SCREENS:
            rules.SCREENS[base](self, *args, **kwargs)
        targets = [f for t in operands if (f := self.target(t)) is not None] if torch.is_grad_enabled() else []
        if not targets:
            return self._records_only(func, name, args, kwargs) if tagged else func(*args, **kwargs)
        if not tagged:
            return self._targets_only(func, name, args, kwargs, operands, targets)
        if name.endswith("_") and not name.startswith("__") and base in rules.RULES:
            raise NoRule(name, "in-place form")
        if base == "where" or (base not in rules.RULES and is_pointwise(base)):
            return rules.broadcast(self, name, func, args, kwargs)
        for t in operands:
            ordered = isinstance(tag := self.tag(t), Order) and base in rules.recurrent.ORDERED
            ordered = ordered or (isinstance(tag, Histogram) and base == "grouped_mm")
            if tag is not None and not isinstance(tag, Rows) and not ordered:
                self.refuse_mixed(base, tag)
        if base not in rules.RULES:
            raise NoRule(base, "no rule for this operation")
        return rules.RULES[base](self, *args, **kwargs)

    def _records_only(self, func: Callable[..., Any], name: str, args: Any, kwargs: Any) -> Any:
        base = clean(name)
        operands = list(indexing.tensors(args, kwargs))
        if any(t.requires_grad and self.tag(t) is None for t in operands):
            raise NoRule(base, "an operand carries gradients but no known record axis")
        if name in ("__bool__", "is_nonzero") and isinstance(verdict := self.tag(operands[0]), Verdict):
            return self._decided(verdict)
        self._refuse_leaks(name, operands)
        written = written_by(name, args, kwargs)
        before = None if written is None else self.tag(written)
        out = func(*args, **kwargs)
        if isinstance(several := kwargs.get("out"), (tuple, list)):
            for tensor in several:
                self.set_tag(tensor, Unknown(name))
                taint(self, tensor, Unknown(name))
        elif base == "setitem":
            self.set_tag(args[0], after_setitem(self, *args))
        elif name == "__set__":
            if getattr(getattr(func, "__self__", None), "__name__", "") != "requires_grad":
                self.set_tag(args[0], Unknown("data"))
        elif name.endswith("_") and not name.startswith("_") and base in SWAPS | RESHAPES:
            self.set_tag(out, Unknown(name))
        else:
            found = follow(self, base, args, kwargs, out) if base in LANDINGS else None
            if found is None:
                found = propagate(name, self.tag, self.tape.records or 0, args, kwargs, out)
            for tensor, tag in found:
                self.set_tag(tensor, self._fitting(tensor, tag, base))
        if written is not None and (out is written or base in ("setitem", "set") or "out" in kwargs):
            after = self.tag(written)
            if not same(before, after):
                taint(self, written, after)
        return out

    def _refuse_leaks(self, name: str, operands: list[Tensor]) -> None:
        """Calls by which records would reach Python, or each other's gradients, unseen."""
        whole = any((tag := self.tag(t)) is not None and not isinstance(tag, Rows) for t in operands)
        if name in DECISIONS and (whole or name != "__bool__" or self.records > 1):
            raise NoRule(name, "a decision taken from the whole batch, or from one record for all")
        if name in ESCAPES and any(t.is_floating_point() or isinstance(self.tag(t), Reduced) for t in operands):
            raise CoupledRecords(
                f"{name}() takes a value of private records out of the graph, where it could reach other records "
                "unseen.",
                where=self.where(),
                fix="compute it with tensor operations, for each record on its own.",
            )
        if name in ESCAPES and self.records > 1:
            raise NoRule(name, "a number taken from the whole batch")
        if name == "register_hook":
            raise UnsupportedError(
                "A hook on an activation can mix the gradients of different records.",
                where=self.where(),
                fix="remove register_hook from the forward.",
            )

    def _decided(self, verdict: Verdict) -> bool:
        """Where all records would decide alike, each goes the way it would go alone; else they go apart."""
        yes = bool(verdict.each.any())
        if yes and not bool(verdict.each.all()):
            raise Split(verdict.each)
        return yes

    @contextmanager
    def branch(self, ids: Tensor) -> Iterator[None]:
        """Some records of the batch as a batch of their own. The values of the whole batch stay outside."""
        whole, tags = self.tape, self.tags
        stale = self._stale
        self._stale = stale | {k: r for k, (r, _) in tags.items() if r() is not None}
        self._tape, self.tags = whole.branch(ids), {}
        try:
            yield
        finally:
            self._stale = stale | {k: r for k, (r, _) in self.tags.items() if r() is not None}
            self._tape, self.tags = whole, tags

    @contextmanager
    def returning(self) -> Iterator[None]:
        """Back to this tape at the end, whichever a recomputation resumed."""
        tape = self._tape
        try:
            yield
        finally:
            if torch._C._current_graph_task_id() != -1:
                self._tape = tape

    def resume(self, tape: Tape | None) -> None:
        """A recomputation goes on where its forward was: perhaps among some of the records only."""
        if tape is not None:
            self._tape = tape

    def _fitting(self, tensor: Tensor, tag: Tag, name: str) -> Tag:
        """A tag whose rows do not fill its axis came from a rule that misread the call."""
        if not isinstance(tag, Rows):
            return tag
        rows = tag.owner.numel() if tag.owner is not None else tag.outer * self.records * tag.inner
        fits = 0 <= tag.axis < tensor.dim() and tensor.shape[tag.axis] == rows
        return tag if fits else Unknown(name)

    def _targets_only(
        self, func: Any, name: str, args: Any, kwargs: Any, operands: list[Tensor], targets: list[Target]
    ) -> Any:
        if any(t.requires_grad and self.target(t) is None for t in operands):
            raise NoRule(clean(name), "an operand carries gradients but no known record axis")
        written = written_by(name, args, kwargs)
        if written is not None and self.target(written) is not None:
            raise NoRule(name, "a write into a parameter or a tensor derived from one")
        out = func(*args, **kwargs)
        if written is not None and clean(name) in ("setitem", "set"):
            out = written
        for tensor in (out,) if isinstance(out, Tensor) else tuple(out) if isinstance(out, (tuple, list)) else ():
            if isinstance(tensor, Tensor) and tensor.requires_grad and self.target(tensor) is None:
                self._derived[id(tensor)] = derive_from(tensor, clean(name), targets, args, kwargs)
        return out

    def derive(self, name: str, value: Tensor, *args: Any) -> Tensor:
        """A view of a parameter (or constant), registered as derived from it."""
        out: Tensor = self.call(getattr(Tensor, name), value, *args)
        return out

    def use(self, rows: Rows, weight: Tensor, bias: Tensor | None) -> Use:
        return Use(self.tape, rows, self.records, self.target(weight), None if bias is None else self.target(bias))

    def refuse_mixed(self, name: str, tag: Tag | None) -> NoReturn:
        if isinstance(tag, Unknown):
            raise NoRule(name, f"the record axis was lost in {tag.by}")
        raise CoupledRecords(
            f"{name} uses a value in which {getattr(tag, 'by', '?')} has mixed the records of the batch, so clipping "
            "cannot bound one record's influence.",
            where=self.where(),
            fix="compute it for each record on its own.",
        )
