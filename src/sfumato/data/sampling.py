"""Samplers: each draws the batches *and* states the event of what it draws, so that the two cannot part.

Fields of a sampler are public. The number of records and the source of randomness are arguments: they are private.
"""

from __future__ import annotations

import itertools
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar, final

import torch
from torch import Tensor

from sfumato import _checks
from sfumato.errors import PlanError
from sfumato.privacy import events
from sfumato.privacy.randomness import RandomSource, keyed_source
from sfumato.privacy.schedules import Constant, Schedule

_Step = TypeVar("_Step")


class Draws(ABC):
    """The batches of one run over one data set. Private: it holds the size of the data and the order of records."""

    @abstractmethod
    def batch(self, step: int) -> Tensor:
        """Return the indices of the records of step `step` (from 0), shape (any,), int64; it may be empty."""

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint must keep so that a resumed run draws what the event says."""
        return {}


class Sampler(ABC):
    """Decides who takes part in a step.

    Attributes:
        kind: The name that is printed.
        rate: The share of the population that a step uses on average, public.
        by_step: Whether each step has a cost of its own, so that what several cost is their composition.
        amplifies: Whether the event counts on nobody knowing who was drawn.
    """

    kind: str
    by_step: bool = True
    amplifies: bool = True

    @property
    @abstractmethod
    def rate(self) -> float:
        """The expected share of the population in a batch, in (0, 1]."""

    def rate_at(self, step: int) -> float:
        """Return the expected share of the population in the batch of step `step` (from 0)."""
        return self.rate

    @abstractmethod
    def event_of(self, noises: Sequence[float], first: int = 0) -> events.Event:
        """Return what noised sums over batches of this sampler cost, by the noise multiplier of each.

        Args:
            noises: Of the steps, in order.
            first: The step (from 0) that the first of them belongs to.
        """

    def event(self, noise_multiplier: float, steps: int) -> events.Event:
        """Return what the first `steps` noised sums cost, all with this noise multiplier."""
        return self.event_of([noise_multiplier] * steps)

    def scheduled(self, rates: Schedule, steps: int) -> Sampler:
        """Return a sampler whose rate follows a schedule.

        Raises:
            PlanError: this kind has one rate only.
        """
        if rates == Constant():
            return self
        raise PlanError(f'Only "poisson" sampling can change its rate over the steps, not "{self.kind}".')

    def check_steps(self, steps: int) -> None:  # noqa: B027 (most kinds serve any number)
        """Refuse a number of steps that the sampler was not made for.

        Raises:
            PlanError: it was made for another number.
        """

    def describe(self) -> dict[str, Any]:
        """Return the sampler as plain JSON data."""
        return {"kind": self.kind, "rate": self.rate}

    @abstractmethod
    def start(self, count: int, source: RandomSource, state: dict[str, Any] | None = None) -> Draws:
        """Return the draws over `count` records; `state` is what a checkpoint kept."""


@final
@dataclass(frozen=True)
class FullBatch(Sampler):
    """Every record in every step. The event claims no amplification."""

    kind = "full-batch"
    amplifies = False

    @property
    def rate(self) -> float:
        """Always 1."""
        return 1.0

    def event_of(self, noises: Sequence[float], first: int = 0) -> events.Event:
        """Return Gaussian sums."""
        return in_runs(noises, events.gaussian)

    def start(self, count: int, source: RandomSource, state: dict[str, Any] | None = None) -> Draws:
        """Return draws that are always all records."""
        return _AllRecords(count)


@final
class _AllRecords(Draws):
    def __init__(self, count: int) -> None:
        self._all = torch.arange(count)

    def batch(self, step: int) -> Tensor:
        return self._all


@final
@dataclass(frozen=True)
class Poisson(Sampler):
    """Every record joins a step independently with probability `sampling_rate`; batches vary in size.

    **Guarantee**: amplification as in `PoissonSampledDpEvent`, because the draw is what that event describes: secret,
    independent for each record and each step, at no more than the stated rate. An empty batch is a batch: its step
    releases noise alone.

    Args:
        sampling_rate: In (0, 1].
        factors: By which the rate of each step is multiplied; empty for always 1.

    Raises:
        InputError: the rate is not in (0, 1].
        PlanError: a factor takes it out of there.
    """

    sampling_rate: float
    factors: tuple[float, ...] = ()
    kind = "poisson"

    def __post_init__(self) -> None:
        _checks.fraction("sampling_rate", self.sampling_rate, allow_one=True)
        for step, factor in enumerate(self.factors):
            if not 0 < self.sampling_rate * factor <= 1:
                raise PlanError(
                    f"The schedule of rates asks for a sampling rate of {self.sampling_rate * factor:.4g} in step {step + 1}, "
                    f"{factor:.4g} times the {self.sampling_rate:.4g} of the plan; keep it in (0, 1] with a smaller "
                    "batch_size or smaller rates."
                )

    @property
    def rate(self) -> float:
        """The probability with which a record joins a step."""
        return self.sampling_rate

    def rate_at(self, step: int) -> float:
        """Return the rate of step `step`."""
        return self.sampling_rate * self.factors[step] if self.factors else self.sampling_rate

    def event_of(self, noises: Sequence[float], first: int = 0) -> events.Event:
        """Return Poisson-sampled Gaussian sums."""

        def sampled(step: tuple[float, float]) -> events.Event:
            rate, noise = step
            return events.poisson_sampled(rate, events.gaussian(noise))

        return in_runs(((self.rate_at(step), noise) for step, noise in enumerate(noises, first)), sampled)

    def scheduled(self, rates: Schedule, steps: int) -> Poisson:
        """Return the sampler whose rates are multiplied by a schedule over `steps` steps."""
        return self if rates == Constant() else Poisson(self.sampling_rate, rates.factors(steps))

    def check_steps(self, steps: int) -> None:
        """Refuse another number of steps than factors."""
        if self.factors and len(self.factors) != steps:
            raise PlanError(f"The sampler has rates for {len(self.factors)} steps, not {steps}.")

    def describe(self) -> dict[str, Any]:
        """Return kind and rate, and the factors if there are any."""
        return super().describe() | ({"factors": list(self.factors)} if self.factors else {})

    def start(self, count: int, source: RandomSource, state: dict[str, Any] | None = None) -> Draws:
        """Return independent draws; there is no position to keep."""
        return _PoissonDraws(count, self, source)


@final
class _PoissonDraws(Draws):
    def __init__(self, count: int, sampler: Poisson, source: RandomSource) -> None:
        self._count, self._sampler, self._source = count, sampler, source

    def batch(self, step: int) -> Tensor:
        return self._source.chosen(self._count, self._sampler.rate_at(step))


@final
@dataclass(frozen=True)
class Shuffled(Sampler):
    """Batches of fixed size from a new random order every epoch, as a shuffling loader does. No amplification claimed.

    An epoch has ceil(population / batch_size) steps, both public. In epochs of several steps, records beyond the
    population are left out of that epoch, and a smaller data set leaves its last batches short or empty.

    **Guarantee**: under add-or-remove-one, the orders of two neighbouring data sets can be paired so that, in one epoch,
    the batch that holds the extra record differs by one replacement (sensitivity 2C) and the batch that the substitute
    came from by one removal (C); nothing else differs. So an epoch costs a Gaussian sum at half the noise multiplier plus
    one at the full one. When an epoch is a single step, all records are in it and it costs one sum. Under replace-one the
    orders pair up exactly and one step an epoch differs, so there the same event overstates the cost.

    Raises:
        InputError: a size is below 1. PlanError: the batch is larger than the population.
    """

    batch_size: int
    population: int
    kind = "shuffled"
    by_step = False

    def __post_init__(self) -> None:
        _checks.count("batch_size", self.batch_size)
        _checks.count("population", self.population)
        if self.batch_size > self.population:
            raise PlanError(f"batch_size {self.batch_size} is larger than the population {self.population}.")

    @property
    def rate(self) -> float:
        """batch_size / population."""
        return self.batch_size / self.population

    @property
    def steps_per_epoch(self) -> int:
        """ceil(population / batch_size)."""
        return math.ceil(self.population / self.batch_size)

    def event_of(self, noises: Sequence[float], first: int = 0) -> events.Event:
        """Return what the epochs begun within these steps cost, each as if all its steps had its least noise."""
        if self.steps_per_epoch == 1:
            return in_runs(noises, events.gaussian)

        def epoch(least: float) -> events.Event:
            return events.composed([events.gaussian(least / 2), events.gaussian(least)])

        return in_runs(least_of_epochs(noises, first, self.steps_per_epoch), epoch)

    def start(self, count: int, source: RandomSource, state: dict[str, Any] | None = None) -> Draws:
        """Return draws that go on with the kept order of the epoch, if there is one."""
        return _ShuffledDraws(self, count, source, state or {})


@final
class _ShuffledDraws(Draws):
    def __init__(self, sampler: Shuffled, count: int, source: RandomSource, state: dict[str, Any]) -> None:
        self._sampler, self._count = sampler, count
        # The order of an epoch is a function of a kept key, so that a run that resumes in the middle of an epoch, even
        # one whose last steps are lost, goes on with the same order and uses no record twice.
        self._key: list[int] = state.get("key") or source.words(4).tolist()
        self._epoch, self._order = -1, torch.empty(0, dtype=torch.int64)

    def batch(self, step: int) -> Tensor:
        epoch, position = divmod(step, self._sampler.steps_per_epoch)
        if epoch != self._epoch:
            self._epoch, self._order = epoch, keyed_source(self._key, epoch).permutation(self._count)
        if self._sampler.steps_per_epoch == 1:
            return self._order
        start = position * self._sampler.batch_size
        return self._order[start : min(start + self._sampler.batch_size, self._sampler.population)]

    def state(self) -> dict[str, Any]:
        return {"key": self._key}


def in_runs(steps: Iterable[_Step], event_of: Callable[[_Step], events.Event]) -> events.Event:
    """Return the events of all steps together, equal neighbours as one that is repeated."""
    runs = [events.repeated(event_of(step), len(list(same))) for step, same in itertools.groupby(steps)]
    return runs[0] if len(runs) == 1 else events.composed(runs)


def least_of_epochs(noises: Sequence[float], first: int, length: int) -> list[float]:
    """Return the least noise of each epoch that is begun within the steps."""
    epochs = itertools.groupby(enumerate(noises, first), key=lambda numbered: numbered[0] // length)
    return [min(noise for _, noise in epoch) for _, epoch in epochs]
