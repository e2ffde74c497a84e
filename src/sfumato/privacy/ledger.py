"""What was spent on each data set, written to disk before any noise is drawn, and never forgotten."""

from __future__ import annotations

import os
import threading
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn, Self, final

from sfumato import _checks
from sfumato.errors import BudgetExhaustedError, InputError, LedgerError
from sfumato.privacy.books import GENESIS, Books, Cost, Entry, Run, json_text, one_line, same_promise
from sfumato.privacy.budget import Budget
from sfumato.privacy.store import Store, entries, has_digest

_ISSUED = object()


@dataclass(frozen=True)
class Balance:
    """What is spent and left of a cap. Spent is rounded up and remaining down, if no float is exact."""

    dataset: str
    cap: Budget
    spent_epsilon: float
    spent_delta: float
    remaining_epsilon: float
    remaining_delta: float


@final
class Ledger:
    """An append-only record of every charge, one SQLite file; charge first, draw the noise after.

    Args:
        path: The file, created if it is not there; its folder must exist, on a local disk.
        timeout: Seconds to wait for another process that is writing.

    Guarantee:
        The charges of a data set never add up to more than its cap, in epsilon or in delta, whichever processes
        race for the last of it. Sums are exact, over the decimals that `repr` prints. Epsilons and deltas are
        added (basic composition), which holds also when later runs were chosen after seeing earlier results
        (Rogers, Roth, Ullman and Vadhan 2016, "Privacy odometers and filters"). A charge or a lease is on disk
        before its first noise draw is allowed: a crash in between loses budget, never privacy.
        Every entry carries a digest of itself and of the one before, so an edited, a deleted or a cut-off
        entry is found before the next charge, balance or lease.

    Edge cases:
        | case | what happens |
        | --- | --- |
        | somebody rewrites, removes or restores an old copy of the whole file | only found by `verify(digest)` with a digest kept elsewhere, e.g. in a report |
        | a crash between lease and noise | the leased draws count as taken |
        | a fork | a file ledger works on in the child; an in-memory ledger and a `Charge` refuse |
        | a later grant below what is spent | nothing is left; nothing is undone |

    Raises:
        LedgerError: the file is missing, locked, read-only, damaged, changed, or no ledger.
    """  # noqa: E501 (a table row cannot be wrapped)

    def __init__(self, path: str | Path, *, timeout: float = 30.0) -> None:
        self._store = Store(Path(path), timeout, create=True)

    @classmethod
    def in_memory(cls) -> Self:
        """Return a ledger with the same rules that is forgotten with this process: for tests and trials."""
        ledger = cls.__new__(cls)
        ledger._store = Store(None, 30.0, create=True)
        return ledger

    @classmethod
    def existing(cls, path: str | Path, *, timeout: float = 30.0) -> Self:
        """Open the ledger at `path`.

        Raises:
            LedgerError: there is none, or it cannot be used (as for the class).
        """
        if not Path(path).exists():
            raise LedgerError(f"There is no ledger at {path}. Fix: create one with `sfumato ledger grant`.")
        ledger = cls.__new__(cls)
        ledger._store = Store(Path(path), timeout, create=False)
        return ledger

    @property
    def path(self) -> Path | None:
        """The absolute path of the file, or None for an in-memory ledger."""
        return self._store.path

    @property
    def is_durable(self) -> bool:
        """Whether the ledger outlives this process."""
        return self._store.path is not None

    @property
    def digest(self) -> str:
        """The digest of the last entry: keep it elsewhere, to hand it to `verify` later."""
        with self._store.transaction():
            return self._store.books.digest

    def grant(self, dataset: str, cap: Budget, *, by: str | None = None, note: str = "") -> None:
        """Set the cap on everything that is ever spent on `dataset`; the latest grant counts.

        Raises:
            InputError: the cap promises nothing (epsilon is infinite), or a text is empty or not one line.
            LedgerError: an earlier grant has another unit or relation, or the ledger cannot be used.
        """
        one_line("dataset", dataset)
        if not cap.is_private:
            raise InputError(f'A cap for data set "{dataset}" needs a finite epsilon; choose one, for example 1.')
        with self._store.transaction(write=True) as (_, pending):
            account = self._store.books.accounts.get(dataset)
            if account is not None:
                same_promise(dataset, "grant", cap, account.cap)
            whole = Cost(cap.epsilon, cap.delta, cap.unit, cap.relation)
            pending.append(self._store.books.next_entry(kind="grant", dataset=dataset, cost=whole, by=by, note=note))

    def has_grant(self, dataset: str) -> bool:
        """Whether `dataset` has a cap, so that it can be charged."""
        with self._store.transaction():
            return dataset in self._store.books.accounts

    def datasets(self) -> list[str]:
        """Return the names of all data sets that have a cap, sorted."""
        with self._store.transaction():
            return sorted(self._store.books.accounts)

    def charge(
        self,
        dataset: str,
        *,
        purpose: str,
        event: str,
        cost: Cost,
        draws: int,
        lease: int | None = None,
        by: str | None = None,
        note: str = "",
    ) -> Charge:
        """Pay for a run of `draws` noise draws, and write it down; a refused charge writes nothing.

        Args:
            dataset: Whose cap is charged.
            purpose: What the run is for, one line, for whoever reads the report.
            event: What will be done, as JSON.
            cost: What all `draws` draws cost together.
            draws: At least 1.
            lease: How many draws are handed out at a time: a crash loses at most as many. None means all.
            by: Who charges; None means the user of this process.
            note: Anything else, one line.

        Raises:
            BudgetExhaustedError: epsilon or delta would pass the cap.
            LedgerError: no grant, another unit or relation than granted, or the ledger cannot be used.
            InputError: an argument is out of range.
        """
        one_line("purpose", purpose)
        json_text("event", event)
        _checks.count("draws", draws)
        size = draws if lease is None else _checks.count("lease", lease)
        with self._store.transaction(write=True) as (_, pending):
            account = self._store.books.account(dataset)
            same_promise(dataset, "charge", cost, account.cap)
            account.check(dataset, cost)
            run = uuid.uuid4().hex
            pending.append(
                self._store.books.next_entry(
                    kind="charge", dataset=dataset, run=run, cost=cost, purpose=purpose, event=event, draws=draws,
                    upto=min(size, draws), by=by, note=note,
                )
            )  # fmt: skip
        paid = Run(dataset, cost, draws)
        return Charge(_ISSUED, self, run, paid, position=0, limit=min(size, draws), lease=size)

    def resume(self, run: str, *, lease: int | None = None) -> Charge:
        """Go on with a run that is paid for, after the last draw that was ever handed out.

        Draws that were handed out before a crash count as taken. If none is left, `take()` will refuse.

        Args:
            run: The `run` of the charge.
            lease: How many draws are handed out at a time. None means all that are left.

        Raises:
            LedgerError: the run is unknown, or the ledger cannot be used.
            InputError: `lease` is below 1.
        """
        size = None if lease is None else _checks.count("lease", lease)
        paid, start, limit = self._hand_out(run, size)
        return Charge(_ISSUED, self, run, paid, position=start, limit=limit, lease=size or paid.draws)

    def balance(self, dataset: str) -> Balance:
        """Return what is spent and left of the cap of `dataset`.

        Raises:
            LedgerError: no grant, or the ledger cannot be used.
        """
        with self._store.transaction():
            account = self._store.books.account(dataset)
            return Balance(dataset, account.cap, *account.spent(), *account.left())

    def history(self, dataset: str | None = None) -> list[Entry]:
        """Return every entry, or those of one data set, oldest first.

        Raises:
            LedgerError: no grant, or the ledger cannot be used.
        """
        with self._store.transaction() as (connection, _):
            if dataset is None:
                return list(entries(connection))
            self._store.books.account(dataset)
            return [entry for entry in entries(connection) if entry.dataset == dataset]

    def run_cost(self, run: str) -> Cost:
        """Return what was paid for `run`.

        Raises:
            LedgerError: the run is unknown, or the ledger cannot be used.
        """
        with self._store.transaction():
            return self._store.books.run(run).cost

    def verify(self, expect_digest: str | None = None) -> str:
        """Check every entry from the first to the last and return the digest of the last.

        Whoever rewrites the whole file can make all digests fit again. That is only found by comparing with
        a digest kept elsewhere, for example in a report: as `expect_digest` it must occur in the chain.

        Raises:
            LedgerError: an entry was changed or removed (the first bad one is named), or the expected digest
                does not occur.
        """
        books = Books(self._store.where)
        with self._store.transaction(verify=books) as (connection, _):
            known = has_digest(connection, expect_digest)
            if expect_digest not in (None, GENESIS) and not known:
                raise LedgerError(
                    f"{self._store.where} has no entry with the digest {expect_digest}: it was rewritten, or is an "
                    "older copy or another ledger. Fix: find the file that the digest was taken from."
                )
            return books.digest

    def close(self) -> None:
        """Refuse all further work. Nothing is lost without it: no connection stays open between calls."""
        self._store.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _hand_out(self, run: str, lease: int | None) -> tuple[Run, int, int]:
        """Commit the next lease of `run`; return the run and the lease's first draw and end."""
        with self._store.transaction(write=True) as (_, pending):
            paid = self._store.books.run(run)
            start = self._store.books.upto[run]
            limit = paid.draws if lease is None else min(start + lease, paid.draws)
            if start < limit:
                pending.append(self._store.books.next_handing("lease", run, limit))
            return paid, start, limit

    def _give_back(self, run: str, position: int, limit: int) -> None:
        """Write that the draws from `position` on were not taken, if nobody was handed later ones."""
        with self._store.transaction(write=True) as (_, pending):
            self._store.books.run(run)
            if position < limit == self._store.books.upto[run]:
                pending.append(self._store.books.next_handing("pause", run, position))


