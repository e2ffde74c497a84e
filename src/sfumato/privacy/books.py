"""What the entries of a ledger are and add up to: an account for each data set, draws for each run, one chain."""

from __future__ import annotations

import dataclasses
import getpass
import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import NoReturn, final

from sfumato import _checks
from sfumato.errors import InputError, LedgerError
from sfumato.privacy.accounts import Account, Composition, Run
from sfumato.privacy.accounts import Cost as Cost  # noqa: PLC0414  (callers know it from here)
from sfumato.privacy.budget import Budget, Relation, Unit

GENESIS = "0" * 64  # stands for the digest of the entry before the first
RESTORE = "Fix: find out by whom, and restore the file from a backup whose digest you know."


@dataclass(frozen=True)
class Entry:
    """One line of the ledger; `digest` covers every other field, and so, by `previous`, all lines before.

    `kind` is "grant" (epsilon and delta are the cap: of the data set, or of `user`), "charge" (they are the cost; the
    run starts here), "lease", "pause" or "settle" (they are 0). `upto` counts the draws of the run that are handed out
    after this line. Under Renyi composition `rdp` is what a charge costs, or after a settle did cost, at `renyi_order`.
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
    composition: str = Composition.BASIC.value
    renyi_order: int = 0
    rdp: float = 0.0
    user: str = ""


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
        composition: Composition = Composition.BASIC,
        order: int = 0,
        rdp: float = 0.0,
        user: str = "",
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
            by=who(by),
            note=note if note == "" else one_line("note", note),
            previous=self.digest,
            digest="",
            composition=str(composition),
            renyi_order=order,
            rdp=rdp,
            user=user,
        )
        return dataclasses.replace(entry, digest=_digest(entry))

    def next_handing(self, kind: str, run: str, upto: int, *, event: str = "", rdp: float = 0.0) -> Entry:
        """Return the next entry if it says that `upto` draws of `run` are handed out."""
        paid = self.runs[run]
        account = self.accounts[paid.dataset]
        free = dataclasses.replace(paid.cost, epsilon=0.0, delta=0.0)
        return self.next_entry(
            kind=kind, dataset=paid.dataset, run=run, cost=free, event=event, draws=paid.draws, upto=upto,
            composition=account.composition, order=account.order, rdp=rdp,
        )  # fmt: skip

    def _apply(self, entry: Entry) -> None:
        cost = Cost(entry.epsilon, entry.delta, Unit(entry.unit), Relation(entry.relation))
        rdp = _checks.non_negative("rdp", entry.rdp)
        account = self.accounts.get(entry.dataset)
        if account and (entry.composition, entry.renyi_order) != (account.composition, account.order):
            raise ValueError(entry.composition)
        match entry.kind:
            case "grant":
                self._grant(entry, Budget(cost.epsilon, cost.delta, cost.unit, cost.relation))
            case "charge" if account:
                paid = Run(
                    entry.dataset, cost, entry.draws, entry.purpose, entry.by, entry.event,
                    rdp=rdp if account.is_renyi else None,
                )  # fmt: skip
                account.add(paid)
                self.runs[entry.run] = paid
                self.upto[entry.run] = entry.upto
            case "lease" | "pause" if not self.runs[entry.run].settled:
                self.upto[entry.run] = entry.upto
            case "settle" if account and account.is_renyi and not self.runs[entry.run].settled:
                account.settle(self.runs[entry.run], rdp)
                self.runs[entry.run] = dataclasses.replace(self.runs[entry.run], rdp=rdp, settled=True)
                self.upto[entry.run] = entry.upto
            case _:
                raise ValueError(entry.kind)

    def _grant(self, entry: Entry, cap: Budget) -> None:
        if entry.user:
            self.accounts[entry.dataset].caps[entry.user] = cap
        elif entry.dataset in self.accounts:
            self.accounts[entry.dataset].cap = cap
        else:
            composition = Composition(entry.composition)
            self.accounts[entry.dataset] = Account(entry.dataset, cap, composition, entry.renyi_order)

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


def who(by: str | None) -> str:
    """Return a name that was given, or the user of this process.

    Raises:
        InputError: the name is not one line of text.
    """
    if by is not None:
        return one_line("by", by)
    try:
        return getpass.getuser()
    except (KeyError, OSError, ImportError):
        return "unknown user"


# A field that came with a later format is left out where it says nothing, so that every digest that anybody kept of an
# older ledger stays good. Two entries still never share their text: what is left out is what would have stood there.
_LATER = {field.name: field.default for field in dataclasses.fields(Entry) if field.default is not dataclasses.MISSING}


def _digest(entry: Entry) -> str:
    fields = {
        name: value
        for name, value in vars(entry).items()
        if name != "digest" and not (name in _LATER and value == _LATER[name])
    }
    canonical = json.dumps(fields, sort_keys=True, separators=(",", ":"), default=repr)
    return hashlib.sha256(canonical.encode()).hexdigest()
