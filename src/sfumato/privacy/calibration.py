"""How much noise a budget needs: the smallest noise multiplier found whose proven epsilon is within the budget."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import dp_accounting
from dp_accounting import pld, rdp

from sfumato.errors import PlanError
from sfumato.privacy import accounting, events
from sfumato.privacy.budget import Budget

_RELATIVE_TOLERANCE = 1e-5
_LARGEST = 1e6
_EPSILONS = (1e-2, 100.0)
_SMALLEST = 1e-3
_SEARCH_INTERVALS = (1e-3, 1e-4)
_CLOSE = 0.999


@dataclass(frozen=True)
class Calibration:
    """A noise multiplier and what it costs; `spending.epsilon` never exceeds the budget's epsilon."""

    noise_multiplier: float
    spending: accounting.Spending


def calibrate(event_of: Callable[[float], events.Event], budget: Budget) -> Calibration:
    """Return the noise multiplier for which `event_of(noise_multiplier)` just fits `budget`.

    The Renyi answer comes first, because it is quick and errs on the private side: it closes the bracket from
    above. The PLD search then works inside the bracket and returns the private end of it.

    Args:
        event_of: Maps a noise multiplier (noise std over sensitivity, > 0) to the event of the whole run.
        budget: A finite budget.

    Raises:
        PlanError: no noise multiplier between 1e-3 and 1e6 fits the budget, or the least of them already does.
    """
    if not budget.is_private:
        raise PlanError("An infinite epsilon needs no noise; there is nothing to calibrate.")
    if not _EPSILONS[0] <= budget.epsilon <= _EPSILONS[1]:
        raise PlanError(
            f"epsilon {budget.epsilon:g} is outside [{_EPSILONS[0]:g}, {_EPSILONS[1]:g}]: below, the accountants resolve "
            "nothing; above, nobody is protected. Choose one inside, or an infinite epsilon for plain training."
        )

    upper = _renyi_answer(event_of, budget)
    best = Calibration(upper, accounting.spending(event_of(upper), budget.delta, budget.relation))
    for interval in _SEARCH_INTERVALS:
        # A coarse grid errs on the private side; the next one is tried only if too much of the budget is left.
        found = _search(event_of, budget, upper, interval)
        spending = accounting.spending(event_of(found), budget.delta, budget.relation)
        if spending.epsilon <= budget.epsilon:
            best = min(best, Calibration(found, spending), key=lambda one: one.noise_multiplier)
        if _CLOSE * budget.epsilon <= best.spending.epsilon <= budget.epsilon:
            break
    if best.spending.epsilon > budget.epsilon:
        raise PlanError(f"No noise multiplier up to {_LARGEST:g} keeps {budget}; use fewer steps or a larger budget.")
    return best


def _search(event_of: Callable[[float], events.Event], budget: Budget, upper: float, interval: float) -> float:
    """Return the least noise multiplier that keeps the budget by a PLD on a grid of this spacing."""

    def accountant() -> pld.PLDAccountant:
        return pld.PLDAccountant(value_discretization_interval=interval)

    def keeps(noise_multiplier: float) -> bool:
        return accounting.epsilon_of(accountant(), event_of(noise_multiplier), budget.delta) <= budget.epsilon

    if not keeps(upper):
        return upper
    lower = upper * 0.8
    while keeps(lower):
        if lower < _SMALLEST:
            raise PlanError(
                f"A noise multiplier below {_SMALLEST:g} would keep {budget}: such a budget protects nobody; "
                "choose a smaller epsilon."
            )
        upper, lower = lower, lower / 2
    bracket = dp_accounting.ExplicitBracketInterval(lower, upper)
    tolerance = _RELATIVE_TOLERANCE * upper
    return float(
        dp_accounting.calibrate_dp_mechanism(accountant, event_of, budget.epsilon, budget.delta, bracket, tol=tolerance)
    )


def _renyi_answer(event_of: Callable[[float], events.Event], budget: Budget) -> float:
    """Return a noise multiplier whose Renyi epsilon is at most the budget's, within 2 % of the least such."""
    lower, upper = _SMALLEST, _LARGEST
    while upper / lower > 1.02:
        middle = (lower * upper) ** 0.5
        epsilon = accounting.epsilon_of(rdp.RdpAccountant(), event_of(middle), budget.delta)
        lower, upper = (lower, middle) if epsilon <= budget.epsilon else (middle, upper)
    return upper
