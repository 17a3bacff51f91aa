"""A judge of what propagation claims: run an operation on tagged tensors, perturb a record, see who moves.

A ``Case`` names the axes of its operands by letters. It is tried with all letters of one size (a guess by shape would
be found out) and with all of them different, with the records on every axis of every operand, alone and together with
constants, one row a record or several: blocks, strides, any owner vector, and rows that the batch itself sorted.
"""

import itertools
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

import sfumato as sf
from sfumato.ghost.capture import Capture
from sfumato.ghost.propagation import clean
from sfumato.ghost.propagation.names import LIKE
from sfumato.ghost.rows import Order, Pointer, Reduced, Rows, Verdict, owners
from sfumato.ghost.rules import NoRule, Split

SAME = 4
DIFFERENT = (4, 6, 2, 8, 10, 12)
MIXED = [("inner", "outer"), ("owner", "inner"), ("plain", "arranged")]
Op = Callable[..., Any]
Records = tuple[int, ...]
Seen = tuple[list[Tensor], list[Any]] | None


@dataclass(frozen=True)
class Case:
    """``name`` of the operation as the capture sees it; ``spec`` of the operands: "abc acd", kinds after a slash.

    Kinds: i (0 or 1), b, p (in (0, 1)), z (complex), c (never with records). A digit is an axis of that size.
    Each of ``ops`` has to be answered for some axis; ``wary`` may always be refused, only never answered wrongly.
    """

    name: str
    spec: str
    ops: tuple[Op, ...]
    wary: tuple[Op, ...] = ()
    moving: bool = False  # where a record's rows lie depends on others
    random: bool = False  # noise for each place, and so for another record where rows were sorted
    sizes: dict[str, int] = field(default_factory=dict)

    def __str__(self) -> str:
        return f"{self.name} {self.spec}".replace("/", "")


@dataclass(frozen=True)
class Operand:
    """One operand as a case wants it: its shape, the axis of its records (None: a constant), how they lie there."""

    shape: tuple[int, ...]
    kind: str
    axis: int | None
    layout: str = "plain"


@dataclass
class Verdicts:
    """What became of a case: how often each op was asked, answered, and seen to let its own record through."""

    asked: Counter[int] = field(default_factory=Counter)
    answered: Counter[int] = field(default_factory=Counter)
    live: Counter[int] = field(default_factory=Counter)
    names: dict[int, set[str]] = field(default_factory=dict)  # operations that were answered


class Watch(Capture):
    """Notes the names of the operations that got an answer."""

    names: set[str] | None = None

    def _records_only(self, func: Any, name: str, args: Any, kwargs: Any) -> Any:
        out = super()._records_only(func, name, args, kwargs)
        if self.names is not None:
            base = clean(name)
            told = [self.tag(t) for t in (args[0] if base == "setitem" else out,) if isinstance(t, Tensor)]
            told += [self.tag(t) for t in out if isinstance(t, Tensor)] if isinstance(out, (tuple, list)) else []
            if any(isinstance(t, (Rows, Reduced, Pointer, Verdict, Order)) for t in told) or base in LIKE:
                self.names.add(base)
        return out


# -- operands ---------------------------------------------------------------------------------------------------------


def _records(size: int, layout: str) -> int | None:
    """How many records an axis of ``size`` rows has in this layout; None where it cannot be one."""
    if layout in ("plain", "arranged"):
        return size
    return 2 if layout == "owner" or size % 2 == 0 else None


def _values(shape: tuple[int, ...], kind: str) -> Tensor:
    match kind:
        case "i":
            return torch.randint(0, 2, shape)
        case "b":
            return torch.rand(shape) > 0.5
        case "p":
            return torch.rand(shape, dtype=torch.float64) * 0.8 + 0.1
        case "z":
            return torch.randn(shape, dtype=torch.complex128)
    return torch.randn(shape, dtype=torch.float64)


