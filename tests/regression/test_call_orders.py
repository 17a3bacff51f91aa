"""Any order of forward, backward, zero_grad, step, break, new loop and evaluation.

Invariants: the ledger holds one entry for each release; a visible gradient is a clipped one; nothing but a typed
error is raised.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from tests.step.harness import data, loss, mlp, norm, world
from torch import Tensor
from torch.overrides import _get_current_function_mode_stack

import sfumato as sf

C = 1e-4
RECORDS = 12
RELEASES: list[int] = []  # seen by the machine: it must not pass because nothing ever happens


class Orders(RuleBasedStateMachine):
    """One user who does everything in every order."""

    @initialize(
        physical=st.sampled_from([None, 1, 5]),
        shuffled=st.booleans(),
        batch=st.sampled_from([1, 4, 12]),
        adam=st.booleans(),
    )
    def begin(self, physical: int | None, shuffled: bool, batch: int, adam: bool) -> None:
        torch.manual_seed(0)
        self.w = world(
            mlp(),
            data(RECORDS),
            batch_size=batch,
            noise=sf.noise.Research(1),
            noise_multiplier=0.0,
            max_grad_norm=C,
            max_physical_batch_size=physical,
            sampling=sf.Shuffle() if shuffled else None,
            optimizer=(lambda p: torch.optim.Adam(p, lr=0.0)) if adam else (lambda p: torch.optim.SGD(p, lr=0.0)),
        )
        self.iterator: Iterator[Any] | None = None
        self.batch: tuple[Tensor, Tensor] | None = None
        self.losses: list[Tensor] = []
        self.errors = 0
        self.since_wiped = 0  # releases that may have added up in p.grad
        self.seen_steps = 0

    def attempt(self, action: Any) -> Any:
        try:
            return action()
        except sf.SfumatoError:
            self.errors += 1
        except RuntimeError as error:
            # torch's own words for a graph that its user has spent or written over
            own = ("second time", "does not require grad", "modified by an inplace operation")
            if not any(words in str(error) for words in own):
                raise
        return None

    @rule()
    def new_loop(self) -> None:
        self.iterator, self.batch = iter(self.w.loader), None

    @rule()
    def second_loop_while_the_first_waits(self) -> None:
        old, self.iterator = self.iterator, iter(self.w.loader)
        self.batch = self.attempt(lambda: next(self.iterator, None))  # type: ignore[call-overload]
        if old is not None:
            self.attempt(lambda: next(old, None))  # type: ignore[call-overload]

    @rule()
    def draw(self) -> None:
        if self.iterator is None:
            self.iterator = iter(self.w.loader)
        self.batch = self.attempt(lambda: next(self.iterator, None))  # type: ignore[call-overload]
        if self.batch is None:
            self.iterator = None

    @rule(rounds=st.integers(1, 4))
    def as_intended(self, rounds: int) -> None:
        """What everybody else's loop looks like, so that releases lie between the odd calls."""
        for _ in range(rounds):
            self.draw()
            if self.batch is not None:
                value = self.attempt(lambda: loss(self.w.model, *self.batch))  # type: ignore[misc]
                if value is not None:
                    self.losses = [*self.losses[-2:], value]
                    self.attempt(value.backward)

    @rule(spoil=st.sampled_from(["evaluate", "forward_on_others", "freeze_or_unfreeze", "step", "zero_grad", "again"]))
    def disturbed_between_forward_and_backward(self, spoil: str) -> None:
        self.draw()
        self.forward(1)
        if spoil == "zero_grad":
            self.zero_grad(False)
        elif spoil == "again":
            self.backward(True, len(self.losses) - 1)
        else:
            getattr(self, spoil)()
        self.backward(True, 0)
        self.backward(False, len(self.losses) - 1)
        RELEASES.append(self.w.engine.steps)

    @rule()
    def leave_the_loop(self) -> None:
        self.iterator = None

    @rule(times=st.integers(1, 2))
    def forward(self, times: int) -> None:
        for _ in range(times):
            if self.batch is not None:
                value = self.attempt(lambda: loss(self.w.model, *self.batch))  # type: ignore[misc]
                if value is not None:
                    self.losses = [*self.losses[-2:], value]

    @rule()
    def forward_on_others(self) -> None:
        value = self.attempt(lambda: loss(self.w.model, *data(3)))
        if value is not None:
            self.losses = [*self.losses[-2:], value]

    @rule(retain=st.booleans(), which=st.integers(0, 2))
    def backward(self, retain: bool, which: int) -> None:
        if self.losses:
            chosen = self.losses[which % len(self.losses)]
            self.attempt(lambda: chosen.backward(retain_graph=retain))

    @rule()
    def backward_of_all(self) -> None:
        if self.losses:
            self.attempt(lambda: sum(self.losses[1:], self.losses[0]).backward(retain_graph=True))

    @rule()
    def backward_with_regulariser(self) -> None:
        if self.losses:
            penalty = self.w.model[0].weight.square().sum()
            self.attempt(lambda: (self.losses[-1] + penalty).backward(retain_graph=True))

    @rule(to_none=st.booleans())
    def zero_grad(self, to_none: bool) -> None:
        self.w.optimizer.zero_grad(set_to_none=to_none)
        self.since_wiped = 0

    @rule()
    def step(self) -> None:
        self.attempt(self.w.optimizer.step)

    @rule()
    def evaluate(self) -> None:
        with torch.no_grad():
            self.w.model(data(7)[0])

    @rule()
    def freeze_or_unfreeze(self) -> None:
        first = self.w.model[0]
        first.requires_grad_(not first.weight.requires_grad)

    @rule(really=st.integers(0, 3))
    def reattach(self, really: int) -> None:
        if really:
            return
        self.w.engine.detach()
        before = self.w.charges
        self.w.model.zero_grad()
        self.w.model.requires_grad_(True)
        self.w = world(
            self.w.model,
            data(RECORDS),
            batch_size=4,
            engine=self.w.engine,
            noise=sf.noise.Research(2),
            noise_multiplier=0.0,
            max_grad_norm=C,
        )
        self.paid_before = before
        self.iterator, self.batch, self.losses = None, None, []
        self.since_wiped = self.seen_steps = 0

    @invariant()
    def every_release_is_in_the_ledger(self) -> None:
        if hasattr(self, "w"):
            assert self.w.charges == self.w.engine.steps + getattr(self, "paid_before", 0)

    @invariant()
    def nothing_unclipped_is_visible(self) -> None:
        if not hasattr(self, "w"):
            return
        self.since_wiped += self.w.engine.steps - self.seen_steps
        self.seen_steps = self.w.engine.steps
        most = C * RECORDS * self.since_wiped / self.w.engine.plan.expected_batch_size
        assert norm(self.w.grads) <= most * (1 + 1e-5)

    @invariant()
    def no_mode_is_left(self) -> None:
        assert not _get_current_function_mode_stack()

    def teardown(self) -> None:
        if hasattr(self, "w"):
            self.w.engine.detach()
            assert not any(p._post_accumulate_grad_hooks for p in self.w.model.parameters())


Orders.TestCase.settings = settings(
    max_examples=150,
    stateful_step_count=30,
    derandomize=True,
    deadline=None,
    database=None,
    suppress_health_check=list(HealthCheck),
)


def test_any_order_of_calls() -> None:
    RELEASES.clear()
    Orders.TestCase().runTest()
    assert sum(r > 0 for r in RELEASES) >= 50
