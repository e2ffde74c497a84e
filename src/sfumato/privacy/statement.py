"""The privacy statement: what is promised, at what cost, by whose reckoning, and what is not covered."""

from __future__ import annotations

import math
from dataclasses import dataclass

from sfumato._numbers import bound
from sfumato.privacy import events
from sfumato.privacy.accounting import Spending
from sfumato.privacy.budget import Budget, Relation, Unit

_RELATION_IN_WORDS = {
    Relation.ADD_OR_REMOVE_ONE: "adding or removing one {unit}",
    Relation.REPLACE_ONE: "replacing one {unit} by another",
}


@dataclass(frozen=True)
class PrivacyStatement:
    """Everything that must be printed beside an epsilon.

    Attributes:
        budget: What was declared.
        spending: What was spent, by both accountants; infinite for a run without privacy.
        event: What was done.
        not_covered: Sentences on what the epsilon says nothing about.
        secret_noise: Whether the noise came from a secure source; with a seeded one nothing is promised.
    """

    budget: Budget
    spending: Spending
    event: events.Event
    not_covered: tuple[str, ...]
    secret_noise: bool = True

    @property
    def epsilon(self) -> float:
        """The claim: a proven upper bound."""
        return self.spending.epsilon

    @property
    def delta(self) -> float:
        """The delta at which epsilon holds."""
        return self.spending.delta

    @property
    def unit(self) -> Unit:
        """Who is protected."""
        return self.budget.unit

    @property
    def relation(self) -> Relation:
        """Which data sets count as neighbours."""
        return self.budget.relation

    def __str__(self) -> str:
        if not math.isfinite(self.epsilon):
            lines = ["No privacy is promised: this run was trained without noise (epsilon is infinite)."]
        else:
            change = _RELATION_IN_WORDS[self.relation].format(unit=self.unit)
            epsilon, delta = bound(self.epsilon), bound(self.delta)
            lines = [
                f"The release is ({epsilon}, {delta})-differentially private for one {self.unit}:",
                f"  {change} changes the probability of any outcome by at most a factor e^{epsilon},",
                f"  except with probability {delta}. Declared budget: epsilon {self.budget.epsilon:g}.",
                self._accountants(),
            ]
            if not self.secret_noise:
                lines.insert(
                    0, "A rehearsal, not a private release: the noise came from a known seed. With secret noise:"
                )
        return "\n".join([*lines, "  Not covered:", *(f"  - {sentence}" for sentence in self.not_covered)])

    def _accountants(self) -> str:
        claim = self.spending
        if math.isinf(claim.pld):
            return f"  Accountant: RDP {bound(claim.rdp)} (the claim, of a filter), by two implementations."
        return f"  Accountants: PLD {bound(claim.pld)} (the claim), RDP {bound(claim.rdp)} (second opinion)."
