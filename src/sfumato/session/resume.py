"""A training's checkpoint: what of a session is public state, and how it is put back."""

import os
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from sfumato import _validate
from sfumato.errors import ConfigurationError
from sfumato.session import checkpoint
from sfumato.session.step import Session

MOST = 2**53  # beyond it a step's number has no float of its own


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
    steps, epoch_step = (_count(stored, name) for name in ("steps", "epoch_step"))
    bound, plan = stored.position.get("bound"), session.plan
    if bound is not None:
        _validate.positive("position: bound", bound)
    if (changed := stored.position.get("changed")) is not None:  # chosen on the way, so what follows is as well
        if not isinstance(changed, list) or len(changed) != 2:
            raise ConfigurationError(f"position has changed={changed!r}, not two numbers.", found=changed)
        sigma = _validate.non_negative("position: noise_multiplier", changed[0])
        c = _validate.positive("position: max_grad_norm", changed[1])
        plan = replace(plan, noise_multiplier=sigma, max_grad_norm=c, adaptive=True)
    plan.at(steps, bound)
    plan.charge(steps)
    checkpoint.admit(stored, session.charging.ledger, plan.described())
    session.abandon()
    checkpoint.apply(stored, session.module, session.optimizers)
    session.charging.renew()
    session.plan, session.steps, session.bound = plan, steps, bound
    session.resumed = epoch_step if epoch_step < plan.steps_per_epoch else 0
    return stored.extra or {}


def _count(stored: checkpoint.Stored, name: str) -> int:
    value = stored.position.get(name)
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < MOST:
        raise ConfigurationError(f"{stored.path}: {name}={value!r} is not a count.", found=value, where="position")
    return value


__all__ = ["load", "save"]
