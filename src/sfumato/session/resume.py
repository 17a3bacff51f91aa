"""A training's checkpoint: what of a session is public state, and how it is put back."""

import os
from collections.abc import Mapping
from typing import Any

from sfumato import _validate
from sfumato.errors import ConfigurationError
from sfumato.session import checkpoint
from sfumato.session.step import Session


def save(session: Session, path: str | os.PathLike[str], extra: Mapping[str, Any] | None) -> None:
    """Write the state as of the last release."""
    checkpoint.save(
        path,
        module=session.module,
        optimizers=session.optimizers,
        position={
            "steps": session.steps,
            "epoch_step": session.epoch_step,
            "bound": session.bound,
            "changed": [session.plan.noise_multiplier, session.plan.max_grad_norm] if session.plan.adaptive else None,
        },
        plan=session.plan.described(),
        ledger_head=session.charging.ledger.head,
        extra=None if extra is None else dict(extra),
    )


def load(session: Session, path: str | os.PathLike[str]) -> dict[str, Any]:
    """Restore it: the rest of its epoch comes next, every step of it a new charge with fresh noise."""
    stored = checkpoint.load(path)
    position = stored.position
    epoch_step, bound, changed = (position.get(name) for name in ("epoch_step", "bound", "changed"))
    if isinstance(epoch_step, bool) or not isinstance(epoch_step, int) or epoch_step < 0:
        raise ConfigurationError(f"position has epoch_step={epoch_step!r}, not a count.", found=epoch_step)
    if bound is not None:
        _validate.positive("position: bound", bound)
    if changed is not None:
        if not isinstance(changed, list) or len(changed) != 2:
            raise ConfigurationError(f"position has changed={changed!r}, not two numbers.", found=changed)
        _validate.non_negative("position: noise_multiplier", changed[0])
        _validate.positive("position: max_grad_norm", changed[1])
    checkpoint.admit(stored, session.charging.ledger, session.plan.described())
    session.abandon()
    checkpoint.apply(stored, session.module, session.optimizers)
    if changed is not None:  # chosen on the way, so what follows is as well
        session.change(noise_multiplier=changed[0], max_grad_norm=changed[1])
    session.charging.renew()
    session.steps, session.bound = position["steps"], bound
    session.resumed = epoch_step if epoch_step < session.plan.steps_per_epoch else 0
    return stored.extra or {}


__all__ = ["load", "save"]
