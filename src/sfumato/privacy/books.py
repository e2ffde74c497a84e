"""What the entries of a ledger are and add up to: exact sums for each data set, draws for each run, one chain."""

from __future__ import annotations

import dataclasses
import getpass
import hashlib
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from fractions import Fraction
from typing import NoReturn, final

from sfumato import _checks
from sfumato.errors import BudgetExhaustedError, InputError, LedgerError
from sfumato.privacy.budget import Budget, Relation, Unit

GENESIS = "0" * 64  # stands for the digest of the entry before the first
RESTORE = "Fix: find out by whom, and restore the file from a backup whose digest you know."


@dataclass(frozen=True)
class Cost:
    """What one charge costs: (epsilon, delta)-differential privacy for one unit.

    Args:
        epsilon: Finite, at least 0.
        delta: In [0, 1).
        unit: `"record"` or `"client"`.
        relation: `"add-or-remove-one"` or `"replace-one"`.

    Raises:
        InputError: a number is out of range or NaN, or a word is unknown.
    """

    epsilon: float
    delta: float
    unit: Unit
    relation: Relation

    def __post_init__(self) -> None:
        words = Budget(math.inf, unit=self.unit, relation=self.relation)
        object.__setattr__(self, "unit", words.unit)
        object.__setattr__(self, "relation", words.relation)
        # SQLite stores -0.0 as 0, which would no longer match its digest: adding 0.0 drops the sign.
        object.__setattr__(self, "epsilon", _checks.non_negative("epsilon", self.epsilon) + 0.0)
        object.__setattr__(self, "delta", _checks.fraction("delta", self.delta, allow_zero=True) + 0.0)


@dataclass(frozen=True)
class Entry:
    """One line of the ledger; `digest` covers every other field, and so, by `previous`, all lines before.

    `kind` is "grant" (epsilon and delta are the cap), "charge" (they are the cost; the run starts here),
    "lease" or "pause" (they are 0). `upto` counts the draws of the run that are handed out after this line.
    """

    seq: int
    at: str
    kind: str
    dataset: str
    run: str
    epsilon: float
    delta: float
    unit: str
    relation: str
    purpose: str
    event: str
    draws: int
    upto: int
    by: str
    note: str
    previous: str
    digest: str


@dataclass
class Account:
    """The cap of one data set and the exact sums of what was charged to it."""

    cap: Budget
    epsilon: Fraction = Fraction(0)
    delta: Fraction = Fraction(0)

    def left(self) -> tuple[float, float]:
        """Return the epsilon and delta that are left, each 0 or more, rounded down."""
        epsilon = _rounded_down(max(_exact(self.cap.epsilon) - self.epsilon, Fraction(0)))
        return epsilon, _rounded_down(max(_exact(self.cap.delta) - self.delta, Fraction(0)))

    def spent(self) -> tuple[float, float]:
        """Return the epsilon and delta that are spent, rounded up."""
        return _rounded_up(self.epsilon), _rounded_up(self.delta)

    def add(self, cost: Cost) -> None:
        """Add what was charged."""
        self.epsilon += _exact(cost.epsilon)
        self.delta += _exact(cost.delta)

    def check(self, dataset: str, cost: Cost) -> None:
        """Refuse a cost that would pass the cap.

        Raises:
            BudgetExhaustedError: in epsilon or in delta.
        """
        fits_epsilon = self.epsilon + _exact(cost.epsilon) <= _exact(self.cap.epsilon)
        fits_delta = self.delta + _exact(cost.delta) <= _exact(self.cap.delta)
        if not (fits_epsilon and fits_delta):
            epsilon, delta = self.left()
            raise BudgetExhaustedError(
                f'Data set "{dataset}": the charge asks for epsilon {cost.epsilon} and delta {cost.delta}, '
                f"but only epsilon {epsilon} and delta {delta} are left of its cap (epsilon "
                f"{self.cap.epsilon}, delta {self.cap.delta}). Fix: ask for less epsilon or delta, or grant "
                "more with `sfumato ledger grant`."
            )


@dataclass(frozen=True)
class Run:
    """What is paid for under the name of one run."""

    dataset: str
    cost: Cost
    draws: int


