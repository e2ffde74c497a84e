"""What is granted and spent on one data set, by whom and for what: exact sums, and the check that a charge fits."""

from __future__ import annotations

import enum
import math
from dataclasses import dataclass, field
from fractions import Fraction

from sfumato import _checks
from sfumato.errors import BudgetExhaustedError, LedgerError
from sfumato.privacy import renyi
from sfumato.privacy.budget import Budget, Relation, Unit
from sfumato.privacy.exact import exact, rounded_down, rounded_up


class Composition(enum.StrEnum):
    """How the charges of a data set add up: (epsilon, delta) each, or Renyi divergences at one order."""

    BASIC = "basic"
    RENYI = "renyi"


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
class Run:
    """What is paid for under the name of one run; `rdp` is None under basic composition, and settled runs have ended."""

    dataset: str
    cost: Cost
    draws: int
    purpose: str
    by: str
    event: str
    rdp: float | None = None
    settled: bool = False


@dataclass(frozen=True)
class Balance:
    """What is spent and left of a cap. Spent is rounded up and remaining down, if no float is exact.

    Under basic composition these are the sums of the charges, and what is left of the cap.

    Under Renyi composition the divergences `spent_rdp` are what adds up, at the order `order`; epsilon does not. So
    `spent_epsilon` is what all charges together keep at the cap's delta (`renyi.epsilon`); the whole delta is spent
    with the first charge, which also pays what the order alone costs, so the second of two equal charges costs far less
    than the first. A charge fits exactly if its divergence is at most `remaining_rdp`; `remaining_epsilon` is only the
    distance to the cap, and a run that costs more than that by itself may still fit.

    Attributes:
        dataset: The data set.
        cap: The latest grant.
        composition: `"basic"` or `"renyi"`.
        order: The Renyi order; None under basic composition, as are the two divergences.
        user: Whose share of the data set this is; None for the whole.
    """

    dataset: str
    cap: Budget
    spent_epsilon: float
    spent_delta: float
    remaining_epsilon: float
    remaining_delta: float
    composition: Composition = Composition.BASIC
    order: int | None = None
    spent_rdp: float | None = None
    remaining_rdp: float | None = None
    user: str | None = None


@dataclass(frozen=True)
class Spent:
    """What the runs of one purpose spent: `amount` is epsilon, or the divergence under Renyi composition.

    `share` is the part of the cap that this is, in the same measure; both are rounded up.
    """

    purpose: str
    runs: int
    amount: float
    share: float


@dataclass
class Sums:
    """What was charged, exactly."""

    runs: int = 0
    epsilon: Fraction = Fraction(0)
    delta: Fraction = Fraction(0)
    rdp: Fraction = Fraction(0)


