"""Random allocation: in every epoch each record takes part in the same number of steps, and chooses them itself."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor

from sfumato import _checks
from sfumato.data.sampling import Draws, Sampler, in_runs, least_of_epochs
from sfumato.errors import PlanError
from sfumato.privacy import events
from sfumato.privacy.randomness import RandomSource, keyed_source


@final
@dataclass(frozen=True)
class RandomAllocation(Sampler):
    """In each epoch of `steps_per_epoch` steps every record takes part in exactly `selected` of them.

    Each record draws its steps by itself, uniformly among the sets of that size and independently of all others, anew in every
    epoch ("balls in bins" for one selected step). So no record is left out of an epoch, as with shuffling, and batches vary
    in size, as with Poisson sampling. `selected` over `steps_per_epoch` is the sampling rate.

    **Guarantee**: the epochs begun cost at most `RandomAllocationDpEvent` under add-or-remove-one (Feldman and Shenfeld 2025;
    proof in `privacy.allocation`), because the draw is what that event describes: secret, uniform, independent between records
    and epochs. The others draw the same with and without a record.

    **Edge cases**

    | case | what is counted |
    | --- | --- |
    | an epoch that is not finished | a whole one: what is left out only hides more |
    | noise that changes within an epoch | the least noise in all its steps: more can be made of less by adding some |
    | every step selected | Gaussian sums without sampling |
    | a run that is resumed | nothing more: the steps of an epoch follow from a kept key |

    Args:
        steps_per_epoch: Steps of an epoch.
        selected: Steps of an epoch that a record takes part in.

    Raises:
        InputError: a number is below 1. PlanError: more steps are selected than there are.
    """

    steps_per_epoch: int
    selected: int = 1
    kind = "random-allocation"
    by_step = False

    def __post_init__(self) -> None:
        _checks.count("steps_per_epoch", self.steps_per_epoch)
        _checks.count("selected", self.selected)
        if self.selected > self.steps_per_epoch:
            raise PlanError(
                f"A record cannot take part in {self.selected} of {self.steps_per_epoch} steps; select fewer."
            )

    @classmethod
    def of_batches(cls, batch_size: int, population: int, selected: int = 1) -> RandomAllocation:
        """Return the sampler whose batches hold `batch_size` of `population` records on average, or a few less.

        Raises:
            InputError: a number is below 1. PlanError: the batch is larger than the population.
        """
        _checks.count("batch_size", batch_size)
        _checks.count("population", population)
        if batch_size > population:
            raise PlanError(f"batch_size {batch_size} is larger than the population {population}.")
        return cls(-(-_checks.count("selected", selected) * population // batch_size), selected)

    @property
    def rate(self) -> float:
        """selected / steps_per_epoch."""
        return self.selected / self.steps_per_epoch

    def event_of(self, noises: Sequence[float], first: int = 0) -> events.Event:
        """Return what the epochs begun within these steps cost, each as if all its steps had its least noise."""
        if self.selected == self.steps_per_epoch:
            return in_runs(noises, events.gaussian)
        runs = [
            events.RandomAllocationDpEvent(noise, self.steps_per_epoch, self.selected, len(list(same)))
            for noise, same in itertools.groupby(least_of_epochs(noises, first, self.steps_per_epoch))
        ]
        return runs[0] if len(runs) == 1 else events.composed(runs)

    def describe(self) -> dict[str, Any]:
        """Return kind, rate and counts."""
        return super().describe() | {"steps_per_epoch": self.steps_per_epoch, "selected": self.selected}

    def start(self, count: int, source: RandomSource, state: dict[str, Any] | None = None) -> Draws:
        """Return draws that go on with the kept key, if there is one."""
        return _AllocatedDraws(self, count, source, state or {})


@final
class _AllocatedDraws(Draws):
    def __init__(self, sampler: RandomAllocation, count: int, source: RandomSource, state: dict[str, Any]) -> None:
        self._sampler, self._count = sampler, count
        # As for shuffled orders: a run that resumes goes on with the same steps, so that no record comes once too often.
        self._key: list[int] = state.get("key") or source.words(4).tolist()
        self._epoch, self._batches = -1, tuple[Tensor, ...]()

    def batch(self, step: int) -> Tensor:
        epoch, position = divmod(step, self._sampler.steps_per_epoch)
        if epoch != self._epoch:
            self._epoch, self._batches = epoch, self._allocated(keyed_source(self._key, epoch))
        return self._batches[position]

    def _allocated(self, source: RandomSource) -> tuple[Tensor, ...]:
        """Return the records of each step, in order."""
        chosen = _subsets(self._count, self._sampler.steps_per_epoch, self._sampler.selected, source).flatten()
        order = torch.argsort(chosen, stable=True)
        sizes = torch.bincount(chosen, minlength=self._sampler.steps_per_epoch)
        batches: list[Tensor] = list(torch.split(order // self._sampler.selected, sizes.tolist()))
        return tuple(batches)

    def state(self) -> dict[str, Any]:
        return {"key": self._key}


def _subsets(count: int, size: int, selected: int, source: RandomSource) -> Tensor:
    """Return `count` independent, uniformly random sets of `selected` numbers below `size`, shape (count, selected), int64.

    Floyd's algorithm: the next number is uniform among the first ones, and the last of these where it is taken already.
    """
    chosen = torch.full((count, selected), -1, dtype=torch.int64)
    for column, last in enumerate(range(size - selected, size)):
        # 63 random bits modulo last + 1: a number's chance is off by less than 2**-63.
        drawn = source.words(count).bitwise_and_(2**63 - 1) % (last + 1)
        taken = (chosen[:, :column] == drawn[:, None]).any(1)
        chosen[:, column] = torch.where(taken, last, drawn)
    return chosen
