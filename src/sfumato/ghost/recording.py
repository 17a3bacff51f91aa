"""record: per-sample gradients of one backward, for research and for checks. No noise, no privacy claim."""

from types import TracebackType
from typing import Literal

import torch
from torch import Tensor, nn

from sfumato import _validate
from sfumato.clipping import Clip, chosen, group_of
from sfumato.errors import ConfigurationError, PrivacyError, TokenError, UnclippedGradient
from sfumato.ghost import entry
from sfumato.ghost.capture import Capture
from sfumato.ghost.clip import clipped, total_norms, wide_dtype
from sfumato.ghost.guard import Guard
from sfumato.ghost.pullback import Parts, collect
from sfumato.ghost.tape import Tape
from sfumato.terms import materialize

Reduction = Literal["mean", "sum"]


class record:
    """``with sf.record(model) as tape: criterion(model(x), y).backward()``, forward inside the ``with``.

    Gradients are those of the *sum* of per-record losses; ``loss_reduction`` says how the loss was reduced. Records lie
    on axis ``batch_dim`` of the model's inputs. ``p.grad`` stays untouched and the model is plain again afterwards.

    Raises:
        UnsupportedError: the model cannot be recorded exactly. TokenError: a second backward.
    """

    def __init__(self, model: nn.Module, *, loss_reduction: Reduction = "mean", batch_dim: int = 0):
        if loss_reduction not in ("mean", "sum"):
            raise ConfigurationError(
                f"loss_reduction={loss_reduction!r} is not 'mean' or 'sum'.",
                found=loss_reduction,
                where="loss_reduction",
            )
        self._guard = Guard(self._violated)
        self._capture = Capture(model, batch_dim, loss_reduction, lambda ps: self._guard.watch(ps.items()))
        self._parts: Parts | None = None
        self._records = 0
        self._scale = 1.0

    def __enter__(self) -> "record":
        entry.install(self._capture)
        self._capture.refresh()
        self._capture.open(self._complete, None)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._capture.close()
        self._guard.release()
        entry.remove(self._capture)

    def _violated(self, name: str) -> None:
        self._parts = None
        for p in self._capture.parameters.values():
            p.grad = None
        raise UnclippedGradient(
            f"Autograd wrote an unclipped gradient into {name}: some use of it bypassed the capture.", where=name
        )

    def _complete(self, tape: Tape) -> None:
        if not self._capture.live:
            raise TokenError("backward() of a recording that is over.", fix="call backward() inside the with block.")
        if self._parts is not None:
            raise TokenError("A second backward inside one record().", fix="sum the losses and call backward once.")
        self._parts = collect(tape, self._capture.parameters)
        self._records = tape.records or 0
        self._scale = float(self._records) if self._capture.reduction == "mean" else 1.0

    def _terms(self) -> Parts:
        if self._parts is None:
            raise PrivacyError("No backward has been recorded.", fix="call loss.backward() inside the with block.")
        return self._parts

    @property
    def tiers(self) -> dict[str, str]:
        """{parameter: "rule" | "vmap" | "microbatch"}"""
        return self._capture.parameter_tiers()

    @property
    def reasons(self) -> dict[str, str]:
        """{module: why it could not stay on the tier above}"""
        return dict(self._capture.reasons)

    def sq_norms(self) -> Tensor:
        """Squared norms of the per-sample gradients over all trainable parameters, shape (B,)."""
        norms = total_norms(self._terms(), self._records)
        return (norms.total * self._scale**2).to(wide_dtype(self._capture.parameters.values()))

    def clipped_sum(self, max_grad_norm: float, clipping: str | Clip = "flat") -> dict[str, Tensor]:
        """{name: Σ_b w_b·G_b}, shape of the parameter; zeros for a parameter the loss did not reach.

        ``clipping`` says what the weights are, as in ``make_private``; min(1, C / ‖G_b‖) if it is "flat".
        """
        _validate.positive("max_grad_norm", max_grad_norm)
        parts, parameters, clip = self._terms(), self._capture.parameters, chosen(clipping)
        norms = total_norms(parts, self._records, group_of(clip, parameters))
        sums, _ = clipped(parts, norms, max_grad_norm, wide_dtype(parameters.values()), self._scale, clip=clip)
        return {n: sums[n] if n in sums else torch.zeros_like(p, dtype=wide_dtype([p])) for n, p in parameters.items()}

    @torch.no_grad()
    def per_sample(self, name: str) -> Tensor:
        """Per-sample gradients of one parameter, shape (B, *shape)."""
        parts, parameters = self._terms(), self._capture.parameters
        if name not in parameters:
            raise ConfigurationError(
                f"{name!r} is not a trainable parameter.", found=name, fix=f"one of {list(parameters)}"
            )
        p = parameters[name]
        out = torch.zeros(self._records, *p.shape, dtype=wide_dtype([p]), device=p.device)
        for ids, bundle in parts:
            for term in bundle.get(name, ()):
                dense = materialize(term) * self._scale
                out = out + dense if ids is None else out.index_add(0, ids.to(p.device), dense)
        return out
