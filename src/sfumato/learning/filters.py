"""The filter under a run that chooses its noise as it goes: it lets no step start that could pass the cap.

**Guarantee**: whatever a policy answers, and whatever it looked at before it did, the steps that the filter lets through are
together what `event` says. Two theorems, each for one currency that is fixed before the first step:

- `order` None, for steps without sampling: each costs 1 / noise**2, and while the sum is at most mu**2 the run is mu-Gaussian
  differentially private, as one Gaussian sum at noise 1 / mu (Smith and Thakurta 2022, "Fully adaptive composition for Gaussian
  differential privacy"; Koskela, Tobaben and Honkela 2023, "Individual privacy accounting with Gaussian differential privacy").
- `order` a, for steps that are sampled: each costs its Renyi divergence at a; see `privacy.renyi` for the theorem and its
  conditions. It costs more than a privacy loss distribution would: that is the price of looking.
"""

from __future__ import annotations

import bisect
import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import final

from sfumato.data.sampling import FullBatch, Poisson, Sampler
from sfumato.errors import PlanError
from sfumato.learning.policies import Outlook, PublicPolicy, ReleasedPolicy, Signal
from sfumato.privacy import events, renyi
from sfumato.privacy.budget import Budget, Relation
from sfumato.privacy.calibration import calibrate
from sfumato.privacy.mechanisms import LARGEST_MULTIPLIER

_FINEST = 1.005  # between neighbouring noise multipliers that a run uses, so that few costs have to be worked out
_WIDEST = 64.0  # how far from the even noise they reach, either way
_USEFUL = 1.5  # times the noise that a policy asked for: a step with more would rather undo what was learnt
_ORDERS = (*range(2, 33), *range(36, 65, 4), 80, 96, 128, 192, 256)


@final
@dataclass(frozen=True)
class Filter:
    """A currency and a cap in it.

    Args:
        sampler: Of the steps: full batches or Poisson.
        order: Of the Renyi divergence; None for Gaussian privacy, without sampling.
        cap: What all steps together may cost.
    """

    sampler: Sampler
    order: int | None
    cap: float

    def __post_init__(self) -> None:
        if isinstance(self.sampler, Poisson) and self.sampler.factors:
            raise PlanError(
                "A policy that looks at released results needs one sampling rate for all steps; leave rates out, or "
                "use a schedule of noise."
            )

    @classmethod
    def of(cls, budget: Budget, sampler: Sampler, steps: int, order: int | None = None) -> Filter:
        """Return the filter for a budget, in the currency that lets `steps` equal steps have the least noise.

        Args:
            budget: Private.
            sampler: Of the steps.
            steps: Planned.
            order: A Renyi order to use in any case, for example that of the ledger's account.

        Raises:
            PlanError: the sampler is of a kind whose single steps have no cost of their own, or not the same one, or
                samples under another relation than add-or-remove-one.
        """
        if order is None and isinstance(sampler, FullBatch):
            one = calibrate(events.gaussian, budget).noise_multiplier
            return cls(sampler, None, one**-2)
        if not isinstance(sampler, Poisson | FullBatch):
            raise PlanError(
                f'A policy that looks at released results needs "poisson" or "full-batch" sampling, not "{sampler.kind}".'
            )
        if isinstance(sampler, Poisson) and budget.relation is not Relation.ADD_OR_REMOVE_ONE:
            raise PlanError(
                "Sampled steps under a filter are only accounted for add-or-remove-one; use that relation, or full batches."
            )
        if order is not None:
            return cls(sampler, order, renyi.cap(order, budget.epsilon, budget.delta))
        filters = [cls(sampler, a, renyi.cap(a, budget.epsilon, budget.delta)) for a in _affordable(budget)]
        return min(filters, key=lambda one: one.even_for(one.cap / steps))

    @property
    def event(self) -> events.Event:
        """What everything that passes the filter costs together."""
        return self.event_of(self.cap)

    def event_of(self, spent: float) -> events.Event:
        """Return what steps cost whose costs add up to `spent`."""
        if self.order is not None:
            return events.RenyiFilterDpEvent(self.order, spent)
        return events.gaussian(math.nextafter(spent**-0.5, 0.0)) if spent > 0 else events.composed([])

    def cost(self, noise: float) -> float:
        """Return what a step with this noise multiplier costs."""
        if self.order is None:
            return math.nextafter(noise**-2, math.inf)
        return renyi.cost(self.sampler.event(noise, 1), self.order)

    def even_for(self, cost: float) -> float:
        """Return the least noise multiplier of a step that costs at most `cost`, within 0.1 %; infinite if none is known."""
        return _least(self.cost, cost)


