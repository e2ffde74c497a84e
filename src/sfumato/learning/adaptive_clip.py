"""A clip norm that follows a quantile of the units' norms, learnt inside the budget (Andrew et al. 2021)."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any, final

from sfumato import _checks
from sfumato.errors import PlanError
from sfumato.gradients.clipping import Clipping

_FURTHEST = 1e6  # from the first clip norm, either way
_MOST = 0.5  # of the clip norm, that the indicator may take


@final
@dataclass(frozen=True)
class AdaptiveClip:
    """Raises the clip norm while fewer units than wanted are within it, and lowers it while more are.

    Every release carries one more coordinate, the centred number of units within the clip norm; it lies in the same noised
    vector as the sum, so its noise is in the same event and nothing is paid beside it. After the step the norm becomes
    clip * exp(-rate * (share within - quantile)), as in Andrew, Thakkar, McMahan and Ramaswamy 2021, "Differentially private
    learning with adaptive clipping", algorithm 1: too many units within it make it fall.

    Who does not answer adds nothing, and would count as half a unit within the norm: with many of them the norm would settle at
    another quantile, or find none and grow or fall without end. So the share that answers has to be declared. Where an engine
    knows that the quantile could not be reached, the federation is refused.

    Args:
        quantile: The share of units that should be within the clip norm, in (0, 1). A median of records falls towards 0 as most
            of them are learnt, and takes the others' gradients with it; hence a higher default than the paper's, for clients.
        rate: How fast it follows, above 0.
        accuracy: The std that the noise gives to the share, above 0. The smaller, the more of the vector's length the
            indicator takes from the gradients; it takes at most half a clip norm.
        answering: The declared, public share of the clients asked that answer, in (0, 1], in a federation with drop-out;
            never read it off the clients.

    Raises:
        InputError: an argument is out of range.
    """

    quantile: float = 0.8
    rate: float = 0.2
    accuracy: float = 0.05
    answering: float = 1.0

    def __post_init__(self) -> None:
        _checks.fraction("quantile", self.quantile)
        _checks.positive("rate", self.rate)
        _checks.positive("accuracy", self.accuracy)
        _checks.fraction("answering", self.answering, allow_one=True)

    def check_reached(self, share: float) -> None:
        """Refuse a quantile that no clip norm reaches where `share` of those who are asked answer.

        Raises:
            PlanError: names both and the fix.
        """
        told = min(1.0, share / self.answering) / 2
        if not abs(self.quantile - 0.5) < told:
            raise PlanError(
                f"With {share:.3g} of the clients answering, the share within the clip norm would be told as "
                f"{0.5 - told:.3g} to {0.5 + told:.3g} and never as the quantile {self.quantile:g}; declare "
                f"AdaptiveClip(answering={share:.3g})."
            )

    def answers(self, expected: float) -> float:
        """Return the public number of units that are expected to answer, of those that are expected in a step."""
        return self.answering * expected

    def counted(self, noise_multiplier: float, expected: float) -> float:
        """Return how long the indicator is, in clip norms, from public numbers.

        Args:
            noise_multiplier: Of the step.
            expected: Units in a step.
        """
        return min(_MOST, noise_multiplier / (2 * self.accuracy * self.answers(expected)))

    def next(self, clipping: Clipping, share: float, first: float) -> float:
        """Return the clip norm of the next step.

        Args:
            clipping: Of this step.
            share: Of units within its norm, as released, in [0, 1].
            first: The clip norm of the first step.
        """
        moved = clipping.norm * math.exp(-self.rate * (share - self.quantile))
        return min(first * _FURTHEST, max(first / _FURTHEST, moved))

    def describe(self) -> dict[str, Any]:
        """Return the settings as plain JSON data."""
        return {"kind": "adaptive", **asdict(self)}
