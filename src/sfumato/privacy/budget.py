"""What is promised: epsilon, delta, who is protected, and against which neighbours."""

from __future__ import annotations

import enum
import math
from dataclasses import dataclass
from typing import TypeVar

from sfumato import _checks
from sfumato.errors import InputError

_E = TypeVar("_E", bound=enum.StrEnum)


class Unit(enum.StrEnum):
    """Who is protected: one record, or one client with everything it holds."""

    RECORD = "record"
    CLIENT = "client"


class Relation(enum.StrEnum):
    """Which two data sets count as neighbours (they differ in one unit)."""

    ADD_OR_REMOVE_ONE = "add-or-remove-one"
    REPLACE_ONE = "replace-one"


@dataclass(frozen=True)
class Budget:
    """The promise a release must keep: (epsilon, delta)-differential privacy for one unit.

    Args:
        epsilon: Above 0. `math.inf` means no privacy at all: plain training, nothing promised.
        delta: In (0, 1). Choose it well below one over the number of units. Ignored (may be left out)
            when epsilon is infinite.
        unit: `"record"` or `"client"` (everything that one owner holds).
        relation: `"add-or-remove-one"` (default) or `"replace-one"`.

    Raises:
        InputError: epsilon or delta is out of range or NaN, or the unit or relation is unknown.
    """

    epsilon: float
    delta: float = 0.0
    unit: Unit = Unit.RECORD
    relation: Relation = Relation.ADD_OR_REMOVE_ONE

    def __post_init__(self) -> None:
        _checks.positive("epsilon", self.epsilon, allow_inf=True)
        if math.isinf(self.epsilon):
            _checks.fraction("delta", self.delta, allow_zero=True)
        else:
            _checks.fraction("delta", self.delta)
        object.__setattr__(self, "unit", _member(Unit, "unit", self.unit))
        object.__setattr__(self, "relation", _member(Relation, "relation", self.relation))

    @property
    def is_private(self) -> bool:
        """Whether anything is promised at all (epsilon is finite)."""
        return math.isfinite(self.epsilon)

    def check_population(self, population: int) -> None:
        """Refuse a delta that would allow publishing one whole unit out of `population` units.

        Raises:
            InputError: delta >= 1 / population.
        """
        _checks.count("population", population)
        if self.is_private and self.delta >= 1 / population:
            raise InputError(
                f"delta {self.delta:g} is not below 1/{population} ({1 / population:.3g}), so it would allow "
                f"publishing a whole {self.unit}; choose a smaller delta, for example {0.1 / population:.0e}."
            )

    def __str__(self) -> str:
        if not self.is_private:
            return "no privacy promised (epsilon is infinite)"
        return f"({self.epsilon:g}, {self.delta:g}) per {self.unit}, {self.relation}"


def _member(kind: type[_E], name: str, value: str) -> _E:
    try:
        return kind(value)
    except ValueError:
        choices = " or ".join(f'"{member}"' for member in kind)
        raise InputError(f"{name} {value!r} is unknown; choose {choices}.") from None
