"""One trial of a search: what it may spend, how that is found, and whether it was what it spent."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar, final

import dp_accounting

from sfumato.errors import InputError, PlanError
from sfumato.learning.plan import Plan
from sfumato.privacy import calibration, events
from sfumato.privacy.budget import Budget
from sfumato.privacy.ledger import Ledger
from sfumato.privacy.selection import Repetitions

R = TypeVar("R")
_CLOSE = 0.998  # of the budget is used up
_TRIES = 8
_FAR, _HALVES = 1000.0, 15  # one trial costs no less than this part of the whole; what is found is within 0.02 %


@final
@dataclass(frozen=True)
class Trial:
    """What one trial may spend; the same for every configuration.

    Attributes:
        plan: To train with. What it does not fix may be tuned: learning rate, model, and with `dataclasses.replace` the clip.
        scoring: To evaluate with; infinite where scores are not paid for, because they need no private record.
        ledger: To charge both to. It holds just enough for one training and one evaluation and is forgotten afterwards.
        dataset: The data set's name in that ledger.
    """

    plan: Plan
    scoring: Budget
    ledger: Ledger
    dataset: str


@final
@dataclass(frozen=True)
class Price:
    """What one trial may do: a training on `plan`, then the evaluation that `scoring` pays for."""

    plan: Plan
    scoring: Budget
    parts: tuple[events.Event, ...]
    cap: Budget | None

    @property
    def event(self) -> events.Event:
        """What one trial costs."""
        return events.composed(self.parts)


def _at(epsilon: float, plan: Callable[[Budget], Plan], budget: Budget, share: float) -> Price:
    """Return the trial whose parts have `epsilon` between them."""
    training = dataclasses.replace(budget, epsilon=epsilon * (1 - share) if share else epsilon)
    planned = plan(training)
    if not isinstance(planned, Plan) or planned.budget != training:
        raise PlanError(
            f"plan must return a Plan with the budget that it is called with ({training}), not {planned!r}."
        )
    if isinstance(planned.event, events.RenyiFilterDpEvent):
        raise PlanError(
            "With sampled batches, a policy that looks at released results is paid for at one Renyi order, and a search needs "
            "several; use full batches, or a schedule, or a policy that looks at public things only."
        )
    unpaid = dataclasses.replace(budget, epsilon=math.inf)
    if not budget.is_private:
        return Price(planned, unpaid, (), None)
    parts, epsilons, deltas, scored = [planned.event], planned.spending.epsilon, budget.delta, unpaid
    if share:
        scored = dataclasses.replace(budget, epsilon=epsilon * share)
        found = calibration.calibrate(events.gaussian, scored)
        parts.append(events.gaussian(found.noise_multiplier))
        # The ledger's sums are exact, so that a sum rounded down would refuse the second charge.
        epsilons = math.nextafter(epsilons + found.spending.epsilon, math.inf)
        deltas = math.nextafter(2 * budget.delta, math.inf)
    return Price(planned, scored, tuple(parts), dataclasses.replace(budget, epsilon=epsilons, delta=deltas))


def calibrated(plan: Callable[[Budget], Plan], budget: Budget, trials: Repetitions, share: float) -> Price:
    """Return the trial with the least noise found for which the whole search keeps the budget.

    A trial of two Gaussian sums with the same epsilons costs nearly as much as the real one and is quick to price, so it
    tells where to look: what remains is the factor between the two, which is taken from the trial that was looked at last.

    Raises:
        PlanError: There is none, or `plan` makes no plan that a search can be paid with.
    """
    if not budget.is_private:
        return _at(math.inf, plan, budget, share)
    found: Price | None = None
    most, factor = 0.0, 1.0
    for _ in range(_TRIES):
        epsilon = _guess(budget.epsilon * (1 + _CLOSE) / 2 / factor, budget.delta, trials, share)
        try:
            price = _at(epsilon, plan, budget, share)
        except PlanError as error:
            raise PlanError(
                f"One trial of a search within {budget} would get epsilon {epsilon:.3g} ({share:.0%} of it for its score), "
                f"and that does not work: {error} Or use fewer trials or a larger budget."
            ) from error
        total = trials.renyi(price.event, budget.delta)
        if most < total <= budget.epsilon:
            found, most = price, total
            if total >= _CLOSE * budget.epsilon:
                break
        factor = total / _gaussian_total(epsilon, budget.delta, trials, share)
    if found is None:
        raise PlanError(f"No noise of the trials keeps {budget}; use fewer trials or a larger budget.")
    return found


def _guess(aim: float, delta: float, trials: Repetitions, share: float) -> float:
    """Return the epsilon of a trial of Gaussian sums for which the search costs `aim`, by bisection of its logarithm."""
    lower, upper = aim / _FAR, aim
    for _ in range(_HALVES):
        middle = math.sqrt(lower * upper)
        keeps = _gaussian_total(middle, delta, trials, share) <= aim
        lower, upper = (middle, upper) if keeps else (lower, middle)
    return lower


def _gaussian_total(epsilon: float, delta: float, trials: Repetitions, share: float) -> float:
    epsilons = [part * epsilon for part in (1 - share, share) if part]
    sums = [events.gaussian(dp_accounting.get_sigma_gaussian(part, delta)) for part in epsilons]
    return trials.renyi(events.composed(sums), delta)


def tried(
    trial: Callable[[Any, Trial], tuple[float, R]], config: Any, price: Price, dataset: str
) -> tuple[float, R]:  # fmt: skip
    """Run one trial on a ledger of its own and return its score and result, if it charged just what was paid for.

    Raises:
        PlanError: It charged anything else, or nothing.
        InputError: It does not return (score, result).
    """
    with Ledger.in_memory() as ledger:
        if price.cap is not None:
            ledger.grant(dataset, price.cap)
        returned = trial(config, Trial(price.plan, price.scoring, ledger, dataset))
        charged = sorted(entry.event for entry in ledger.history() if entry.kind == "charge")
    if charged != sorted(events.to_json(part) for part in price.parts):
        raise PlanError(
            f"A trial charged {len(charged)} things to its ledger that are not the {len(price.parts)} that were paid for. Fix: "
            "pass ledger=one.ledger to one training with one.plan and, if scoring is above 0, to one sf.evaluate with "
            "one.scoring."
        )
    if not isinstance(returned, tuple) or len(returned) != 2:
        raise InputError(f"A trial must return (score, result), not a {type(returned).__name__}.")
    try:
        score = float(returned[0])
    except (TypeError, ValueError):
        raise InputError(
            f"The score of a trial must be a number, not a {type(returned[0]).__name__}; return for example accuracy.value."
        ) from None
    return (-math.inf if math.isnan(score) else score), returned[1]
