"""How the clipped sums of clients become released sums: where the noise is added and what a lost client costs.

A value of this kind is a privacy choice: it says who is trusted with what. Each has `combine` and a stated sensitivity: the
bound of one unit's part, which every `Bounded` carries.
"""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, final

from sfumato import _checks
from sfumato.errors import PlanError
from sfumato.privacy import mechanisms
from sfumato.privacy.bounded import Bounded, Released
from sfumato.privacy.budget import Relation
from sfumato.privacy.ledger import Charge
from sfumato.privacy.randomness import RandomSource

if TYPE_CHECKING:
    from sfumato.learning.plan import Plan


@final
@dataclass(frozen=True)
class Noise:
    """What a release needs besides the sums: how much noise, in which relation, paid by whom, drawn from where."""

    multiplier: float
    relation: Relation
    charge: Charge
    source: RandomSource


class Aggregation(ABC):
    """Turns the sums of the clients that answered into released sums.

    Attributes:
        trust: One sentence on who sees what before the noise, printed with every epsilon.
        hides_cohort: Whether those against whom the promise holds cannot see which clients were drawn. Only then may a
            sampled cohort claim amplification.
        takes_total: Whether it needs nothing but the sum over all clients, so that nobody has to keep their parts apart.
    """

    trust: str
    hides_cohort: bool
    takes_total: bool = False

    def begin(self) -> Aggregation:
        """Return what serves one run: a fresh one, if it remembers anything from round to round."""
        return self

    def check_plan(self, plan: Plan) -> None:  # noqa: B027 (most kinds serve every plan)
        """Refuse, before anything is charged, a plan that does not account for this noise.

        Raises:
            PlanError: names the reason and the fix.
        """

    def void(self) -> None:  # noqa: B027 (most kinds remember nothing)
        """Take note that a round was void: nothing of it was or will be released."""

    def bound(self, zero: Bounded, noise_multiplier: float) -> Bounded:
        """Return a zero with the bound that each release is noised for: that of `zero`, or more."""
        return zero

    def summed(self, parts: Mapping[str, Bounded], *, zero: Bounded, noise: Noise) -> Mapping[str, Bounded]:
        """Return what the next `combine` of the same arguments adds its noise to; private, for the self-check."""
        return parts

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint must keep; private."""
        return {}

    def restore(self, state: dict[str, Any]) -> None:  # noqa: B027 (most kinds keep nothing)
        """Take back what `state` returned."""

    @abstractmethod
    def check_clients(self, count: int) -> None:
        """Refuse, before anything is charged, a federation of `count` (at least 1) clients that this noise cannot serve.

        Raises:
            PlanError: names the reason and the fix.
        """

    @abstractmethod
    def combine(self, parts: Mapping[str, Bounded], *, zero: Bounded, asked: int, noise: Noise) -> dict[str, Released]:
        """Return the released sums by name; exactly one draw of the charge is used.

        Args:
            parts: The sum of each client that answered; may be empty.
            zero: A sum of no units, with the round's names, shapes and bound.
            asked: How many clients were asked.
            noise: How to release.

        Raises:
            LostClientsError: too few answered for the noise to be whole.
        """


@final
@dataclass(frozen=True)
class ServerNoise(Aggregation):
    """The server adds the noise to the sum. Lost clients add nothing and the noise stays whole."""

    hides_cohort = True
    takes_total = True
    trust = "The server is trusted: it sees each client's clipped sum before the noise is added."

    def check_clients(self, count: int) -> None:
        """Serve any number of clients."""

    def combine(self, parts: Mapping[str, Bounded], *, zero: Bounded, asked: int, noise: Noise) -> dict[str, Released]:
        """Return one released sum under the name "all"."""
        # A single sum is taken as it is; several are added up in the float64 of `zero`.
        total = next(iter(parts.values())) if len(parts) == 1 else functools.reduce(Bounded.plus, parts.values(), zero)
        released = mechanisms.gaussian(
            total, noise.multiplier, relation=noise.relation, charge=noise.charge, source=noise.source
        )
        return {"all": released}


@final
@dataclass(frozen=True)
class SharedNoise(Aggregation):
    """Every client adds its part of the noise, sized so that up to `tolerate` of them may be lost.

    A round that loses more is refused; its charge stays spent.

    Raises:
        InputError: tolerate is negative.
    """

    tolerate: int = 0
    hides_cohort = False
    trust = (
        "Each client adds a part of the noise to its own sum: the promise holds for everybody who sees only the total. A "
        "client's single sum carries less noise than the total, and clients can subtract the part they drew themselves."
    )

    def __post_init__(self) -> None:
        _checks.count("tolerate", self.tolerate, minimum=0)

    def check_clients(self, count: int) -> None:
        """Refuse to tolerate the loss of every client."""
        if self.tolerate >= count:
            raise PlanError(
                f"SharedNoise(tolerate={self.tolerate}) would let all {count} clients be lost; tolerate at most {count - 1}."
            )

    def combine(self, parts: Mapping[str, Bounded], *, zero: Bounded, asked: int, noise: Noise) -> dict[str, Released]:
        """Return one released sum under the name "all"."""
        shared = mechanisms.SharedGaussian(
            zero.norm_bound, zero.size, noise.multiplier,
            relation=noise.relation, clients=asked, tolerate=self.tolerate, charge=noise.charge,
        )  # fmt: skip
        return {"all": shared.combine([shared.share(name, part, noise.source) for name, part in parts.items()])}


@final
@dataclass(frozen=True)
class LocalNoise(Aggregation):
    """Every client adds the whole noise to its own sum, so that nobody is trusted and nothing is added up un-noised."""

    hides_cohort = False
    trust = "Nobody is trusted: each client's sums carry their full noise before they leave it."

    def check_clients(self, count: int) -> None:
        """Serve any number of clients."""

    def combine(self, parts: Mapping[str, Bounded], *, zero: Bounded, asked: int, noise: Noise) -> dict[str, Released]:
        """Return one released sum for each client, by its name."""
        return mechanisms.gaussian_each(
            parts, noise.multiplier, relation=noise.relation, charge=noise.charge, source=noise.source
        )
