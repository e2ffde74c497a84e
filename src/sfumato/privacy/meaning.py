# ruff: noqa: RUF001  (Chinese sentences have Chinese commas)
"""What a promise means for an attack on one unit: a few numbers, and two plain sentences in English and Chinese."""

from __future__ import annotations

import math
from dataclasses import dataclass
from decimal import ROUND_CEILING, Decimal
from typing import Any, Final, Literal, TypeAlias, final

from sfumato import _checks
from sfumato._numbers import bound, percent_bound
from sfumato.errors import AccountingError, InputError
from sfumato.privacy import accounting, events
from sfumato.privacy.budget import Budget, Relation, Unit
from sfumato.privacy.statement import PrivacyStatement
from sfumato.privacy.tradeoff import RARE, TradeOff, trade_off

Language: TypeAlias = Literal["en", "zh"]
Basis: TypeAlias = Literal["pld", "epsilon-delta"]

FALSE_POSITIVE_RATES: Final = (0.001, 0.01, 0.1)
SHOWN_RATE: Final = 0.01  # of false positives, in the sentences and in the plot of the report; one of the above
_CURVE = tuple((k / 40) ** 2 for k in range(41))  # dense where false positives are few


@final
@dataclass(frozen=True)
class Meaning:
    """What a promise means for an attack on one unit; every number is an upper bound.

    Attributes:
        epsilon: The claim, as in the statement.
        delta: The delta of the claim.
        unit: Who is protected.
        relation: Which data sets count as neighbours.
        trade_off: Which errors an attack must make.
        basis: `"pld"`: from the privacy loss distribution of what was done. `"epsilon-delta"`: from epsilon and delta alone,
            because no such distribution is known for it; true, but less tight.
    """

    epsilon: float
    delta: float
    unit: Unit
    relation: Relation
    trade_off: TradeOff
    basis: Basis

    @property
    def advantage(self) -> float:
        """The largest difference of true and false positive rate."""
        return self.trade_off.advantage

    @property
    def guess(self) -> float:
        """The average posterior of the likelier answer from a prior of 50 %, which is how often the best guess is right."""
        return self.trade_off.guess

    @property
    def certainty(self) -> float:
        """The posterior probability of the truth, from a prior of 50 %, that at most 1 % of releases pass."""
        return self.trade_off.certainty()

    @property
    def success(self) -> tuple[tuple[float, float], ...]:
        """For the false positive rates 0.1 %, 1 % and 10 % the largest true positive rate."""
        return tuple((rate, self.trade_off.true_positive_rate(rate)) for rate in FALSE_POSITIVE_RATES)

    @property
    def curve(self) -> tuple[tuple[float, float], ...]:
        """The trade-off curve as points (false positive rate, least false negative rate)."""
        return tuple((x, self.trade_off.false_negative_rate(x)) for x in _CURVE)

    def sentences(self, language: Language = "en") -> tuple[str, str]:
        """Return the meaning in two plain sentences, in English or Chinese.

        Raises:
            InputError: the language is neither "en" nor "zh".
        """
        return in_words(language, self.unit, self.relation, self.guess, self.trade_off.true_positive_rate(SHOWN_RATE))

    def to_dict(self) -> dict[str, Any]:
        """Return the numbers as plain JSON data, as they stand in `result.json`."""
        return {
            "advantage": self.advantage,
            "guess": self.guess,
            "certainty": self.certainty,
            "success": [list(pair) for pair in self.success],
            "curve": [list(pair) for pair in self.curve],
            "basis": self.basis,
        }

    def __str__(self) -> str:
        claim = "nothing is promised" if math.isinf(self.epsilon) else f"epsilon {bound(self.epsilon)}"
        source = "the privacy loss distribution" if self.basis == "pld" else "epsilon and delta alone"
        rows = [f"  found at {100 * x:g} % false positives: at most {share_bound(y)}" for x, y in self.success]
        return "\n".join(
            [
                f"What the promise means ({claim}; from {source}):",
                *(f"  {sentence}" for sentence in self.sentences()),
                *rows,
                f"  advantage: at most {percent_bound(self.advantage)}",
                f"  sure of the truth, but for {100 * RARE:g} % of releases: at most {percent_bound(self.certainty)}",
            ]
        )


