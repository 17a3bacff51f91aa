"""Rules of the user: the per-sample gradient of an operation that the capture cannot look into."""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import wraps
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor
from torch.autograd import Function
from torch.overrides import handle_torch_function, has_torch_function

from sfumato.errors import ConfigurationError
from sfumato.ghost.functions import exactly, wide
from sfumato.ghost.rows import Rows
from sfumato.ghost.rules.table import NoRule
from sfumato.ghost.tape import Tape
from sfumato.ghost.targets import Target, settle, shape_of
from sfumato.terms import Dense

if TYPE_CHECKING:
    from sfumato.ghost.capture import Capture

Gradients = Callable[..., dict[str, Tensor]]
F = TypeVar("F", bound=Gradients)

_OPERATORS: dict[str, Gradients] = {}  # by qualified name
_FUNCTIONS: dict[Callable[..., Any], Gradients] = {}  # by the apply that stands in for a Function's own


def rule(op: Any) -> Callable[[F], F]:
    """Register the per-sample gradient of ``op``, for every private model of this process.

    ``op`` is a ``torch.library.custom_op`` (or ``torch.ops.name.space``) or a subclass of ``torch.autograd.Function``:
    whatever runs code that is no torch operation. The decorated function gets the gradient of the output and the
    arguments of the call, records on axis 0 of all that is per record, and returns ``{argument: gradient}``:

    - for an argument that is (or may be) a parameter: one gradient a record, shape (B, *parameter.shape);
    - for an argument that carries records: its ordinary gradient.

    Example::

        @sf.rule(Scale)                      # class Scale(torch.autograd.Function): x * weight
        def scale(grad, x, weight):
            return {"x": grad * weight, "weight": grad * x}

    The guarantee rests on it: a gradient that is smaller than the true one is clipped too little. Prove it with
    ``sf.check_rule``. Operations without a rule need none: they run on a slower tier that is exact for anything.

    Raises:
        ConfigurationError: ``op`` is no such operation, or has a rule already.
    """

    def register(gradients: F) -> F:
        name = _name(op)
        if name is not None:
            if name in _OPERATORS:
                raise ConfigurationError(f"{name} already has a rule.", found=name, fix="register one rule only.")
            _OPERATORS[name] = gradients
        elif isinstance(op, type) and issubclass(op, Function):
            if op.apply in _FUNCTIONS:
                raise ConfigurationError(f"{op.__name__} already has a rule.", found=op, fix="register one rule only.")
            _FUNCTIONS[_opened(op)] = gradients
        else:
            raise ConfigurationError(
                f"{op!r} is neither a custom operator nor an autograd Function.",
                found=op,
                fix="a plain function needs no rule: the torch operations inside it are seen.",
            )
        return gradients

    return register


def _name(op: Any) -> str | None:
    """The qualified name of a custom operator, however it is called."""
    op = getattr(op, "_opoverload", op)
    if isinstance(op, torch._ops.OpOverload):
        return str(op._schema.name)
    return str(op._qualified_op_name) if isinstance(op, torch._ops.OpOverloadPacket) else None


def _opened(function: type[Function]) -> Callable[..., Any]:
    """``function.apply`` where a capture can see it."""
    own = function.apply

    @wraps(own)
    def apply(*args: Any) -> Any:
        tensors = tuple(a for a in args if isinstance(a, Tensor))
        return handle_torch_function(apply, tensors, *args) if has_torch_function(tensors) else own(*args)  # type: ignore[no-untyped-call]

    function.apply = staticmethod(apply)  # type: ignore[method-assign]
    return apply


def find(func: Callable[..., Any]) -> Gradients | None:
    """The user's rule for what the mode has been called with."""
    if not _OPERATORS and not _FUNCTIONS:
        return None
    if (name := _name(func)) is not None:
        return _OPERATORS.get(name)
    return _FUNCTIONS.get(func)


@dataclass(frozen=True, slots=True)
class _Call:
    op: Callable[..., Any]
    gradients: Gradients
    arguments: dict[str, Any]  # what is no tensor
    tensors: tuple[str, ...]
    targets: dict[str, Target]
    tape: Tape
    records: int

    def values(self, tensors: tuple[Tensor, ...]) -> dict[str, Any]:
        return {**self.arguments, **dict(zip(self.tensors, tensors, strict=True))}

    def run(self, tensors: tuple[Tensor, ...]) -> Any:
        values = self.values(tensors)
        named = [p for p in inspect.signature(self.gradients).parameters.values() if p.name in values]
        keywords = {p.name: values[p.name] for p in named if p.kind is p.KEYWORD_ONLY}
        return self.op(*(values[p.name] for p in named if p.name not in keywords), **keywords)


def run(c: "Capture", op: Callable[..., Any], gradients: Gradients, args: Any, kwargs: Any) -> Tensor:
    """The operation, with the user's gradients in its backward."""
    bound = inspect.signature(gradients).bind(None, *args, **kwargs).arguments
    given = dict(list(bound.items())[1:])
    tags = [tag for v in given.values() if (tag := c.tag(v)) is not None]
    if not all(isinstance(t, Rows) and t.plain and t.axis == 0 for t in tags):
        raise NoRule(getattr(op, "__name__", "op"), "its records do not lie one by one on axis 0")
    tensors = tuple(k for k, v in given.items() if isinstance(v, Tensor))
    targets = {k: t for k in tensors if (t := c.target(given[k])) is not None}
    rest = {k: v for k, v in given.items() if k not in tensors}
    call = _Call(op, gradients, rest, tensors, targets, c.tape, c.records)
    values = (given[k].detach() if k in targets else given[k] for k in tensors)
    out: Tensor = _UserFn.apply(c.tape.anchor, call, *values)  # type: ignore[no-untyped-call]
    return c.tagged(out, Rows(0))


class _UserFn(Function):
    @staticmethod
    def forward(ctx: Any, anchor: Tensor, call: _Call, *tensors: Tensor) -> Tensor:
        ctx.call = call
        ctx.save_for_backward(anchor, *tensors)
        versions = [t._version for t in tensors]
        out = call.run(tensors)
        if [t._version for t in tensors] != versions:
            raise NoRule("a rule of the user", "the operation writes into its arguments")
        if not isinstance(out, Tensor) or out.dim() == 0 or out.shape[0] != call.records:
            raise NoRule("a rule of the user", "its output is not one tensor with a row for each record")
        return out

    @staticmethod
    @exactly
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        call: _Call = ctx.call
        _, *tensors = ctx.saved_tensors
        found = call.gradients(grad, **call.values(tuple(tensors)))
        out: list[Tensor | None] = []
        for k, (name, value) in enumerate(zip(call.tensors, tensors, strict=True)):
            target = call.targets.get(name)
            wanted = target is not None or ctx.needs_input_grad[2 + k]
            shape = (call.records, *shape_of(target)) if target is not None else tuple(value.shape)
            if wanted and (name not in found or tuple(found[name].shape) != shape):
                got = tuple(found[name].shape) if name in found else None
                raise ConfigurationError(
                    f"The rule of {getattr(call.op, '__name__', call.op)} must return a gradient of shape {shape} for "
                    f"{name!r}.",
                    found=got,
                    where=name,
                    fix="return one gradient a record for a parameter, the ordinary gradient for an input.",
                )
            if target is not None:
                call.tape.add(*settle(target, Dense(wide(found[name]))))
            out.append(found[name] if wanted and target is None else None)
        return call.tape.zero, None, *out
