"""check: is this model ready for private training? A judge of the engine's own work, and of what it cannot see."""

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import nn

from sfumato import _validate
from sfumato.checking import agreement, carried, explain, independence
from sfumato.checking.batches import read
from sfumato.checking.calling import Criterion
from sfumato.checking.independence import Verdict
from sfumato.checking.outputs import judge_criterion
from sfumato.checking.report import Problem, Remark, Report
from sfumato.checking.subject import Subject, subject
from sfumato.errors import ConfigurationError, CoupledRecords, SfumatoError
from sfumato.ghost import refuse_batch_statistics
from sfumato.session import refuse_module

_LARGE = 5_000_000


def check(
    model: nn.Module,
    criterion: Criterion,
    batch: Any,
    *,
    loss_reduction: Literal["mean", "sum"] = "mean",
    batch_dim: int = 0,
    max_records: int = 8,
) -> Report:
    """Whether ``model`` with ``criterion`` can be trained privately, judged on one batch; changes nothing of yours.

    Looks for records that influence each other (in the model, the loss or the backward), for state that keeps private
    values, and for gradients that the engine computes differently than plain autograd. Dropout is switched off for it.

    Args:
        criterion: called as ``criterion(output, target)``; None where the model returns its loss.
        batch: ``(inputs, target)``, ``(x1, x2, ..., target)``, or a dict for ``model(**batch)``, with a torch loss
            applied to output (or its logits) and labels, and any other called as ``criterion(output, batch)``.
        loss_reduction: how the criterion joins the records.
        batch_dim: axis of the inputs that holds the records.
        max_records: most records to look at; a few show a dependence as well as many. Above 5 million parameters, 4.

    Raises:
        ConfigurationError: an argument that is none of these, or a batch of fewer than 2 records.
    """
    _validate.one_of("loss_reduction", loss_reduction, ("mean", "sum"))
    if not isinstance(model, nn.Module):
        raise ConfigurationError(
            f"model is a {type(model).__name__}, not a torch.nn.Module.", found=type(model).__name__, where="model"
        )
    if criterion is not None and not callable(criterion):
        raise ConfigurationError(
            f"criterion is a {type(criterion).__name__}, which cannot be called.",
            found=type(criterion).__name__,
            where="criterion",
        )
    if isinstance(batch_dim, bool) or not isinstance(batch_dim, int) or batch_dim < 0:
        raise ConfigurationError(
            f"batch_dim={batch_dim!r} is not an axis number >= 0.", found=batch_dim, where="batch_dim"
        )
    most = max(2, _validate.count("max_records", max_records))
    if sum(p.numel() for p in model.parameters()) > _LARGE:
        most = min(most, 4)
    with torch.inference_mode(False):
        return _report(model, criterion, batch, loss_reduction, batch_dim, most)


def _report(
    model: nn.Module, criterion: Criterion, batch: Any, loss_reduction: str, batch_dim: int, most: int
) -> Report:
    records = read(batch, batch_dim, most)
    report = Report(records=records.count, of_records=records.count if records.of is None else records.of[0].count)
    for problem in _known(model, batch):
        _add(report, problem)
    report.remarks += _hooks(model)
    try:
        s, put_back = subject(model, criterion, records, loss_reduction)
    except SfumatoError as error:
        report.problems.append(explain.from_error(error))
        return report
    except Exception as error:  # noqa: BLE001  (any error of the user's own code is an answer)
        report.problems.append(explain.fails(type(model).__name__, error))
        return report
    try:
        _examine(report, s, criterion, model, batch_dim)
    finally:
        put_back()
    return report


def _examine(report: Report, s: Subject, criterion: Criterion, model: nn.Module, batch_dim: int) -> None:
    if outside := _outside(s, model):
        report.problems.append(outside)
    v, s = _judged(report, s, batch_dim)
    native = explain.from_movement(s, v, v.movement, criterion) if v.movement is not None else None
    state = carried.state(s) if v.reproducible else []
    engine = agreement.compare(s, v, batch_dim)
    report.coverage = engine.coverage
    report.remarks += engine.remarks
    if native is not None:
        _add(report, native)
    for problem in state:
        _add(report, problem)
    if engine.refusal is not None:
        if not isinstance(engine.refusal, CoupledRecords):
            _add(report, explain.from_error(engine.refusal))
        elif native is None:
            _add(report, explain.refused(s, engine.refusal))
    elif engine.problem is not None and native is None:
        report.problems.append(engine.problem)
    if v.reproducible and not report.problems and (later := _elsewhere(s, batch_dim, criterion)):
        _add(report, later)
    if v.fails_alone is not None and v.movement is None:
        report.problems.append(_fails_alone(model, v.fails_alone))
    if not any(m.training for m in model.modules()):
        report.remarks.append(
            Remark(
                "", "The model is in eval() mode and was checked so; call train() first if you train it in that mode."
            )
        )


def _judged(report: Report, s: Subject, batch_dim: int) -> tuple[Verdict, Subject]:
    """By plain autograd: the verdict, and the subject it is of."""
    v = independence.judge(s, batch_dim)
    if v.finite is not None:
        v, s = _finite(report, s, v, batch_dim)
    if v.movement is None and v.reproducible:
        v.movement = judge_criterion(s, v)
    if not v.reproducible:
        report.problems.append(explain.unreproducible())
    elif v.movement is None and not v.compared:
        report.problems.append(explain.unjudged())
    if v.movement is not None and (held := _held(s, batch_dim)):
        report.remarks.append(held[0])
        v = held[1]
    report.remarks += _limits(v)
    return v, s


