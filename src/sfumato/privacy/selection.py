"""Private selection: the best of a random number of runs, at the price of about two of them and not of all.

Who runs a private computation many times and keeps the best outcome pays for every run, unless the number of runs is random
and secret. Then the price hardly grows with it (Papernot and Steinke 2022, "Hyperparameter tuning with Renyi differential
privacy", after Liu and Talwar 2019): theorem 6 for a Poisson number, theorem 2 for a truncated negative binomial one.
"""

from __future__ import annotations

import decimal
import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from decimal import Decimal
from typing import final

from dp_accounting import rdp

from sfumato import _checks
from sfumato.errors import AccountingError, InputError
from sfumato.privacy import accounting, composition, events
from sfumato.privacy.accounting import Spending
from sfumato.privacy.budget import Relation
from sfumato.privacy.randomness import RandomSource

POISSON, NEGATIVE_BINOMIAL = "poisson", "negative-binomial"
_LARGEST_MEAN, _LARGEST_SHAPE = 1000.0, 100.0
# The usual orders, with more of them where small epsilons have their best one.
_ORDERS = [1 + tenth / 10 for tenth in range(1, 100)] + [*range(11, 64), *(round(64 * 1.2**i) for i in range(20))]
_DIGITS = 60
_BITS = 128
_SAFE = 1e-8  # relative; more than what the accountant's own inversion of the mean may be off
_INTERVAL = 1e-3
_MOST_RUNS = 500  # of which all outcomes are composed; beyond, that bound would say nothing anyway
_TAIL = 0.1  # of delta


