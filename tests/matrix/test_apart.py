"""What a forward may not do when its records run apart: found by attack, each broke the bound or lost records."""

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tests.oracle.oracle import B, Net, R, agree, microbatch_of_one, per_record, recorded
from torch import Tensor, nn

import sfumato as sf

D, T = 4, 3
FULL = torch.ones(B, T).bool()
SOME = torch.tensor([[1, 1, 1], [1, 1, 0], [1, 1, 1], [1, 0, 0]]).bool()


def model(forward: Any) -> nn.Module:
    return Net(forward, a=nn.Linear(D, D), b=nn.Linear(D, 2)).double()


def hidden(s: nn.Module, x: Tensor, m: Tensor) -> Tensor:
    h = s.a(x)
    return h if m.all() else h.masked_fill(~m[..., None], 0.0)


@dataclass
class Output:
    logits: Tensor
    extra: Any = None


BOXES = {
    "dataclass": lambda t: Output(t, {"inner": [t * 2]}),
    "namespace": lambda t: SimpleNamespace(logits=t, extra=SimpleNamespace(deep=t * 3)),
    "dict": lambda t: {"logits": t, "none": None, "name": "x"},
}


def inside(box: Any) -> list[Tensor]:
    values = box if isinstance(box, dict) else vars(box)
    extra = values.get("extra")
    more = [] if extra is None else extra["inner"] if isinstance(extra, dict) else [extra.deep]
    return [values["logits"], *more]


@pytest.mark.parametrize("slow", [False, True], ids=["groups", "one by one"])
@pytest.mark.parametrize("name", BOXES)
def test_outputs_in_objects_hold_all_records(name: str, slow: bool) -> None:
    def forward(s: nn.Module, x: Tensor, m: Tensor) -> Any:
        h = hidden(s, x, m).sum(1)
        if slow and h.max() > 1e9:
            h = h * 0
        return BOXES[name](s.b(h))

    net, given = model(forward), (R(B, T, D).double(), SOME)

    def loss(out: Any) -> Tensor:
        return per_record(inside(out))

    want = microbatch_of_one(net, given, loss)
    tape, out = recorded(net, given, loss)
    assert all(len(t) == B for t in inside(out))
    agree(tape, want, 1e-9)


def kept_in_an_attribute(s: nn.Module, x: Tensor, m: Tensor) -> Tensor:
    h = hidden(s, x, m)
    s.aux = h.square().sum((1, 2))
    return s.b(h.sum(1))


def kept_in_a_list(s: nn.Module, x: Tensor, m: Tensor) -> Tensor:
    h = s.a(x)
    s.seen = [*getattr(s, "seen", []), h.sum((1, 2))]
    return s.b((h if m.all() else h.masked_fill(~m[..., None], 0.0)).sum(1))


def written_input(s: nn.Module, x: Tensor, m: Tensor) -> Tensor:
    x.sub_(0.5)
    return s.b(hidden(s, x, m).sum(1))


def asserted(s: nn.Module, x: Tensor, m: Tensor) -> Tensor:
    assert (~m).any(), "nothing is hidden"
    return s.b(s.a(x).sum(1))


def other_keys(s: nn.Module, x: Tensor, m: Tensor) -> dict[str, Tensor]:
    out = s.b(hidden(s, x, m).sum(1))
    return {"plain": out} if m.all() else {"masked": out}


def other_constants(s: nn.Module, x: Tensor, m: Tensor) -> tuple[Tensor, float]:
    out = s.b(hidden(s, x, m).sum(1))
    return out, 1.0 if m.all() else 3.0


def other_constant_tensors(s: nn.Module, x: Tensor, m: Tensor) -> tuple[Tensor, Tensor]:
    out = s.b(hidden(s, x, m).sum(1))
    return out, torch.tensor(1.0 if m.all() else 3.0)


def asked_of_the_first(s: nn.Module, x: Tensor, m: Tensor) -> Tensor:
    h = s.a(x)
    return s.b((h * 2 if (x[:1, 0, 0] > 0).any() else h).sum(1))


def asked_of_the_first_alone(s: nn.Module, x: Tensor, m: Tensor) -> Tensor:
    h = s.a(x)
    return s.b((h * 2 if x[:1, 0, 0] > 0 else h).sum(1))


def a_number_that_is_numel(s: nn.Module, x: Tensor, m: Tensor) -> Tensor:
    return s.b(s.a(x * 2 if m.sum() >= B * T else x).sum(1))