@final
class Purse:
    """What is left of a filter's cap during one run.

    Args:
        filter: The currency and the cap.
        steps: Planned.
    """

    def __init__(self, filter: Filter, steps: int) -> None:
        self._filter, self._steps = filter, steps
        self.spent = 0.0
        even = filter.even_for(filter.cap / steps)
        reach = round(math.log(_WIDEST) / math.log(_FINEST))
        self._first = even
        self._noises = [even * _FINEST**k for k in range(-reach, reach + 1)]
        self._cost = functools.cache(lambda place: filter.cost(self._noises[place]))

    def outlook(self, step: int) -> Outlook:
        """Return what is public before step `step` (from 0)."""
        left = max(0.0, self._filter.cap - self.spent)
        even = self._affordable(left / max(1, self._steps - step))
        return Outlook(
            step, self._steps, left / self._filter.cap, self._noises[-1] if even is None else even, self._first
        )

    def pay(self, proposed: float) -> float | None:
        """Take a step's cost out; return the noise multiplier that it must have, or None if nothing is left for a step.

        It is the proposed one, or the next that the filter knows above it, or the least that is affordable. Where that is more
        than 1.5 times the proposed one, the run is over.
        """
        _check_answer(proposed)
        affordable = self._affordable(self._filter.cap - self.spent)
        if affordable is None or affordable > _USEFUL * max(proposed, self._noises[0]):
            return None
        place = bisect.bisect_left(self._noises, max(proposed, affordable))
        place = min(place, len(self._noises) - 1)
        # Rounded up, so that many additions cannot fall behind the sum.
        spent = math.nextafter(self.spent + self._cost(place), math.inf)
        if spent > self._filter.cap:
            return None
        self.spent = spent
        return self._noises[place]

    def _affordable(self, cost: float) -> float | None:
        """Return the least known noise multiplier of a step that costs at most `cost`."""
        places = range(len(self._noises))
        place = bisect.bisect_left(places, -cost, key=lambda known: -self._cost(known))
        return self._noises[place] if place < len(self._noises) else None


def rollout(policy: PublicPolicy, filter: Filter, steps: int) -> tuple[float, ...]:
    """Return what a policy that looks at public things only answers in each of `steps` steps.

    Raises:
        PlanError: it answers with what is no noise multiplier.
    """
    purse = Purse(filter, steps)
    answers = []
    for step in range(steps):
        wanted = policy.noise(purse.outlook(step))
        purse.pay(wanted)  # where nothing is left, the plan's own scaling makes room
        answers.append(float(wanted))
    return tuple(answers)


def ask(policy: ReleasedPolicy, purse: Purse, step: int, seen: Sequence[Signal]) -> float | None:
    """Return the noise multiplier of step `step`, paid for, or None if the run ends here."""
    now = purse.outlook(step)
    wanted = policy.noise(now, seen)
    noise = None if wanted is None else purse.pay(wanted)
    if noise is None and wanted is not None and step == 0:
        raise PlanError(
            f"The policy asked for the noise multiplier {wanted:.4g} in the first step, and the budget does not reach for "
            f"a single step of it. Answer with about now.even, which is {now.even:.4g}."
        )
    return noise


def _check_answer(answer: object) -> None:
    number = isinstance(answer, int | float) and not isinstance(answer, bool)
    if not number or not 1e-9 <= float(answer) <= LARGEST_MULTIPLIER:  # type: ignore[arg-type]
        raise PlanError(
            f"The policy answered with the noise multiplier {answer!r}; it must be a number above 0 and at most "
            f"{LARGEST_MULTIPLIER:g}, and usually lies near now.even."
        )


def _affordable(budget: Budget) -> list[int]:
    """Return the orders at which the budget allows anything at all."""
    return [a for a in _ORDERS if renyi.epsilon(a, 1e-9, budget.delta) < budget.epsilon]


def _least(cost_of: Callable[[float], float], most: float) -> float:
    low, high = 1e-2, 1e6
    if cost_of(high) > most:
        return math.inf
    while high / low > 1.001:
        middle = math.sqrt(low * high)
        low, high = (low, middle) if cost_of(middle) <= most else (middle, high)
    return high
