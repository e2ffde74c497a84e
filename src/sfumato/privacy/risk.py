"""How much noise a limit on attacks needs, in place of an epsilon.

To calibrate noise to the risk itself takes less of it than to reach the same risk by way of one pair of epsilon and delta
(Kulynych, Gomez, Kaissis, Calmon and Troncoso 2024, "Attack-aware noise calibration for differential privacy").
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from statistics import NormalDist
from typing import final

from dp_accounting import rdp

from sfumato import _checks
from sfumato.errors import InputError, PlanError
from sfumato.privacy import accounting, composition, events
from sfumato.privacy.budget import Budget, Relation, Unit
from sfumato.privacy.tradeoff import COARSE, FINE, TradeOff, trade_off

_SMALLEST, _LARGEST = 1e-3, 1e6
_CLOSE = 0.999  # of the risk is used up
_SAME = 3e-4  # relative, of two noise multipliers
_FAR, _TRIES = 1.5, 60
_NORMAL = NormalDist()
_SHIFTS = (1e-9, 16.0)
_ORDERS = [2, 3, 4, 6, 8, 12, 16, 24, 32, 64]
_QUICK_DELTA = 1e-6
_LARGE, _WEAK = 50.0, 100.0  # epsilons


@final
@dataclass(frozen=True)
class RiskCalibration:
    """A noise multiplier, the event of the run with it, and the errors that any attack on that run must make."""

    noise_multiplier: float
    event: events.Event
    trade_off: TradeOff

    def budget(self, delta: float, unit: Unit = Unit.RECORD, relation: Relation = Relation.ADD_OR_REMOVE_ONE) -> Budget:
        """Return the budget that the run spends at `delta`. The same run planned within it has no less noise.

        Raises:
            AccountingError: no epsilon can be proven at this delta, or the event is sampled and the relation replace-one.
            InputError: delta is outside (0, 1), or the unit or the relation is unknown.
        """
        plain = Budget(math.inf, delta, unit, relation)
        return replace(plain, epsilon=accounting.spending(self.event, delta, plain.relation).epsilon)


@dataclass(frozen=True)
class _Risk:
    """A risk of a trade-off, its limit, and the shift of the unit Gaussian that has a given risk.

    That shift is about inverse to the noise, so a search that looks at it needs few steps.
    """

    of: Callable[[TradeOff], float]
    limit: float
    shift: Callable[[float], float]


def calibrate_to_risk(
    event_of: Callable[[float], events.Event], *, advantage: float | None = None,
    true_positive_rate: float | None = None, false_positive_rate: float | None = None,
) -> RiskCalibration:  # fmt: skip
    """Return the least noise found with which no attack passes a risk: an advantage, or a true at a false positive rate.

    **Guarantee**: the bound that `trade_off` proves for the event of the answer is at most the risk asked for. The relation is
    that of `trade_off`.

    **Edge cases**

    | asked for | answer |
    | --- | --- |
    | a true positive rate not above the false one | refused: a coin has that |
    | a risk that is not reached before epsilon at delta 1e-6 passes about 100 | more noise than it needs |
    | a risk that no noise or all noise keeps to | refused |

    Args:
        event_of: Maps a noise multiplier (noise std over sensitivity, > 0) to the event of the whole run.
        advantage: The largest allowed difference of true and false positive rate, in (0, 1).
        true_positive_rate: The largest allowed one at `false_positive_rate`, above that and below 1.
        false_positive_rate: In (0, 1).

    Raises:
        InputError: not exactly one risk is given, or a rate is out of range.
        PlanError: no noise multiplier up to 1e6 is found to keep to the risk, or 1e-3 does already.
        AccountingError: no bound is known for a part of the event.
    """
    risk = _risk(advantage, true_positive_rate, false_positive_rate)
    start = 1.0 / risk.shift(risk.limit)
    found = _meet(event_of, risk, start, COARSE)
    if found is None:
        raise PlanError(
            f"No noise multiplier up to {_LARGEST:g} keeps to this risk; choose a larger risk, or fewer steps."
        )
    # The coarse grid errs on the private side. With large losses it is fine enough, and the fine one would be slow.
    if _quick_epsilon(found.event) > _LARGE:
        return found
    return _meet(event_of, risk, found.noise_multiplier, FINE) or found


def _meet(
    event_of: Callable[[float], events.Event], risk: _Risk, start: float, interval: float
) -> RiskCalibration | None:
    """Return an answer that keeps the risk and, where it can, uses up nearly all of it; None if there is none.

    Secants in the logarithms of noise and shift, inside a bracket whose upper end always keeps the risk.
    """
    aim = risk.shift(risk.limit)
    lower: tuple[float, float] | None = None  # too little noise
    upper: tuple[float, float] | None = None  # enough
    kept: RiskCalibration | None = None
    noise, slope = start, -1.0
    for _ in range(_TRIES):
        event = event_of(noise)
        # What is less private than this is taken to promise nothing: its losses would not fit in memory.
        curve = trade_off(event, interval) if _quick_epsilon(event) <= _WEAK else TradeOff((), ())
        reached = risk.of(curve)
        point = math.log(noise), math.log(risk.shift(reached))
        if reached <= risk.limit:
            upper, kept = point, RiskCalibration(noise, event, curve)
            if risk.shift(reached) >= _CLOSE * aim:
                break
        else:
            lower = point
        if lower and upper:
            if upper[0] - lower[0] < _SAME:
                break
            slope = min(-_SAME, (upper[1] - lower[1]) / (upper[0] - lower[0]))
        wanted = math.log(aim * (1 + _CLOSE) / 2)
        place = point[0] + max(-_FAR, min(_FAR, (wanted - point[1]) / slope))
        if lower and upper and not lower[0] < place < upper[0]:
            place = (lower[0] + upper[0]) / 2
        noise = math.exp(place)
        if noise < _SMALLEST:
            raise PlanError(f"Even a noise multiplier of {_SMALLEST:g} keeps to this risk; choose a smaller risk.")
        if noise > _LARGEST:
            break
    return kept


def _risk(advantage: float | None, true_positive_rate: float | None, false_positive_rate: float | None) -> _Risk:
    if advantage is not None and true_positive_rate is None and false_positive_rate is None:
        limit = _checks.fraction("advantage", advantage)
        # A unit Gaussian shifted by m gives the advantage 2 Phi(m / 2) - 1.
        return _Risk(lambda curve: curve.advantage, limit, lambda reached: _shift((1 + reached) / 2, 0.5, 2.0))
    if advantage is None and true_positive_rate is not None and false_positive_rate is not None:
        rate = _checks.fraction("false_positive_rate", false_positive_rate)
        limit = _checks.fraction("true_positive_rate", true_positive_rate)
        if not limit > rate:
            raise InputError(
                f"true_positive_rate {limit:g} must be above false_positive_rate {rate:g}, which a coin reaches; "
                "choose a larger one."
            )
        return _Risk(lambda curve: curve.true_positive_rate(rate), limit, lambda reached: _shift(reached, rate, 1.0))
    raise InputError("Give either an advantage, or a true_positive_rate together with a false_positive_rate.")


def _shift(high: float, low: float, times: float) -> float:
    if high >= 1.0:
        return _SHIFTS[1]
    return max(_SHIFTS[0], min(_SHIFTS[1], times * (_NORMAL.inv_cdf(high) - _NORMAL.inv_cdf(low))))


def _quick_epsilon(event: events.Event) -> float:
    known = events.for_renyi(composition.grouped(event))
    return accounting.epsilon_of(rdp.RdpAccountant(_ORDERS), known, _QUICK_DELTA)
