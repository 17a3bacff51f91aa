"""The private loader: draws logical batches, cuts them into microbatches, and hands the session a token for each."""

from collections import deque
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, IterableDataset, RandomSampler, SequentialSampler

from sfumato.errors import ConfigurationError, PrivacyError, TokenError, UnsupportedError
from sfumato.sampling import (
    CyclicPoisson,
    Shuffle,
    TruncatedPoisson,
    Units,
    draw_cyclic,
    draw_poisson,
    draw_truncated,
    pad,
    physical,
    physical_units,
    shuffle_epoch,
)
from sfumato.session.collate import in_order
from sfumato.session.population import numbers
from sfumato.session.step import Session
from sfumato.session.token import Token


def inspect(loader: DataLoader[Any]) -> tuple[int, int]:
    """(batch size, data set size) of a loader that can be replaced by a private one; refuses any other."""
    if not isinstance(loader, DataLoader):
        raise ConfigurationError(
            f"data_loader is a {type(loader).__name__}, not a torch.utils.data.DataLoader.",
            found=type(loader).__name__,
            where="data_loader",
        )
    if isinstance(loader.dataset, IterableDataset):
        raise UnsupportedError(
            "An IterableDataset has no records to choose from, so Poisson sampling cannot be guaranteed.",
            found=type(loader.dataset).__name__,
            where="data_loader.dataset",
            fix="use a map-style dataset (with __getitem__ and __len__).",
        )
    if loader.batch_size is None:
        raise UnsupportedError(
            "The loader has no batch_size (a custom batch_sampler, or batching switched off), so the sampling that "
            "would be accounted for is unknown.",
            found=type(loader.batch_sampler).__name__,
            where="data_loader",
            fix="build the DataLoader with batch_size= and choose sampling=sf.Poisson(...) or sf.Shuffle(...).",
        )
    sampler = loader.sampler
    plain = type(sampler) is SequentialSampler or (
        type(sampler) is RandomSampler and not sampler.replacement and sampler._num_samples is None
    )
    if not plain or type(loader.batch_sampler) is not BatchSampler:
        raise UnsupportedError(
            f"The loader draws with {type(sampler).__name__}; the private loader draws by itself and would drop it, "
            "and its privacy is not that of Poisson sampling.",
            found=type(sampler).__name__,
            where="data_loader.sampler",
            fix="build the DataLoader without sampler= (shuffle=True is fine).",
        )
    return loader.batch_size, len(loader.dataset)  # type: ignore[arg-type]


def plain(loader: DataLoader[Any]) -> DataLoader[Any]:
    """The loader behind a private one; any other as it is."""
    return loader.base if isinstance(loader, PrivateLoader) else loader


class _Draws:
    """A batch sampler: index lists go to the DataLoader (which may prefetch), a token for each to ``tokens``."""

    def __init__(self, session: Session, tokens: deque[Token], units: Units | None):
        self.session, self.tokens, self.units = session, tokens, units

    def __len__(self) -> int:
        return self.session.plan.steps_per_epoch

    def logical(self) -> Iterator[tuple[int, int | None, Any]]:
        """(turn, period, records or units drawn) of the rest of the epoch."""
        plan, first = self.session.plan, self.session.turn
        uniform, n, sampler = self.session.source.uniform, plan.dataset_size, plan.sampler
        if isinstance(sampler, Shuffle):  # every epoch is a period of its own, whole or not
            batches = shuffle_epoch(n, plan.expected_batch_size, uniform)
            for k, batch in enumerate(batches[self.session.epoch_step :]):
                yield first + k, first, batch
            return
        for turn in range(first, first + plan.steps_per_epoch - self.session.epoch_step):
            if isinstance(sampler, CyclicPoisson):
                yield turn, turn // sampler.cycle, draw_cyclic(n, plan.sample_rate, sampler.cycle, turn, uniform)
            elif isinstance(sampler, TruncatedPoisson):
                yield turn, None, draw_truncated(n, plan.sample_rate, sampler.max_batch_size or n, uniform)
            else:
                yield turn, None, draw_poisson(n, plan.sample_rate, uniform)

    def __iter__(self) -> Iterator[list[int]]:
        self.tokens.clear()
        for turn, period, drawn in self.logical():
            parts = self._cut(np.asarray(drawn))
            if not parts:
                self.tokens.append(Token(0, True, True, turn=turn, period=period))
            for k, (part, unit, padding) in enumerate(parts):
                last = k == len(parts) - 1
                self.tokens.append(Token(len(part), k == 0, last, None, False, unit, padding, turn, period))
                yield part.tolist()

    def _cut(self, drawn: Any) -> list[tuple[Any, Tensor | None, int]]:
        """(records, which unit each belongs to, how many of them are padding) of every physical batch."""
        size = self.session.plan.max_physical_batch_size
        if self.units is None:
            parts = physical(drawn, size)
            if self.session.plan.static_shapes and size is not None:
                return [(filled, None, size - real) for filled, real in (pad(part, size) for part in parts)]
            return [(part, None, 0) for part in parts]
        return [
            (
                np.concatenate(parts),
                torch.arange(len(parts)).repeat_interleave(torch.tensor([len(p) for p in parts])),
                0,
            )
            for parts in physical_units(self.units.drawn(drawn, self.session.source.uniform), size)
        ]


