"""How much noise a budget needs: the smallest noise multiplier found whose proven epsilon is within the budget."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from dp_accounting import rdp

from sfumato.errors import PlanError
from sfumato.privacy import accounting, composition, events
from sfumato.privacy.budget import Budget

_LARGEST = 1e6
_SMALLEST = 1e-3
_EPSILONS = (1e-2, 100.0)
_SMALLEST_EPSILON = 1e-9
_SEARCH_INTERVAL = 1e-3
_COARSE, _CLOSE = 0.99, 0.9998  # how much of the budget is used up
_RENYI = 1.2
_WIDTH = 0.06  # of the groups of nearly equal steps in a coarse look
_SLOPE = -1.3  # of log epsilon over log noise, until two points tell
_FLATTEST, _FAR, _SAME, _TRIES = 0.05, 0.7, 1e-7, 40


@dataclass(frozen=True)
class Calibration:
    """A noise multiplier and what it costs; `spending.epsilon` never exceeds the budget's epsilon."""

    noise_multiplier: float
    spending: accounting.Spending


def calibrate(event_of: Callable[[float], events.Event], budget: Budget) -> Calibration:
    """Return the noise multiplier for which `event_of(noise_multiplier)` just fits `budget`.

    The Renyi answer comes first, because it is quick and errs on the private side. From there the PLD bound is followed down,
    on a coarse grid and then with the very figure that will be claimed, and the private end of the last bracket is returned.

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

    def claim(noise_multiplier: float) -> float:
        return accounting.spending(event_of(noise_multiplier), budget.delta, budget.relation).epsilon

    def coarse(noise_multiplier: float) -> float:
        event = composition.grouped(event_of(noise_multiplier), _WIDTH)
        return accounting.pld_epsilon(event, budget.delta, _SEARCH_INTERVAL)

    # A coarse look errs on the private side, so what it finds is a good place to start from.
    private = _renyi_answer(event_of, budget)
    start, slope = _meet(coarse, budget, private, _COARSE, _SLOPE)
    found, _ = _meet(claim, budget, start, _CLOSE, slope)
    return Calibration(found, accounting.spending(event_of(found), budget.delta, budget.relation))


def _meet(
    epsilon_of: Callable[[float], float], budget: Budget, start: float, close: float, slope: float
) -> tuple[float, float]:  # fmt: skip
    """Return a noise multiplier whose epsilon is within the budget, and above `close` times it where that can be had.

    And the slope of log epsilon over log noise there, of which the argument is a guess.

    Secants in the logarithms of both, inside a bracket whose upper end always keeps the budget.
    """
    aim = math.log(budget.epsilon) + math.log(close) / 2
    lower: tuple[float, float] | None = None  # too little noise
    upper: tuple[float, float] | None = None  # enough
    last: tuple[float, float] | None = None
    noise = start
    for _ in range(_TRIES):
        epsilon = epsilon_of(noise)
        point = (math.log(noise), math.log(max(epsilon, _SMALLEST_EPSILON)))
        if last and abs(point[0] - last[0]) > _SAME:
            slope = min(-_FLATTEST, (point[1] - last[1]) / (point[0] - last[0]))
        last = point
        if epsilon <= budget.epsilon:
            upper = point if upper is None else min(upper, point)
            if epsilon >= close * budget.epsilon:
                return noise, slope
        else:
            lower = point if lower is None else max(lower, point)
        if lower and upper and upper[0] - lower[0] < _SAME:
            break
        place = point[0] + max(-_FAR, min(_FAR, (aim - point[1]) / slope))
        if lower and upper and not lower[0] < place < upper[0]:
            place = (lower[0] + upper[0]) / 2
        noise = math.exp(place)
        if noise < _SMALLEST:
            raise PlanError(
                f"A noise multiplier below {_SMALLEST:g} would keep {budget}: such a budget protects nobody; "
                "choose a smaller epsilon."
            )
        if noise > _LARGEST:
            break
    if upper is None:
        raise PlanError(f"No noise multiplier up to {_LARGEST:g} keeps {budget}; use fewer steps or a larger budget.")
    return math.exp(upper[0]), slope


def _renyi_answer(event_of: Callable[[float], events.Event], budget: Budget) -> float:
    """Return a noise multiplier whose Renyi epsilon is at most the budget's, within 20 % of the least such."""
    lower, upper = _SMALLEST, _LARGEST
    noise = 1.0
    while upper / lower > _RENYI:
        event = events.for_renyi(composition.grouped(event_of(noise)))
        epsilon = accounting.epsilon_of(rdp.RdpAccountant(accounting.QUICK_ORDERS), event, budget.delta)
        lower, upper = (lower, noise) if epsilon <= budget.epsilon else (noise, upper)
        # By factors of 4 until there is a bracket of them, then by halves of it.
        noise = lower * 4 if upper == _LARGEST else upper / 4 if lower == _SMALLEST else math.sqrt(lower * upper)
        noise = min(_LARGEST, max(_SMALLEST, noise))
    return upper