@final
class Books:
    """What all verified entries add up to. It only ever grows by entries that fit the chain."""

    def __init__(self, where: str) -> None:
        self.seq = 0
        self.digest = GENESIS
        self.accounts: dict[str, Account] = {}
        self.runs: dict[str, Run] = {}
        self.upto: dict[str, int] = {}
        self._where = where

    def account(self, dataset: str) -> Account:
        """Return the account of `dataset`.

        Raises:
            LedgerError: it has no grant.
        """
        try:
            return self.accounts[dataset]
        except KeyError:
            raise LedgerError(
                f'{self._where} has no budget for data set "{dataset}".'
                f"{_checks.did_you_mean(dataset, self.accounts) if self.accounts else ''}"
                " Fix: grant it one with `sfumato ledger grant`."
            ) from None

    def run(self, run: str) -> Run:
        """Return what is paid for under the name `run`.

        Raises:
            LedgerError: it is unknown.
        """
        try:
            return self.runs[run]
        except KeyError:
            raise LedgerError(
                f"{self._where} has no run {run}. Fix: name the ledger that the run was charged to."
            ) from None

    def follow(self, new: Iterator[Entry]) -> None:
        """Verify that the last known entry still stands, and add what was written since.

        Args:
            new: All entries from number `seq` on; from the very first, if none is known yet.

        Raises:
            LedgerError: an entry was changed or removed.
        """
        if self.seq:
            last = next(new, None)
            if last is None or last.seq != self.seq:
                self._refuse(f"entry {self.seq} is missing")
            if not self.digest == last.digest == _digest(last):
                self._refuse(f"entry {self.seq} was changed")
        for entry in new:
            self.add(entry)

    def check_head(self, heads: list[tuple[int, str]]) -> None:
        """Compare with the number and digest that were written down as those of the last entry.

        Raises:
            LedgerError: they are missing, or of another entry.
        """
        if len(heads) != 1:
            self._refuse("the record of its last entry is missing")
        if heads[0][0] > self.seq:
            self._refuse(f"entry {self.seq + 1} is missing")
        if heads[0] != (self.seq, self.digest):
            self._refuse(f"entry {self.seq} is not the last one that sfumato wrote")

    def add(self, entry: Entry) -> None:
        """Add the next entry of the chain."""
        if entry.seq <= self.seq or entry.seq < 1:
            self._refuse(f"entry {entry.seq} is out of place")
        if entry.seq != self.seq + 1:
            self._refuse(f"entry {self.seq + 1} is missing")
        if entry.digest != _digest(entry):
            self._refuse(f"entry {entry.seq} was changed")
        if entry.previous != self.digest:
            self._refuse(f"entry {entry.seq} does not follow the one before it")
        try:
            self._apply(entry)
        except (KeyError, TypeError, ValueError):
            self._refuse(f"entry {entry.seq} makes no sense")
        self.seq, self.digest = entry.seq, entry.digest

    def next_entry(
        self,
        *,
        kind: str,
        dataset: str,
        cost: Cost,
        run: str = "",
        purpose: str = "",
        event: str = "",
        draws: int = 0,
        upto: int = 0,
        by: str | None = None,
        note: str = "",
    ) -> Entry:
        """Return the entry that would come next in the chain."""
        entry = Entry(
            seq=self.seq + 1,
            at=datetime.now(UTC).isoformat(timespec="microseconds"),
            kind=kind,
            dataset=dataset,
            run=run,
            epsilon=cost.epsilon,
            delta=cost.delta,
            unit=str(cost.unit),
            relation=str(cost.relation),
            purpose=purpose,
            event=event,
            draws=draws,
            upto=upto,
            by=_who() if by is None else one_line("by", by),
            note=note if note == "" else one_line("note", note),
            previous=self.digest,
            digest="",
        )
        return dataclasses.replace(entry, digest=_digest(entry))

    def next_handing(self, kind: str, run: str, upto: int) -> Entry:
        """Return the next entry if it says that `upto` draws of `run` are handed out."""
        paid = self.runs[run]
        free = dataclasses.replace(paid.cost, epsilon=0.0, delta=0.0)
        return self.next_entry(kind=kind, dataset=paid.dataset, run=run, cost=free, draws=paid.draws, upto=upto)

    def _apply(self, entry: Entry) -> None:
        cost = Cost(entry.epsilon, entry.delta, Unit(entry.unit), Relation(entry.relation))
        match entry.kind:
            case "grant":
                cap = Budget(cost.epsilon, cost.delta, cost.unit, cost.relation)
                self.accounts.setdefault(entry.dataset, Account(cap)).cap = cap
            case "charge":
                self.accounts[entry.dataset].add(cost)
                self.runs[entry.run] = Run(entry.dataset, cost, entry.draws)
                self.upto[entry.run] = entry.upto
            case "lease" | "pause" if entry.run in self.runs:
                self.upto[entry.run] = entry.upto
            case _:
                raise ValueError(entry.kind)

    def _refuse(self, what: str) -> NoReturn:
        raise LedgerError(f"{self._where} was changed by somebody else: {what}. {RESTORE}")


def same_promise(dataset: str, what: str, asked: Cost | Budget, cap: Budget) -> None:
    """Refuse what is asked per another unit or relation than the cap.

    Raises:
        LedgerError: it is.
    """
    if (asked.unit, asked.relation) != (cap.unit, cap.relation):
        raise LedgerError(
            f'The {what} for data set "{dataset}" is per {asked.unit}, {asked.relation}, but its budget is '
            f"per {cap.unit}, {cap.relation}. Fix: use the unit and relation of the budget."
        )


def one_line(name: str, value: str) -> str:
    """Return a text that is one printable line.

    Raises:
        InputError: it is empty, or something else.
    """
    # Printable also means that SQLite can store it and that it cannot forge a second line in a report.
    if value.strip() and value.isprintable():
        return value
    raise InputError(f"{name} must be one line of text that can be printed, not {value!r}.")


def json_text(name: str, value: str) -> str:
    """Return a text that is JSON.

    Raises:
        InputError: it is not.
    """
    try:
        json.loads(value.encode())
    except ValueError:
        raise InputError(f"{name} must be JSON, not {value[:80]!r}.") from None
    return value


def _digest(entry: Entry) -> str:
    fields = {name: value for name, value in vars(entry).items() if name != "digest"}
    canonical = json.dumps(fields, sort_keys=True, separators=(",", ":"), default=repr)
    return hashlib.sha256(canonical.encode()).hexdigest()


def _exact(value: float) -> Fraction:
    # A Fraction of the printed decimal: 0.1 three times is 0.3, and no digit is ever rounded away.
    return Fraction(repr(value))


def _rounded_up(exact: Fraction) -> float:
    value = float(exact)
    return value if _exact(value) >= exact else math.nextafter(value, math.inf)


def _rounded_down(exact: Fraction) -> float:
    value = float(exact)
    return value if _exact(value) <= exact else math.nextafter(value, 0.0)


def _who() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError, ImportError):
        return "unknown user"