def _finite(report: Report, s: Subject, v: Verdict, batch_dim: int) -> tuple[Verdict, Subject]:
    """Again with the records whose gradients are finite."""
    assert v.finite is not None
    report.remarks.append(
        Remark("batch", f"The gradient of {s.n - len(v.finite)} of {s.n} records is not finite; they were left out.")
    )
    if len(v.finite) < 2:
        return v, s
    again = s.of(v.finite)
    return independence.judge(again, batch_dim), again


def _held(s: Subject, batch_dim: int) -> tuple[Remark, Verdict] | None:
    """An input that only happens to have as many rows as there are records: with it held constant nothing moves."""
    for path in s.pool.records.coincidental:
        try:
            again = s.of(range(s.n), constant=path)
            v = independence.judge(again, batch_dim)
            v.movement = v.movement or judge_criterion(again, v)
        except Exception:  # noqa: BLE001, S112  (it does hold records)
            continue
        if v.movement is None and v.reproducible and v.compared and v.fails_alone is None:
            words = (
                "has as many rows as the batch has records, and was taken for the same for all records: nothing moves "
                "then. Make it a buffer, or expand it to one for each record: the engine may take it for records."
            )
            return Remark(path, words), v
    return None


def _limits(v: Verdict) -> list[Remark]:
    said = []
    if not v.judged:
        said.append("The model draws more or fewer random numbers for other records, so rows could not be compared.")
    if v.random and not v.sized and v.movement is None:
        said.append("The model draws random numbers of its own, so it was not run on batches of different sizes.")
    if not v.steady:
        said.append("Rounding errors are amplified in this model, so batches of different sizes were not compared.")
    return [Remark("", words) for words in said]


def _elsewhere(s: Subject, batch_dim: int, criterion: Criterion) -> Problem | None:
    """The same at other weights: at zeros (a last layer before training) much does not show."""
    s.shift_weights(0.02, least=0.02)
    try:
        s.first = s.run(range(s.n), state=True)
        v = independence.judge(s, batch_dim, quick=True)
        if v.movement is None and v.reproducible:
            v.movement = judge_criterion(s, v, whole=False)
        return explain.from_movement(s, v, v.movement, criterion) if v.movement and v.reproducible else None
    except Exception:  # noqa: BLE001  (weights that the user's code was never meant for)
        return None


def _hooks(model: nn.Module) -> list[Remark]:
    held = [n for n, p in model.named_parameters() if p._backward_hooks or p._post_accumulate_grad_hooks]
    if not held:
        return []
    return [Remark(", ".join(held[:3]), "has gradient hooks, which do not run in private training.")]


def _add(report: Report, problem: Problem) -> None:
    """Unless the same place is named already: BatchNorm also moves rows and keeps statistics."""
    for known in report.problems:
        if problem.where == known.where or problem.where.startswith(known.where + "."):
            return
    report.problems.append(problem)


def _known(model: nn.Module, batch: Any) -> list[Problem]:
    """What is known to be wrong without running anything."""
    found = []
    try:
        refuse_module(model)
    except CoupledRecords:
        pass
    except SfumatoError as error:
        found.append(explain.from_error(error))
    for name, module in model.named_modules():
        if isinstance(module, nn.modules.batchnorm._NormBase):
            try:
                refuse_batch_statistics(module, name)
            except SfumatoError as error:
                found.append(explain.from_error(error))
    if isinstance(batch, Mapping) and "num_items_in_batch" in batch:
        found.append(
            Problem(
                "num_items_in_batch",
                "The batch carries the number of its tokens, by which the loss is divided.",
                explain.WHY,
                "leave it out, and average each record's loss over its own tokens.",
            )
        )
    return found


def _outside(s: Subject, model: nn.Module) -> Problem | None:
    """Trainable tensors that the loss reaches but the model does not own: nobody would clip their gradients."""
    theirs = {id(p) for p in s.criterion.parameters()} if isinstance(s.criterion, nn.Module) else set()
    users, foreign = {id(p) for p in model.parameters()}, s.first.foreign
    scripted = any(isinstance(m, torch.jit.ScriptModule) and list(m.parameters()) for m in model.modules())
    if not foreign or scripted:  # parameters of a scripted module are the engine's to refuse
        return None
    if any(id(t) in users for t in foreign):
        return Problem(
            "criterion",
            "The criterion uses parameters of the model (a penalty on the weights?).",
            "Their gradient bypasses the forward of the model, so it can be neither clipped nor noised.",
            "use the optimizer's weight_decay, or move this part into the model's forward.",
        )
    return Problem(
        "criterion" if any(id(t) in theirs for t in foreign) else "model",
        f"The loss reaches {len(foreign)} trainable tensors that are no parameters of the model (shapes "
        f"{[tuple(t.shape) for t in foreign[:3]]}).",
        "Only the parameters of the model are clipped and noised; these would be trained on raw records.",
        "register them in the model (nn.Parameter, nn.ParameterList, a submodule), or freeze them.",
    )


def _fails_alone(model: nn.Module, error: str) -> Problem:
    return Problem(
        type(model).__name__,
        f"It fails on a batch of one record: {error.splitlines()[0]}",
        "A private batch is drawn at random, and may hold a single record.",
        "let the forward run for any number of records (look for squeeze() without an axis, and fixed sizes).",
    )