@final
@dataclass(frozen=True)
class Repetitions:
    """The law of a secret number of runs, of which only the best outcome is kept.

    **Guarantee**: if one run is `event`, then running it independently as often as `draw` says, and keeping the best outcome
    in any fixed order of outcomes, is `self.event(event)`. Runs may choose their configuration at random, in the same way
    each. Ties may be broken by who comes first, which is as good as by lot. Without a run, the outcome is that there is none.

    **Edge cases**

    | case | what happens |
    | --- | --- |
    | Poisson | no run at all has probability exp(-mean) |
    | negative binomial | there is at least one run; with a mean of 1, exactly one |
    | the law is met in arithmetic | of 60 digits, by 128 random bits: within 2**-120 in total variation |

    Args:
        mean: Mean number of runs, in [1, 1000].
        shape: Infinite for Poisson. Of the truncated negative binomial it is in [0, 100]: 1 is geometric, 0 logarithmic; the
            smaller, the more the number varies and the less a large mean costs.

    Raises:
        InputError: mean or shape is out of range.
    """

    mean: float
    shape: float = math.inf

    def __post_init__(self) -> None:
        if not 1 <= _checks.positive("mean_trials", self.mean) <= _LARGEST_MEAN:
            raise InputError(f"mean_trials must lie in [1, {_LARGEST_MEAN:g}], not {self.mean!r}.")
        if self.shape != math.inf and not _checks.non_negative("shape", self.shape) <= _LARGEST_SHAPE:
            raise InputError(f"shape must lie in [0, {_LARGEST_SHAPE:g}], not {self.shape!r}.")

    @classmethod
    def named(cls, distribution: str, mean: float, shape: float) -> Repetitions:
        """Return the law called "poisson" (which has no shape) or "negative-binomial".

        Raises:
            InputError: the name is unknown, or a number is out of range.
        """
        if distribution not in (POISSON, NEGATIVE_BINOMIAL):
            known = (POISSON, NEGATIVE_BINOMIAL)
            raise InputError(
                f"distribution {distribution!r} is unknown.{_checks.did_you_mean(str(distribution), known)}"
            )
        if distribution == POISSON:
            return cls(mean)
        return cls(mean, _checks.non_negative("shape", shape))

    @property
    def name(self) -> str:
        """What the law is called."""
        return POISSON if math.isinf(self.shape) else NEGATIVE_BINOMIAL

    def event(self, one: events.Event) -> events.Event:
        """Return the event of the whole, if that of each run is `one`."""
        return events.repeat_and_select(one, self.mean, self.shape)

    def masses(self) -> Iterator[Decimal]:
        """Yield the probabilities of 0, 1, 2, ... runs."""
        masses = self._poisson() if math.isinf(self.shape) else self._negative_binomial()
        # The body of a generator computes in the context of whoever asks for the next one.
        while True:
            with decimal.localcontext(decimal.Context(prec=_DIGITS)):
                mass = next(masses)
            yield mass

    def draw(self, source: RandomSource) -> int:
        """Return a number of runs by inversion: the first whose cumulative probability exceeds a uniform of 128 bits."""
        high, low = (word % 2**64 for word in source.words(2).tolist())
        with decimal.localcontext(decimal.Context(prec=_DIGITS)):
            uniform, total = Decimal(high * 2**64 + low) / 2**_BITS, Decimal(0)
            for runs, mass in enumerate(self.masses()):
                total += mass
                if uniform < total:
                    return runs
        raise AssertionError("The probabilities do not add up to one.")

    def spending(
        self, one: events.Event, delta: float, relation: Relation = Relation.ADD_OR_REMOVE_ONE
    ) -> tuple[Spending, Spending]:
        """Return what the whole costs at `delta`, and what one run would cost alone.

        The claim is the Renyi bound by the theorem. The second opinion, `pld`, does not use the theorem: it pays for every
        outcome of every run, by privacy loss distributions averaged over the number of runs. It is an upper bound too, and
        usually a much larger one. For a check that can fail, both accountants must agree on one run, and the claim must not
        lie below what that one costs.

        Raises:
            AccountingError: no bound can be proven, or the accountants contradict each other.
        """
        alone = accounting.spending(one, delta, relation)
        if not math.isfinite(alone.epsilon):
            return alone, alone
        claim = self.renyi(one, delta)
        if claim < alone.pld:
            raise AccountingError(
                f"The accountants contradict each other: the best of several runs costs epsilon {claim:g}, one of them "
                f"{alone.pld:g}; nothing is claimed. Use a larger epsilon or a smaller delta."
            )
        return Spending(claim, delta, pld=self._all_outcomes(one, delta), rdp=claim), alone

    def renyi(self, one: events.Event, delta: float) -> float:
        """Return the Renyi bound on epsilon for the whole, the figure that is claimed."""
        event = self.event(events.for_renyi(composition.grouped(one)))
        return accounting.epsilon_of(rdp.RdpAccountant(_ORDERS), event, delta)

    def _all_outcomes(self, one: events.Event, delta: float) -> float:
        """Return an epsilon for releasing every outcome: delta(epsilon) averaged over the number of runs.

        Numbers of runs are put into groups, each counted as its largest; what is left of the tail is added to delta.
        """
        groups, rest = self._groups(_TAIL * delta)
        if not groups:
            return math.inf
        losses = []
        for runs, chance in groups:
            loss = composition.pld_of(events.repeated(one, runs), _INTERVAL)
            if loss is None:
                return math.inf
            losses.append((chance, loss))

        def keeps(epsilon: float) -> bool:
            return rest + math.fsum(p * float(loss.get_delta_for_epsilon(epsilon)) for p, loss in losses) <= delta

        upper = 1.0
        while not keeps(upper):
            upper *= 2
            if upper > 2**20:
                return math.inf
        lower = 0.0
        while upper - lower > 1e-4 * upper:
            middle = (lower + upper) / 2
            lower, upper = (lower, middle) if keeps(middle) else (middle, upper)
        return upper

    def _groups(self, tail: float) -> tuple[list[tuple[int, float]], float]:
        """Return the largest number of each group with the group's probability, and the probability of all beyond."""
        groups: list[tuple[int, float]] = []
        left, inside, edge = Decimal(1), Decimal(0), 1
        for runs, mass in enumerate(self.masses()):
            if runs == 0:
                left -= mass
                continue
            inside, left = inside + mass, left - mass
            last = left <= Decimal(tail)
            if runs == edge or last:
                groups.append((runs, float(inside)))
                inside, edge = Decimal(0), max(edge + 1, edge * 4 // 3)
            if last:
                return groups, max(0.0, float(left))
            if runs >= _MOST_RUNS:
                return [], 1.0
        raise AssertionError("The probabilities do not add up to one.")

    def _poisson(self) -> Iterator[Decimal]:
        mean = Decimal(self.mean)
        mass = (-mean).exp()
        for runs in itertools.count(1):
            yield mass
            mass = mass * mean / runs

    def _negative_binomial(self) -> Iterator[Decimal]:
        """Yield definition 1 of the paper: (1-g)**k / (g**-s - 1) * prod_{l<k} (l+s)/(l+1), whose limit is g = 1, one run."""
        yield Decimal(0)
        gamma, shape = Decimal(self.gamma), Decimal(self.shape)
        if gamma == 1:
            mass = Decimal(1)
        elif shape == 0:
            mass = (1 - gamma) / -gamma.ln()
        else:
            mass = shape * (1 - gamma) / ((-shape * gamma.ln()).exp() - 1)
        for runs in itertools.count(1):
            yield mass
            mass = mass * (1 - gamma) * (runs + shape) / (runs + 1)

    @property
    def gamma(self) -> float:
        """The stopping probability of the negative binomial, a hair above the one that has exactly the declared mean.

        A larger one stops sooner, so its cost is no larger in either term of theorem 2: neither in log(1/gamma) nor in the
        mean. The hair covers the error of the accountant's own inversion.
        """
        lower, upper = 0.0, 1.0
        while upper - lower > 1e-12 * upper:
            middle = (lower + upper) / 2
            lower, upper = (middle, upper) if self._mean_of(middle) > self.mean else (lower, middle)
        return min(1.0, upper * (1 + _SAFE))

    def _mean_of(self, gamma: float) -> float:
        if self.shape == 0:
            return (1 - gamma) / gamma / -math.log(gamma)
        return self.shape * (1 - gamma) / gamma / -math.expm1(self.shape * math.log(gamma))
