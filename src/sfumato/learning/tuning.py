"""Tuning inside the budget: many configurations are tried, the best is kept, and the search is in the epsilon that is printed.

A trial trains with one configuration and scores what came out. How many trials there are is random and secret, which is why
the best of them costs about as much as two and not as much as all (`privacy.selection`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeAlias, TypeVar, final

from typing_extensions import override

from sfumato import _checks
from sfumato._numbers import bound
from sfumato.errors import AccountingError, DivergedError, InputError, PlanError, SfumatoError
from sfumato.learning import distributed
from sfumato.learning.plan import Plan
from sfumato.learning.trials import Price, Trial, calibrated, tried
from sfumato.privacy import accounting, events
from sfumato.privacy.accounting import Spending
from sfumato.privacy.books import Cost
from sfumato.privacy.budget import Budget
from sfumato.privacy.ledger import Ledger
from sfumato.privacy.randomness import RandomSource, SecureSource
from sfumato.privacy.selection import POISSON, Repetitions
from sfumato.privacy.statement import PrivacyStatement

R = TypeVar("R")
Space: TypeAlias = Mapping[str, Iterable[Any]] | Sequence[Any]


@final
@dataclass(frozen=True)
class Best(Generic[R]):
    """The trial that is kept.

    Attributes:
        config: The configuration it was called with.
        score: What it returned as its score; NaN counts as minus infinity.
        result: What it returned beside the score.
    """

    config: Any
    score: float
    result: R


@final
class TuningStatement(PrivacyStatement):
    """The privacy statement of a search: here the Renyi figure is the claim, and the other bound the looser one."""

    @override
    def _accountants(self) -> str:
        second = f"PLD {bound(self.spending.pld)}" if math.isfinite(self.spending.pld) else "PLD no bound"
        return (
            f"  Accountants: RDP {bound(self.spending.rdp)} by the theorem on random numbers of trials (the claim), "
            f"{second} for all outcomes of all trials (second opinion)."
        )


@final
@dataclass(frozen=True)
class Tuned(Generic[R]):
    """The best trial of a search, and what the search cost. How many trials there were is secret.

    Attributes:
        best: The trial that is kept; None if the number of trials was zero, which only Poisson allows.
        privacy: The privacy statement of the whole search.
        trials: The law of the number of trials.
        one_trial: What one trial alone costs.
        naive: Epsilon, at the same delta, of as many trials as the mean says, if that number were fixed and all were paid.
        run: The run's name in the ledger; empty without privacy.
    """

    best: Best[R] | None
    privacy: PrivacyStatement
    trials: Repetitions
    one_trial: Spending
    naive: float
    run: str

    @property
    def config(self) -> Any:
        """The best configuration.

        Raises:
            SfumatoError: there was no trial.
        """
        return self._found().config

    @property
    def score(self) -> float:
        """The score of the best trial; the best of several noisy scores is, in the mean, better than a new one would be.

        Raises:
            SfumatoError: there was no trial.
        """
        return self._found().score

    @property
    def result(self) -> R:
        """What the best trial returned.

        Raises:
            SfumatoError: there was no trial.
        """
        return self._found().result

    def __str__(self) -> str:
        mean = f"{self.trials.mean:g}"
        if self.best is None:
            lines = [self._nothing()]
        else:
            lines = [
                f"The best of a secret number of trials (mean {mean}): {self.best.config}, score {self.best.score:.4g}."
            ]
        if self.privacy.budget.is_private:
            lines.append(
                f"One trial alone costs epsilon {bound(self.one_trial.epsilon)}; a fixed number of "
                f"{math.ceil(self.trials.mean)}, all paid for, would cost {_shown(self.naive)}."
            )
        return "\n".join([*lines, str(self.privacy)])

    def _found(self) -> Best[R]:
        if self.best is None:
            raise SfumatoError(self._nothing())
        return self.best

    def _nothing(self) -> str:
        chance = math.exp(-self.trials.mean)
        return (
            f"There was no trial: a Poisson number with mean {self.trials.mean:g} is zero with probability {chance:.2g}, and "
            'what was charged stays spent. Fix for the next search: a larger mean, or distribution="negative-binomial".'
        )


def tune(
    space: Space, trial: Callable[[Any, Trial], tuple[float, R]], budget: Budget, *, plan: Callable[[Budget], Plan],
    dataset: str, mean_trials: float, distribution: str = POISSON, shape: float = 1.0, scoring: float = 0.25,
    ledger: Ledger | None = None, purpose: str = "tuning", by: str | None = None, source: RandomSource | None = None,
) -> Tuned[R]:  # fmt: skip
    """Try a random number of configurations from `space` and return the best of them, all within `budget`.

    The noise of a trial is calibrated so that the whole search lands on the budget from below. The whole is charged before
    the number of trials is drawn; trials charge a ledger of their own.

    **Guarantee**: everything that is returned keeps `budget`, by theorem 6 (Poisson) or 2 (negative binomial) of Papernot
    and Steinke (2022, "Hyperparameter tuning with Renyi differential privacy"), if

    - a trial touches private records only in ways that it charges to its ledger, which must be just what was paid for:
      one training on its plan and, unless `scoring` is 0, one evaluation with its budget. This is checked after
      each trial; what a trial computes from records without charging it cannot be seen;
    - its score and result depend on the configuration and on what it released, and on no other trial: the noise of each
      is drawn anew, so a trial that trains from a seed of its own is only a rehearsal;
    - nobody learns the number of trials, nor anything of those that are not returned.

    **Edge cases**

    | case | what happens |
    | --- | --- |
    | Poisson draws zero | nothing is returned (`best` is None); the charge stays spent |
    | two trials have the same score | the first is kept; by symmetry that is as good as by lot |
    | a score is NaN | it counts as minus infinity |
    | a trial's training diverges | it counts as minus infinity; if that is the best, DivergedError |
    | any other error in a trial | ends the search, as if it were the best outcome; the charge stays spent |
    | a trial charges anything else than what was paid for | refused, its result is dropped; the charge stays spent |
    | a policy that looks at released results, with sampled batches | refused: its filter holds at one Renyi order only |
    | an infinite epsilon | plain trials, nothing charged, nothing promised |
    | a seeded source | a rehearsal: whoever knows the seed knows the number of trials |

    Args:
        space: Name to values (a configuration is a dict with one value for each name), or a sequence of configurations.
            Each trial draws uniformly from all of them, so the same may come twice.
        trial: Called as trial(configuration, one: Trial); returns (score, result). The highest score wins.
        budget: For the whole search.
        plan: Called with the budget of one training, several times while the noise is sought; returns its plan. For example
            `functools.partial(Plan.calibrate, population=607, batch_size=607, steps=20)`.
        dataset: The data set's name in `ledger` and in the ledger of each trial.
        mean_trials: Mean number of trials, in [1, 1000].
        distribution: "poisson", the cheaper one up to about ten trials, or "negative-binomial", which has at least one trial
            and grows dearer more slowly.
        shape: Of the negative binomial: 1 is geometric; towards 0 the number varies more and costs less.
        scoring: Share of a trial's epsilon that pays for its score, in [0, 1); 0 if scores need no private record.
        ledger: Where the charge is written. None: the search keeps its budget but nobody remembers it.
        purpose: What the charge is called.
        by: Who searches; by default the user's login.
        source: Where the number of trials and their configurations come from; by default a fresh secure source.

    Raises:
        DivergedError: The best trial is one that diverged.
        PlanError: No noise keeps the budget, or a trial spent something else than what was paid for.
        InputError: An argument is out of range, or a trial does not return (score, result).
        SfumatoError: The ledger refused the charge, or one of its kinds from a trial.
    """
    distributed.refuse("Searches")
    configs = _Configurations(space)
    trials = Repetitions.named(distribution, mean_trials, shape)
    share = _checks.fraction("scoring", scoring, allow_zero=True)
    source = source or SecureSource()
    price = calibrated(plan, budget, trials, share)
    if not budget.is_private:
        whole = alone = Spending(math.inf, budget.delta, math.inf, math.inf)
        statement = PrivacyStatement(
            budget, whole, events.non_private(), ("Everything: the run was not private.",), source.is_secure
        )
        best = _best(configs, trial, trials.draw(source), price, dataset, source)
        return Tuned(best, statement, trials, alone, math.inf, "")
    whole, alone = trials.spending(price.event, budget.delta, budget.relation)
    if not whole.epsilon <= budget.epsilon:
        raise PlanError(f"The search would cost epsilon {whole.epsilon:g}, more than {budget}; use fewer trials.")
    not_covered = _not_covered(share, ledger, source)
    statement = TuningStatement(budget, whole, trials.event(price.event), not_covered, source.is_secure)
    naive = _naive(price.event, trials, budget)
    run = _charge(statement, dataset, ledger, purpose, by)
    best = _best(configs, trial, trials.draw(source), price, dataset, source)
    return Tuned(best, statement, trials, alone, naive, run)


class _Configurations:
    """A finite space, of which one configuration is drawn at a time."""

    def __init__(self, space: Space) -> None:
        self._names: tuple[str, ...] | None = None
        if isinstance(space, Mapping):
            self._names = tuple(space)
            self._values = [_listed(f'space["{name}"]', values) for name, values in space.items()]
        else:
            self._values = [_listed("space", space)]
        self._size = math.prod(map(len, self._values))
        if not self._values or not self._size:
            raise InputError("The space holds no configuration. Fix: give each name at least one value.")

    def draw(self, source: RandomSource) -> int:
        """Return the number of a uniformly drawn configuration (but for a bias below 2**-64 times their number)."""
        return int(source.words(1)[0]) % self._size

    def at(self, number: int) -> Any:
        """Return the configuration of that number, a new dict each time where names were given."""
        chosen = []
        for values in self._values:
            number, place = divmod(number, len(values))
            chosen.append(values[place])
        return chosen[0] if self._names is None else dict(zip(self._names, chosen, strict=True))


def _listed(what: str, values: Any) -> list[Any]:
    if isinstance(values, str | bytes) or not isinstance(values, Iterable):
        raise InputError(f"{what} must be a list of values, not {values!r}.")
    return list(values)


def _charge(statement: PrivacyStatement, dataset: str, ledger: Ledger | None, purpose: str, by: str | None) -> str:
    """Pay for the whole search and return the run's name."""
    budget, spending = statement.budget, statement.spending
    if ledger is None:
        ledger = Ledger.in_memory()
        ledger.grant(dataset, budget)
    cost = Cost(spending.epsilon, spending.delta, budget.unit, budget.relation)
    charge = ledger.charge(
        dataset, purpose=purpose, event=events.to_json(statement.event), cost=cost, draws=1, by=by
    )  # fmt: skip
    charge.take()
    return charge.run


