"""The private loader: draws logical batches, cuts them into microbatches, and hands the session a token for each."""

from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, IterableDataset, RandomSampler, SequentialSampler

from sfumato.errors import ConfigurationError, PrivacyError, TokenError, UnsupportedError
from sfumato.plan import Plan
from sfumato.sampling import Poisson, Units, draw_poisson, physical, physical_units, shuffle_epoch
from sfumato.session.collate import in_order
from sfumato.session.step import Session, Token


def inspect(loader: DataLoader[Any]) -> tuple[int, int]:
    """(batch size, data set size) of a loader that can be replaced by a private one; refuses any other."""
    if not isinstance(loader, DataLoader):
        raise ConfigurationError(
            f"data_loader is a {type(loader).__name__}, not a torch.utils.data.DataLoader.",
            found=type(loader).__name__,
            where="data_loader",
        )
    if isinstance(loader, PrivateLoader):
        raise UnsupportedError(
            "data_loader is already private.", where="data_loader", fix="pass the original DataLoader."
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


class _Draws:
    """A batch sampler: index lists go to the DataLoader (which may prefetch), a token for each to ``tokens``."""

    def __init__(self, plan: Plan, uniform: Callable[[int], Any], tokens: deque[Token], units: Units | None):
        self.plan, self.uniform, self.tokens, self.units = plan, uniform, tokens, units

    def __len__(self) -> int:
        return self.plan.steps_per_epoch

    def logical(self) -> Iterator[Any]:
        plan = self.plan
        if isinstance(plan.sampler, Poisson):
            for _ in range(plan.steps_per_epoch):
                yield draw_poisson(plan.dataset_size, plan.sample_rate, self.uniform)
        else:
            yield from shuffle_epoch(plan.dataset_size, plan.expected_batch_size, self.uniform)

    def __iter__(self) -> Iterator[list[int]]:
        self.tokens.clear()
        for drawn in self.logical():
            parts = self._cut(np.asarray(drawn))
            if not parts:
                self.tokens.append(Token(0, True, True))
            for k, (part, unit) in enumerate(parts):
                self.tokens.append(Token(len(part), k == 0, k == len(parts) - 1, unit=unit))
                yield part.tolist()

    def _cut(self, drawn: Any) -> list[tuple[Any, Tensor | None]]:
        """(records, which unit each belongs to) of every physical batch."""
        size = self.plan.max_physical_batch_size
        if self.units is None:
            return [(part, None) for part in physical(drawn, size)]
        return [
            (np.concatenate(parts), torch.arange(len(parts)).repeat_interleave(torch.tensor([len(p) for p in parts])))
            for parts in physical_units(self.units.drawn(drawn, self.uniform), size)
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
        self._session, self._tokens, self._serial = session, tokens, 0
        workers: dict[str, Any] = {}
        if base.num_workers > 0:
            workers = {"prefetch_factor": base.prefetch_factor, "persistent_workers": base.persistent_workers}
        super().__init__(
            base.dataset,
            batch_sampler=_Draws(session.plan, session.source.uniform, tokens, units),
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
        session.begin_epoch()
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
                    if token.first and not session.affordable():
                        session.stopped = True
                        return
                    if token.size == 0:
                        session.empty()
                        token = None
                if token is None:
                    return
                session.issue(token, batch)
                yield batch
                if not session.closed:
                    session.settle(token)
        finally:
            if serial == self._serial and not session.closed:
                session.abandon()


__all__ = ["PrivateLoader", "inspect"]
