"""What a check found, for people and for programs."""

import json
import textwrap
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True)
class Problem:
    """Something that breaks the guarantee or stops private training."""

    where: str  # parameter, module path, "criterion" or argument
    what: str
    why: str
    fix: str


@dataclass(frozen=True)
class Remark:
    """Something worth knowing that breaks nothing."""

    where: str
    what: str


@dataclass
class Report:
    """The result of ``sf.check``. Coverage: {parameter: "rule" | "vmap" | "microbatch" | "unused"}."""

    problems: list[Problem] = field(default_factory=list)
    remarks: list[Remark] = field(default_factory=list)
    coverage: dict[str, str] = field(default_factory=dict)
    records: int = 0
    of_records: int = 0

    @property
    def ok(self) -> bool:
        """Whether nothing was found that stands in the way of private training."""
        return not self.problems

    def to_dict(self) -> dict[str, Any]:
        """Plain values only."""
        return {
            "ok": self.ok,
            "problems": [asdict(p) for p in self.problems],
            "remarks": [asdict(r) for r in self.remarks],
            "coverage": dict(self.coverage),
            "records": self.records,
            "of_records": self.of_records,
        }

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), allow_nan=False)

    def __str__(self) -> str:
        lines = [_verdict(self), ""]
        for k, p in enumerate(self.problems, 1):
            lines += _paragraph(f"{k}. ", f"{p.where}: {p.what}")
            lines += _paragraph("   Why it matters: ", p.why)
            lines += [*_paragraph("   What to do: ", p.fix), ""]
        for r in self.remarks:
            lines += [*_paragraph("Note. ", f"{r.where}: {r.what}" if r.where else r.what), ""]
        return "\n".join([*lines, *_coverage(self)]).rstrip()


def _verdict(report: Report) -> str:
    looked = f"Looked at {report.records} of the {report.of_records} records of the batch."
    if report.ok:
        return (
            f"No problem found: this model can be trained privately.\n{looked} Each record's gradient was its own: it "
            "did not change with\nthe other records of the batch, and the engine computes it as plain autograd does."
        )
    n = len(report.problems)
    return f"{n} problem{'s' * (n != 1)} found: do not train this model privately as it is.\n{looked}"


_TIERS = {
    "rule": "exact formulas (fast)",
    "vmap": "one copy of the parameters per record (slower)",
    "microbatch": "one record at a time (slowest)",
    "unused": "the loss does not reach it",
}


def _coverage(report: Report) -> list[str]:
    lines = ["How per-record gradients are computed:"] if report.coverage else []
    for tier, words in _TIERS.items():
        count = sum(t == tier for t in report.coverage.values())
        if count:
            lines.append(f"  {count} parameter{'s' * (count != 1)}: {tier}, {words}")
    return lines


def _paragraph(lead: str, text: str) -> list[str]:
    return textwrap.wrap(lead + text, 100, subsequent_indent="   ", break_long_words=False, break_on_hyphens=False)
