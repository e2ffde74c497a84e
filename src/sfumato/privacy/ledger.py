"""What was spent on each data set, written to disk before any noise is drawn, and never forgotten."""

from __future__ import annotations

import json
import uuid
from pathlib import Path
from typing import Self, final

from sfumato import _checks
from sfumato.errors import InputError, LedgerError
from sfumato.privacy import renyi
from sfumato.privacy.accounts import Account, Composition, Cost, Run, Spent
from sfumato.privacy.accounts import Balance as Balance  # noqa: PLC0414  (callers know it from here)
from sfumato.privacy.books import GENESIS, Books, Entry, json_text, one_line, same_promise, who
from sfumato.privacy.budget import Budget, Relation
from sfumato.privacy.charge import ISSUED
from sfumato.privacy.charge import Charge as Charge  # noqa: PLC0414  (callers know it from here)
from sfumato.privacy.store import Store, entries, has_digest


@final
class Ledger:
    """An append-only record of every charge, one SQLite file; charge first, draw the noise after.

    Args:
        path: The file, created if it is not there; its folder must exist, on a local disk.
        timeout: Seconds to wait for another process that is writing.

    Guarantee:
        The charges of a data set never pass its cap, whichever processes race for the last of it. Sums are exact, over
        the decimals that `repr` prints. How they add up is fixed by the first grant; both ways hold also when later
        runs were chosen after seeing earlier results:

        - "basic": epsilons and deltas are added (Rogers, Roth, Ullman and Vadhan 2016, "Privacy odometers and filters");
        - "renyi": divergences at one order, fixed by the first grant, are added (a Renyi filter: Feldman and Zrnic 2021,
          Theorem 4.3, with its conditions in `privacy.renyi`). Many runs then cost far less together.

        A charge or a lease is on disk before its first noise draw is allowed: a crash in between loses budget, never
        privacy. Every entry carries a digest of itself and of the one before, so an edited, a deleted or a cut-off
        entry is found before the next charge, balance or lease.

    Edge cases:
        | case | what happens |
        | --- | --- |
        | somebody rewrites, removes or restores an old copy of the whole file | only found by `verify(digest)` with a digest kept elsewhere, e.g. in a report |
        | a crash between lease and noise | the leased draws count as taken |
        | a fork | a file ledger works on in the child; an in-memory ledger and a `Charge` refuse |
        | a later grant below what is spent | nothing is left; nothing is undone |
        | a later grant above the first | a new, larger promise, at the same Renyi order |
        | a later grant with another composition or order | refused |
        | a file of an older sfumato | upgraded when it is opened; all digests stay as they were |

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

    def grant(
        self,
        dataset: str,
        cap: Budget,
        *,
        composition: Composition | str | None = None,
        order: int | None = None,
        user: str | None = None,
        by: str | None = None,
        note: str = "",
    ) -> None:
        """Set the cap on everything that is ever spent on `dataset`, or on a user's share of it; the latest counts.

        A user's cap limits the charges made `by` that name, also those before the grant, in the composition of the data
        set, whose own cap holds as well. It shares out a budget; it is no promise about what that person learns, who
        may hear of other people's results. Names are taken at their word.

        Args:
            dataset: The data set.
            cap: The promise, with a finite epsilon.
            composition: `"basic"` or `"renyi"`; None means basic for a first grant, and unchanged for a later one.
            order: The Renyi order; None means `renyi.order_for` the cap, and unchanged for a later grant.
            user: Whose charges are capped; None means all.
            by: Who grants; None means the user of this process.
            note: Anything else, one line.

        Raises:
            InputError: the cap promises nothing (epsilon is infinite) or too little for the Renyi order, the composition
                is unknown, an order is given for basic composition, or a text is empty or not one line.
            LedgerError: an earlier grant has another unit, relation, composition or order, a user is named before the
                data set has a cap, or the ledger cannot be used.
        """
        one_line("dataset", dataset)
        if user is not None:
            one_line("user", user)
        asked = None if composition is None else _composition(composition)
        if not cap.is_private:
            raise InputError(f'A cap for data set "{dataset}" needs a finite epsilon; choose one, for example 1.')
        with self._store.transaction(write=True) as (_, pending):
            books = self._store.books
            account = books.account(dataset) if user is not None else books.accounts.get(dataset)
            if account is not None:
                same_promise(dataset, "grant", cap, account.cap)
            how, at = _rule(dataset, cap, asked, order, account)
            whole = Cost(cap.epsilon, cap.delta, cap.unit, cap.relation)
            pending.append(
                books.next_entry(
                    kind="grant", dataset=dataset, cost=whole, by=by, note=note, composition=how, order=at,
                    user=user or "",
                )
            )  # fmt: skip

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

        Under Renyi composition the divergence of `event` is what is paid (`renyi.cost`, worked out here), and `cost`
        is only written down, as what the run would cost by itself.

        Args:
            dataset: Whose cap is charged.
            purpose: What the run is for, one line, for whoever reads the report.
            event: What will be done, as JSON; under Renyi composition an event as `events.to_json` writes it.
            cost: What all `draws` draws cost together.
            draws: At least 1.
            lease: How many draws are handed out at a time: a crash loses at most as many. None means all.
            by: Who charges; None means the user of this process.
            note: Anything else, one line.

        Raises:
            BudgetExhaustedError: the cap of the data set, or that of the user who charges, would be passed.
            AccountingError: under Renyi composition, no bound is known for the event at the order of the data set.
            LedgerError: no grant, another unit or relation than granted, or the ledger cannot be used.
            InputError: an argument is out of range.
        """
        one_line("purpose", purpose)
        json_text("event", event)
        _checks.count("draws", draws)
        size = draws if lease is None else _checks.count("lease", lease)
        name, rdp = who(by), self._divergence(dataset, event)
        with self._store.transaction(write=True) as (_, pending):
            account = self._store.books.account(dataset)
            same_promise(dataset, "charge", cost, account.cap)
            account.check(cost, rdp, name)
            run = uuid.uuid4().hex
            pending.append(
                self._store.books.next_entry(
                    kind="charge", dataset=dataset, run=run, cost=cost, purpose=purpose, event=event, draws=draws,
                    upto=min(size, draws), by=name, note=note, composition=account.composition, order=account.order,
                    rdp=rdp or 0.0,
                )
            )  # fmt: skip
        paid = Run(dataset, cost, draws, purpose, name, event, rdp)
        return Charge(ISSUED, self, run, paid, position=0, limit=min(size, draws), lease=size)

    def resume(self, run: str, *, lease: int | None = None) -> Charge:
        """Go on with a run that is paid for, after the last draw that was ever handed out.

        Draws that were handed out before a crash count as taken. If none is left, `take()` will refuse.

        Args:
            run: The `run` of the charge.
            lease: How many draws are handed out at a time. None means all that are left.

        Raises:
            LedgerError: the run is unknown or settled, or the ledger cannot be used.
            InputError: `lease` is below 1.
        """
        size = None if lease is None else _checks.count("lease", lease)
        paid, start, limit = self._hand_out(run, size)
        return Charge(ISSUED, self, run, paid, position=start, limit=limit, lease=size or paid.draws)

    def balance(self, dataset: str, user: str | None = None) -> Balance:
        """Return what is spent and left of the cap of `dataset`, or of a user's cap on it.

        Raises:
            LedgerError: no grant, or the ledger cannot be used.
        """
        with self._store.transaction():
            return self._store.books.account(dataset).balance(user)

    def users(self, dataset: str) -> list[str]:
        """Return the names of all users who have a cap of their own on `dataset`, sorted.

        Raises:
            LedgerError: no grant, or the ledger cannot be used.
        """
        with self._store.transaction():
            return sorted(self._store.books.account(dataset).caps)

    def by_purpose(self, dataset: str) -> list[Spent]:
        """Return what was spent on `dataset` for each purpose, most first.

        Raises:
            LedgerError: no grant, or the ledger cannot be used.
        """
        with self._store.transaction():
            return self._store.books.account(dataset).by_purpose()

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
            if paid.settled:
                raise LedgerError(f"Run {run} was settled: it ended early and has no draws left. Fix: charge anew.")
            start = self._store.books.upto[run]
            limit = paid.draws if lease is None else min(start + lease, paid.draws)
            if start < limit:
                pending.append(self._store.books.next_handing("lease", run, limit))
            return paid, start, limit

    def _give_back(self, run: str, position: int, limit: int) -> None:
        """Write that the draws from `position` on were not taken, if nobody was handed later ones."""
        with self._store.transaction(write=True) as (_, pending):
            paid = self._store.books.run(run)
            if position < limit == self._store.books.upto[run] and not paid.settled:
                pending.append(self._store.books.next_handing("pause", run, position))

    def _divergence(self, dataset: str, event: str) -> float | None:
        """Return what `event` costs in the composition of `dataset`, None for the basic one."""
        with self._store.transaction():
            account = self._store.books.account(dataset)
        # The order never changes, so this may take its time without holding up other processes.
        return _cost_of(event, account.order, account.cap.relation) if account.is_renyi else None

    def _price(self, paid: Run, event: str, taken: int) -> float:
        """Return what a run costs that ends after `taken` draws as `event`; refuse what cannot be."""
        json_text("event", event)
        with self._store.transaction():
            account = self._store.books.account(paid.dataset)
        if paid.rdp is None:
            raise LedgerError(
                f'Data set "{paid.dataset}" adds up epsilons and deltas (basic composition). There a run that stopped '
                "after looking at its own results cannot be refunded soundly, because its epsilon was worked out for the "
                'whole run. Fix: let it stand, or grant a data set with composition "renyi" from the start.'
            )
        rdp = _cost_of(event, account.order, account.cap.relation)
        if rdp > paid.rdp:
            raise InputError(
                f"The event costs a Renyi divergence of {rdp}, more than the {paid.rdp} that the run was charged. "
                "Fix: describe what the run did within its charge."
            )
        least = _cost_of(_of_draws(paid, taken), account.order, account.cap.relation)
        if rdp < least or (taken and not rdp):
            raise InputError(
                f"The event costs a Renyi divergence of {rdp}, less than the {taken} draws that were handed out do "
                f"({least or 'more than 0'}). Fix: describe every draw before `position`, also those lost in a crash."
            )
        return rdp

    def _settle(self, run: str, event: str, rdp: float, position: int, limit: int) -> None:
        """Write that the run ended after `position` draws as `event`, if nobody was handed later ones."""
        with self._store.transaction(write=True) as (_, pending):
            if self._store.books.run(run).settled:
                raise LedgerError(f"Run {run} was settled already. Fix: nothing; it is settled once.")
            if limit != self._store.books.upto[run]:
                raise LedgerError(
                    f"Run {run} went on elsewhere after draw {limit}, so what it did is not known here. "
                    "Fix: settle it where it ended, or after `Ledger.resume` with an event of all its draws."
                )
            pending.append(self._store.books.next_handing("settle", run, position, event=event, rdp=rdp))


