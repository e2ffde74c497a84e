"""The plan: unit, sampler, clip, noise and steps in one frozen object, whose event is what running it costs."""

from __future__ import annotations

import dataclasses
import json
import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeAlias

from sfumato import _checks
from sfumato.data.allocated import RandomAllocation
from sfumato.data.participation import MinSeparation
from sfumato.data.sampling import FullBatch, Poisson, Sampler, Shuffled
from sfumato.data.truncated import TruncatedPoisson
from sfumato.errors import AccountingError, PlanError
from sfumato.gradients.clipping import Clipping, check_kind
from sfumato.learning.adaptive_clip import AdaptiveClip
from sfumato.learning.filters import Filter, rollout
from sfumato.learning.policies import PublicPolicy, ReleasedPolicy
from sfumato.learning.terms import Terms
from sfumato.privacy import accounting, calibration, events
from sfumato.privacy.budget import Budget, Relation, Unit
from sfumato.privacy.mechanisms import LARGEST_MULTIPLIER
from sfumato.privacy.schedules import Constant, Schedule

Noise: TypeAlias = Schedule | PublicPolicy | ReleasedPolicy
"""How the noise changes over the steps."""

_CONSTANT = Constant()
_SAMPLING = ("poisson", "truncated-poisson", "random-allocation", "shuffled", "full-batch", "min-separation")
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
        noise: The shape of the noise over the steps, which `noise_multiplier` scales; or a policy that is asked before each
            step. With a `ReleasedPolicy` the multiplier is that of even spending, `steps` is the most there can be, and the
            guarantee is that of `learning.filters`.
        clips: The shape of the clip norm over the steps, which `clip` scales; or an `AdaptiveClip`, which starts there.
        order: The Renyi order of the filter of a `ReleasedPolicy`; None for the best one. A ledger that composes by a filter
            needs its own order here.

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
    noise: Noise = _CONSTANT
    clips: Schedule | AdaptiveClip = _CONSTANT
    order: int | None = None

    def __post_init__(self) -> None:
        check_kind(self.clipping)
        _checks.count("steps", self.steps)
        self.budget.check_population(self.population)
        self.sampler.check_steps(self.steps)
        if not self.budget.is_private:
            if self.noise_multiplier != 0 or not math.isinf(self.clip):
                raise PlanError(
                    "An infinite epsilon means plain training: noise_multiplier must be 0 and clip infinite."
                )
            if self.noise != _CONSTANT or self.clips != _CONSTANT:
                raise PlanError("An infinite epsilon means plain training, without noise or clipping to be scheduled.")
            return
        _check_shapes(self.noise, self.clips, _CONSTANT)
        if self.order is not None and not isinstance(self.noise, ReleasedPolicy):
            raise PlanError("order is for policies that look at released results; leave it out.")
        self._check_clip()
        self._check_noise()
        if not self.spending.epsilon <= self.budget.epsilon:
            raise PlanError(
                f"This plan costs epsilon {self.spending.epsilon:.4g} at delta {self.budget.delta:g}, more than the budget of "
                f"{self.budget.epsilon:g}; use Plan.calibrate to find the noise, fewer steps, or a larger budget."
            )

    def _check_clip(self) -> None:
        for clip in (self.clip,) if isinstance(self.clips, AdaptiveClip) else (min(self._clips), max(self._clips)):
            if not _SMALLEST_CLIP <= _checks.positive("clip", clip) <= 1 / _SMALLEST_CLIP:
                raise PlanError(
                    f"clip {clip:g} is outside [{_SMALLEST_CLIP:g}, {1 / _SMALLEST_CLIP:g}]; rescale the loss."
                )
        if isinstance(self.clips, AdaptiveClip) and self.clipping != "flat":
            raise PlanError(f'An adaptive clip norm needs clipping="flat", not "{self.clipping}".')

    def _check_noise(self) -> None:
        for noise in (min(self.noises), max(self.noises)):
            if not _checks.positive("noise_multiplier", noise) <= LARGEST_MULTIPLIER:
                raise PlanError(f"noise_multiplier {noise:g} is above {LARGEST_MULTIPLIER:g}; use a larger budget.")

    @classmethod
    def calibrate(
        cls, budget: Budget, *, population: int, batch_size: int, steps: int | None = None,
        epochs: float | None = None, clip: float = 1.0, sampling: str = "poisson",
        clipping: str = "flat", noise: Noise = _CONSTANT, clips: Schedule | AdaptiveClip = _CONSTANT,
        rates: Schedule = _CONSTANT, max_batch: int | None = None, order: int | None = None,
        separation: int | None = None, participations: int | None = None,
    ) -> Plan:  # fmt: skip
        """Return the plan with the least noise that keeps `budget`.

        A schedule or public policy is scaled as a whole until it lands on the budget.

        Args:
            budget: The promise. With an infinite epsilon, clip and noise are left out.
            population: The public number of units (records or clients) that the budget protects.
            batch_size: The expected number of units in a step; equal to the population means every unit in every step.
            steps: Number of steps; or give `epochs` (passes over the population).
            epochs: Passes over the population.
            clip: Norm at which one unit's part is clipped.
            sampling: "poisson", "truncated-poisson" (at most `max_batch`), "random-allocation" (every unit once an epoch, in
                a step of its own choice), "shuffled" (fixed batches, no amplification), "full-batch", or "min-separation"
                (units that come as they like, at least `separation` steps apart, at most `participations` times: no
                amplification).
            clipping: "flat", "per-layer" or "normalised"; see `Clipping`. The cost is the same.
            noise: As for the class.
            clips: As for the class.
            rates: The shape of the sampling rate over the steps, which batch_size / population scales; "poisson" only.
            max_batch: The largest batch of "truncated-poisson", which has to be given there.
            order: As for the class.
            separation: Of "min-separation", which has to be given there.
            participations: Of one unit in all steps of "min-separation"; None for as many as the separation leaves room for.

        Raises:
            PlanError: no noise keeps the budget, or the arguments contradict one another.
            InputError: a number is out of range, or the sampling is unknown.
        """
        _checks.count("population", population)
        _checks.count("batch_size", batch_size)
        _check_shapes(noise, clips, rates)
        count = _steps(steps, epochs, population, batch_size)
        sampler = _sampler(sampling, population, batch_size, count, max_batch, separation, participations)
        sampler = sampler.scheduled(rates, count)
        budget.check_population(population)
        if not budget.is_private:
            return cls(budget, sampler, math.inf, 0.0, count, population, clipping, noise, clips)
        if isinstance(noise, ReleasedPolicy):
            filter = Filter.of(budget, sampler, count, order)
            even = filter.even_for(filter.cap / count)
            return cls(budget, sampler, clip, even, count, population, clipping, noise, clips, order)
        shape = _shape(noise, budget, sampler, count)
        found = calibration.calibrate(lambda base: sampler.event_of([base * one for one in shape]), budget)
        return cls(budget, sampler, clip, found.noise_multiplier, count, population, clipping, noise, clips, order)

    @classmethod
    def without_privacy(
        cls, *, population: int, batch_size: int, steps: int | None = None, epochs: float | None = None,
        sampling: str = "poisson", unit: str = "record",
    ) -> Plan:  # fmt: skip
        """Return a plan of plain training: no clipping, no noise, no promise.

        With unit "client" the population are the clients of a federation, and the sampler draws the cohort of each round.
        """
        return cls.calibrate(
            Budget(math.inf, unit=Unit(unit)),
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

    @cached_property
    def noises(self) -> tuple[float, ...]:
        """The noise multiplier of each step; with a `ReleasedPolicy`, that of even spending."""
        if isinstance(self.noise, ReleasedPolicy):
            return (self.noise_multiplier,) * self.steps
        shape = _shape(self.noise, self.budget, self.sampler, self.steps)
        return tuple(self.noise_multiplier * one for one in shape)

    @cached_property
    def _clips(self) -> tuple[float, ...]:
        factors = (1.0,) * self.steps if isinstance(self.clips, AdaptiveClip) else self.clips.factors(self.steps)
        return tuple(self.clip * factor for factor in factors)

    def terms(self, step: int) -> Terms:
        """Return what step `step` (from 0) is done with, as far as the plan alone says."""
        rate = self.sampler.rate_at(step)
        if not self.is_private:
            return Terms(0.0, None, rate)
        noise = self.noises[step]
        counted = 0.0
        if isinstance(self.clips, AdaptiveClip):
            counted = self.clips.counted(noise, rate * self.population)
        return Terms(noise, Clipping(self._clips[step], self.clipping, counted), rate)

    @cached_property
    def filter(self) -> Filter | None:
        """What a policy that looks at released results is held by; None for other plans."""
        if not (self.is_private and isinstance(self.noise, ReleasedPolicy)):
            return None
        return Filter.of(self.budget, self.sampler, self.steps, self.order)

    @property
    def expected_batch(self) -> float:
        """The public number of units in a step: sampling rate times population, never the drawn size."""
        return self.sampler.rate * self.population

    def event_after(self, steps: int) -> events.Event:
        """Return what the first `steps` steps cost."""
        if steps == 0:
            return events.composed([])
        if not self.is_private:
            return events.non_private()
        if self.filter is not None:
            return self.filter.event
        return self.sampler.event_of(self.noises[:steps])

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

        It is worked out at 16 points of the plan, all at once; in between it is the figure of the next point, so it never
        understates. With a `ReleasedPolicy` it is the whole from the first step: a filter promises nothing smaller on the way.
        """
        if steps <= 0:
            return 0.0
        if not self.is_private:
            return math.inf
        return self._curve[min(len(self._curve), math.ceil(steps / self._stride)) - 1]

    @property
    def _stride(self) -> int:
        return max(1, math.ceil(self.steps / _CURVE_POINTS))

    @cached_property
    def _curve(self) -> list[float]:
        whole = self.spending.epsilon  # bounds every part of the plan
        ends = [*range(self._stride, self.steps, self._stride), self.steps]
        if not self.sampler.by_step or self.filter is not None:
            return [self._epsilon_at(end) for end in ends[:-1]] + [whole]
        starts = [0, *ends[:-1]]
        segments = [self.sampler.event_of(self.noises[a:b], first=a) for a, b in zip(starts, ends, strict=True)]
        return [min(point, whole) for point in accounting.curve(segments, self.budget.delta)[:-1]] + [whole]

    def _epsilon_at(self, end: int) -> float:
        try:
            return min(
                self.spending.epsilon,
                accounting.spending(self.event_after(end), self.budget.delta, self.budget.relation).epsilon,
            )
        except AccountingError:
            return self.spending.epsilon

    def describe(self) -> dict[str, Any]:
        """Return the plan as plain JSON data (infinite numbers as null)."""
        return {
            "epsilon": _finite(self.budget.epsilon),
            "delta": self.budget.delta,
            "unit": str(self.budget.unit),
            "relation": str(self.budget.relation),
            "sampling": self.sampler.describe(),
            "clip_norm": _finite(self.clip),
            "clipping": self.clipping,
            "noise_multiplier": self.noise_multiplier,
            "steps": self.steps,
            "population": self.population,
        } | self._varying()

    def _varying(self) -> dict[str, Any]:
        """Return what is not the same in every step, as plain JSON data."""
        changes: dict[str, Any] = {}
        if self.noise != _CONSTANT:
            changes["noise"] = self.noise.describe()
        if self.clips != _CONSTANT:
            changes["clip"] = self.clips.describe()
        if self.order is not None:
            changes["order"] = self.order
        return changes

    def fingerprint(self) -> str:
        """Return one line that is the same for equal plans and different for different ones."""
        return json.dumps(self.describe(), sort_keys=True)


def _check_shapes(noise: object, clips: object, rates: object) -> None:
    """Refuse what is no schedule, policy or adaptive clip norm, also a class in place of its instance."""
    wanted: tuple[tuple[str, object, tuple[type, ...], str], ...] = (
        (
            "noise",
            noise,
            (Schedule, PublicPolicy, ReleasedPolicy),
            "a schedule such as Cosine(2, 1) or a policy such as Decay()",
        ),
        ("clips", clips, (Schedule, AdaptiveClip), "a schedule such as Linear(1, 0.5), or AdaptiveClip()"),
        ("rates", rates, (Schedule,), "a schedule such as Linear(0.5, 1.5)"),
    )
    for name, given, kinds, say in wanted:
        if not isinstance(given, kinds):
            raise PlanError(f"{name} must be {say}, not {given!r}.")


def _shape(noise: Schedule | PublicPolicy, budget: Budget, sampler: Sampler, steps: int) -> tuple[float, ...]:
    """Return the noise of each step, up to one factor that they all have in common."""
    if isinstance(noise, Schedule):
        return noise.factors(steps)
    # Only proportions matter here: what the whole costs is accounted by the sampler itself.
    like = sampler if isinstance(sampler, FullBatch) else Poisson(sampler.rate)
    return rollout(
        noise, Filter.of(dataclasses.replace(budget, relation=Relation.ADD_OR_REMOVE_ONE), like, steps), steps
    )


def _sampler(
    sampling: str, population: int, batch_size: int, steps: int, max_batch: int | None, separation: int | None,
    participations: int | None,
) -> Sampler:  # fmt: skip
    if not isinstance(sampling, str) or sampling not in _SAMPLING:
        raise PlanError(f"sampling {sampling!r} is unknown.{_checks.did_you_mean(str(sampling), _SAMPLING)}")
    if batch_size > population:
        raise PlanError(f"batch_size {batch_size} is larger than the population {population}; choose a smaller one.")
    if (max_batch is None) == (sampling == "truncated-poisson"):
        raise PlanError('max_batch belongs to "truncated-poisson" sampling, and has to be given there.')
    if max_batch is not None and max_batch < batch_size:
        raise PlanError(
            f"max_batch {max_batch} is below batch_size {batch_size}, so nearly every batch would be cut, at many times the "
            "cost; leave room for about four times the root of batch_size."
        )
    if (separation is None) == (sampling == "min-separation") or (participations is not None and separation is None):
        raise PlanError(
            'separation and participations belong to "min-separation" sampling, where separation has to be given.'
        )
    if separation is not None:
        room = math.ceil(steps / _checks.count("separation", separation))
        return MinSeparation(batch_size, population, separation, room if participations is None else participations)
    if sampling == "shuffled":
        return Shuffled(batch_size, population)
    if max_batch is not None:
        return TruncatedPoisson(batch_size / population, max_batch, population)
    if batch_size == population:
        return FullBatch()
    if sampling == "full-batch":
        raise PlanError(f"A full batch has batch_size equal to the population ({population}), not {batch_size}.")
    if sampling == "random-allocation":
        return RandomAllocation.of_batches(batch_size, population)
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