@final
class Charge:
    """A receipt for noise draws that the ledger has already written down. Only a `Ledger` makes one.

    It belongs to the process that got it: a copy, in a forked child or from a pickle, would be a second
    permission for the same draws, so both are refused. Threads may share it.
    """

    def __init__(
        self, issued: object, ledger: Ledger, run: str, paid: Run, *, position: int, limit: int, lease: int
    ) -> None:
        if issued is not _ISSUED:
            raise TypeError("A Charge is only made by Ledger.charge or Ledger.resume.")
        self._ledger = ledger
        self._run = run
        self._paid = paid
        self._position = position
        self._limit = limit
        self._lease = lease
        self._paused = False
        self._pid = os.getpid()
        self._lock = threading.Lock()

    @property
    def run(self) -> str:
        """The name of the run, 32 hexadecimal digits: `Ledger.resume` takes it."""
        return self._run

    @property
    def dataset(self) -> str:
        """The data set that was charged."""
        return self._paid.dataset

    @property
    def cost(self) -> Cost:
        """What all draws of the run cost together."""
        return self._paid.cost

    @property
    def draws(self) -> int:
        """How many draws the run has paid for."""
        return self._paid.draws

    @property
    def position(self) -> int:
        """The index of the next draw; it jumps where another process was handed draws of the same run."""
        return self._position

    def take(self) -> int:
        """Return the index of one noise draw that is now allowed. Call it before the noise is drawn.

        Raises:
            BudgetExhaustedError: every draw that was paid for is taken.
            LedgerError: the charge is paused or in a forked child, or the next lease cannot be written.
        """
        self._refuse_copy()
        with self._lock:
            if self._paused:
                raise LedgerError(f"Run {self._run} is paused. Fix: go on with `Ledger.resume`.")
            if self._position == self._limit < self._paid.draws:
                _, self._position, self._limit = self._ledger._hand_out(self._run, self._lease)
            if self._position == self._limit:
                raise BudgetExhaustedError(
                    f"Run {self._run} has used all {self._paid.draws} draws it paid for. Fix: charge anew."
                )
            index = self._position
            self._position += 1
            return index

    def pause(self) -> None:
        """Stop cleanly: give back the draws that were handed out and not taken. Twice is as good as once.

        Raises:
            LedgerError: the charge is in a forked child, or the ledger cannot be written (draws are lost).
        """
        self._refuse_copy()
        with self._lock:
            if self._paused:
                return
            # First: a write that fails may have reached the disk, and then the draws are no longer ours.
            self._paused = True
            self._ledger._give_back(self._run, self._position, self._limit)

    def __reduce__(self) -> NoReturn:
        raise TypeError("A Charge cannot be copied or pickled: two owners would draw on one permission.")

    def __getstate__(self) -> NoReturn:
        self.__reduce__()

    def _refuse_copy(self) -> None:
        # Before the lock, which may have been held at the fork and would then never be free again.
        if os.getpid() != self._pid:
            raise LedgerError(
                f"Run {self._run} belongs to the process that charged it, not to a forked child. "
                "Fix: call `Ledger.resume` here."
            )