def _composition(word: Composition | str) -> Composition:
    try:
        return Composition(word)
    except ValueError:
        raise InputError(f'composition {word!r} is unknown; choose "basic" or "renyi".') from None


def _rule(
    dataset: str, cap: Budget, asked: Composition | None, order: int | None, account: Account | None
) -> tuple[Composition, int]:
    """Return how the charges of a data set add up and at which order (0 under basic composition)."""
    if account is None:
        how = asked or Composition.BASIC
        if how is Composition.BASIC and order is not None:
            raise InputError('A Renyi order only belongs to composition "renyi"; leave it out, or choose that.')
        at = 0
        if how is Composition.RENYI:
            at = renyi.order_for(cap.epsilon, cap.delta) if order is None else order
    else:
        how, at = account.composition, account.order
        if asked not in (None, how) or order not in (None, at):
            told = f"{how} composition" + (f" at order {at}" if at else "")
            raise LedgerError(
                f'Data set "{dataset}" was granted with {told}, which never changes, so that what was charged before '
                "still adds up. Fix: leave composition and order out; the cap may change."
            )
    if how is Composition.RENYI:
        renyi.cap(at, cap.epsilon, cap.delta)  # refuses a cap that leaves no room at this order
    return how, at


def _cost_of(event: str, order: int, relation: Relation) -> float:
    from sfumato.privacy import events  # noqa: PLC0415  (it loads dp-accounting, which a basic ledger never needs)

    return renyi.cost(events.from_json(event), order, relation)


def _of_draws(paid: Run, taken: int) -> str:
    """Return the least that the first `taken` draws can have been: of equal draws, so many of them; of other runs, the whole.

    Only what a filter holds may have been anything within its cap, and only the filter knows.
    """
    tree = json.loads(paid.event)
    if not taken or tree["type"] in ("RenyiFilterDpEvent", "GaussianDpEvent"):
        return '{"type": "NoOpDpEvent"}'
    if tree["type"] == "SelfComposedDpEvent" and tree["count"] == paid.draws:
        return json.dumps(tree | {"count": taken})
    return paid.event
