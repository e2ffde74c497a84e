"""What was spent on each data set, written to disk before any noise is drawn, and never forgotten."""

from __future__ import annotations

import dataclasses
import getpass
import hashlib
import json
import math
import os
import sqlite3
import threading
import time
import uuid
import weakref
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from fractions import Fraction
from pathlib import Path
from typing import NoReturn, Self, final

from sfumato import _checks
from sfumato.errors import BudgetExhaustedError, InputError, LedgerError
from sfumato.privacy.budget import Budget, Relation, Unit


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
        self._start(Path(path), timeout, create=True)

    @classmethod
    def in_memory(cls) -> Self:
        """Return a ledger with the same rules that is forgotten with this process: for tests and trials."""
        ledger = cls.__new__(cls)
        ledger._start(None, 30.0, create=True)
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
        ledger._start(Path(path), timeout, create=False)
        return ledger

    @property
    def path(self) -> Path | None:
        """The absolute path of the file, or None for an in-memory ledger."""
        return self._path

    @property
    def is_durable(self) -> bool:
        """Whether the ledger outlives this process."""
        return self._path is not None

    @property
    def digest(self) -> str:
        """The digest of the last entry: keep it elsewhere, to hand it to `verify` later."""
        with self._transaction():
            return self._books.digest

    def grant(self, dataset: str, cap: Budget, *, by: str | None = None, note: str = "") -> None:
        """Set the cap on everything that is ever spent on `dataset`; the latest grant counts.

        Raises:
            InputError: the cap promises nothing (epsilon is infinite), or a text is empty or not one line.
            LedgerError: an earlier grant has another unit or relation, or the ledger cannot be used.
        """
        _line("dataset", dataset)
        if not cap.is_private:
            raise InputError(f'A cap for data set "{dataset}" needs a finite epsilon; choose one, for example 1.')
        with self._transaction(write=True) as (_, pending):
            account = self._books.accounts.get(dataset)
            if account is not None:
                _same_promise(dataset, "grant", cap, account.cap)
            pending.append(
                self._books.next_entry(
                    kind="grant",
                    dataset=dataset,
                    cost=Cost(cap.epsilon, cap.delta, cap.unit, cap.relation),
                    by=by,
                    note=note,
                )
            )

    def has_grant(self, dataset: str) -> bool:
        """Whether `dataset` has a cap, so that it can be charged."""
        with self._transaction():
            return dataset in self._books.accounts

    def datasets(self) -> list[str]:
        """Return the names of all data sets that have a cap, sorted."""
        with self._transaction():
            return sorted(self._books.accounts)

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
        _line("purpose", purpose)
        _json("event", event)
        _checks.count("draws", draws)
        size = draws if lease is None else _checks.count("lease", lease)
        with self._transaction(write=True) as (_, pending):
            account = self._account(dataset)
            _same_promise(dataset, "charge", cost, account.cap)
            account.check(dataset, cost)
            run = uuid.uuid4().hex
            pending.append(
                self._books.next_entry(
                    kind="charge",
                    dataset=dataset,
                    run=run,
                    cost=cost,
                    purpose=purpose,
                    event=event,
                    draws=draws,
                    upto=min(size, draws),
                    by=by,
                    note=note,
                )
            )
        paid = _Run(dataset, cost, draws)
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
        with self._transaction():
            account = self._account(dataset)
            left_epsilon, left_delta = account.left()
            return Balance(
                dataset=dataset,
                cap=account.cap,
                spent_epsilon=_rounded_up(account.epsilon),
                spent_delta=_rounded_up(account.delta),
                remaining_epsilon=left_epsilon,
                remaining_delta=left_delta,
            )

    def history(self, dataset: str | None = None) -> list[Entry]:
        """Return every entry, or those of one data set, oldest first.

        Raises:
            LedgerError: no grant, or the ledger cannot be used.
        """
        with self._transaction() as (connection, _):
            if dataset is None:
                return list(_entries(connection))
            self._account(dataset)
            return [entry for entry in _entries(connection) if entry.dataset == dataset]

    def run_cost(self, run: str) -> Cost:
        """Return what was paid for `run`.

        Raises:
            LedgerError: the run is unknown, or the ledger cannot be used.
        """
        with self._transaction():
            return self._run(run).cost

    def verify(self, expect_digest: str | None = None) -> str:
        """Check every entry from the first to the last and return the digest of the last.

        Whoever rewrites the whole file can make all digests fit again. That is only found by comparing with
        a digest kept elsewhere, for example in a report: as `expect_digest` it must occur in the chain.

        Raises:
            LedgerError: an entry was changed or removed (the first bad one is named), or the expected digest
                does not occur.
        """
        books = _Books(self._where)
        with self._transaction(verify=books) as (connection, _):
            known = connection.execute("SELECT 1 FROM entries WHERE digest = ?", (expect_digest,)).fetchone()
            if expect_digest not in (None, _GENESIS) and known is None:
                raise LedgerError(
                    f"{self._where} has no entry with the digest {expect_digest}: it was rewritten, or is an "
                    "older copy or another ledger. Fix: find the file that the digest was taken from."
                )
            return books.digest

    def close(self) -> None:
        """Refuse all further work. Nothing is lost without it: no connection stays open between calls."""
        self._closed = True
        if self._memory is not None:
            self._memory.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _start(self, path: Path | None, timeout: float, *, create: bool) -> None:
        self._timeout = _checks.positive("timeout", timeout)
        self._path = None if path is None else path.absolute()
        self._where = "The in-memory ledger" if path is None else f"The ledger {path}"
        self._closed = False
        self._pid = os.getpid()
        self._memory: sqlite3.Connection | None = None
        self._books = _Books(self._where)
        if self._path is not None and not self._path.parent.is_dir():
            raise LedgerError(f"{self._where} has no folder to lie in. Fix: create {self._path.parent} first.")
        with _ONE_AT_A_TIME, self._sentences():
            if self._path is None:
                self._memory = sqlite3.connect(":memory:", isolation_level=None, check_same_thread=False)
                weakref.finalize(self, self._memory.close)
                self._prepare(self._memory, create=True)
            else:
                self._connect(create=create).close()
        with self._transaction():  # reads, and so verifies, every entry
            pass

    def _hand_out(self, run: str, lease: int | None) -> tuple[_Run, int, int]:
        """Commit the next lease of `run`; return the run and the lease's first draw and end."""
        with self._transaction(write=True) as (_, pending):
            paid = self._run(run)
            start = self._books.upto[run]
            limit = paid.draws if lease is None else min(start + lease, paid.draws)
            if start < limit:
                pending.append(self._books.next_handing("lease", run, limit))
            return paid, start, limit

    def _give_back(self, run: str, position: int, limit: int) -> None:
        """Write that the draws from `position` on were not taken, if nobody was handed later ones."""
        with self._transaction(write=True) as (_, pending):
            self._run(run)
            if position < limit == self._books.upto[run]:
                pending.append(self._books.next_handing("pause", run, position))

    def _account(self, dataset: str) -> _Account:
        try:
            return self._books.accounts[dataset]
        except KeyError:
            raise LedgerError(
                f'{self._where} has no budget for data set "{dataset}".'
                f"{_checks.did_you_mean(dataset, self._books.accounts) if self._books.accounts else ''}"
                " Fix: grant it one with `sfumato ledger grant`."
            ) from None

    def _run(self, run: str) -> _Run:
        try:
            return self._books.runs[run]
        except KeyError:
            raise LedgerError(
                f"{self._where} has no run {run}. Fix: name the ledger that the run was charged to."
            ) from None

    @contextmanager
    def _transaction(
        self, *, write: bool = False, verify: _Books | None = None
    ) -> Iterator[tuple[sqlite3.Connection, list[Entry]]]:
        """Read what others wrote, let the caller decide, then commit the entries it has put on the list.

        The whole chain is read into `verify` first, if it is given, so that the first bad entry is named.
        """
        self._refuse_unusable()
        pending: list[Entry] = []
        with _ONE_AT_A_TIME, self._sentences(), self._connection() as connection:
            try:
                connection.execute("BEGIN IMMEDIATE" if write else "BEGIN")
                if verify is not None:
                    verify.follow(connection)
                self._books.follow(connection)
                yield connection, pending
                for entry in pending:
                    _insert(connection, entry)
                connection.execute("COMMIT")
            except BaseException:
                if connection.in_transaction:
                    connection.execute("ROLLBACK")
                raise
            for entry in pending:
                self._books.add(entry)

    def _refuse_unusable(self) -> None:
        if self._closed:
            raise LedgerError(f"{self._where} is closed. Fix: open it again.")
        if self._path is None and os.getpid() != self._pid:
            raise LedgerError(
                f"{self._where} belongs to another process, which would not see what is charged here. "
                "Fix: use a ledger file."
            )

    @contextmanager
    def _connection(self) -> Iterator[sqlite3.Connection]:
        if self._memory is not None:
            yield self._memory
        else:
            with closing(self._connect(create=False)) as connection:
                yield connection

    def _connect(self, *, create: bool) -> sqlite3.Connection:
        assert self._path is not None
        if not (create or self._path.exists()):
            raise LedgerError(f"{self._where} is gone. Fix: put it back, so that nothing spent is forgotten.")
        # SQLite takes a file below its smallest page for an empty one, and would write over it.
        if self._path.exists() and 0 < self._path.stat().st_size < 512:
            raise LedgerError(f"{self._where} is not an SQLite file. Fix: name another file.")
        address = f"{self._path.as_uri()}?mode={'rwc' if create else 'rw'}"
        deadline = time.monotonic() + self._timeout
        while True:
            connection = sqlite3.connect(address, uri=True, isolation_level=None, timeout=self._timeout)
            try:
                self._prepare(connection, create=create)
                return connection
            except BaseException as error:
                connection.close()
                # While another process creates the file or leaves WAL, SQLite gives up without waiting.
                if not (_is_busy(error) and time.monotonic() < deadline):
                    raise
                time.sleep(0.01)

    def _prepare(self, connection: sqlite3.Connection, *, create: bool) -> None:
        """Make sure that this is a ledger before anything of it is changed; create it if it is empty."""
        connection.execute("PRAGMA synchronous = FULL")
        connection.execute("BEGIN")
        exists = self._is_ledger(connection)
        connection.execute("COMMIT")
        if not exists and not create:
            raise LedgerError(f"{self._where} is empty. Fix: create it with `sfumato ledger grant`.")
        mode = connection.execute("PRAGMA journal_mode = WAL").fetchone()[0]
        if self._path is not None and mode != "wal":
            raise LedgerError(f"{self._where} lies on a disk that cannot keep it safe. Fix: use a local disk.")
        if not exists:
            connection.execute("BEGIN IMMEDIATE")
            if not self._is_ledger(connection):
                for statement in (*_SCHEMA, *_MARKS):
                    connection.execute(statement)
            connection.execute("COMMIT")

    def _is_ledger(self, connection: sqlite3.Connection) -> bool:
        """Whether the file holds a ledger (True) or nothing at all (False); anything else is refused."""
        application = connection.execute("PRAGMA application_id").fetchone()[0]
        version = connection.execute("PRAGMA user_version").fetchone()[0]
        schema = {sql for (sql,) in connection.execute(_READ_SCHEMA)}
        if (application, version, schema) == (0, 0, set()):
            return False
        if application != _APPLICATION:
            raise LedgerError(f"{self._where} is an SQLite file of another program. Fix: name another file.")
        if version != _VERSION:
            raise LedgerError(
                f"{self._where} has format {version}, not {_VERSION}. Fix: use the sfumato that wrote it."
            )
        if schema != set(_SCHEMA):
            raise LedgerError(f"{self._where}: its tables or triggers were changed by somebody else. {_RESTORE}")
        return True

    @contextmanager
    def _sentences(self) -> Iterator[None]:
        """Turn every error of SQLite into one sentence that names the file and the fix."""
        try:
            yield
        except sqlite3.Error as error:
            match _code(error):
                case sqlite3.SQLITE_BUSY | sqlite3.SQLITE_LOCKED:
                    reason = f"is locked by another process for longer than {self._timeout:g} s"
                    fix = "wait until that process is done, or raise the timeout"
                case sqlite3.SQLITE_NOTADB | sqlite3.SQLITE_CORRUPT:
                    reason = "is not an SQLite file, or is damaged"
                    fix = "name another file, or restore it from a backup"
                case sqlite3.SQLITE_READONLY | sqlite3.SQLITE_CANTOPEN | sqlite3.SQLITE_PERM:
                    reason = f"cannot be written ({error})"
                    fix = "make the file and its folder writable, or name another file"
                case _:
                    reason = f"cannot be used ({error})"
                    fix = "check the disk and the file; nothing was released"
            raise LedgerError(f"{self._where} {reason}. Fix: {fix}.") from error


