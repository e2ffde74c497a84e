"""A receipt for noise draws: what the ledger has written down may be drawn, once, in order, by one process."""

from __future__ import annotations

import os
import threading
from typing import Final, NoReturn, Protocol, final

from sfumato.errors import BudgetExhaustedError, LedgerError
from sfumato.privacy.accounts import Cost, Run

ISSUED: Final = object()


class Till(Protocol):
    """What a charge asks of its ledger."""

    def _hand_out(self, run: str, lease: int | None) -> tuple[Run, int, int]: ...

    def _give_back(self, run: str, position: int, limit: int) -> None: ...

    def _price(self, paid: Run, event: str, taken: int) -> float: ...

    def _settle(self, run: str, event: str, rdp: float, position: int, limit: int) -> None: ...


@final
class Charge:
    """A receipt for noise draws that the ledger has already written down. Only a `Ledger` makes one.

    It belongs to the process that got it: a copy, in a forked child or from a pickle, would be a second
    permission for the same draws, so both are refused. Threads may share it.
    """

    def __init__(
        self, issued: object, ledger: Till, run: str, paid: Run, *, position: int, limit: int, lease: int
    ) -> None:
        if issued is not ISSUED:
            raise TypeError("A Charge is only made by Ledger.charge or Ledger.resume.")
        self._ledger = ledger
        self._run = run
        self._paid = paid
        self._position = position
        self._limit = limit
        self._lease = lease
        self._ended = ""
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
    def rdp(self) -> float | None:
        """The Renyi divergence that was charged; None under basic composition."""
        return self._paid.rdp

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
            LedgerError: the charge is paused, settled or in a forked child, or the next lease cannot be written.
        """
        self._refuse_copy()
        with self._lock:
            self._refuse_ended()
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
            if self._ended:
                return
            # First: a write that fails may have reached the disk, and then the draws are no longer ours.
            self._ended = "paused"
            self._ledger._give_back(self._run, self._position, self._limit)

    def settle(self, event: str) -> None:
        """End the run early, for good, and pay only for what it really did; the rest goes back to the data set.

        **Guarantee**: the data set's promise stands, even if the run stopped because of what it had released, for under
        Renyi composition only what was really done adds up, along every path of results (`privacy.renyi`). The event
        must describe every draw that was handed out, which are those before `position`: after a crash and a resume
        that includes the draws that were lost.

        **Edge cases**

        | case | what happens |
        | --- | --- |
        | basic composition | refused: an epsilon for a whole run says nothing of a stop that looked at its results |
        | an event that costs more than was charged, or nothing although draws were taken | refused; the run may go on |
        | a run charged as so many equal draws | an event that costs less than those taken is refused as well |
        | a run of unequal draws that no filter held | once a draw was taken, nothing is given back |
        | a run that went on elsewhere | refused; nothing is given back, and this charge has ended |
        | a second settle, or a settle after a pause | refused |
        | no draw was taken | the event of doing nothing is accepted: everything goes back |

        Args:
            event: What was really done, as `events.to_json` writes it.

        Raises:
            InputError: the event is not JSON, or costs too much or too little (see the table).
            AccountingError: no bound is known for the event.
            LedgerError: basic composition, the charge has ended, the run went on elsewhere, or the ledger cannot be
                written (then it may or may not be settled, and the charge has ended).
        """
        self._refuse_copy()
        with self._lock:
            self._refuse_ended()
            rdp = self._ledger._price(self._paid, event, self._position)
            self._ended = "settled"
            self._ledger._settle(self._run, event, rdp, self._position, self._limit)

    def _refuse_ended(self) -> None:
        if self._ended:
            fix = "go on with `Ledger.resume`" if self._ended == "paused" else "charge anew"
            raise LedgerError(f"Run {self._run} is {self._ended}. Fix: {fix}.")

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