def _base(operand: Operand) -> Tensor:
    """A batch, records first; ``_lay`` makes the operand from it."""
    shape, axis = operand.shape, operand.axis
    if axis is None:
        return _values(shape, operand.kind)
    rest, size = (*shape[:axis], *shape[axis + 1 :]), shape[axis]
    lead = {"inner": (2, size // 2), "outer": (2, size // 2), "owner": (2, size - 1)}.get(operand.layout, (size,))
    return _values((*lead, *rest), operand.kind)


def _lay(base: Tensor, keys: Tensor, operand: Operand) -> Tensor:
    if operand.axis is None:
        return base
    if operand.layout == "inner":
        base = base.flatten(0, 1)
    elif operand.layout == "outer":
        base = base.transpose(0, 1).flatten(0, 1)
    elif operand.layout == "owner":  # all rows of one record, the first of the other, not in order
        mask = torch.zeros(base.shape[:2], dtype=torch.bool)
        mask[0], mask[1, 0] = True, True
        base = base[mask][torch.arange(operand.shape[operand.axis]).roll(2)]
    elif operand.layout == "arranged":
        base = base.index_select(0, keys.argsort())
    return base.movedim(0, operand.axis)


def _perturbed(bases: list[Tensor], operands: list[Operand], records: Records) -> list[Tensor]:
    """Other values for some of the records; the same ones for a record, whoever else is perturbed."""
    result = []
    for base, operand in zip(bases, operands, strict=True):
        if operand.axis is not None:
            base = base.clone()
            for b in records:
                torch.default_generator.manual_seed(97 + b)
                old = base[b]
                base[b] = (
                    ~old
                    if old.dtype == torch.bool
                    else 1 - old
                    if operand.kind == "i"
                    else _values(old.shape, operand.kind)
                )
        result.append(base)
    return result


def _keys(keys: Tensor, records: Records) -> Tensor:
    """Lengths to sort by, of which some records have others."""
    keys = keys.clone()
    for b in records:
        keys[b] = (keys[b] + 7) % 13
    return keys


# -- variants ---------------------------------------------------------------------------------------------------------


def variants(case: Case) -> Iterator[tuple[list[Operand], int]]:
    """(operands, records) for every way to lay records in the operands of a case."""
    words = [(w.split("/") + [""])[:2] for w in case.spec.split()]
    letters = sorted({c for w, _ in words for c in w if c.isalpha()})
    same = dict.fromkeys(letters, SAME) | case.sizes
    different = dict(zip(letters, DIFFERENT, strict=False)) | case.sizes
    for sizes in (same,) if same == different or len(words) > 2 else (same, different):
        shapes = [tuple(int(c) if c.isdigit() else sizes[c] for c in w) for w, _ in words]
        choices = [[None] if k == "c" else [None, *(i for i, c in enumerate(w) if c.isalpha())] for w, k in words]
        for axes in itertools.product(*choices):
            for first, others in _layouts([a for a in axes if a is not None], len(words), sizes is same):
                if case.random and first == "arranged":
                    continue
                tagged = [k for k, a in enumerate(axes) if a is not None]
                operands = [
                    Operand(shape, kind, axis, first if tagged[:1] == [k] else others)
                    for k, (shape, (_, kind), axis) in enumerate(zip(shapes, words, axes, strict=True))
                ]
                counts = {_records(o.shape[o.axis], o.layout) for o in operands if o.axis is not None}
                if len(counts) == 1 and None not in counts:
                    yield operands, counts.pop()


def _layouts(axes: list[int], operands: int, same: bool) -> list[tuple[str, str]]:
    """(layout of the first operand with records, of the others)."""
    kinds = ["plain"] if not same and operands > 1 else ["plain", "owner"]
    if same:
        kinds += ["arranged"] if operands > 2 or len(set(axes)) > 1 else ["arranged", "inner", "outer"]
    mixed = MIXED if same and len(axes) > 1 == len(set(axes)) else []
    return [*((k, k) for k in kinds), *mixed]


# -- judging ----------------------------------------------------------------------------------------------------------


def leaves(out: Any) -> list[Tensor]:
    if isinstance(out, Tensor):
        return [out]
    return [t for o in out for t in leaves(o)] if isinstance(out, (tuple, list)) else []


def _claims(tags: list[Any]) -> list[bool]:
    """Which tags say something that can be wrong."""
    return [t is None or isinstance(t, (Rows, Reduced, Verdict, Pointer)) for t in tags]


def _moved(a: Tensor, b: Tensor) -> Tensor:
    """Which elements differ."""
    if a.is_floating_point() or a.is_complex():
        return ~torch.isclose(a, b, rtol=1e-7, atol=1e-9, equal_nan=True)
    return a != b


def _by_owner(out: Tensor, rows: Rows, records: int) -> tuple[Tensor, Tensor]:
    owner = owners(rows, records, out.device)
    order = torch.argsort(owner, stable=True)
    return owner[order], out.movedim(rows.axis, 0)[order]


class Trial:
    """All ops of a case on one variant."""

    def __init__(self, case: Case, operands: list[Operand], records: int):
        self.ops, self.moving = (*case.ops, *case.wary), case.moving
        self.operands, self.records = operands, records
        torch.default_generator.manual_seed(zlib.crc32(str(operands).encode()))
        self.bases = [_base(o) for o in operands]
        self.keys = torch.randperm(records)
        self.names: list[set[str]] = [set() for _ in self.ops]  # what was answered
        self.watched = cache(self._watched)
        self.given = cache(self._given)

    def _given(self, who: Records) -> list[Tensor]:
        """The operands with ``who`` perturbed."""
        bases, keys = _perturbed(self.bases, self.operands, who), _keys(self.keys, who)
        return [_lay(x, keys, o) for x, o in zip(bases, self.operands, strict=True)]

    def native(self, k: int, who: Records) -> list[Tensor]:
        given = self.given(who)
        torch.default_generator.manual_seed(0)
        return leaves(self.ops[k](*given))

    def _watched(self, who: Records) -> list[Seen]:
        """Outputs of each op and their tags with ``who`` perturbed; None where the capture refuses."""
        c = Watch(nn.Module())
        c.open(lambda _: None, self.records)
        c.tape.records = self.records
        bases, keys = _perturbed(self.bases, self.operands, who), _keys(self.keys, who)
        for x, o in zip(bases, self.operands, strict=True):
            if o.axis is not None:
                c.set_tag(x, Rows(0))
        c.set_tag(keys, Rows(0))
        result: list[Seen] = []
        with c:
            given = [_lay(x, keys, o) for x, o in zip(bases, self.operands, strict=True)]
            for x, o in zip(given, self.operands, strict=True):
                laid = c.own_tag(x)
                assert o.axis is None or (isinstance(laid, Rows) and laid.axis == o.axis), (o, laid)
            for k, op in enumerate(self.ops):
                if who and not self.followed(k):
                    result.append(None)
                    continue
                c.names = self.names[k]
                torch.default_generator.manual_seed(0)
                try:
                    out = leaves(op(*given))
                except (sf.SfumatoError, NoRule, Split):
                    result.append(None)
                except Exception as error:
                    error.add_note(f"op {k}")
                    raise
                else:
                    result.append((out, [c.tag(t) for t in out]))
        return result

    def followed(self, k: int) -> bool:
        """Whether the claim itself depends on the records, so that it is asked for again with each perturbation."""
        seen = self.watched(())[k]
        if seen is None or not any(_claims(seen[1])):
            return False
        settled = all(t is None or (isinstance(t, Rows) and not t.arranged) for t in seen[1])
        return self.moving or not settled or any(o.layout == "arranged" for o in self.operands)

    def judge(self, k: int) -> tuple[bool, bool]:
        """Whether op k was answered, and let a record through to itself; raises on a wrong answer."""
        seen = self.watched(())[k]
        if seen is None:
            return False, False
        outs, tags = seen
        claims = _claims(tags)
        if not any(claims):
            return False, False
        live = [t is None for t in tags]
        followed = self.followed(k)
        for b in range(min(self.records, 2) if followed else self.records):
            again = self.watched((b,))[k] if followed else (self.native(k, (b,)), tags)
            if again is None:
                continue
            assert len(again[0]) == len(outs), "the number of outputs depends on a record"
            for i, ok in enumerate(claims):
                if ok and type(again[1][i]) is type(tags[i]):
                    live[i] |= self._one(b, outs[i], tags[i], again[0][i], again[1][i])
        summed = self.records > 1 and any(isinstance(t, Reduced) for t in tags)
        batches = [self.watched(who)[k] for who in ((0,), (1,), (0, 1))] if summed else []
        for i, tag in enumerate(tags):  # a sum that depends on the data (ignored labels) may be none in another batch
            if isinstance(tag, Reduced) and all(
                seen is not None and isinstance(seen[1][i], Reduced) for seen in batches
            ):
                live[i] |= _additive(outs[i], *(seen[0][i] for seen in batches))
        return True, any(ok and alive for ok, alive in zip(claims, live, strict=True))

    def _one(self, b: int, out: Tensor, tag: Any, new: Tensor, new_tag: Any) -> bool:
        """Record b was perturbed: what may have changed is its own. Says whether something did."""
        match tag:
            case None:
                assert out.shape == new.shape, f"record {b} decides the shape of an untagged value"
                assert not _moved(out, new).any(), f"record {b} reaches an untagged value"
                return True
            case Rows():
                if new_tag is tag and out.shape == new.shape:
                    moved = _moved(out, new).movedim(tag.axis, 0).unsqueeze(-1).flatten(1).any(1)
                    own = owners(tag, self.records, out.device) == b
                    assert not (moved & ~own).any(), f"record {b} reaches rows of another"
                    return bool(moved.any())
                mine, ours = _by_owner(out, tag, self.records)
                yours, theirs = _by_owner(new, new_tag, self.records)
                assert torch.equal(mine[mine != b], yours[yours != b]), f"record {b} decides how many rows others have"
                before, later = ours[mine != b], theirs[yours != b]
                assert before.shape == later.shape, f"record {b} decides the shape of others"
                assert not _moved(before, later).any(), f"record {b} reaches rows of another"
                before, later = ours[mine == b], theirs[yours == b]
                return before.shape != later.shape or bool(_moved(before, later).any())
            case Verdict():
                others = torch.arange(self.records) != b
                assert torch.equal(tag.each[others], new_tag.each[others]), "the verdict of another record changed"
                return bool(tag.each[b] != new_tag.each[b])
            case Pointer():
                places, again = self._places(out, tag), self._places(new, new_tag)
                for record in set(places) - {b}:
                    assert places[record] == again.get(record), f"record {b} decides where others point"
                return True
            case Reduced(each=Tensor() as each):
                assert int(each.sum()) == int(out), "the sum is not that of the records"
        return False

    def _places(self, out: Tensor, tag: Pointer) -> dict[int, list[int]]:
        """{record: which of its own rows it points to}; every pointer names a row of its own record."""
        if tag.base is None or tag.rows.axis != 0:
            return {}
        numbers = out if out.dim() == 1 else out.select(1, tag.column or 0).reshape(len(out), -1)[:, 0]
        owner = owners(tag.base, self.records, out.device)
        rank = torch.stack([(owner[:r] == owner[r]).sum() for r in range(len(owner))])
        whose = owners(tag.rows, self.records, out.device)
        assert torch.equal(owner[numbers], whose), "a pointer to rows of another"
        found: dict[int, list[int]] = {}
        for record, place in zip(whose.tolist(), rank[numbers].tolist(), strict=True):
            found.setdefault(record, []).append(place)
        return found


def _additive(out: Tensor, one: Tensor, two: Tensor, both: Tensor) -> bool:
    """What one record adds does not depend on another."""
    kind = torch.complex128 if out.is_complex() else torch.float64
    out, one, two, both = (t.to(kind) for t in (out, one, two, both))
    assert not _moved(both - two, one - out).any(), "what a record adds depends on another"
    return bool(_moved(out, one).any())


def judge(case: Case) -> Verdicts:
    """Every op of a case on every variant. Raises AssertionError on the first claim that is wrong."""
    found = Verdicts()
    for operands, records in variants(case):
        trial = Trial(case, operands, records)
        for k in range(len(trial.ops)):
            try:
                answered, live = trial.judge(k)
            except Exception as error:
                error.add_note(f"{case}, op {k} of {operands}")
                raise
            found.asked[k] += 1
            found.answered[k] += answered
            found.live[k] += live
        for k, names in enumerate(trial.names):
            found.names.setdefault(k, set()).update(names)
    return found
