"""Truncated Poisson sampling: batches that never pass a size, for compiled kernels and a bounded memory."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, final

from scipy import special
from torch import Tensor

from sfumato import _checks
from sfumato.data.sampling import Draws, Sampler, in_runs
from sfumato.errors import PlanError
from sfumato.privacy import events
from sfumato.privacy.randomness import RandomSource

_RAREST = 1e-250  # times the smallest probabilities of a privacy loss distribution, still a normal float


@final
@dataclass(frozen=True)
class TruncatedPoisson(Sampler):
    """A Poisson draw of which at most `max_batch` records are kept, uniformly chosen.

    The draw is one of *places*: there are `population` of them, each joins a step independently with probability
    `sampling_rate`, and of more than `max_batch` joined places a uniformly random subset of that size is kept. The records lie
    in the first places; the others stay empty and add nothing to a batch. So the places that are drawn do not depend on the
    number of records, which is private.

    Leave room: a max_batch four standard deviations above the mean, at mean + 4 sqrt(mean), costs next to nothing; one at the
    mean costs several times the epsilon.

    **Guarantee**: each step costs at most `TruncatedSubsampledGaussianDpEvent` with `dataset_size=population`, for two
    neighbours under add-or-remove-one that both hold at most `population` records. Given how many other places joined, either
    fewer than `max_batch` did, and the step is a Poisson-sampled sum at the stated rate; or the record is kept, in the stead of
    another place, with the chance r that the event computes. Then the two sides are (1-r)A + rB and (1-r)A + rC: A is the
    noised sum with the other place, B that with the record, C that with the record's place left empty. In clip norms, the
    means of A and B are at most 2 apart, and that of C is at most 1 from both. The event counts (1-r)N(0) + rN(2) against
    (1-r)N(0) + rN(-2), which dominates: by advanced joint convexity (Balle, Barthe and Gaboardi 2018, theorem 2) the divergence
    of the two sides is r times that of B from a mixture of A and C, or of C from one of A and B, so at most r times that of
    N(2) from N(0); and that of N(2) from a mixture of N(0) and N(-2) is no smaller. The event itself, for data that fill the
    population exactly, is from "Tighter privacy analysis for truncated Poisson sampling" (arXiv 2508.15089).

    **Edge cases**

    | case | what happens |
    | --- | --- |
    | fewer records than the population | the places stay empty; the guarantee is the same, and the number stays private |
    | more records than the population | refused before anything is drawn; the refusal tells this one fact and no number |
    | max_batch of at least the population | plain Poisson sampling, and its cost |
    | max_batch that is passed with a chance above 0 and below 1e-250 | refused: the accountant cannot divide by it |
    | a batch without records | a batch: its step releases noise alone |

    Args:
        sampling_rate: In (0, 1].
        max_batch: Records of a batch, at most.
        population: A public number that the records cannot pass.

    Raises:
        InputError: the rate is not in (0, 1], or a size is below 1.
        PlanError: the batch can never be full, to the precision of a float.
    """

    sampling_rate: float
    max_batch: int
    population: int
    kind = "truncated-poisson"

    def __post_init__(self) -> None:
        _checks.fraction("sampling_rate", self.sampling_rate, allow_one=True)
        _checks.count("max_batch", self.max_batch)
        _checks.count("population", self.population)
        if 0 < _more(self.max_batch - 1, self.population - 1, self.sampling_rate) < _RAREST:
            raise PlanError(
                f"A max_batch of {self.max_batch} is never full at a sampling rate of {self.sampling_rate:g} of "
                f'{self.population}; choose a smaller one, or plain "poisson" sampling.'
            )

    @property
    def rate(self) -> float:
        """The probability with which a place joins a step and is kept."""
        return _kept(self.sampling_rate, self.max_batch, self.population)

    def event_of(self, noises: Sequence[float], first: int = 0) -> events.Event:
        """Return truncated Poisson-sampled Gaussian sums."""
        draw = (self.sampling_rate, self.max_batch, self.population)
        return in_runs(noises, lambda noise: events.truncated_poisson_sampled(*draw, noise))

    def describe(self) -> dict[str, Any]:
        """Return kind, rates and sizes."""
        sizes = {"sampling_rate": self.sampling_rate, "max_batch": self.max_batch, "population": self.population}
        return super().describe() | sizes

    def start(self, count: int, source: RandomSource, state: dict[str, Any] | None = None) -> Draws:
        """Return independent draws; there is no position to keep.

        Raises:
            PlanError: there are more records than the population.
        """
        if count > self.population:
            raise PlanError(
                f"There are more records than the population of {self.population} that the plan declares; declare a public "
                "number that they cannot pass."
            )
        return _TruncatedDraws(self, count, source)


@final
class _TruncatedDraws(Draws):
    def __init__(self, sampler: TruncatedPoisson, count: int, source: RandomSource) -> None:
        self._sampler, self._count, self._source = sampler, count, source

    def batch(self, step: int) -> Tensor:
        places = self._source.chosen(self._sampler.population, self._sampler.sampling_rate)
        if len(places) > self._sampler.max_batch:
            places = places[self._source.permutation(len(places))[: self._sampler.max_batch]].sort().values
        return places[places < self._count]


@functools.lru_cache(maxsize=256)
def _kept(rate: float, most: int, population: int) -> float:
    """Return E[min(K, most)] / population for a binomial number K of places that join."""
    whole = rate * (1 - _more(most - 1, population - 1, rate))  # sum of k P(K = k) up to `most`
    return whole + most * _more(most, population, rate) / population


def _more(count: int, places: int, rate: float) -> float:
    """Return the probability that more than `count` of `places` join."""
    return float(special.bdtrc(count, places, rate)) if count < places else 0.0
