"""The trade-off curve: which errors an attack must make that tells two neighbouring data sets apart.

A bound on delta at every epsilon, which is what a privacy loss distribution gives, says more than one pair of the two. Read
as a test between two neighbouring data sets, it bounds the errors of every attack (Dong, Roth and Su 2022, "Gaussian
differential privacy").
"""

from __future__ import annotations

import functools
import json
import math
from dataclasses import dataclass
from typing import Final, final

import numpy as np
from numpy.typing import NDArray

from sfumato import _checks
from sfumato.errors import InputError
from sfumato.privacy import composition, events

FINE, COARSE = 3e-4, 1e-3  # grids of privacy losses; on either the curve bounds every attack
RARE: Final = 0.01

_FEW_PARTS = 4
_NARROW = 1000  # spacings
_SMALLEST_SPACING = 1e-6
_EPSILONS = 2049
_TAIL = 1e-9  # an epsilon with a smaller delta changes no bound that anybody would look at
_SLACK = 1e-12  # on every delta: floating-point convolution proves nothing below
_LARGEST_EXPONENT = 700.0


@final
@dataclass(frozen=True)
class TradeOff:
    """The errors that no attack can avoid, when (epsilon, delta)-privacy holds for every pair given at once.

    An attack sees a release and says which of two neighbouring data sets it came from: the one without the unit (a false
    positive, if it says "with") or the one with it (a false negative, if it says "without"). Of any attack with false positive
    rate x, the false negative rate is at least f(x) = max over the pairs of 0, 1 - delta - e^epsilon x and
    e^-epsilon (1 - delta - x) (Wasserman and Zhou 2010; Dong, Roth and Su 2022, proposition 2.5).

    **Guarantee**: if the release is (epsilon, delta)-DP for each pair, the answers bound every attack, whatever it knows
    about the other units and however much it computes. More pairs make them tighter.

    **Edge cases**

    | pairs | answer |
    | --- | --- |
    | none | nothing is promised: an attack need not err |
    | (0, 0) | f(x) = 1 - x: no attack beats guessing |
    | epsilon of 700 or more | left out: e^epsilon would overflow |

    Args:
        epsilons: Each at least 0.
        deltas: One for each epsilon, in [0, 1].

    Raises:
        InputError: there are not as many deltas as epsilons, or one is out of range or NaN.
    """

    epsilons: tuple[float, ...]
    deltas: tuple[float, ...]

    def __post_init__(self) -> None:
        if len(self.epsilons) != len(self.deltas):
            raise InputError(f"{len(self.epsilons)} epsilons need as many deltas, not {len(self.deltas)}.")
        for epsilon, delta in zip(self.epsilons, self.deltas, strict=True):
            _checks.non_negative("epsilon", epsilon)
            _checks.fraction("delta", delta, allow_zero=True, allow_one=True)

    def false_negative_rate(self, false_positive_rate: float) -> float:
        """Return the least false negative rate of any attack with this false positive rate.

        Raises:
            InputError: the rate is outside [0, 1].
        """
        x = _checks.fraction("false_positive_rate", false_positive_rate, allow_zero=True, allow_one=True)
        epsilons, kept = self._pairs
        lines = np.concatenate([kept - np.exp(epsilons) * x, np.exp(-epsilons) * (kept - x)])
        return float(lines.max(initial=0.0))

    def true_positive_rate(self, false_positive_rate: float) -> float:
        """Return the largest true positive rate, the attack success, at this false positive rate.

        Raises:
            InputError: the rate is outside [0, 1].
        """
        return 1.0 - self.false_negative_rate(false_positive_rate)

    @functools.cached_property
    def advantage(self) -> float:
        """The largest difference of true and false positive rate; with an epsilon of 0 given, at most its delta.

        The curve is symmetric and convex, so the difference is largest where both error rates are equal.
        """
        epsilons, kept = self._pairs
        equal_errors = kept / (1.0 + np.exp(epsilons))
        return float(1.0 - 2.0 * equal_errors.max(initial=0.0))

    @property
    def guess(self) -> float:
        """(1 + advantage) / 2: how often the best attack is right when both data sets are equally likely beforehand.

        In Bayes' terms: from a prior of 50 %, the posterior probability of the likelier data set, on average over releases.
        """
        return (1.0 + self.advantage) / 2.0

    def certainty(self, rare: float = RARE) -> float:
        """Return the posterior probability of the truth, from a prior of 50 %, that only rare releases exceed.

        Whichever data set is the true one, its posterior probability is above the answer for at most a share `rare` of the
        releases. Proof: with L the log-likelihood ratio in favour of the truth, every t > epsilon has
        delta(epsilon) >= E[max(0, 1 - e^(epsilon - L))] >= (1 - e^(epsilon - t)) P(L >= t), and the posterior is
        1 / (1 + e^-L).

        Raises:
            InputError: `rare` is not in (0, 1).
        """
        _checks.fraction("rare", rare)
        epsilons, kept = self._pairs
        share = (1.0 - kept) / rare
        ratios = epsilons[share < 1.0] - np.log1p(-share[share < 1.0])
        return 1.0 / (1.0 + math.exp(-ratios.min(initial=math.inf)))

    @functools.cached_property
    def _pairs(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Return the epsilons, and what each delta leaves of 1."""
        epsilons = np.array(self.epsilons, dtype=np.float64)
        usable = epsilons < _LARGEST_EXPONENT
        return epsilons[usable], 1.0 - np.array(self.deltas, dtype=np.float64)[usable]


def trade_off(event: events.Event, interval: float = FINE) -> TradeOff:
    """Return the trade-off of `event` from its privacy loss distribution, in the relation add-or-remove-one.

    Without any sampling it is also that of replace-one, because noise is scaled to the sensitivity of the relation.

    Args:
        event: What was done.
        interval: Spacing of the privacy losses; at least `COARSE` where more than four different sums are composed.

    Raises:
        AccountingError: no privacy loss distribution is known for a part of the event.
    """
    return _trade_off(events.to_json(event), interval)


@functools.lru_cache(maxsize=64)
def _trade_off(event_json: str, interval: float) -> TradeOff:
    event = events.from_dict(json.loads(event_json))
    few = len(composition.parts(event)) <= _FEW_PARTS
    spacing = interval if few else max(interval, COARSE)
    losses = composition.pld_of(event, spacing)
    if losses is None:
        return TradeOff((), ())
    top = _largest(losses)
    if 0 < top < _NARROW * spacing:
        # Small losses, rounded up to a wide grid, would look much larger; a grid of their own size is cheap.
        losses = composition.pld_of(event, max(_SMALLEST_SPACING, top / _NARROW / 5))
        assert losses is not None
        top = _largest(losses)
    # Not below 0, where rounding errors would be multiplied: by symmetry the half above gives the whole curve.
    epsilons = np.linspace(0.0, top, _EPSILONS) if 0 < top < math.inf else np.zeros(1)
    deltas = np.asarray(losses.get_delta_for_epsilon(epsilons), dtype=np.float64)
    if deltas.any():
        deltas = np.clip(deltas + _SLACK, _SLACK, 1.0)
    return TradeOff(tuple(epsilons.tolist()), tuple(deltas.tolist()))


def _largest(losses: composition.Pld) -> float:
    """Return the epsilon above which delta is next to what it is at infinity."""
    never = float(losses.get_delta_for_epsilon([math.inf])[0])
    return float(losses.get_epsilon_for_delta(max(_TAIL, 2 * never)))