def _best(
    configs: _Configurations, trial: Callable[[Any, Trial], tuple[float, R]], count: int, price: Price, dataset: str,
    source: RandomSource,
) -> Best[R] | None:  # fmt: skip
    """Run `count` trials and keep the best; one that diverged ranks below all others.

    An error that ends the search is sound too: it is the outcome of one trial, ranked above all others.
    """
    kept: Best[R] | DivergedError | None = None
    highest = -math.inf
    for _ in range(count):
        number = configs.draw(source)
        outcome: Best[R] | DivergedError
        try:
            score, result = tried(trial, configs.at(number), price, dataset)
            outcome = Best(configs.at(number), score, result)
        except DivergedError as error:
            score, outcome = -math.inf, error
        if kept is None or score > highest:
            kept, highest = outcome, score
    if isinstance(kept, DivergedError):
        raise DivergedError(
            "The best trial is one that diverged. What was charged stays spent. Fix: smaller learning rates in the space."
        ) from kept
    return kept


def _naive(one: events.Event, trials: Repetitions, budget: Budget) -> float:
    try:
        count = math.ceil(trials.mean)
        return accounting.spending(events.repeated(one, count), budget.delta, budget.relation).epsilon
    except AccountingError:
        return math.inf


def _shown(epsilon: float) -> str:
    return f"epsilon {bound(epsilon)}" if math.isfinite(epsilon) else "more than can be accounted"


def _not_covered(share: float, ledger: Ledger | None, source: RandomSource) -> tuple[str, ...]:
    sentences = [
        "How long the search took, its use of the machine, and all else that tells how many trials there were: it is secret.",
        "What a trial prints, writes or keeps apart from what it returns, and what it computes from the records without "
        "charging it.",
        "That a trial was refused because of the records themselves, such as scores that are no numbers.",
        "Choices made by looking at these records before the search (the space, the model, the number of steps, the split).",
        "What training and evaluation leave out: rounding in the model's own number type, and a curator who is trusted.",
    ]
    if not share:
        sentences.append(
            "The scores, if they were computed from these records: no part of the budget was set aside for them."
        )
    if ledger is None or not ledger.is_durable:
        sentences.append("Other runs on the same records: no ledger on disk was given, so nobody adds them up.")
    if not source.is_secure:
        sentences.append(
            "Anybody who knows the seed: the number of trials came from a seeded source, which is for tests only."
        )
    return tuple(sentences)
