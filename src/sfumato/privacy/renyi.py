"""A Renyi privacy filter at one order: what an event costs there, and which total keeps an (epsilon, delta) promise.

The filter adds up Renyi divergences of one integer order a and lets nothing start that would take their sum past B.

**Guarantee** (Feldman and Zrnic 2021, "Individual privacy accounting via a Renyi filter", Theorem 4.3; Lecuyer 2021,
"Practical privacy filters and odometers with Renyi differential privacy"): then everything that was released is
together (a, B)-Renyi differentially private, even if each mechanism, its noise, and whether there is another one at all,
was chosen after seeing every earlier result. The conditions:

- The order is fixed before the first result. Sums of divergences at several orders, with the best order picked in the
  end, are *not* shown to be sound under adaptive choice by that theorem; hence one order, written down with the grant.
- The bound B is fixed. (Who grants more later makes a new, larger promise.)
- Each cost bounds the divergence of its mechanism for all pairs of neighbours, both ways round, and for every fixed
  sequence of earlier results. It may depend on those results, never on the data in another way.
- What is added up comes before what is released: a mechanism whose cost does not fit is not started.

Why one order is enough: the order-a divergence of a sequence is at most the sum of the divergences given the past, and
that inequality holds along each path of results as long as one and the same order is used in every step. Runs may
overlap in time: for Renyi privacy of a fixed order the filter also covers mechanisms that are answered step by step in
turn (Haney, Shoemate, Tian, Vadhan, Vyrros, Xu and Zhang 2023, "Concurrent composition for interactive differential
privacy with adaptive privacy-loss parameters").

A run is paid for whole and may be settled for less when it ends early: on every path the sum of what was really done
is then at most the sum of what was reserved, and it is the former that the theorem speaks of.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from decimal import Decimal, localcontext
from fractions import Fraction
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Final

from sfumato import _checks
from sfumato.errors import AccountingError, InputError
from sfumato.privacy.budget import Relation
from sfumato.privacy.exact import exact, rounded_down, rounded_up

if TYPE_CHECKING:
    from sfumato.privacy.events import Event

LOWEST_ORDER: Final = 2
HIGHEST_ORDER: Final = 512

# dp-accounting adds up a binomial series in logarithms. Its terms are exact to about 3e-12 at orders up to 512, and
# weigh at most 1 together; a relative error comes on top where they are large. Both are covered several times over.
_RELATIVE_SLACK: Final = Fraction(1, 10**9)
_ABSOLUTE_SLACK: Final = Fraction(1, 10**11)
_GOOD_ENOUGH: Final = 0.9
_DIGITS: Final = 50
_LAST_DIGIT: Final = Decimal("1e-40")


def cost(event: Event, order: int, relation: Relation = Relation.ADD_OR_REMOVE_ONE) -> float:
    """Return an upper bound of the Renyi divergence of `event` at `order`, infinite for a non-private part.

    **Guarantee**: never below the value of `dp_accounting`'s formulas in exact arithmetic; parts are added exactly and
    rounded up. **Edge cases**: see the table; each has a test.

    | event | cost |
    | --- | --- |
    | nothing, or zero repetitions | 0 |
    | a non-private part, or noise 0 | infinite |
    | a filter (`RenyiFilterDpEvent`) | its `rdp`, if its order is this one; else refused |
    | random allocation, truncated Poisson sampling | that of `events.for_renyi` |
    | replace-one with any sampling | refused, as in `accounting.spending` |
    | an event that no Renyi bound is known for | refused |

    Raises:
        AccountingError: no bound is known (see the table), or a number in the event makes no sense.
        InputError: the order is no whole number from 2 to 512.
    """
    # dp-accounting takes a second to load, and a ledger that adds (epsilon, delta) never needs it.
    from sfumato.privacy import events  # noqa: PLC0415

    _order(order)
    if relation is Relation.REPLACE_ONE and events.is_sampled(event):
        raise AccountingError(
            "Amplification by sampling is only accounted for add-or-remove-one; use that relation, "
            "or a sampler that claims no amplification (full batch, shuffled)."
        )
    try:
        tree = events.to_dict(events.for_renyi(event))
    except InputError as error:
        raise AccountingError(f"No Renyi bound is known for this event: {error}") from error
    total = _sum(tree, order)
    return math.inf if total is None else rounded_up(total)


def epsilon(order: int, rdp: float, delta: float) -> float:
    """Return the epsilon that `rdp` at `order` keeps at `delta`, rounded up; 0 for 0, infinite for infinity.

    Source: Canonne, Kamath and Steinke 2020, "The discrete Gaussian for differential privacy", Proposition 12:
    epsilon = rdp + log((a - 1) / a) - (log(delta) + log(a)) / (a - 1), and never below 0.

    Raises:
        InputError: the order, the divergence or delta is out of range.
    """
    constant = _constant(_order(order), _checks.fraction("delta", delta))
    if not isinstance(rdp, int | float) or not rdp >= 0:
        raise InputError(f"rdp must be a number of at least 0, not {rdp!r}.")
    if rdp == 0 or math.isinf(rdp):
        return float(rdp)
    return max(0.0, rounded_up(exact(rdp) + Fraction(constant + _LAST_DIGIT)))


def cap(order: int, epsilon: float, delta: float) -> float:
    """Return the largest divergence at `order` that keeps (epsilon, delta), rounded down.

    Raises:
        InputError: an argument is out of range, or not even the smallest divergence keeps the promise.
    """
    constant = _constant(_order(order), _checks.fraction("delta", delta))
    largest = rounded_down(exact(_checks.positive("epsilon", epsilon)) - Fraction(constant + _LAST_DIGIT))
    if largest > 0:
        return largest
    raise InputError(
        f"At Renyi order {order} no release at all keeps epsilon {epsilon:g} at delta {delta:g}: the order alone costs "
        f"epsilon {float(constant):.3g} there. Fix: choose a larger epsilon or a larger delta."
    )


def order_for(epsilon: float, delta: float) -> int:
    """Return a good order for a cap, from 2 to 512: at 1 + 2 log(1 / delta) / epsilon, or below.

    It depends on the cap only, and so can be fixed before anything is released. Unsampled Gaussian noise does best
    where the cap over the order is largest; sampled noise, above some order, costs suddenly far more. So this is the
    lowest order that still leaves nine tenths of that best: at the cap the noise is then usually within a tenth of
    what the best order for that very noise would allow.

    Raises:
        InputError: an argument is out of range, or no order keeps such a promise.
    """
    _checks.positive("epsilon", epsilon)
    _checks.fraction("delta", delta)

    # A Gaussian costs a / (2 sigma^2) at order a, so this is how much of it fits.
    def room(order: int) -> float:
        return (epsilon + math.log1p(1 / (order - 1)) + (math.log(delta) + math.log(order)) / (order - 1)) / order

    orders = range(LOWEST_ORDER, HIGHEST_ORDER + 1)
    best = max(map(room, orders))
    if best > 0:
        return next(order for order in orders if room(order) >= _GOOD_ENOUGH * best)
    raise InputError(
        f"No Renyi order up to {HIGHEST_ORDER} keeps epsilon {epsilon:g} at delta {delta:g}. "
        "Fix: choose a larger epsilon or delta, or basic composition."
    )


def _order(order: int) -> int:
    if _checks.count("order", order, minimum=LOWEST_ORDER) <= HIGHEST_ORDER:
        return order
    raise InputError(f"order must be at most {HIGHEST_ORDER}, not {order!r}.")


@lru_cache(maxsize=1024)
def _constant(order: int, delta: float) -> Decimal:
    """Return what an order costs in epsilon before anything is spent, to `_DIGITS` digits."""
    with localcontext() as context:
        context.prec = _DIGITS
        share = (Decimal(order - 1) / order).ln()
        return share - (Decimal(repr(delta)).ln() + Decimal(order).ln()) / (order - 1)


def _sum(tree: dict[str, Any], order: int) -> Fraction | None:
    """Return the exact sum of the parts of an event, each rounded up, or None if it is infinite."""
    if tree["type"] == "ComposedDpEvent":
        parts = [_sum(part, order) for part in tree["events"]]
        finite = [part for part in parts if part is not None]
        return sum(finite, Fraction(0)) if len(finite) == len(parts) else None
    if tree["type"] == "SelfComposedDpEvent":
        times = _sensible(lambda: _checks.count("count", tree["count"], minimum=0), tree)
        once = _sum(tree["event"], order)
        return Fraction(0) if times == 0 else None if once is None else times * once
    return _part(tree, order)


def _part(tree: dict[str, Any], order: int) -> Fraction | None:
    match tree["type"]:
        case "NoOpDpEvent":
            return Fraction(0)
        case "NonPrivateDpEvent":
            return None
        case "GaussianDpEvent":
            noise = _sensible(lambda: _checks.non_negative("noise_multiplier", tree["noise_multiplier"]), tree)
            # Rounded up at once: a sum of thousands of such fractions would carry all their digits along.
            return exact(rounded_up(order / (2 * exact(noise) ** 2))) if noise else None
        case "RenyiFilterDpEvent":
            if tree["order"] != order:
                raise AccountingError(
                    f"A filter at Renyi order {tree['order']} cannot be added up at order {order}. "
                    "Fix: run it at the order of the account, which is written in the grant of its data set."
                )
            return exact(tree["rdp"])
        case "RepeatAndSelectDpEvent":
            return _selected(tree, order)
        case "PoissonSampledDpEvent":
            _sum(tree["event"], order)  # its numbers make sense, each for itself
    return _with_slack(_leaf(json.dumps(tree, sort_keys=True), order))


def _selected(tree: dict[str, Any], order: int) -> Fraction | None:
    """Return the cost of the best of a random number of runs, whose constant may come from any other order."""
    from dp_accounting.rdp import rdp_privacy_accountant as formulas  # noqa: PLC0415

    orders = sorted({order, *(2**power for power in range(1, 10))})
    parts = [_sum(tree["event"], each) for each in orders]
    if None in parts:
        return None
    rdp = [rounded_up(part) for part in parts if part is not None]
    mean, shape = tree["mean"], math.inf if tree["shape"] is None else tree["shape"]
    costs = _sensible(lambda: formulas._compute_rdp_repeat_and_select(orders, rdp, mean, shape), tree)
    return _with_slack(float(costs[orders.index(order)]))


def _with_slack(value: float) -> Fraction | None:
    return None if math.isinf(value) else exact(value) * (1 + _RELATIVE_SLACK) + _ABSOLUTE_SLACK


@lru_cache(maxsize=4096)
def _leaf(event_json: str, order: int) -> float:
    from dp_accounting import UnsupportedEventError, rdp  # noqa: PLC0415

    from sfumato.privacy import events  # noqa: PLC0415

    tree = json.loads(event_json)
    accountant = rdp.RdpAccountant(orders=[order])
    try:
        _sensible(lambda: accountant.compose(events.from_dict(tree)), tree)
    except UnsupportedEventError as error:
        raise AccountingError(f"No Renyi bound is known for this event ({event_json}): {error}") from error
    value = float(accountant.rdp[0])
    # Rounding can make the divergence of a tiny sampling rate negative; less than the slack is no contradiction.
    if value >= -float(_ABSOLUTE_SLACK):
        return max(value, 0.0)
    raise AccountingError(f"The Renyi accountant returned {value} for this event ({event_json}); nothing is claimed.")


def _sensible(work: Callable[[], Any], tree: dict[str, Any]) -> Any:
    """Return what `work` returns; a number that it cannot work with is an error that shows the event."""
    try:
        return work()
    except (ValueError, TypeError, ArithmeticError) as error:
        raise AccountingError(f"This event makes no sense ({json.dumps(tree, sort_keys=True)}): {error}") from error