def _refuse_closed(session: Session) -> None:
    if session.closed:
        raise PrivacyError(
            "The engine of this loader has been detached.", where="data_loader", fix="call make_private again."
        )


class PrivateLoader(DataLoader[Any]):
    """A DataLoader over the records that the plan's sampler draws; ``len`` is the number of logical steps an epoch.

    Every item is one physical microbatch; exactly one backward may follow it. Empty draws never reach the loop: they
    are charged, released as noise and stepped here. The loader ends before the step that the budget does not allow.
    """

    def __init__(self, base: DataLoader[Any], session: Session, units: Units | None = None):
        tokens: deque[Token] = deque()
        self.base, self._numbers = base, numbers(base.dataset)
        self._session, self._tokens, self._serial = session, tokens, 0
        workers: dict[str, Any] = {}
        if base.num_workers > 0:
            workers = {"prefetch_factor": base.prefetch_factor, "persistent_workers": base.persistent_workers}
        super().__init__(
            base.dataset,
            batch_sampler=_Draws(session, tokens, units),
            num_workers=base.num_workers,
            collate_fn=base.collate_fn if units is None else in_order(base.collate_fn),
            pin_memory=base.pin_memory,
            timeout=base.timeout,
            worker_init_fn=base.worker_init_fn,
            multiprocessing_context=base.multiprocessing_context,
            **workers,
        )

    def __len__(self) -> int:
        return self._session.plan.steps_per_epoch

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        session = self._session
        _refuse_closed(session)
        session.abandon()
        session.epoch_step, session.resumed = session.resumed, 0
        session.stopped = False
        if not np.array_equal(self._numbers, numbers(self.dataset)):
            raise PrivacyError(
                "The Subset behind this loader lists other records than when it was made private, and the ledger would "
                "name those.",
                where="data_loader.dataset",
                fix="call make_private again, with a Subset for each round.",
            )
        self._serial += 1
        serial = self._serial
        batches = super().__iter__()
        try:
            while True:
                _refuse_closed(session)
                if serial != self._serial:
                    raise TokenError("Two loops run over one private loader.", fix="finish one before the next.")
                batch = next(batches, None)
                token: Token | None = None
                while self._tokens and token is None:
                    token = self._tokens.popleft()
                    if token.first and not session.affordable(token):
                        session.stopped = True
                        return
                    if token.size == 0:
                        session.empty(token)
                        token = None
                        if session.stopped:
                            return
                if token is None:
                    return
                session.issue(token, batch)
                yield batch
                if not session.closed:
                    session.settle(token)
                if session.stopped:
                    return
        finally:
            if serial == self._serial and not session.closed:
                session.abandon()


__all__ = ["PrivateLoader", "inspect", "plain"]
