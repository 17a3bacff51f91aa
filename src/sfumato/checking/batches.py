"""Reading a batch: where its records lie, and a pool of records from which other batches are put together."""

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

import torch
from torch import Tensor

from sfumato.errors import ConfigurationError
from sfumato.ghost.indexing import named_tensors

TARGETS = ("labels", "label", "targets", "target", "y")


def substitute(
    value: Any, tensor: Callable[[Tensor, str], Any], items: Callable[[list[Any]], list[Any]], path: str = ""
) -> Any:
    """The same structure with other tensors, and other lists where one holds an item for each record."""

    def below(item: Any, key: object) -> Any:
        return substitute(item, tensor, items, f"{path}.{key}" if path else str(key))

    if isinstance(value, Tensor):
        return tensor(value, path)
    if isinstance(value, Mapping):
        members = {k: below(v, k) for k, v in value.items()}
        if type(value) is dict:
            return members
        try:
            return type(value)(members)  # type: ignore[call-arg]
        except Exception:  # noqa: BLE001  (any mapping of the user's)
            return members
    if isinstance(value, tuple):
        parts = [below(v, k) for k, v in enumerate(value)]
        return type(value)(*parts) if hasattr(value, "_fields") else tuple(parts)
    if isinstance(value, list):
        return items([below(v, k) for k, v in enumerate(value)])
    if is_dataclass(value) and not isinstance(value, type):
        new = copy.copy(value)
        for f in fields(value):
            object.__setattr__(new, f.name, below(getattr(value, f.name), f.name))
        return new
    inside = dict(named_tensors(value))
    if not inside:
        return value
    return copy.deepcopy(value, {id(t): tensor(t, f"{path}{name}") for name, t in inside.items()})


@dataclass(frozen=True)
class Records:
    """A batch of which any rows can be taken. ``axes`` names the axis of the records for every tensor that has one."""

    value: Any
    count: int
    axes: dict[str, int]
    of: "tuple[Records, list[int]] | None" = None  # the whole batch, and where these records are in it

    def take(self, rows: Sequence[int]) -> Any:
        """The batch of these records, in this order; records may repeat."""
        index = list(rows)

        def tensor(t: Tensor, path: str) -> Tensor:
            if path not in self.axes:
                return t.detach().clone().requires_grad_(t.requires_grad)
            taken = t.detach().index_select(self.axes[path], torch.tensor(index, device=t.device))
            return taken.requires_grad_(t.requires_grad)

        def items(values: list[Any]) -> list[Any]:
            return [copy.copy(values[i]) for i in index] if _for_each_record(values, self.count) else values

        return substitute(self.value, tensor, items)

    def cast(self, dtype: torch.dtype) -> "Records":
        """Floating-point members in another precision."""
        value = substitute(self.value, lambda t, _: _cast(t, dtype), lambda v: v)
        of = None if self.of is None else (self.of[0].cast(dtype), self.of[1])
        return Records(value, self.count, self.axes, of)

    @property
    def coincidental(self) -> list[str]:
        """Paths of inputs that may only happen to have as many rows as there are records: not the first, no target."""
        targets = {p for p in self.axes if self._target(p)}
        return [p for p in list(self.axes)[1:] if p not in targets]

    def _target(self, path: str) -> bool:
        head = path.split(".", 1)[0]
        return head in TARGETS if isinstance(self.value, Mapping) else head == str(_last(self.value))

    @property
    def floating(self) -> list[str]:
        """Paths of the inputs whose values are free: floating, of many values, and no target."""
        paths = []

        def look(t: Tensor, path: str) -> Tensor:
            if t.is_floating_point() and path in self.axes and not self._target(path) and not _mask(t):
                paths.append(path)
            return t

        substitute(self.value, look, lambda v: v)
        return paths


def _cast(t: Tensor, dtype: torch.dtype) -> Tensor:
    return t.detach().to(dtype).requires_grad_(t.requires_grad) if t.is_floating_point() else t


def _last(value: Any) -> int:
    return len(value) - 1 if isinstance(value, (tuple, list)) and len(value) > 1 else -1


def _mask(t: Tensor) -> bool:
    """A float tensor of two values (and infinities) is a mask or a code: other values have no meaning there."""
    return not bool(t.isfinite().all()) or len(t.flatten()[:4096].unique()) <= 2


def _for_each_record(values: list[Any], count: int) -> bool:
    return (
        len(values) == count
        and count > 0
        and not all(isinstance(v, Tensor) and v.dim() and len(v) == count for v in values)
    )


