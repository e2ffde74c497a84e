"""The plan: unit, sampler, clip, noise and steps in one frozen object, whose event is what running it costs."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from sfumato import _checks
from sfumato.data.sampling import FullBatch, Poisson, Sampler, Shuffled
from sfumato.errors import AccountingError, PlanError
from sfumato.gradients.clipping import Clipping, check_kind
from sfumato.privacy import accounting, calibration, events
from sfumato.privacy.budget import Budget
from sfumato.privacy.mechanisms import LARGEST_MULTIPLIER

_SAMPLING = ("poisson", "shuffled", "full-batch")
_CURVE_POINTS = 16
_SMALLEST_CLIP = 1e-30  # its square is far above what float64 loses


@dataclass(frozen=True)
class Plan:
    """Everything that privacy depends on. Running a plan executes this very object; speed knobs live elsewhere.

    Usually made by `Plan.calibrate` or `Plan.without_privacy`.

    **Guarantee**: `plan.event` describes `steps` sums over batches of `sampler`, each bounded by `clip` and noised with
    `noise_multiplier`; its PLD epsilon at `budget.delta` is at most `budget.epsilon`, or the plan cannot be made.

    Args:
        budget: The promise.
        sampler: Who takes part in a step.
        clip: The l2 norm at which one unit's part is clipped; infinite without privacy.
        noise_multiplier: Noise std over sensitivity; 0 without privacy.
        steps: Number of noised sums.
        population: The declared, public number of units; never read off the data.
        clipping: How one unit's part is clipped: "flat", "per-layer" or "normalised"; see `Clipping`.

    Raises:
        PlanError: the plan would cost more than its budget, or its parts contradict one another.
        InputError: a number is out of range.
    """

    budget: Budget
    sampler: Sampler
    clip: float
    noise_multiplier: float
    steps: int
    population: int
    clipping: str = "flat"

    def __post_init__(self) -> None:
        check_kind(self.clipping)
        _checks.count("steps", self.steps)
        self.budget.check_population(self.population)
        if not self.budget.is_private:
            if self.noise_multiplier != 0 or not math.isinf(self.clip):
                raise PlanError(
                    "An infinite epsilon means plain training: noise_multiplier must be 0 and clip infinite."
                )
            return
        if not _SMALLEST_CLIP <= _checks.positive("clip", self.clip) <= 1 / _SMALLEST_CLIP:
            raise PlanError(
                f"clip {self.clip:g} is outside [{_SMALLEST_CLIP:g}, {1 / _SMALLEST_CLIP:g}]; rescale the loss."
            )
        if not _checks.positive("noise_multiplier", self.noise_multiplier) <= LARGEST_MULTIPLIER:
            raise PlanError(
                f"noise_multiplier {self.noise_multiplier:g} is above {LARGEST_MULTIPLIER:g}; use a larger budget."
            )
        if not self.spending.epsilon <= self.budget.epsilon:
            raise PlanError(
                f"This plan costs epsilon {self.spending.epsilon:.4g} at delta {self.budget.delta:g}, more than the budget of "
                f"{self.budget.epsilon:g}; use Plan.calibrate to find the noise, fewer steps, or a larger budget."
            )

    @classmethod
    def calibrate(
        cls, budget: Budget, *, population: int, batch_size: int, steps: int | None = None,
        epochs: float | None = None, clip: float = 1.0, sampling: str = "poisson",
        clipping: str = "flat",
    ) -> Plan:  # fmt: skip
        """Return the plan with the least noise that keeps `budget`.

        Args:
            budget: The promise. With an infinite epsilon, clip and noise are left out.
            population: The public number of units (records or clients) that the budget protects.
            batch_size: The expected number of units in a step; equal to the population means every unit in every step.
            steps: Number of steps; or give `epochs` (passes over the population).
            epochs: Passes over the population.
            clip: Norm at which one unit's part is clipped.
            sampling: "poisson", "shuffled" (fixed batches, no amplification) or "full-batch".
            clipping: "flat", "per-layer" or "normalised"; see `Clipping`. The cost is the same.

        Raises:
            PlanError: no noise keeps the budget, or the arguments contradict one another.
            InputError: a number is out of range, or the sampling is unknown.
        """
        _checks.count("population", population)
        _checks.count("batch_size", batch_size)
        sampler = _sampler(sampling, population, batch_size)
        count = _steps(steps, epochs, population, batch_size)
        budget.check_population(population)
        if not budget.is_private:
            return cls(budget, sampler, math.inf, 0.0, count, population, clipping)
        found = calibration.calibrate(lambda noise: sampler.event(noise, count), budget)
        return cls(budget, sampler, clip, found.noise_multiplier, count, population, clipping)

    @classmethod
    def without_privacy(
        cls, *, population: int, batch_size: int, steps: int | None = None, epochs: float | None = None,
        sampling: str = "poisson",
    ) -> Plan:  # fmt: skip
        """Return a plan of plain training: no clipping, no noise, no promise."""
        return cls.calibrate(
            Budget(math.inf),
            population=population,
            batch_size=batch_size,
            steps=steps,
            epochs=epochs,
            sampling=sampling,
        )

    @property
    def is_private(self) -> bool:
        """Whether the plan promises anything."""
        return self.budget.is_private

    @property
    def clipper(self) -> Clipping:
        """How one unit's part is clipped, and at which norm."""
        return Clipping(self.clip, self.clipping)

    @property
    def expected_batch(self) -> float:
        """The public number by which every sum is divided: sampling rate times population, never the drawn size."""
        return self.sampler.rate * self.population

    def event_after(self, steps: int) -> events.Event:
        """Return what the first `steps` steps cost."""
        if steps == 0:
            return events.composed([])
        if not self.is_private:
            return events.non_private()
        return self.sampler.event(self.noise_multiplier, steps)

    @cached_property
    def event(self) -> events.Event:
        """What the whole plan costs."""
        return self.event_after(self.steps)

    @cached_property
    def spending(self) -> accounting.Spending:
        """The whole cost by both accountants."""
        if not self.is_private:
            return accounting.Spending(math.inf, self.budget.delta, math.inf, math.inf)
        return accounting.spending(self.event, self.budget.delta, self.budget.relation)

    def epsilon_after(self, steps: int) -> float:
        """Return an upper bound on what the first `steps` steps cost.

        It is exact at 16 points of the plan; in between it is the figure of the next point, so it never understates.
        """
        if steps <= 0:
            return 0.0
        if not self.is_private:
            return math.inf
        stride = max(1, math.ceil(self.steps / _CURVE_POINTS))
        point = min(self.steps, math.ceil(steps / stride) * stride)
        try:
            return accounting.spending(self.event_after(point), self.budget.delta, self.budget.relation).epsilon
        except AccountingError:
            return self.spending.epsilon  # the whole plan bounds every part of it

    def describe(self) -> dict[str, Any]:
        """Return the plan as plain JSON data (infinite numbers as null)."""
        return {
            "epsilon": _finite(self.budget.epsilon),
            "delta": self.budget.delta,
            "unit": str(self.budget.unit),
            "relation": str(self.budget.relation),
            "sampling": {"kind": self.sampler.kind, "rate": self.sampler.rate},
            "clip_norm": _finite(self.clip),
            "clipping": self.clipping,
            "noise_multiplier": self.noise_multiplier,
            "steps": self.steps,
            "population": self.population,
        }

    def fingerprint(self) -> str:
        """Return one line that is the same for equal plans and different for different ones."""
        return json.dumps(self.describe(), sort_keys=True)


def _sampler(sampling: str, population: int, batch_size: int) -> Sampler:
    if sampling not in _SAMPLING:
        raise PlanError(f"sampling {sampling!r} is unknown.{_checks.did_you_mean(sampling, _SAMPLING)}")
    if batch_size > population:
        raise PlanError(f"batch_size {batch_size} is larger than the population {population}; choose a smaller one.")
    if sampling == "shuffled":
        return Shuffled(batch_size, population)
    if batch_size == population:
        return FullBatch()
    if sampling == "full-batch":
        raise PlanError(f"A full batch has batch_size equal to the population ({population}), not {batch_size}.")
    return Poisson(batch_size / population)


def _steps(steps: int | None, epochs: float | None, population: int, batch_size: int) -> int:
    if (steps is None) == (epochs is None):
        raise PlanError("Give either steps or epochs, and only one of them.")
    if steps is not None:
        return _checks.count("steps", steps)
    assert epochs is not None
    return math.ceil(_checks.positive("epochs", epochs) * population / batch_size)


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