@dataclass
class Account:
    """The caps of one data set, and what was charged to it: in all, by each user and for each purpose."""

    dataset: str
    cap: Budget
    composition: Composition = Composition.BASIC
    order: int = 0
    total: Sums = field(default_factory=Sums)
    caps: dict[str, Budget] = field(default_factory=dict)
    users: dict[str, Sums] = field(default_factory=dict)
    purposes: dict[str, Sums] = field(default_factory=dict)

    @property
    def is_renyi(self) -> bool:
        """Whether divergences are added up, not epsilons and deltas."""
        return self.composition is Composition.RENYI

    def add(self, paid: Run) -> None:
        """Add what was charged."""
        for sums in self._sums(paid):
            sums.runs += 1
            sums.epsilon += exact(paid.cost.epsilon)
            sums.delta += exact(paid.cost.delta)
            sums.rdp += exact(paid.rdp or 0.0)

    def settle(self, paid: Run, rdp: float) -> None:
        """Replace the divergence that was charged by a smaller one."""
        for sums in self._sums(paid):
            sums.rdp += exact(rdp) - exact(paid.rdp or 0.0)

    def check(self, cost: Cost, rdp: float | None, by: str) -> None:
        """Refuse a cost that would pass the cap of the data set or of the user.

        Raises:
            BudgetExhaustedError: it would.
        """
        self._fits(f'Data set "{self.dataset}"', self.cap, self.total, cost, rdp)
        if by in self.caps:
            whose = f'User "{by}" of data set "{self.dataset}"'
            self._fits(whose, self.caps[by], self.users.get(by, Sums()), cost, rdp)

    def balance(self, user: str | None = None) -> Balance:
        """Return what is spent and left, of the data set or of a user's share.

        Raises:
            LedgerError: the user has no cap.
        """
        if user is None:
            cap, sums = self.cap, self.total
        elif user in self.caps:
            cap, sums = self.caps[user], self.users.get(user, Sums())
        else:
            raise LedgerError(
                f'User "{user}" has no cap of its own on data set "{self.dataset}".'
                f"{_checks.did_you_mean(user, self.caps) if self.caps else ''}"
                " Fix: grant one with `sfumato ledger grant --user`."
            )
        if self.is_renyi:
            return self._renyi_balance(cap, sums, user)
        return Balance(
            self.dataset, cap, rounded_up(sums.epsilon), rounded_up(sums.delta), *_left(cap, sums), user=user
        )

    def by_purpose(self) -> list[Spent]:
        """Return what was spent for each purpose, most first."""
        whole = exact(self._largest(self.cap) if self.is_renyi else self.cap.epsilon)
        amounts = {
            purpose: (sums.runs, sums.rdp if self.is_renyi else sums.epsilon) for purpose, sums in self.purposes.items()
        }
        return [
            Spent(purpose, runs, rounded_up(amount), rounded_up(amount / whole))
            for purpose, (runs, amount) in sorted(amounts.items(), key=lambda item: (-item[1][1], item[0]))
        ]

    def _sums(self, paid: Run) -> tuple[Sums, Sums, Sums]:
        return (
            self.total,
            self.users.setdefault(paid.by, Sums()),
            self.purposes.setdefault(paid.purpose, Sums()),
        )

    def _fits(self, whose: str, cap: Budget, sums: Sums, cost: Cost, rdp: float | None) -> None:
        if not self.is_renyi:
            fits_epsilon = sums.epsilon + exact(cost.epsilon) <= exact(cap.epsilon)
            if fits_epsilon and sums.delta + exact(cost.delta) <= exact(cap.delta):
                return
            epsilon, delta = _left(cap, sums)
            asked = f"epsilon {cost.epsilon} and delta {cost.delta}"
            left = f"epsilon {epsilon} and delta {delta} are"
            fix = "ask for less epsilon or delta"
        else:
            assert rdp is not None
            if math.isfinite(rdp) and sums.rdp + exact(rdp) <= exact(self._largest(cap)):
                return
            asked = f"a Renyi divergence of {rdp} at order {self.order}"
            left = f"{self._room(cap, sums)} is"
            fix = "use more noise or fewer steps"
        raise BudgetExhaustedError(
            f"{whose}: the charge asks for {asked}, but only {left} left of its cap (epsilon {cap.epsilon}, delta "
            f"{cap.delta}). Fix: {fix}, or grant more with `sfumato ledger grant`."
        )

    def _renyi_balance(self, cap: Budget, sums: Sums, user: str | None) -> Balance:
        spent = rounded_up(sums.rdp)
        epsilon = renyi.epsilon(self.order, spent, cap.delta)
        return Balance(
            self.dataset,
            cap,
            spent_epsilon=epsilon,
            spent_delta=cap.delta if spent else 0.0,
            remaining_epsilon=rounded_down(max(exact(cap.epsilon) - exact(epsilon), Fraction(0))),
            remaining_delta=0.0 if spent else cap.delta,
            composition=self.composition,
            order=self.order,
            spent_rdp=spent,
            remaining_rdp=self._room(cap, sums),
            user=user,
        )

    def _largest(self, cap: Budget) -> float:
        return renyi.cap(self.order, cap.epsilon, cap.delta)

    def _room(self, cap: Budget, sums: Sums) -> float:
        return rounded_down(max(exact(self._largest(cap)) - sums.rdp, Fraction(0)))


def _left(cap: Budget, sums: Sums) -> tuple[float, float]:
    epsilon = rounded_down(max(exact(cap.epsilon) - sums.epsilon, Fraction(0)))
    return epsilon, rounded_down(max(exact(cap.delta) - sums.delta, Fraction(0)))