def read(batch: Any, batch_dim: int, most: int | None = None) -> Records:
    """The records of a batch (the first ``most`` of them).

    Raises:
        ConfigurationError: no tensor has a batch axis, or there are fewer than two records.
    """
    if batch is None or isinstance(batch, (str, bytes, int, float)):
        raise ConfigurationError(
            f"batch is a {type(batch).__name__}, not (inputs, target) or a dict of tensors.",
            found=type(batch).__name__,
            where="batch",
        )
    tensors: list[tuple[str, Tensor]] = []

    def note(t: Tensor, path: str) -> Tensor:
        tensors.append((path, t))
        return t

    substitute(batch, note, lambda v: v)
    first = next((t for _, t in tensors if t.dim() > batch_dim), None)
    if first is None:
        raise ConfigurationError(
            f"batch has no tensor with an axis {batch_dim} that could hold records.",
            where="batch",
            fix="pass a batch as your loader gives it, and name the axis of the records with batch_dim=.",
        )
    count = first.shape[batch_dim]
    if count < 2:
        raise ConfigurationError(
            f"batch has {count} record{'s' * (count != 1)}: whether records are independent shows only between two.",
            found=count,
            where="batch",
            fix="pass a batch of at least 2 records (8 are good).",
        )
    axes = {}
    for path, t in tensors:
        fits = [a for a in dict.fromkeys((batch_dim, 0)) if t.dim() > a and t.shape[a] == count]
        if fits:
            axes[path] = fits[0]
    whole = Records(batch, count, axes)
    if most is None or count <= most:
        return whole
    chosen = _diverse(whole, most)
    return Records(whole.take(chosen), most, axes, (whole, chosen))


def _diverse(records: Records, most: int) -> list[int]:
    """Records of several kinds (labels, lengths of masks), two of each if possible, then the first of the others."""
    kinds: list[tuple[float, ...]] = [()] * records.count

    def look(t: Tensor, path: str) -> Tensor:
        axis = records.axes.get(path)
        if axis is not None and (t.dim() == 1 or not t.is_floating_point() or _mask(t)):
            each = t.movedim(axis, 0).reshape(records.count, -1)
            code = each[:, 0] if each.shape[1] == 1 else (each > 0).sum(1)
            for i, value in enumerate(code.tolist()):
                kinds[i] += (value,)
        return t

    substitute(records.value, look, lambda v: v)
    seen: dict[tuple[float, ...], int] = {}
    for i, kind in enumerate(kinds):
        seen.setdefault(kind, i)
    chosen = list(seen.values())[: max(1, most // 2) if len(seen) < records.count else most]
    picked = {kinds[i] for i in chosen}
    rest = [i for i in range(records.count) if i not in chosen]
    rest.sort(key=lambda i: kinds[i] not in picked)  # pairs of a kind: a loss may join only records of one label
    second = {kinds[i]: i for i in reversed(rest) if kinds[i] in picked}
    chosen += list(second.values())[: most - len(chosen)]
    chosen += [i for i in [*seen.values(), *rest] if i not in chosen][: most - len(chosen)]
    return sorted(dict.fromkeys(chosen))


@dataclass(frozen=True)
class Pool:
    """Records and variants of them: ``n`` as they are, ``n`` shifted by noise, and the first one at extremes."""

    records: Records
    n: int
    varied: bool  # whether any input is floating, so that variants differ from the originals

    def take(self, rows: Sequence[int]) -> Any:
        return self.records.take(rows)

    def first(self, n: int) -> Records:
        """The records as they are."""
        return Records(self.records.take(range(n)), n, self.records.axes)

    def shifted(self, i: int) -> int:
        return self.n + i

    @property
    def extremes(self) -> dict[str, int]:
        """Variants of record 0."""
        return {"10 times as large": 2 * self.n, "1000 times as large": 2 * self.n + 1, "zero": 2 * self.n + 2}


def pool(records: Records) -> Pool:
    """Integers and masks keep to values found in the batch; noise goes on floating inputs alone."""
    n, free = records.count, set(records.floating)

    def grown(t: Tensor, path: str) -> Tensor:
        if path not in records.axes:
            return t
        x = t.detach().movedim(records.axes[path], 0)
        first = x[:1]
        if path in free:
            noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
            moved = x + noise.to(x) * x.std() * 0.7
            extremes = [10 * first, 1000 * first, 0 * first]
        else:
            moved, extremes = x, [first] * 3
        return torch.cat([x, moved, *extremes]).movedim(0, records.axes[path]).requires_grad_(t.requires_grad)

    def items(values: list[Any]) -> list[Any]:
        return values * 2 + values[:1] * 3 if _for_each_record(values, n) else values

    return Pool(Records(substitute(records.value, grown, items), 2 * n + 3, records.axes), n, bool(free))
