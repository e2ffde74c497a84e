"""Participation with a minimum separation: for clients that come as they like, where no sampling can be promised."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, final

import numpy as np
import torch
from torch import Tensor

from sfumato import _checks
from sfumato.data.sampling import Draws, Sampler
from sfumato.errors import CheckpointError, InputError, PlanError, SfumatoError
from sfumato.privacy import events
from sfumato.privacy.randomness import RandomSource, keyed_source

_DRAWN, _CAME = "drawn", "came"


@final
@dataclass(frozen=True)
class MinSeparation(Sampler):
    """Cohorts of up to `cohort` clients, none of which takes part within `separation` steps of its last time, or too often.

    Each cohort is drawn uniformly among those that did not take part in the `separation` - 1 steps before and have taken part
    less than `participations` times. The draw is one of *places*: there are `population` of them, the clients lie in the first
    ones, and the others stay empty and add nothing. So the places that are drawn do not depend on the number of clients. Or the
    caller says at each step who has come, and the cohort is drawn among those (`SeparatedDraws.batch`).

    No amplification is claimed: the promise holds against somebody who knows who takes part when. In return the noise of
    different steps may be correlated (`learning.correlated`), which sampling forbids.

    **Guarantee**: let step t release a row y_t = c_0 x_t + c_1 x_{t-1} + ... + c_{b-1} x_{t-b+1} plus independent Gaussian
    noise, where x_t is the sum of step t's cohort, each client's part is bounded by C, b <= `separation`, and the noise's std
    is at least z * C * |c| for the norm |c| = sqrt(c_0**2 + ... + c_{b-1}**2). (b = 1 is a plain noised sum. Rows and terms may
    be left out.) Then the run costs at most what `participations` Gaussian sums of noise multiplier z do, or fewer where the
    steps leave no room for so many. Given all earlier rows, the two sides of neighbours differ in the mean of the next row by
    c_i times one client's part at most, where i is the number of steps since that client last took part: the separation lets
    no two of its participations reach the same row. The squares of these differences over the std add up to at most
    participations / z**2 on every path, whatever the client sends and whoever takes part, also where either depends on earlier
    rows; so the whole tells at most as much as one Gaussian sum at z / sqrt(participations) (Smith and Thakurta 2022, "Fully
    adaptive composition for Gaussian differential privacy"), which is the composition that the event counts. For fixed
    participation this is the sensitivity of banded matrices (Choquette-Choo et al. 2023, "(Amplified) banded matrix
    factorization"), and its adaptivity that of lower triangular ones (Denisov et al. 2022, "Improved differential privacy for
    SGD via optimal private linear operators on adaptive streams").

    **Edge cases**

    | case | what happens |
    | --- | --- |
    | fewer than `cohort` places are left, or have come | all of them are the cohort; it may be empty |
    | noise that changes over the steps | counted as the least noise in all steps |
    | steps in the middle of a run | counted with the participations before them that still reach in |
    | more clients than the population | refused before anything is drawn |
    | steps lost in a crash, cohorts drawn from all places | they follow from a kept key, and count as done |
    | steps lost in a crash, cohorts drawn from who came | refused: who took part in them is unknown |
    | who comes, where the caller says so | taken to be the same for both neighbours: it is not hidden |

    Args:
        cohort: Clients of a step, at most.
        population: A public number that the clients cannot pass.
        separation: From one participation of a client to its next there are at least so many steps.
        participations: Of one client in the whole run, at most.

    Raises:
        InputError: a number is below 1.
        PlanError: there cannot be such cohorts in every step.
    """

    cohort: int
    population: int
    separation: int
    participations: int
    kind = "min-separation"
    by_step = False
    amplifies = False

    def __post_init__(self) -> None:
        for name in ("cohort", "population", "separation", "participations"):
            _checks.count(name, getattr(self, name))
        if self.cohort * self.separation > self.population:
            raise PlanError(
                f"{self.separation} steps with cohorts of {self.cohort} need {self.cohort * self.separation} different "
                f"clients, more than the population of {self.population}; use a smaller cohort or a smaller separation."
            )

    @property
    def rate(self) -> float:
        """cohort / population."""
        return self.cohort / self.population

    def event_of(self, noises: Sequence[float], first: int = 0) -> events.Event:
        """Return one client's participations that reach these steps, each a Gaussian sum with the least noise of them."""
        if not noises:
            return events.composed([])
        reached = len(noises) + min(first, self.separation - 1)
        return events.repeated(events.gaussian(min(noises)), self._most(reached))

    def _most(self, steps: int) -> int:
        """Return how often a client can take part in so many steps on end."""
        return min(self.participations, math.ceil(steps / self.separation))

    def check_steps(self, steps: int) -> None:
        """Refuse more steps than the clients may take part in.

        Raises:
            PlanError: their participations would not fill the cohorts.
        """
        if self.cohort * steps > self.population * self._most(steps):
            raise PlanError(
                f"{steps} steps with cohorts of {self.cohort} need {self.cohort * steps} participations, and {self.population} "
                f"clients have {self.population * self._most(steps)}; allow more participations, or use fewer steps or a "
                "smaller cohort."
            )

    def describe(self) -> dict[str, Any]:
        """Return kind, rate and counts."""
        counts = {
            "cohort": self.cohort,
            "population": self.population,
            "separation": self.separation,
            "participations": self.participations,
        }
        return super().describe() | counts

    def start(self, count: int, source: RandomSource, state: dict[str, Any] | None = None) -> SeparatedDraws:
        """Return draws that go on with the kept participations, if there are some.

        Raises:
            PlanError: there are more clients than the population.
        """
        if count > self.population:
            raise PlanError(
                f"There are more clients than the population of {self.population} that the plan declares; declare a public "
                "number that they cannot pass."
            )
        return SeparatedDraws(self, count, source, state or {})


@final
class SeparatedDraws(Draws):
    """The cohorts of one run, and when and how often each place has taken part. Made by `MinSeparation.start`.

    The cohorts of a run are drawn either from all places in every step, or from those who came in every step.
    """

    def __init__(self, sampler: MinSeparation, count: int, source: RandomSource, state: dict[str, Any]) -> None:
        self._sampler, self._count = sampler, count
        # As for shuffled orders: the draw of a step is a function of a kept key and of the participations before it.
        self._key: list[int] = state.get("key") or source.words(4).tolist()
        self._next: int = state.get("next", 0)
        self._mode: str = state.get("mode", "")
        size = sampler.population
        self._last = np.full(size, -sampler.separation - 1, dtype=np.int32)  # before any step that matters
        self._times = np.zeros(size, dtype=np.int32)
        self._cohort = torch.empty(0, dtype=torch.int64)
        if state:
            if any(len(state[name]) != size for name in ("last", "times")):
                raise InputError(f"The kept participations are not those of {size} places; restore the right ones.")
            self._last[:], self._times[:] = state["last"].numpy(), state["times"].numpy()
            self._cohort = torch.from_numpy(np.flatnonzero(self._last == self._next - 1))

    def batch(self, step: int, available: Tensor | None = None) -> Tensor:
        """Return the indices of the clients of step `step` (from 0), ascending, shape (any,), int64; it may be empty.

        The same step again is the same cohort: its clients have taken part, whatever became of the step.

        Args:
            step: No smaller than in the call before. Steps that are left out count as done.
            available: Indices of the clients that have come, shape (any,), int64; None draws from all places. See the
                guarantee of `MinSeparation` for what this does not hide.

        Raises:
            CheckpointError: steps were left out, and who took part in them cannot be known.
            InputError: an index is not that of a client, or the run draws now from who came and now from all places.
            SfumatoError: the step is over.
        """
        if step < max(0, self._next - 1):
            raise SfumatoError(f"The cohort of step {step + 1} was asked for after that of step {self._next}.")
        come = None if available is None else self._present(available)
        mode = _DRAWN if available is None else _CAME
        if self._mode not in ("", mode):
            raise InputError(
                "A run draws its cohorts either from all clients or from those who came, in all its steps; pass `available` "
                "in every step or in none."
            )
        if step > self._next and self._mode != _DRAWN:
            raise CheckpointError(
                f"Before step {step + 1}, {step - self._next} steps were lost, and who took part in them is not known, so no "
                "separation can be promised; start a new run, or draw the cohorts from all clients, which can be drawn again."
            )
        self._mode = mode
        while self._next <= step:
            self._cohort = self._drawn(self._next, come)
            self._next += 1
        return self._cohort[self._cohort < self._count]

    def _present(self, available: Tensor) -> np.ndarray[Any, np.dtype[np.bool_]]:
        """Return which places have come."""
        if available.dim() != 1 or available.dtype is not torch.int64:
            raise InputError("available must be the clients' indices, one dimension, int64.")
        if len(available) and not 0 <= int(available.min()) <= int(available.max()) < self._count:
            raise InputError(
                "available holds an index that no client has; pass indices from 0 to the number of clients."
            )
        come = np.zeros(self._sampler.population, dtype=np.bool_)
        come[available.cpu().numpy()] = True
        return come

    def _drawn(self, step: int, come: np.ndarray[Any, np.dtype[np.bool_]] | None) -> Tensor:
        """Draw the places of a step and write down that they took part."""
        sampler = self._sampler
        free = (self._last <= step - sampler.separation) & (self._times < sampler.participations)
        places = np.flatnonzero(free if come is None else free & come)
        chosen = places[_subset(len(places), sampler.cohort, keyed_source(self._key, step))]
        self._last[chosen] = step
        self._times[chosen] += 1
        return torch.from_numpy(chosen)

    def state(self) -> dict[str, Any]:
        """Return the key, the next step, and when and how often each place took part."""
        return {
            "key": self._key,
            "next": self._next,
            "mode": self._mode,
            "last": torch.from_numpy(self._last.copy()),
            "times": torch.from_numpy(self._times.copy()),
        }


def _subset(count: int, size: int, source: RandomSource) -> np.ndarray[Any, np.dtype[np.int64]]:
    """Return a uniformly random set of `size` numbers below `count`, or all of them, ascending."""
    if size >= count:
        return np.arange(count)
    if 4 * size >= count:
        return np.sort(source.permutation(count)[:size].numpy())
    found = np.empty(0, dtype=np.int64)
    while len(found) < size:
        # The first `size` different ones of a row of uniform numbers are such a set. 63 random bits modulo `count`: a
        # number's chance is off by less than 2**-63.
        more = source.words(2 * size).numpy() & (2**63 - 1)
        row = np.concatenate([found, more % count])
        _, places = np.unique(row, return_index=True)
        found = row[np.sort(places)[:size]]
    return np.sort(found)
