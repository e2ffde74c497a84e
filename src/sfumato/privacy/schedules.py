"""Schedules: how a number changes over the steps of a plan, declared before the first one.

A schedule is a shape. A plan multiplies it by a base number (noise multiplier, clip norm or sampling rate), so the same shape
serves every budget: `Plan.calibrate` looks for the base at which the whole shape fits.
"""

from __future__ import annotations

import itertools
import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, final

from sfumato import _checks
from sfumato.errors import PlanError


class Schedule(ABC):
    """A shape over the steps: a factor for each of them, above 0 and finite, the same whenever it is asked."""

    @abstractmethod
    def at(self, progress: float) -> float:
        """Return the factor at `progress`, the share of the plan's other steps that come before this one, in [0, 1]."""

    def factors(self, steps: int) -> tuple[float, ...]:
        """Return the factor of each of `steps` steps.

        Raises:
            PlanError: the schedule does not fit so many steps.
        """
        last = max(1, steps - 1)
        return tuple(self.at(step / last) for step in range(steps))

    @abstractmethod
    def describe(self) -> dict[str, Any]:
        """Return the schedule as plain JSON data."""


@final
@dataclass(frozen=True)
class Constant(Schedule):
    """The same factor, 1, in every step."""

    def at(self, progress: float) -> float:
        """Return 1."""
        return 1.0

    def describe(self) -> dict[str, Any]:
        """Return the kind alone."""
        return {"kind": "constant"}


@dataclass(frozen=True)
class _Curve(Schedule):
    """From one factor to another.

    Args:
        start: Of the first step, above 0.
        end: Of the last step, above 0.

    Raises:
        InputError: an end is not above 0.
    """

    start: float
    end: float

    def __post_init__(self) -> None:
        _checks.positive("the start of the schedule", self.start)
        _checks.positive("the end of the schedule", self.end)

    def describe(self) -> dict[str, Any]:
        """Return kind and ends."""
        return {"kind": type(self).__name__.lower(), "start": self.start, "end": self.end}


@final
@dataclass(frozen=True)
class Linear(_Curve):
    """From `start` to `end` in equal parts."""

    def at(self, progress: float) -> float:
        """Return start + progress * (end - start)."""
        return self.start + progress * (self.end - self.start)


@final
@dataclass(frozen=True)
class Cosine(_Curve):
    """From `start` to `end` along half a cosine wave: slow at both ends (Loshchilov and Hutter 2017)."""

    def at(self, progress: float) -> float:
        """Return end + (start - end) * (1 + cos(pi * progress)) / 2."""
        return self.end + (self.start - self.end) * (1 + math.cos(math.pi * progress)) / 2


@final
@dataclass(frozen=True)
class Exponential(_Curve):
    """From `start` to `end` by the same factor from step to step."""

    def at(self, progress: float) -> float:
        """Return start * (end / start) ** progress."""
        return float(self.start * (self.end / self.start) ** progress)


@final
@dataclass(frozen=True)
class Stepwise(Schedule):
    """`values[0]` up to `milestones[0]`, then `values[1]`, and so on.

    Args:
        values: One more than milestones.
        milestones: Shares of the plan, in (0, 1), rising.

    Raises:
        InputError: a value is not above 0, or a milestone not in (0, 1).
        PlanError: the milestones do not rise, or the numbers do not match.
    """

    values: tuple[float, ...]
    milestones: tuple[float, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "values", tuple(_checks.positive("a value of the schedule", v) for v in self.values))
        places = tuple(_checks.fraction("a milestone", place) for place in self.milestones)
        object.__setattr__(self, "milestones", places)
        if len(self.values) != len(places) + 1 or any(a >= b for a, b in itertools.pairwise(places)):
            raise PlanError("A stepwise schedule needs rising milestones and one value more than milestones.")

    def at(self, progress: float) -> float:
        """Return the value of the stage that `progress` lies in."""
        return self.values[sum(progress >= place for place in self.milestones)]

    def describe(self) -> dict[str, Any]:
        """Return kind, values and milestones."""
        return {"kind": "stepwise", "values": list(self.values), "milestones": list(self.milestones)}


@final
@dataclass(frozen=True)
class Listed(Schedule):
    """Any list: one factor for each step.

    Raises:
        InputError: a factor is not above 0. PlanError: the list is empty.
    """

    values: tuple[float, ...]

    def __init__(self, values: Sequence[float]) -> None:
        object.__setattr__(self, "values", tuple(_checks.positive("a value of the schedule", v) for v in values))
        if not self.values:
            raise PlanError("A listed schedule needs one value for each step.")

    def at(self, progress: float) -> float:
        """Return the value that is nearest to `progress`."""
        return self.values[round(progress * (len(self.values) - 1))]

    def factors(self, steps: int) -> tuple[float, ...]:
        """Return the list.

        Raises:
            PlanError: it has another length.
        """
        if steps != len(self.values):
            raise PlanError(
                f"The listed schedule has {len(self.values)} values, the plan {steps} steps; give one for each."
            )
        return self.values

    def describe(self) -> dict[str, Any]:
        """Return kind and values."""
        return {"kind": "listed", "values": list(self.values)}
