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
from dataclasses import dataclass
from functools import lru_cache

import dp_accounting
from dp_accounting import pld, rdp

from sfumato import _checks
from sfumato.errors import AccountingError
from sfumato.privacy import events
from sfumato.privacy.budget import Relation

_SMALLEST_DELTA = 1e-12
_INTERVALS = (1e-4, 1e-5)
_LARGEST_EPSILON = 500.0


@dataclass(frozen=True)
class Spending:
    """What an event costs at a delta, by two accountants.

    Attributes:
        epsilon: The claim: a proven upper bound (the PLD figure).
        delta: The delta at which epsilon holds.
        pld: The privacy-loss-distribution upper bound.
        rdp: The Renyi upper bound; never below `pld`.
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
    second = epsilon_of(rdp.RdpAccountant(), event, delta)
    if _LARGEST_EPSILON < second < math.inf:
        raise AccountingError(
            f"This costs about epsilon {second:.4g}, which protects nobody; use more noise, fewer steps, or an infinite "
            "epsilon for plain training."
        )
    first = math.inf
    for interval in _INTERVALS:
        first = epsilon_of(pld.PLDAccountant(value_discretization_interval=interval), event, delta)
        if first <= second:
            return Spending(epsilon=first, delta=delta, pld=first, rdp=second)
    raise AccountingError(
        f"The accountants contradict each other: PLD says epsilon {first:g}, RDP says at most {second:g}; "
        "nothing is claimed. This happens where epsilon is tiny beside delta; use a larger epsilon or a smaller delta."
    )


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
    epsilon = float(accountant.get_epsilon(delta))
    if math.isnan(epsilon) or epsilon < 0:
        raise AccountingError(f"{type(accountant).__name__} returned epsilon {epsilon}; nothing is claimed.")
    return epsilon
