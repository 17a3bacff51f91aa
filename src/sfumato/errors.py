"""Every error Sfumato raises on purpose.

SfumatoError
├── ConfigurationError      a bad argument, found before anything changed (also a ValueError)
├── UnsupportedError        a model, optimizer, loader or call that cannot be made private
│   ├── CoupledRecords      one record's value depends on another record of the batch
│   └── UnknownBatchAxis    which record a row belongs to cannot be established
├── PrivacyError            an unsafe call order or an unclipped gradient during training
│   ├── UnclippedGradient   autograd wrote into a private parameter behind the engine's back
│   ├── GradientMismatch    a rule's per-sample gradient is not that of the record alone
│   ├── TokenError          a backward without, or with an already spent, batch of the private loader
│   └── RowsMismatch        rows that reach the model are not the records that were drawn
├── BudgetExceeded          the budget does not allow one more step
├── LedgerError             the ledger is damaged, foreign or missing
└── DataError               an input file or data set that cannot be used (also a ValueError)
"""


class SfumatoError(Exception):
    """Base class. ``found`` is the offending value, ``where`` the module path or argument, ``fix`` the remedy."""

    def __init__(self, message: str, *, found: object = None, where: str | None = None, fix: str | None = None):
        self.found = found
        self.where = where
        self.fix = fix
        super().__init__(message if fix is None else f"{message} Fix: {fix}")


class ConfigurationError(SfumatoError, ValueError):
    """A bad argument; nothing has been changed."""


class UnsupportedError(SfumatoError):
    """This model, optimizer, loader or call cannot be made private exactly."""


class CoupledRecords(UnsupportedError):
    """One record's value depends on another record of the same batch, so clipping cannot bound its influence."""


class UnknownBatchAxis(UnsupportedError):
    """Which record a row belongs to cannot be established for an operation that touches a parameter."""


class PrivacyError(SfumatoError):
    """An unsafe call order or an unclipped gradient; the step was discarded."""


class UnclippedGradient(PrivacyError):
    """Autograd accumulated an unclipped gradient into a private parameter."""


class GradientMismatch(PrivacyError):
    """A per-sample gradient is not that of the record alone."""


class TokenError(PrivacyError):
    """A backward that no batch of the private loader pays for."""


class RowsMismatch(PrivacyError):
    """The rows that reached the model are not the records that were drawn."""


class BudgetExceeded(SfumatoError):
    """The privacy budget does not allow this step."""


class LedgerError(SfumatoError):
    """The ledger is damaged, foreign or missing."""


class DataError(SfumatoError, ValueError):
    """An input file or data set that cannot be used."""
