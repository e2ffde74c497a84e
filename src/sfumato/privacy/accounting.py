"""What an event costs: the PLD upper bound, with the RDP bound as a second opinion.

Both accountants are `dp_accounting`'s. The privacy loss distribution (Koskela et al. 2020, Doroshenko et al. 2022) is
rounded pessimistically, so its epsilon is an upper bound and the tighter of the two; it is the claim. Renyi accounting
(Mironov 2017) is an independent, looser upper bound. If the loose one ever lies below the tight one, one of them is
wrong or too coarse, and nothing is claimed.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import dp_accounting
from dp_accounting import pld, rdp

from sfumato import _checks
from sfumato.errors import AccountingError
from sfumato.privacy import composition, events, renyi
from sfumato.privacy.budget import Relation

_SMALLEST_DELTA = 1e-12
_INTERVALS = (1e-4, 1e-5)
_FEW_PARTS = 4  # different sums of a run; with more, the quick grids and orders below are used
_QUICK_INTERVALS = (2e-3, 1e-4)
_CURVE_INTERVAL = 1e-3
_RESOLVED = 400  # grid points to an epsilon are enough: the grid then adds a few tenths of a per cent
QUICK_ORDERS = [2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 128, 256]
_LARGEST_EPSILON = 500.0


@dataclass(frozen=True)
class Spending:
    """What an event costs at a delta, by two accountants.

    Attributes:
        epsilon: The claim: a proven upper bound (the PLD figure, where there is one).
        delta: The delta at which epsilon holds.
        pld: The privacy-loss-distribution upper bound; infinite where none is known, for example for a filter.
        rdp: The Renyi upper bound; never below a finite `pld`.
    """

    epsilon: float
    delta: float
    pld: float
    rdp: float


def spending(event: events.Event, delta: float, relation: Relation = Relation.ADD_OR_REMOVE_ONE) -> Spending:
    """Return what `event` costs at `delta`.

    **Guarantee**: the event is (epsilon, delta)-DP in the given relation, if the event describes what was done.

    **Edge cases**

    | event or argument | answer |
    | --- | --- |
    | a non-private part | epsilon is infinite |
    | no steps | epsilon is 0 |
    | replace-one with any sampling claimed | refused: the noise multiplier of such a plan is relative to 2C |
    | delta below 1e-12 | refused: floating-point convolution proves nothing there |
    | RDP below PLD | a finer grid is tried once, then refused |
    | a Renyi filter | its conversion at its one order is the claim; there is no PLD of it |
    | more than 24 different sampled steps | nearly equal ones are counted as their worst: about 1 % above the exact figure |
    | epsilon above 500 by RDP | refused: it protects nobody and its grid would not fit in memory |

    Raises:
        AccountingError: no bound can be proven (see the table), or the event is of an unknown kind.
        InputError: delta is outside (0, 1).
    """
    _checks.fraction("delta", delta)
    if delta < _SMALLEST_DELTA:
        raise AccountingError(
            f"delta {delta:g} is below {_SMALLEST_DELTA:g}, where floating-point accounting proves nothing; "
            "choose a larger delta."
        )
    if relation is Relation.REPLACE_ONE and events.is_sampled(event):
        raise AccountingError(
            "Amplification by sampling is only accounted for add-or-remove-one; use that relation, "
            "or a sampler that claims no amplification (full batch, shuffled)."
        )
    # Without sampling a Gaussian sum costs the same in both relations once its noise is scaled to that relation's
    # sensitivity, which is what the mechanism does.
    return _spending(events.to_json(event), delta)


@lru_cache(maxsize=4096)
def _spending(event_json: str, delta: float) -> Spending:
    event = events.from_dict(json.loads(event_json))
    if isinstance(event, events.RenyiFilterDpEvent):
        return _filtered(event, delta)
    if isinstance(event, dp_accounting.dp_event.RepeatAndSelectDpEvent):
        raise AccountingError("The best of several runs is accounted by `privacy.selection.Repetitions.spending`.")
    few = len(composition.parts(event)) <= _FEW_PARTS
    orders = None if few else QUICK_ORDERS
    # With many different steps both accountants look at the same event, which costs at least as much.
    known = event if few else composition.grouped(event)
    second = epsilon_of(rdp.RdpAccountant(orders), events.for_renyi(known), delta)
    if _LARGEST_EPSILON < second < math.inf:
        raise AccountingError(
            f"This costs about epsilon {second:.4g}, which protects nobody; use more noise, fewer steps, or an infinite "
            "epsilon for plain training."
        )
    first = math.inf
    coarse, fine = _QUICK_INTERVALS
    for interval in _INTERVALS if few else (min(coarse, max(fine, second / _RESOLVED)), fine):
        first = pld_epsilon(known, delta, interval)
        if first <= second:
            return Spending(epsilon=first, delta=delta, pld=first, rdp=second)
    raise AccountingError(
        f"The accountants contradict each other: PLD says epsilon {first:g}, RDP says at most {second:g}; "
        "nothing is claimed. This happens where epsilon is tiny beside delta; use a larger epsilon or a smaller delta."
    )


def _filtered(event: events.RenyiFilterDpEvent, delta: float) -> Spending:
    """Return what a filter lets through at most: the same conversion by two implementations, and the larger answer."""
    ours = renyi.epsilon(event.order, event.rdp, delta)
    theirs, _ = rdp.compute_epsilon([event.order], [event.rdp], delta)
    # Theirs also knows a second conversion, which can be a little smaller where epsilon is tiny.
    if not 0.99 * ours <= theirs <= ours * (1 + 1e-6) + 1e-9:
        raise AccountingError(
            f"The accountants contradict each other on a filter: epsilon {ours:g} and {float(theirs):g}; nothing is claimed."
        )
    epsilon = max(ours, float(theirs))
    return Spending(epsilon=epsilon, delta=delta, pld=math.inf, rdp=epsilon)


def pld_epsilon(event: events.Event, delta: float, interval: float) -> float:
    """Return the PLD bound on epsilon at `delta`, on a grid of this spacing.

    Raises:
        AccountingError: the accountant does not know the event, or answers with no number.
    """
    if len(composition.parts(event)) <= _FEW_PARTS and not events.is_own(event):
        return epsilon_of(pld.PLDAccountant(value_discretization_interval=interval), event, delta)
    return _number("PLD", composition.epsilons([event], delta, interval)[0])


def curve(segments: Sequence[events.Event], delta: float) -> list[float]:
    """Return upper bounds on what the first, the first two, ... segments of a run cost, for a look while it goes on.

    Quick rather than tight: they may lie a little above what `spending` says of the same events.
    """
    return composition.epsilons(segments, delta, _CURVE_INTERVAL)


def epsilon_of(accountant: dp_accounting.PrivacyAccountant, event: events.Event, delta: float) -> float:
    """Return what one fresh accountant says `event` costs at `delta`.

    Raises:
        AccountingError: the accountant does not know the event, or answers with no number.
    """
    # dp-accounting logs every Renyi order whose series does not converge; it leaves that order out, which is safe.
    logging.getLogger("absl").setLevel(logging.ERROR)
    try:
        accountant.compose(event)
    except dp_accounting.UnsupportedEventError as error:
        raise AccountingError(
            f"{type(accountant).__name__} has no proven bound for this event ({events.to_json(event)}): {error}"
        ) from error
    return _number(type(accountant).__name__, float(accountant.get_epsilon(delta)))


def _number(who: str, epsilon: float) -> float:
    if math.isnan(epsilon) or epsilon < 0:
        raise AccountingError(f"{who} returned epsilon {epsilon}; nothing is claimed.")
    return epsilon
