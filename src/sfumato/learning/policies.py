"""Noise by what is left: policies that are asked before each step and answer with the noise of that step.

There are two honest kinds, told apart by their type:

- A `PublicPolicy` looks only at how many steps are done and how much of the budget is left. Its answers are known before the
  run, so the plan asks it for all of them at once and accounts them as any schedule, by privacy loss distributions.
- A `ReleasedPolicy` looks also at what the steps have released. Which noise comes next then depends on the noise that came
  before, and the usual composition theorems do not apply; such a plan runs under a filter (`learning.filters`).
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import asdict, dataclass, is_dataclass
from typing import Any, final

from sfumato import _checks
from sfumato.errors import PlanError


@final
@dataclass(frozen=True)
class Outlook:
    """What is public before a step.

    Attributes:
        step: Steps done.
        steps: Steps of the plan.
        left: Share of the budget that is left, in the filter's own currency, in [0, 1].
        even: The noise multiplier at which what is left just lasts for the steps that remain.
        first: What `even` was before the first step.
    """

    step: int
    steps: int
    left: float
    even: float
    first: float


@final
@dataclass(frozen=True)
class Signal:
    """What one release tells about itself: post-processing of numbers that are out already.

    Attributes:
        size: l2 norm of the released sum.
        noise: l2 norm that its noise has on average, std * sqrt(coordinates).
    """

    size: float
    noise: float

    @property
    def ratio(self) -> float:
        """Estimated norm of the sum without its noise, over the norm of the noise; 0 where the noise hides it."""
        return math.sqrt(max(0.0, self.size**2 - self.noise**2)) / self.noise


class PublicPolicy(ABC):
    """Chooses noise from public numbers only."""

    @abstractmethod
    def noise(self, now: Outlook) -> float:
        """Return the noise multiplier of the next step, above 0. Only proportions matter: the plan scales all of them."""

    def describe(self) -> dict[str, Any]:
        """Return the policy as plain JSON data."""
        return _described(self)


class ReleasedPolicy(ABC):
    """Chooses noise from what was released as well. It must be a function of its arguments alone."""

    @abstractmethod
    def noise(self, now: Outlook, seen: Sequence[Signal]) -> float | None:
        """Return the noise multiplier of the next step, or None to end the run and keep the rest of the budget.

        Args:
            now: What is public before the step.
            seen: What each step so far released, in order.
        """

    def describe(self) -> dict[str, Any]:
        """Return the policy as plain JSON data."""
        return _described(self)


@final
@dataclass(frozen=True)
class SpendEvenly(PublicPolicy):
    """Every step that remains gets the same share of what is left."""

    def noise(self, now: Outlook) -> float:
        """Return `now.even`."""
        return now.even


@final
@dataclass(frozen=True)
class Decay(PublicPolicy):
    """The noise falls by the same factor from step to step: little is spent first, most where the model is nearly done.

    Args:
        ratio: Noise of the first step over that of the last, above 0; below 1 the noise rises.

    Raises:
        InputError: the ratio is not above 0.
    """

    ratio: float = 2.0

    def __post_init__(self) -> None:
        _checks.positive("ratio", self.ratio)

    def noise(self, now: Outlook) -> float:
        """Return a noise multiplier on the curve."""
        return float(self.ratio ** -(now.step / max(1, now.steps - 1)))


@final
@dataclass(frozen=True)
class SignalToNoise(ReleasedPolicy):
    """Raises the noise while the released sums stand out of it, and lowers it where they drown.

    The measured signal is averaged over the last `window` steps and compared with that of the first: the noise is the even
    one times (signal now / signal at first) ** power. It stays within a factor of `most` of the even noise of the first step,
    so that what was spent early cannot drown the last steps; the run ends before that.

    Args:
        power: How strongly it answers, above 0.
        window: Steps that are averaged, at least 1.
        most: The largest factor, at least 1.

    Raises:
        InputError: an argument is out of range.
    """

    power: float = 0.5
    window: int = 10
    most: float = 2.0

    def __post_init__(self) -> None:
        _checks.positive("power", self.power)
        _checks.count("window", self.window)
        if not _checks.positive("most", self.most) >= 1:
            raise PlanError(f"most must be at least 1, not {self.most:g}.")

    def noise(self, now: Outlook, seen: Sequence[Signal]) -> float:
        """Return the even noise times the factor."""
        if len(seen) < 2 * self.window:
            return now.even
        # Of the sums without noise, so that the policy's own choices do not come back as signal.
        first, last = _strength(seen[: self.window]), _strength(seen[-self.window :])
        factor = (last / first) ** self.power if first > 0 else 1.0
        return min(self.most * now.first, max(now.first / self.most, now.even * factor))


@final
@dataclass(frozen=True)
class StopWhenFlat(ReleasedPolicy):
    """Spends evenly, and ends the run when the released sums no longer stand out of their noise.

    What is left then goes back to a ledger that composes by a filter.

    Args:
        ratio: Of signal to noise, below which a step counts as flat.
        window: Steps that are averaged, at least 1.
        least: Share of the plan that is done in any case, in (0, 1).

    Raises:
        InputError: an argument is out of range.
    """

    ratio: float = 0.05
    window: int = 20
    least: float = 0.25

    def __post_init__(self) -> None:
        _checks.positive("ratio", self.ratio)
        _checks.count("window", self.window)
        _checks.fraction("least", self.least)

    def noise(self, now: Outlook, seen: Sequence[Signal]) -> float | None:
        """Return the even noise, or None."""
        if len(seen) >= max(self.window, self.least * now.steps):
            last = seen[-self.window :]
            # Of squares, because single ratios are cut off at 0 and would be too large on average.
            signal = sum(one.size**2 - one.noise**2 for one in last)
            if signal <= self.ratio**2 * sum(one.noise**2 for one in last):
                return None
        return now.even


def _strength(seen: Sequence[Signal]) -> float:
    """Return the estimated norm of the sums without noise, averaged."""
    return math.sqrt(max(0.0, sum(one.size**2 - one.noise**2 for one in seen) / len(seen)))


def _described(policy: Any) -> dict[str, Any]:
    settings = asdict(policy) if is_dataclass(policy) and not isinstance(policy, type) else {}
    return {"kind": type(policy).__name__} | settings
