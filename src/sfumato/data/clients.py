"""Records divided among clients, with a public part and one common test set, all three disjoint."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from ..errors import ConfigurationError, DataError
from .dataset import SPLIT_SEED, DataSet, Records


@dataclass(frozen=True)
class FederatedData:
    """``data``: what was divided, with ``train`` less the public part; ``clients``: client id -> its own records.

    ``public``: records that no guarantee covers, None without any; ``partition``: one sentence on how it was divided;
    ``natural``: whether the clients are those of the data, or were drawn.
    """

    data: DataSet
    clients: Mapping[str, Records]
    public: Records | None
    partition: str
    natural: bool


def simulated(
    data: DataSet, *, clients: int, alpha: float, public_fraction: float, seed: int = SPLIT_SEED
) -> FederatedData:
    """A public part, drawn class by class, then :func:`dirichlet` over the rest of the training records."""
    kept, public = stratified(data.train.y.numpy(), public_fraction, seed=seed)
    private = take(data.train, kept)
    held = replace(data, train=private)
    return FederatedData(
        data=held,
        clients=dirichlet(private, clients, alpha, seed=seed),
        public=take(data.train, public) if len(public) else None,
        partition=f"{clients:,} simulated clients of equal size; the classes of each follow a Dirichlet distribution "
        f"with concentration {alpha:g} (Hsu, Qi, Brown 2019), drawn from a fixed seed.",
        natural=False,
    )


def by_column(
    data: DataSet, keys: Sequence[str], *, public_fraction: float, column: str, seed: int = SPLIT_SEED
) -> FederatedData:
    """One client for each distinct key; ``keys`` (n,) goes with the n training records.

    Whole clients are drawn for the public part: records of a protected client must not be public.
    """
    names = np.asarray(keys, dtype=str)
    if names.shape != (len(data.train),):
        raise DataError(f"{len(names)} keys do not go with {len(data.train)} records", where=column)
    found = {str(name): np.flatnonzero(names == name) for name in np.unique(names)}
    order = [sorted(found)[i] for i in np.random.default_rng(seed).permutation(len(found))]
    wanted, cut, held = round(public_fraction * len(names)), 0, 0
    while held < wanted:
        held += len(found[order[cut]])
        cut += 1
    if len(order) - cut < 2:
        raise DataError(f"column {column!r} leaves {len(order) - cut} client(s); 2 or more are needed", where=column)
    opened = np.concatenate([found[name] for name in order[:cut]]) if cut else np.empty(0, np.int64)
    clients = {name: take(data.train, found[name]) for name in sorted(order[cut:])}
    private = np.sort(np.concatenate([found[name] for name in order[cut:]]))
    spared = f" {cut:,} further clients were drawn from a fixed seed to be public." if cut else ""
    return FederatedData(
        data=replace(data, train=take(data.train, private)),
        clients=clients,
        public=take(data.train, np.sort(opened)) if cut else None,
        partition=f"{len(clients):,} natural clients: the values of column {column!r}.{spared}",
        natural=True,
    )


def dirichlet(
    records: Records, clients: int, alpha: float, *, least: int = 1, seed: int = SPLIT_SEED
) -> dict[str, Records]:
    """Clients of equal size (to one record) with unlike class mixtures (Hsu, Qi, Brown 2019).

    Each client draws a mixture from Dirichlet(``alpha`` · overall mixture · classes) and then records by it until the
    pools are empty. A small ``alpha`` gives clients of one class, a large one alike clients. ``seed`` is public.

    Raises :class:`ConfigurationError` for an ``alpha`` that is not positive, :class:`DataError` if there are not
    ``least`` records for each client.
    """
    if not (np.isfinite(alpha) and alpha > 0):
        raise ConfigurationError(f"--alpha must be greater than 0, got {alpha:g}", found=alpha)
    if clients < 1 or len(records) < clients * least:
        raise DataError(
            f"{len(records)} records cannot be divided among {clients} clients with {least} or more each.",
            fix="choose fewer clients.",
        )
    generator = np.random.default_rng(seed)
    y = records.y.numpy()
    pools = [list(generator.permutation(np.flatnonzero(y == label))) for label in range(int(y.max()) + 1)]
    shares = np.array([len(pool) for pool in pools], dtype=np.float64)
    shares *= len(pools) / shares.sum()
    sizes = np.full(clients, len(y) // clients)
    sizes[generator.permutation(clients)[: len(y) % clients]] += 1
    rows: list[np.ndarray] = []
    for size in sizes:
        mixture = generator.dirichlet(alpha * np.maximum(shares, 1e-9))
        rows.append(np.sort([_pop(pools, mixture, generator) for _ in range(size)]))
    width = len(str(clients - 1))
    return {f"client-{i:0{width}}": take(records, own) for i, own in enumerate(rows)}


def stratified(y: np.ndarray, fraction: float, *, seed: int = SPLIT_SEED) -> tuple[np.ndarray, np.ndarray]:
    """(rows that stay, rows held out): ``fraction`` of each class is held out, the same for every run."""
    generator = np.random.default_rng(seed)
    order = [generator.permutation(np.flatnonzero(y == label)) for label in np.unique(y)]
    cuts = [round(fraction * len(rows)) for rows in order]
    stay = [rows[cut:] for rows, cut in zip(order, cuts, strict=True)]
    out = [rows[:cut] for rows, cut in zip(order, cuts, strict=True)]
    return np.sort(np.concatenate(stay)), np.sort(np.concatenate(out))


def take(records: Records, rows: np.ndarray) -> Records:
    """The records at ``rows``, as tensors of their own."""
    index = torch.from_numpy(np.asarray(rows, dtype=np.int64))
    return Records(records.x[index], records.y[index])


def _pop(pools: list[list[int]], mixture: np.ndarray, generator: np.random.Generator) -> int:
    """One record of a class drawn by ``mixture``, among the classes that are left."""
    weights = np.where([bool(pool) for pool in pools], np.maximum(mixture, 1e-12), 0.0)
    return pools[int(generator.choice(len(pools), p=weights / weights.sum()))].pop()
