"""Is a model ready for private training? ``check`` judges it on one batch; ``fix`` replaces what stands in the way."""

from sfumato.checking.examine import check
from sfumato.checking.repair import Change, FrozenBatchNorm, fix
from sfumato.checking.report import Problem, Remark, Report
from sfumato.checking.rules import check_rule

__all__ = ["Change", "FrozenBatchNorm", "Problem", "Remark", "Report", "check", "check_rule", "fix"]
