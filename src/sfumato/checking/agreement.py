"""The engine against plain autograd: the gradient of every record, and what tier each parameter is on."""

from dataclasses import dataclass, field

from sfumato.checking import sketch
from sfumato.checking.independence import Verdict, rounding
from sfumato.checking.report import Problem, Remark
from sfumato.checking.subject import Subject
from sfumato.errors import CoupledRecords, SfumatoError
from sfumato.ghost import record

_LARGE_SHARE = 0.2


@dataclass
class Engine:
    """What the engine did with the batch."""

    coverage: dict[str, str] = field(default_factory=dict)
    remarks: list[Remark] = field(default_factory=list)
    refusal: SfumatoError | None = None
    problem: Problem | None = None


def compare(s: Subject, v: Verdict, batch_dim: int) -> Engine:
    """Run the engine on the batch; compare gradients where ``v`` holds what they must be."""
    found = _run(s, v, batch_dim)
    if v.movement is None and isinstance(found.refusal, CoupledRecords) and _own_loss_is_spare(s):
        s.withhold = True
        second = _run(s, v, batch_dim)
        s.withhold = False
        if second.refusal is None and second.problem is None:
            second.remarks.append(
                Remark(
                    type(s.model).__name__,
                    "given labels, the model computes a loss of its own, which the engine refuses. Give the labels to "
                    "your criterion alone.",
                )
            )
            return second
    return found


def _own_loss_is_spare(s: Subject) -> bool:
    """The criterion has what it needs without what the model makes of the target."""
    if s.criterion is None:
        return False
    s.withhold = True
    try:
        return s.try_gradient(range(s.n)) is not None
    finally:
        s.withhold = False


def _run(s: Subject, v: Verdict, batch_dim: int) -> Engine:
    found, problem = Engine(), None
    tape = record(s.model, loss_reduction="mean" if s.reduction == "mean" else "sum", batch_dim=batch_dim)
    try:
        with s.quiet():
            with tape:
                _, loss = s.call(s.pool.take(range(s.n)))
                if loss.requires_grad:
                    loss.backward()
            found.coverage = {n: t if n in v.together else "unused" for n, t in tape.tiers.items()}
            found.remarks = _remarks(s, found.coverage, tape.reasons)
            if loss.requires_grad and v.movement is None:
                problem = _disagreement(s, v, tape, found.coverage)
    except SfumatoError as error:
        found.refusal, found.coverage = error, {}
    except Exception as error:  # noqa: BLE001  (a report, not a crash, whatever fails under the capture)
        found.problem, found.coverage = _broken(s, error), {}
    if problem is not None and (v.random or not rounding(s, v, None)):
        found.problem = problem
    return found


def _broken(s: Subject, error: Exception) -> Problem:
    first = str(error).splitlines()[0] if str(error) else ""
    return Problem(
        type(s.model).__name__,
        f"It runs plainly, but fails inside the engine: {type(error).__name__}: {first}",
        "Private training would stop with this error.",
        "please report it with the model.",
    )


def _disagreement(s: Subject, v: Verdict, tape: record, coverage: dict[str, str]) -> Problem | None:
    """Record by record where each record's gradient is known; by their sum where the model draws random numbers."""
    lower = any(t in ("vmap", "microbatch") for t in coverage.values())
    if v.alone is None and (lower or not v.reproducible):
        return None  # a lower tier draws its own random numbers
    scale = sketch.scales([v.together, *(v.alone or [])])
    mine: list[sketch.Sketch] = [{} for _ in range(s.n)]
    for name in s.parameters:
        for b, gradient in enumerate(tape.per_sample(name)):
            mine[b][name] = s.sketcher.one(gradient)
    wrong = sketch.unequal(sketch.total(mine), v.together, scale, s.tolerance)
    for b, want in enumerate(v.alone or []):
        wrong += sketch.unequal(mine[b], want, scale, s.tolerance)
    if not wrong:
        return None
    name = wrong[0]
    return Problem(
        name,
        f"The engine's gradient of single records differs from plain autograd's (tier: {coverage.get(name)}).",
        "Either this model computes something else when it runs inside the engine, or the engine is wrong. Clipping "
        "would bound the wrong thing.",
        "please report it with the model; until then, train without this parameter (requires_grad_(False)).",
    )


def _remarks(s: Subject, coverage: dict[str, str], reasons: dict[str, str]) -> list[Remark]:
    parameters = s.parameters
    sizes = {n: parameters[n].numel() for n in coverage}
    slow = [n for n, t in coverage.items() if t == "microbatch"]
    unused = [n for n, t in coverage.items() if t == "unused"]
    remarks = []
    if slow and sum(sizes[n] for n in slow) >= _LARGE_SHARE * sum(sizes.values()):
        share = sum(sizes[n] for n in slow) / sum(sizes.values())
        why = next((reasons[m] for m in sorted(reasons, key=len) if not m or slow[0].startswith(m + ".")), "")
        remarks.append(
            Remark(
                slow[0] if len(slow) == 1 else f"{slow[0]} and {len(slow) - 1} more",
                f"{share:.0%} of the parameters run one record at a time, which is exact and slow"
                + (f". The reason: {why}." if why else "."),
            )
        )
    if unused:
        more = f" and {len(unused) - 3} more" if len(unused) > 3 else ""
        remarks.append(
            Remark(", ".join(unused[:3]) + more, "the loss does not reach it: it would be trained on noise.")
        )
    return remarks
