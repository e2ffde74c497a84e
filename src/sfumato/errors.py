"""Every error a user can meet: one clear sentence that names the thing and the fix."""

from __future__ import annotations


class SfumatoError(Exception):
    """Base of all errors raised on purpose. The message is for people: it names the thing and the fix."""


class InputError(SfumatoError, ValueError):
    """A file, a row, a key or an argument is not what it should be."""


class PlanError(InputError):
    """A privacy plan that cannot be kept: its parameters contradict one another or the budget."""


class AccountingError(SfumatoError):
    """An accountant cannot prove a bound for what is asked, or two accountants contradict each other."""


class BudgetExhaustedError(SfumatoError):
    """The charge would pass the cap of the data set. Nothing was charged and no noise was drawn."""


class LedgerError(SfumatoError):
    """The ledger cannot be read, cannot be written, is locked, or was changed by somebody else."""


class UnsupportedModelError(SfumatoError):
    """The model cannot be trained privately as it is; the message names the module and the fix."""


class SelfCheckError(SfumatoError):
    """The first step was not bounded, not noised or did not cover every parameter. Training stopped."""


class DivergedError(SfumatoError):
    """The model is no longer finite. What was charged stays spent."""


class LostClientsError(SfumatoError):
    """Clients were lost and the round cannot be released without weakening its noise."""


class ProcessError(SfumatoError):
    """The processes that share a run do not agree, or one of them failed or was lost."""


class CheckpointError(SfumatoError):
    """A checkpoint cannot be read, or belongs to another plan, model or ledger."""
