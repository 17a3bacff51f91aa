"""Independence: does any record move what the model, the loss or the gradient holds for another?

By plain autograd on plain runs; the engine and its capture take no part. Two kinds of evidence:

- *Rows.* The outputs of records that are in two batches must be the same in both: alone, with others replaced, dropped,
  reordered, taken to extremes, or all equal to one (which fills an expert's capacity).
- *Sums.* The gradient of the summed loss over a batch must be the sum of the gradients of its records alone. This sees
  whatever the rows do not: losses over pairs, shared normalisers, auxiliary losses, a backward that mixes.

A model that is random by itself (beyond dropout, which is off) is compared between batches of one size and one seed;
instead of the sum, the mixed difference g(A, B) - g(A', B) - g(A, B') + g(A', B') must vanish.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

from torch import Tensor

from sfumato.checking import rows, sketch
from sfumato.checking.rows import Pairs
from sfumato.checking.sketch import Sketch
from sfumato.checking.subject import TOLERANCE, Run, Subject
from sfumato.ghost.state import same_randomness


@dataclass
class Movement:
    """Evidence that records depend on each other."""

    probe: str  # what was done, to be read after "when"
    first: list[int]
    second: list[int]
    pairs: Pairs
    output: str | None = None  # the output that moved; None: the gradient
    parameters: list[str] = field(default_factory=list)
    factor: float | None = None  # the gradient is this many times the sum of its records
    criterion: bool = False  # seen in the criterion by itself
    constant: bool = False  # seen with one random number for all records


@dataclass
class Verdict:
    """What was found, and what later parts of the check can use."""

    movement: Movement | None = None
    random: bool = False
    reproducible: bool = True
    judged: bool = True  # False: random numbers depend on the records, so rows could not be compared
    compared: bool = False  # at least one comparison of gradients took place
    sized: bool = False  # one of them between batches of different sizes
    steady: bool = True  # False: rounding is amplified so much that only batches of one size can be compared
    alone: list[Sketch] | None = None  # the gradient of each record; None where it is not defined
    finite: list[int] | None = None  # records to look at instead, where the gradient of others is not finite
    fails_alone: str | None = None
    together: Sketch = field(default_factory=dict)
    axes: dict[str, int] = field(default_factory=dict)


def judge(s: Subject, batch_dim: int, quick: bool = False) -> Verdict:
    """Stops at the first movement, which rounding alone must not explain."""
    v = _judge(s, batch_dim, quick)
    if v.movement is None or v.random or v.movement.factor is not None or not rounding(s, v, v.movement):
        return v
    v.steady, v.alone = False, None
    base = s.run(range(s.n))
    v.movement = _same_size(s, v, base, thorough=True) or _mixed_differences(s, v)
    return v


_ULP = {64: 2e-15, 32: 5e-7, 16: 8e-3, 8: 0.1}


def rounding(s: Subject, v: Verdict, m: Movement | None) -> bool:
    """Whether weights that differ by rounding alone move as much."""
    base = s.run(range(s.n))
    back = s.shift_weights(_ULP[s.bits])
    try:
        near = s.try_measure(range(s.n))
    finally:
        back()
    if near is None:
        return False
    if m is None or m.output is None:
        scale = sketch.scales([v.together, near[1]])
        return bool(sketch.unequal(near[1], v.together, scale, s.exact))
    return not _same(base, near[0], s.tolerance)


def _judge(s: Subject, batch_dim: int, quick: bool) -> Verdict:
    v = Verdict()
    everyone = list(range(s.n))
    base, v.together = s.measure(everyone)
    v.random = not _same(base, s.run(everyone, seed=1), s.tolerance)
    if not _same(base, s.first, s.tolerance):
        s.first = s.run(everyone, state=True)  # the first run of all may have met something that was still empty
        v.reproducible = _same(base, s.first, s.tolerance)
    alone = _alone(s, v)
    fewer = (alone[0][0], 1) if alone else (s.attempt(everyone[:-1]), s.n - 1)
    v.axes = rows.record_axes(base.outputs, s.n, None if fewer[0] is None else fewer[0].outputs, fewer[1], batch_dim)
    if not v.reproducible:
        return v
    if alone and not v.random and not all(sketch.finite(g) for _, g in alone):
        v.finite = [i for i, (_, g) in enumerate(alone) if sketch.finite(g)]
        return v
    comparable = alone is not None and not v.random
    v.movement = None if quick and comparable else _same_size(s, v, base, thorough=not comparable)
    if v.random:
        v.movement = v.movement or (_mixed_differences(s, v) if v.judged else None) or _constant(s, v, batch_dim)
        return v
    v.movement = v.movement or (_alone_rows(s, v, base, alone) if alone else _other_sizes(s, v, base))
    v.movement = v.movement or (None if quick else _whole_rows(s, v, base))
    v.alone = [g for _, g in alone] if alone else None
    if v.movement is None:
        s.exact = _exact(s, v, base, alone) if alone and not quick else s.exact
        v.movement = _sums(s, v, base, quick) if v.alone is not None else _mixed_differences(s, v)
    return v


def _exact(s: Subject, v: Verdict, base: Run, alone: list[tuple[Run, Sketch]]) -> float:
    """A tolerance for gradients from the rounding that is seen where no dependence enters: in the outputs of records
    alone, and in the gradient of the batch reordered and repeated.
    """
    least = TOLERANCE[64]
    if s.tolerance <= least or s.dtype is None:
        return s.tolerance
    floor = max((rows.distance(base.outputs, r.outputs, v.axes, s.n, i) for i, (r, _) in enumerate(alone)), default=0.0)
    for members in (list(range(s.n))[::-1], list(range(s.n)) * 3):
        found = s.try_gradient(members)
        if found is None:
            return s.tolerance
        found = sketch.scaled(found, s.n / len(members))
        scale = sketch.scales([v.together, found])
        largest = max(scale.values(), default=0.0)
        for n in found.keys() & v.together.keys():
            floor = max(floor, float((found[n] - v.together[n]).norm()) / (scale[n] + 1e-2 * largest + 1e-300))
    return min(max(1000 * floor, least), s.tolerance)


def _alone(s: Subject, v: Verdict) -> list[tuple[Run, Sketch]] | None:
    try:
        return [s.measure([i]) for i in range(s.n)]
    except Exception as error:  # noqa: BLE001  (the user's code on one record)
        v.fails_alone = f"{type(error).__name__}: {error}"
        return None


def _same(a: Run, b: Run, tol: float) -> bool:
    whole = a.loss[None], b.loss[None]
    return a.outputs.keys() == b.outputs.keys() and all(
        x.shape == y.shape and (x.dim() == 0 or _equal(x, y, tol))
        for x, y in (whole, *((a.outputs[k], b.outputs[k]) for k in a.outputs))
    )


def _equal(x: Tensor, y: Tensor, tol: float) -> bool:
    return rows.stays(x, y, 0, (len(x), len(y)), [(i, i) for i in range(len(x))], tol)


# -- rows -----------------------------------------------------------------------------------------------------------


def _same_size(s: Subject, v: Verdict, base: Run, thorough: bool) -> Movement | None:
    """Records replaced. Thorough: every ordered pair; otherwise two halves, where each record is also seen alone."""
    everyone = list(range(s.n))

    def compare(probe: str, changed: list[int], shifted: bool) -> Movement | None:
        stay = [i for i in everyone if changed[i] == i]
        run = s.attempt(changed)
        if run is None and shifted:
            run = s.attempt(changed := [c % s.n for c in changed])
        if run is None:
            return None
        if v.random and not (same_randomness(base.end, run.end) and base.drawn == run.drawn):
            v.judged = False  # another number of random draws: every draw after it is another one too
            return None
        pairs = [(i, i) for i in stay]
        moved = rows.first_moved(base.outputs, run.outputs, v.axes, (s.n, s.n), pairs, s.tolerance)
        return None if moved is None else Movement(probe, everyone, changed, pairs, moved)

    probes: list[tuple[str, list[int], bool]] = []
    # Two records differ in some bit of their number, so every ordered pair is tried: one replaced, the other kept.
    for bit in range((s.n - 1).bit_length() if thorough else 1):
        for value in (0, 1):
            new = [s.pool.shifted((i + 1) % s.n) if i >> bit & 1 == value else i for i in everyone]
            probes.append(("other records of the batch were replaced", new, True))
    if s.pool.varied:
        for words, variant in s.pool.extremes.items():
            probes.append((f"the values of one other record were made {words}", [variant, *everyone[1:]], False))
    first = None
    for probe in probes:
        found = compare(*probe)
        first = first or found
        if first is not None and not v.random:
            break  # else go on: does the number of draws depend on the records?
    return first if v.judged else None


def _alone_rows(s: Subject, v: Verdict, base: Run, alone: list[tuple[Run, Sketch]]) -> Movement | None:
    for i, (run, _) in enumerate(alone):
        moved = rows.first_moved(base.outputs, run.outputs, v.axes, (s.n, 1), [(i, 0)], s.tolerance)
        if moved is not None:
            return Movement("it was alone in the batch", list(range(s.n)), [i], [(i, 0)], moved)
    return None


def _whole_rows(s: Subject, v: Verdict, base: Run) -> Movement | None:
    run = s.run_whole()
    if run is None or s.whole is None:
        return None
    records, chosen = s.whole
    pairs = list(enumerate(chosen))
    moved = rows.first_moved(base.outputs, run.outputs, v.axes, (s.n, records.count), pairs, s.tolerance)
    if moved is None:
        return None
    return Movement(f"the batch had all its {records.count} records", list(range(s.n)), [], pairs, moved)


def _constant(s: Subject, v: Verdict, batch_dim: int) -> Movement | None:
    """A model that draws random numbers, compared between sizes with one number for all records."""
    s.constant = True
    try:
        everyone = list(range(s.n))
        both, other = s.try_measure(everyone), s.try_gradient(everyone, seed=1)
        calls = s.draws
        if both is None or other is None:
            return None
        (base, together), alone = both, []
        if sketch.unequal(together, other, sketch.scales([together, other]), s.tolerance):
            return None  # random still
        for i in everyone:
            one = s.try_measure([i])
            if one is None or s.draws != calls:
                return None  # it draws for each record
            alone.append(one)
        v.judged = v.sized = True
        axes = rows.record_axes(base.outputs, s.n, alone[0][0].outputs, 1, batch_dim)
        v.axes = v.axes or axes
        for i, (run, _) in enumerate(alone):
            moved = rows.first_moved(base.outputs, run.outputs, axes, (s.n, 1), [(i, 0)], s.tolerance)
            if moved is not None:
                return Movement("it was alone in the batch", everyone, [i], [(i, 0)], moved, constant=True)
        return _unsummed(s, v, "the batch was taken apart", everyone, together, [g for _, g in alone])
    finally:
        s.constant = False


def _other_sizes(s: Subject, v: Verdict, base: Run) -> Movement | None:
    """For models that fail on a single record."""
    n, everyone = s.n, list(range(s.n))
    others: list[tuple[str, list[int], Pairs]] = [
        ("the batch was reordered", everyone[::-1], [(i, n - 1 - i) for i in everyone]),
        ("one other record was left out", everyone[1:], [(i, i - 1) for i in everyone[1:]]),
        ("the other records were made equal", [0, *[1] * (n - 1)], [(0, 0), *((1, i) for i in everyone[1:])]),
    ]
    for probe, second, pairs in others:
        run = s.attempt(second)
        if run is None:
            continue
        moved = rows.first_moved(base.outputs, run.outputs, v.axes, (n, len(second)), pairs, s.tolerance)
        if moved is not None:
            return Movement(probe, everyone, second, pairs, moved)
    return None


# -- sums -----------------------------------------------------------------------------------------------------------


def _sums(s: Subject, v: Verdict, base: Run, quick: bool) -> Movement | None:
    assert v.alone is not None
    everyone, alone = list(range(s.n)), v.alone
    if found := _unsummed(s, v, "the batch was taken apart", everyone, v.together, alone):
        return found
    if quick:
        return None
    copies = [0, *[1] * (s.n - 1)]
    if (both := s.try_measure(copies)) is not None:
        pairs = [(0, 0), *((1, i) for i in everyone[1:])]
        moved = rows.first_moved(base.outputs, both[0].outputs, v.axes, (s.n, s.n), pairs, s.tolerance)
        if moved is not None:
            return Movement("the other records were made equal", everyone, copies, pairs, moved)
        if found := _unsummed(s, v, "the other records were made equal", copies, both[1], [alone[i] for i in copies]):
            return found
    if s.pool.varied:
        large = s.pool.extremes["10 times as large"]
        one, together = s.try_gradient([large]), s.try_gradient([large, *everyone[1:]])
        if one is not None and together is not None:
            return _unsummed(
                s, v, "one other record was made 10 times as large", [large, *everyone[1:]], together, [one, *alone[1:]]
            )
    return None


def _unsummed(
    s: Subject, v: Verdict, probe: str, members: list[int], together: Sketch, alone: list[Sketch]
) -> Movement | None:
    if not sketch.finite(together):
        return None
    v.compared = v.sized = True
    want, scale = sketch.total(alone), sketch.scales([together, *alone])
    wrong = sketch.unequal(together, want, scale, s.exact)
    if not wrong:
        return None
    factor = _factor(together, want)
    if factor is not None and sketch.unequal(together, sketch.scaled(want, factor), scale, s.exact):
        factor = None
    return Movement(probe, members, members[:1], [], parameters=wrong, factor=factor)


def _factor(together: Sketch, want: Sketch) -> float | None:
    common = [n for n in together if n in want]
    square = sum(float(want[n].square().sum()) for n in common)
    return sum(float((together[n] * want[n]).sum()) for n in common) / square if square > 0 else None


def _mixed_differences(s: Subject, v: Verdict) -> Movement | None:
    everyone = list(range(s.n))
    replaced = [s.pool.shifted((i + 1) % s.n) for i in everyone]
    if s.try_gradient(replaced) is None:
        replaced = [(i + 1) % s.n for i in everyone]
    corners: Callable[[list[int]], Sketch | None] = s.try_gradient
    kept, gone = corners(everyone), corners(replaced)
    for bit in range((s.n - 1).bit_length()):
        mixed = [[replaced[i] if (i >> bit & 1) == value else i for i in everyone] for value in (0, 1)]
        first, second = corners(mixed[0]), corners(mixed[1])
        if kept is None or gone is None or first is None or second is None:
            continue
        v.compared = True
        scale = sketch.scales([kept, gone, first, second])
        wrong = sketch.unequal(sketch.total([kept, gone]), sketch.total([first, second]), scale, s.tolerance)
        if wrong:
            pairs = [(i, i) for i in everyone if mixed[0][i] == i]
            return Movement("other records of the batch were replaced", everyone, mixed[0], pairs, parameters=wrong)
    return None