@final
class Charge:
    """A receipt for noise draws that the ledger has already written down. Only a `Ledger` makes one.

    It belongs to the process that got it: a copy, in a forked child or from a pickle, would be a second
    permission for the same draws, so both are refused. Threads may share it.
    """

    def __init__(
        self, issued: object, ledger: Ledger, run: str, paid: _Run, *, position: int, limit: int, lease: int
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


@dataclass
class _Account:
    """The cap of one data set and the exact sums of what was charged to it."""

    cap: Budget
    epsilon: Fraction = Fraction(0)
    delta: Fraction = Fraction(0)

    def left(self) -> tuple[float, float]:
        """Return the epsilon and delta that are left, each 0 or more."""
        epsilon = _rounded_down(max(_exact(self.cap.epsilon) - self.epsilon, Fraction(0)))
        return epsilon, _rounded_down(max(_exact(self.cap.delta) - self.delta, Fraction(0)))

    def add(self, cost: Cost) -> None:
        self.epsilon += _exact(cost.epsilon)
        self.delta += _exact(cost.delta)

    def check(self, dataset: str, cost: Cost) -> None:
        """Refuse a cost that would pass the cap."""
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
class _Run:
    """What is paid for under the name of one run."""

    dataset: str
    cost: Cost
    draws: int


@final
class _Books:
    """What all verified entries add up to. It only ever grows by entries that fit the chain."""

    def __init__(self, where: str) -> None:
        self.seq = 0
        self.digest = _GENESIS
        self.accounts: dict[str, _Account] = {}
        self.runs: dict[str, _Run] = {}
        self.upto: dict[str, int] = {}
        self._where = where

    def follow(self, connection: sqlite3.Connection) -> None:
        """Verify that the last known entry still stands, and add what was written since.

        Raises:
            LedgerError: an entry was changed or removed.
        """
        new = _entries(connection, self.seq or _LOWEST)
        if self.seq:
            last = next(new, None)
            if last is None or last.seq != self.seq:
                self._refuse(f"entry {self.seq} is missing")
            if not self.digest == last.digest == _digest(last):
                self._refuse(f"entry {self.seq} was changed")
        for entry in new:
            self.add(entry)
        heads = connection.execute("SELECT seq, digest FROM head").fetchall()
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
            by=_who() if by is None else _line("by", by),
            note=note if note == "" else _line("note", note),
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
                self.accounts.setdefault(entry.dataset, _Account(cap)).cap = cap
            case "charge":
                self.accounts[entry.dataset].add(cost)
                self.runs[entry.run] = _Run(entry.dataset, cost, entry.draws)
                self.upto[entry.run] = entry.upto
            case "lease" | "pause" if entry.run in self.runs:
                self.upto[entry.run] = entry.upto
            case _:
                raise ValueError(entry.kind)

    def _refuse(self, what: str) -> NoReturn:
        raise LedgerError(f"{self._where} was changed by somebody else: {what}. {_RESTORE}")


_RESTORE = "Fix: find out by whom, and restore the file from a backup whose digest you know."
_ISSUED = object()
_GENESIS = "0" * 64
_LOWEST = -(2**63)  # of all row numbers: the whole chain is read from here, so that no row can hide
_VERSION = 1
_APPLICATION = int.from_bytes(b"sfum")
_FIELDS = tuple(field.name for field in dataclasses.fields(Entry))

_SCHEMA = (
    "CREATE TABLE entries (seq INTEGER PRIMARY KEY AUTOINCREMENT, at TEXT NOT NULL, kind TEXT NOT NULL, "
    "dataset TEXT NOT NULL, run TEXT NOT NULL, epsilon REAL NOT NULL, delta REAL NOT NULL, "
    "unit TEXT NOT NULL, relation TEXT NOT NULL, purpose TEXT NOT NULL, event TEXT NOT NULL, "
    "draws INTEGER NOT NULL, upto INTEGER NOT NULL, by TEXT NOT NULL, note TEXT NOT NULL, "
    "previous TEXT NOT NULL, digest TEXT NOT NULL)",
    "CREATE TABLE head (only INTEGER PRIMARY KEY CHECK (only = 1), seq INTEGER NOT NULL, digest TEXT NOT NULL)",
    "CREATE TRIGGER no_update BEFORE UPDATE ON entries BEGIN SELECT RAISE(ABORT, 'the ledger is append-only'); END",
    "CREATE TRIGGER no_delete BEFORE DELETE ON entries BEGIN SELECT RAISE(ABORT, 'the ledger is append-only'); END",
    # INSERT OR REPLACE deletes without asking no_delete.
    "CREATE TRIGGER no_replace BEFORE INSERT ON entries WHEN NEW.seq IS NOT (SELECT seq + 1 FROM head) "
    "BEGIN SELECT RAISE(ABORT, 'the ledger is append-only'); END",
)
_MARKS = (
    f"INSERT INTO head VALUES (1, 0, '{_GENESIS}')",
    f"PRAGMA application_id = {_APPLICATION}",
    f"PRAGMA user_version = {_VERSION}",
)
_READ_SCHEMA = "SELECT sql FROM sqlite_master WHERE name NOT LIKE 'sqlite~_%' ESCAPE '~'"

# One transaction at a time in this process. A fork waits for it, so that no child inherits an open file:
# there SQLite would count on locks which only the parent holds, and could lose what the child writes.
_ONE_AT_A_TIME = threading.RLock()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(
        before=_ONE_AT_A_TIME.acquire,
        after_in_parent=_ONE_AT_A_TIME.release,
        after_in_child=_ONE_AT_A_TIME.release,
    )


def _entries(connection: sqlite3.Connection, first: int = 1) -> Iterator[Entry]:
    rows = connection.execute(f"SELECT {', '.join(_FIELDS)} FROM entries WHERE seq >= ? ORDER BY seq", (first,))
    return (Entry(*row) for row in rows)


def _insert(connection: sqlite3.Connection, entry: Entry) -> None:
    places = ", ".join("?" * len(_FIELDS))
    connection.execute(f"INSERT INTO entries VALUES ({places})", dataclasses.astuple(entry))
    connection.execute("UPDATE head SET seq = ?, digest = ?", (entry.seq, entry.digest))


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


def _same_promise(dataset: str, what: str, asked: Cost | Budget, cap: Budget) -> None:
    if (asked.unit, asked.relation) != (cap.unit, cap.relation):
        raise LedgerError(
            f'The {what} for data set "{dataset}" is per {asked.unit}, {asked.relation}, but its budget is '
            f"per {cap.unit}, {cap.relation}. Fix: use the unit and relation of the budget."
        )


def _line(name: str, value: str) -> str:
    # Printable also means that SQLite can store it and that it cannot forge a second line in a report.
    if value.strip() and value.isprintable():
        return value
    raise InputError(f"{name} must be one line of text that can be printed, not {value!r}.")


def _json(name: str, value: str) -> str:
    try:
        json.loads(value.encode())
    except ValueError:
        raise InputError(f"{name} must be JSON, not {value[:80]!r}.") from None
    return value


def _who() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError, ImportError):
        return "unknown user"


def _code(error: BaseException) -> int:
    return getattr(error, "sqlite_errorcode", 0) & 0xFF


def _is_busy(error: BaseException) -> bool:
    return isinstance(error, sqlite3.Error) and _code(error) in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED)
