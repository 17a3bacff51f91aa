"""Every claim of propagation, judged by influence: see ``claims`` for the judge and ``claim_*`` for the operations."""

from dataclasses import replace

import pytest
import torch
from tests.ghost import claim_cases, claim_elements, claim_sums, claims

from sfumato.ghost import propagation
from sfumato.ghost.landing import LANDINGS
from sfumato.ghost.propagation import batched, names, packing
from sfumato.ghost.rows import Coupled, Reduced, Rows

pytestmark = pytest.mark.filterwarnings("ignore")  # deprecations of torch's own
CASES = claim_cases.CASES
assert claim_sums
assert claim_elements
# Names that a newer or older torch gives to operations which this one calls otherwise.
ELSEWHERE = set("boolean_dispatch fn upsample vector_norm cuda logsigmoid requires_grad".split())
ELSEWHERE |= set("mod radd rmul truediv rtruediv iadd isub imul itruediv bitwise_and bitwise_not bitwise_or".split())
ELSEWHERE |= {"bincount", "segment_reduce"}  # of declared rows, see tests/oracle


@pytest.mark.parametrize("case", CASES, ids=[f"{k} {c}" for k, c in enumerate(CASES)])
def test_a_claim_is_true(case):
    """Perturbing a record moves what is said to be its own and nothing else; and the answer is not always "unknown"."""
    found = claims.judge(case)
    for k in range(len(case.ops)):
        asked, answered, live = found.asked[k], found.answered[k], found.live[k]
        assert answered * 16 >= asked, f"op {k}: {asked} times asked, {answered} times answered"
        assert live * 3 >= answered > 0, f"op {k}: {answered} times answered, {live} times seen to be needed"
    assert not case.ops or case.name in set().union(*found.names.values())


def test_every_operation_of_the_tables_has_a_case():
    """Whoever adds an entry adds a case that answers it."""
    tables = {*propagation._RULES, *packing.TABLE, *batched.TABLE, *names.LIKE, *names.ELEMENTWISE_LOSS}
    tables |= {*names._POINTWISE, *LANDINGS, *propagation._LOGIC}
    tried = {case.name for case in CASES if case.ops}
    assert tables - tried - ELSEWHERE == set()
    assert not ELSEWHERE - tables


def lying(rule):
    """The rule, but the records are on another axis of that size, or not in order; and what mixes them is a sum."""

    def twist(told, out):
        if isinstance(told, list):
            return [twist(t, o) for t, o in zip(told, out, strict=False)]
        if isinstance(told, Coupled) and isinstance(out, torch.Tensor):
            return Reduced("a lie")
        if not isinstance(told, Rows) or not isinstance(out, torch.Tensor):
            return told
        same = [k for k in range(out.dim()) if k != told.axis and out.shape[k] == out.shape[told.axis]]
        if same:
            return told.at(same[0])
        return told if told.owner is None else replace(told, owner=told.owner.roll(1))

    return lambda *call: twist(rule(*call), call[-1])


RULES = sorted(set(propagation._RULES.values()), key=lambda r: r.__module__ + r.__qualname__)


def found_out(case):
    try:
        claims.judge(case)
    except AssertionError:
        return True
    return False


@pytest.mark.parametrize("rule", RULES, ids=lambda r: f"{r.__module__.rpartition('.')[2]}.{r.__name__}")
def test_a_wrong_claim_is_found(rule, monkeypatch):
    """The judge would notice if any of the rules told a lie."""
    liars = [name for name, other in propagation._RULES.items() if other is rule]
    for name in liars:
        monkeypatch.setitem(propagation._RULES, name, lying(rule))
        if packing.TABLE.get(name) is rule:
            monkeypatch.setitem(packing.TABLE, name, lying(rule))
    assert any(found_out(case) for case in CASES if case.name in liars)
