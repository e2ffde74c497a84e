"""When a run ends before its plan does: a target, a plateau, a number of rounds; and several of them together.

A run also ends with its plan, which is when its budget is spent. What a private run has been charged stays the cost of the
whole plan: to stop early because of what was released gives nothing back, except under a filter (`learning.filters`).

A run that goes on from a checkpoint counts all of its rounds and looks; one that a rule has ended stays ended.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, final

from torch import nn
from typing_extensions import override

from sfumato import _checks
from sfumato.errors import InputError

Score = Callable[[nn.Module], float]
"""Tells how good a model is, higher is better: on public or held-out records, or through a release that is paid for."""


Ask = Callable[[nn.Module, int], str | None]
"""Called with (model, rounds done); returns why to stop, or None to go on."""

Memory = dict[str, Any]
"""Plain numbers by name."""


@final
@dataclass
class Watched:
    """What a stopping rule knows of a run, in all of its processes.

    Attributes:
        rounds: Steps that were done.
        stopped: Why the rule ended the run; empty while it goes on.
        memory: Of the rule.
    """

    rounds: int = 0
    stopped: str = ""
    memory: Memory = field(default_factory=dict)


class Stop(ABC):
    """A rule that is asked after each round."""

    looks: bool = True
    """Whether it looks at a score, which may come from private records."""

    @abstractmethod
    def begin(self, memory: Memory | None = None) -> Ask:
        """Return what is called after each round.

        Args:
            memory: Where the rule keeps what it has to know when the run goes on from a checkpoint; empty at first.
        """


@final
@dataclass(frozen=True)
class Rounds(Stop):
    """Stops after so many rounds.

    Raises:
        InputError: most is below 1.
    """

    most: int
    looks = False

    def __post_init__(self) -> None:
        _checks.count("most", self.most)

    @override
    def begin(self, memory: Memory | None = None) -> Ask:
        return lambda _, done: f"{done} rounds were asked for" if done >= self.most else None


@final
@dataclass(frozen=True)
class Target(Stop):
    """Stops once a score is reached.

    Args:
        score: Called with the model.
        at: The score to reach, on the score's own scale: 0.95, not 95, where the score is a share. A target that is never
            reached stops nothing; `TrainingResult.stopped` is then empty.
        every: Rounds between two looks.

    Raises:
        InputError: a number is out of range; or, while the run goes on, the score is no number.
    """

    score: Score
    at: float
    every: int = 1

    def __post_init__(self) -> None:
        _checks.count("every", self.every)
        if not math.isfinite(self.at):
            raise InputError(f"at must be a finite number, not {self.at}.")

    @override
    def begin(self, memory: Memory | None = None) -> Ask:
        def asked(model: nn.Module, done: int) -> str | None:
            if done % self.every:
                return None
            found = _number(self.score(model))
            return f"the score {found:.4g} reached the target {self.at:.4g}" if found >= self.at else None

        return asked


@final
@dataclass(frozen=True)
class Plateau(Stop):
    """Stops once a score has not risen for a while.

    Args:
        score: Called with the model.
        patience: Looks without a rise.
        by: By how much more than at the last rise the score must be to count as the next one, at least 0.
        every: Rounds between two looks.

    Raises:
        InputError: a number is out of range; or, while the run goes on, the score is no number.
    """

    score: Score
    patience: int = 5
    by: float = 0.0
    every: int = 1

    def __post_init__(self) -> None:
        _checks.count("patience", self.patience)
        _checks.count("every", self.every)
        _checks.non_negative("by", self.by)

    @override
    def begin(self, memory: Memory | None = None) -> Ask:
        kept: Memory = {} if memory is None else memory
        kept.setdefault("best", -math.inf)
        kept.setdefault("flat", 0)

        def asked(model: nn.Module, done: int) -> str | None:
            if done % self.every:
                return None
            found = _number(self.score(model))
            best, flat = kept["best"], kept["flat"]
            best, flat = (found, 0) if found > best + self.by else (best, flat + 1)
            kept.update(best=best, flat=flat)
            above = f"above {best + self.by:.4g}"
            return f"the score has not risen {above} in {flat} looks" if flat >= self.patience else None

        return asked


@final
@dataclass(frozen=True, init=False)
class FirstOf(Stop):
    """Stops when the first of several rules does.

    Args:
        rules: In one tuple.

    Raises:
        InputError: there is no rule, or they are not in one tuple.
    """

    rules: tuple[Stop, ...]

    def __init__(self, rules: tuple[Stop, ...] = (), *more: object) -> None:
        alone = not isinstance(rules, tuple) or not rules or not all(isinstance(rule, Stop) for rule in rules)
        if more or alone:
            raise InputError(
                "FirstOf needs one tuple of rules, for example FirstOf((Rounds(100), Target(score, 0.95)))."
            )
        object.__setattr__(self, "rules", rules)
        object.__setattr__(self, "looks", any(rule.looks for rule in rules))

    @override
    def begin(self, memory: Memory | None = None) -> Ask:
        kept: Memory = {} if memory is None else memory
        begun = [rule.begin(kept.setdefault(str(place), {})) for place, rule in enumerate(self.rules)]

        def asked(model: nn.Module, done: int) -> str | None:
            answers = [ask(model, done) for ask in begun]  # each is asked, so that a plateau counts every look
            return next((answer for answer in answers if answer is not None), None)

        return asked


def _number(value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise InputError(f"The score of a stopping rule must be a finite number, not {value!r}.")
    return float(value)
