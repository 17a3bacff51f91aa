"""Nothing is found where nothing is wrong, and every parameter has a tier."""

from __future__ import annotations

import pytest
from tests.checking.sound import SOUND

import sfumato as sf


@pytest.mark.parametrize("name", SOUND)
def test_a_sound_model_passes(name: str) -> None:
    case = SOUND[name]
    model = case.model()
    report = sf.check(model, case.criterion, case.batch(), **case.options)
    assert report.ok, str(report)
    assert report.coverage.keys() == {n for n, p in model.named_parameters() if p.requires_grad}
    assert set(report.coverage.values()) <= {"rule", "vmap", "microbatch", "unused"}
