"""Every planted violation is found, named by place, and given a remedy."""

from __future__ import annotations

import json

import pytest
from tests.checking.violations import VIOLATIONS, penalised

import sfumato as sf
from sfumato.checking import Report


@pytest.mark.parametrize("name", VIOLATIONS)
def test_a_violation_is_found_and_explained(name: str) -> None:
    case = VIOLATIONS[name]
    model = case.model()
    criterion = penalised(model) if case.criterion is penalised else case.criterion
    report = sf.check(model, criterion, case.batch(), **case.options)
    assert not report.ok, name
    places = [p.where for p in report.problems]
    assert any(case.where in place for place in places), report
    first = next(p for p in report.problems if case.where in p.where)
    assert case.fix in first.fix, first
    assert first.what
    assert first.why
    assert first.where in str(report)
    assert json.loads(report.to_json()) == report.to_dict()
    assert len(report.problems) <= 2, places


@pytest.mark.parametrize("name", VIOLATIONS)
def test_the_tests_above_have_power(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each of them fails for a check that finds nothing."""
    monkeypatch.setitem(vars(sf), "check", lambda *_, **__: Report())
    with pytest.raises(AssertionError):
        test_a_violation_is_found_and_explained(name)