REFUSED = [
    kept_in_an_attribute, kept_in_a_list, written_input, asserted, other_keys, other_constants, other_constant_tensors,
    asked_of_the_first, asked_of_the_first_alone,
]  # fmt: skip


@pytest.mark.parametrize("forward", REFUSED, ids=lambda f: f.__name__)
def test_refused(forward: Any) -> None:
    x = R(B, T, D).double()
    x[:, 0, 0] = torch.tensor([1.0, -1, 1, -1])
    with pytest.raises(sf.SfumatoError):
        recorded(model(forward), (x, SOME.clone()), lambda out: per_record(out[0] if isinstance(out, tuple) else out))


def test_a_number_that_happens_to_be_numel_is_not_its_own_records() -> None:
    """Each record alone has T entries, so ``m.sum() >= 12`` is false for it: only the whole batch reaches 12."""
    with pytest.raises(sf.SfumatoError):
        recorded(model(a_number_that_is_numel), (R(B, T, D).double(), FULL.clone()))


def swallowed(s: nn.Module, x: Tensor, m: Tensor) -> Tensor:
    h = s.a(x)
    try:
        hide = not m.all()
    except Exception:  # noqa: BLE001  (as user code does)
        return s.b(-3 * h.sum(1))
    return s.b((h.masked_fill(~m[..., None], 0.0) if hide else h).sum(1))


def swallowed_by_all_means(s: nn.Module, x: Tensor, m: Tensor) -> Tensor:
    h = s.a(x)
    try:
        hide = not m.all()
    except:  # noqa: E722
        hide = False
        h = -3 * h
    return s.b((h.masked_fill(~m[..., None], 0.0) if hide else h).sum(1))


def padding_counted(s: nn.Module, x: Tensor, m: Tensor) -> Tensor:
    h = s.a(x)
    return s.b(h.mean(1) if m.numel() - m.sum() == 0 else (h * m[..., None]).sum(1) / m.sum(1, keepdim=True))


def two_counts(s: nn.Module, x: Tensor, m: Tensor) -> Tensor:
    h = s.a(x)
    return s.b((h * m[..., None]).sum(1) if m[:, 1].sum() + m[:, 2].sum() > 0 else h[:, 0])


def negative_count(s: nn.Module, x: Tensor, m: Tensor) -> Tensor:
    return s.b((s.a(x) * m[..., None] if -m.long().sum() < 0 else 0 * s.a(x)).sum(1))


def compared(s: nn.Module, x: Tensor, m: Tensor) -> Tensor:
    h = s.a(x)
    return s.b((h.masked_fill(~m[..., None], 0.0) if torch.equal(m.all(), torch.tensor(False)) else h).sum(1))


EXACT = [swallowed, swallowed_by_all_means, padding_counted, two_counts, negative_count, compared]


@pytest.mark.parametrize("mask", [SOME, FULL], ids=["some", "all"])
@pytest.mark.parametrize("forward", EXACT, ids=lambda f: f.__name__)
def test_whatever_the_tier_the_branch_is_the_record_s_own(forward: Any, mask: Tensor) -> None:
    net, given = model(forward), (R(B, T, D).double(), mask.clone())
    want = microbatch_of_one(net, given, per_record)
    tape, _ = recorded(net, given)
    agree(tape, want, 1e-9)


def test_rows_of_all_steps_first_leave_in_order() -> None:
    """(T·B, d): blocks that cannot be cut into groups go to a tier below, and never end in an internal error."""
    net = model(lambda s, x, m: s.b(hidden(s, x, m)).transpose(0, 1).reshape(-1, 2))
    given = (R(B, T, D).double(), SOME)

    def loss(out: Tensor) -> Tensor:
        return per_record(out.reshape(T, -1, 2).transpose(0, 1))

    try:
        tape, _ = recorded(net, given, loss)
    except sf.SfumatoError:
        return
    agree(tape, microbatch_of_one(net, given, loss), 1e-9)


def test_a_batch_of_one_may_decide_by_a_value() -> None:
    net = model(lambda s, x, m: s.b(s.a(x).sum(1) * (2 if x[:, 0, 0] > 0 else 1)))
    given = (R(1, T, D).double(), FULL[:1])
    tape, _ = recorded(net, given)
    agree(tape, microbatch_of_one(net, given, per_record), 1e-9)