def meaning(
    of: PrivacyStatement | events.Event, *, delta: float | None = None, unit: Unit | None = None,
    relation: Relation | None = None,
) -> Meaning:  # fmt: skip
    """Return what a statement, or an event, means for an attack on one unit.

    **Guarantee**: the bounds follow from the same upper bounds that prove epsilon: the privacy loss distribution of the
    event, and the claimed (epsilon, delta). They hold for every attack, if the statement is true.

    **Edge cases**

    | of what | answer |
    | --- | --- |
    | an event without a privacy loss distribution | from epsilon and delta alone; `basis` says so |
    | an infinite epsilon | every bound is 1 |
    | no steps | no better than guessing |
    | sampling with replace-one | refused, as by `accounting.spending` |

    Args:
        of: A statement, or an event with its `delta`, `unit` and `relation`.
        delta: For an event: where its epsilon is stated.
        unit: For an event: who is protected; one record, if not said.
        relation: For an event: which data sets count as neighbours; add-or-remove-one, if not said.

    Raises:
        InputError: an argument is missing, out of range, or given beside a statement that has it already.
        AccountingError: no bound on epsilon can be proven for the event.
    """
    if isinstance(of, PrivacyStatement):
        if (delta, unit, relation) != (None, None, None):
            raise InputError("A statement has its delta, unit and relation already; leave them out.")
        event, epsilon, delta, budget = of.event, of.epsilon, of.delta, of.budget
    else:
        if delta is None:
            raise InputError("An event says nothing about delta; give one, for example delta=1e-5.")
        _checks.fraction("delta", delta)
        budget = Budget(math.inf, delta, unit or Unit.RECORD, relation or Relation.ADD_OR_REMOVE_ONE)
        event, epsilon = of, accounting.spending(of, delta, budget.relation).epsilon
    curve, basis = _curve_of(event, epsilon, delta)
    return Meaning(epsilon, delta, budget.unit, budget.relation, curve, basis)


def _curve_of(event: events.Event, epsilon: float, delta: float) -> tuple[TradeOff, Basis]:
    """Return the trade-off of the event and of the claim together, and what it rests on."""
    claim = TradeOff((epsilon,), (delta,)) if math.isfinite(epsilon) else TradeOff((), ())
    try:
        curve = trade_off(event)
    except AccountingError:
        return claim, "epsilon-delta"
    return TradeOff(curve.epsilons + claim.epsilons, curve.deltas + claim.deltas), "pld"


def share_bound(value: float) -> str:
    """Return a share as percent with its sign, rounded up: below 1 % to two digits after the point, else to one."""
    if value >= 0.01:
        return percent_bound(value)
    return f"{(Decimal(repr(value)) * 100).quantize(Decimal('0.01'), rounding=ROUND_CEILING):f} %"


def in_words(language: Language, unit: Unit, relation: Relation, guess: float, success: float) -> tuple[str, str]:
    """Return two plain sentences: on the best guess, and on the true positive rate at 1 % false positives.

    Args:
        language: "en" or "zh".
        unit: Who is protected.
        relation: Which data sets count as neighbours.
        guess: How often the best guess is right, from a prior of 50 %.
        success: The largest true positive rate at a false positive rate of 1 %.

    Raises:
        InputError: the language is neither "en" nor "zh".
    """
    if (language, relation) not in _SENTENCES:
        raise InputError(f'language {language!r} is unknown; choose "en" or "zh".')
    gap = "" if language == "zh" else " "
    shown = {"guess": percent_bound(guess).replace(" ", gap), "success": percent_bound(success).replace(" ", gap)}
    first, second = (text.format(**_UNITS[language, unit], **shown) for text in _SENTENCES[language, relation])
    return first, second


_UNITS: Final = {
    ("en", Unit.RECORD): {"one": "record", "this": "record", "many": "records"},
    ("en", Unit.CLIENT): {"one": "client", "this": "client", "many": "clients"},
    ("zh", Unit.RECORD): {"one": "一条记录", "this": "这条记录", "many": "记录"},
    ("zh", Unit.CLIENT): {"one": "一个客户端", "this": "这个客户端的数据", "many": "客户端数据"},
}
_SENTENCES: Final = {
    ("en", Relation.ADD_OR_REMOVE_ONE): (
        "Somebody who knows every {one} but one, and sees what is released, is right at most {guess} of the time about "
        "whether that one was used; a coin is right 50 % of the time.",
        "An attack that wrongly names 1 % of the {many} that were not used finds at most {success} of those that were; "
        "without the release it would find 1 %.",
    ),
    ("en", Relation.REPLACE_ONE): (
        "Somebody who knows every {one} but one, and sees what is released, is right at most {guess} of the time about "
        "which of two candidates that one was; a coin is right 50 % of the time.",
        "An attack that names the second candidate in 1 % of the cases where it was the first names it in at most {success} "
        "of the cases where it was the second; without the release it would be 1 %.",
    ),
    ("zh", Relation.ADD_OR_REMOVE_ONE): (
        "即使有人知道除{one}之外的全部数据，又看到了发布的结果，他判断{this}是否被使用过，猜对的概率也不超过 {guess}；"
        "抛硬币猜对的概率是 50%。",
        "如果一种攻击会把 1% 未被使用的{many}误认作被使用过，那么在被使用过的{many}中，它最多认出 {success}；"
        "若没有发布任何结果，这个比例是 1%。",
    ),
    ("zh", Relation.REPLACE_ONE): (
        "即使有人知道除{one}之外的全部数据，又看到了发布的结果，他判断{this}是两个候选中的哪一个，猜对的概率也不超过 {guess}；"
        "抛硬币猜对的概率是 50%。",
        "如果实际是第一个候选时，一种攻击有 1% 的情况误判为第二个，那么实际是第二个候选时，它判断正确的情况最多占 {success}；"
        "若没有发布任何结果，这个比例是 1%。",
    ),
}
