"""The promise: what a budget accepts, and what it refuses by name."""

from __future__ import annotations

import dataclasses
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sfumato.errors import InputError
from sfumato.privacy.budget import Budget, Relation, Unit


@given(
    epsilon=st.floats(min_value=0, exclude_min=True, allow_nan=False, allow_infinity=False),
    delta=st.floats(min_value=0, max_value=1, exclude_min=True, exclude_max=True),
    unit=st.sampled_from([*Unit, "record", "client"]),
    relation=st.sampled_from([*Relation, "add-or-remove-one", "replace-one"]),
)
def test_any_honest_budget_is_kept_as_given(epsilon: float, delta: float, unit: str, relation: str) -> None:
    budget = Budget(epsilon, delta, unit, relation)
    assert (budget.epsilon, budget.delta) == (epsilon, delta)
    assert budget.unit is Unit(unit)
    assert budget.relation is Relation(relation)
    assert budget.is_private


@pytest.mark.parametrize("epsilon", [0, -1, math.nan, -math.inf, True, "1", None])
def test_epsilon_out_of_range_is_refused_by_name(epsilon: object) -> None:
    with pytest.raises(InputError, match="epsilon must be"):
        Budget(epsilon, 1e-5)  # type: ignore[arg-type]


@pytest.mark.parametrize("delta", [0, 1, -1e-5, 1.5, math.nan, math.inf, True, "0.1"])
def test_delta_out_of_range_is_refused_by_name(delta: object) -> None:
    with pytest.raises(InputError, match="delta must lie in"):
        Budget(1.0, delta)  # type: ignore[arg-type]


def test_delta_must_be_given_when_epsilon_is_finite() -> None:
    with pytest.raises(InputError, match="delta"):
        Budget(1.0)


def test_infinite_epsilon_promises_nothing_and_needs_no_delta() -> None:
    budget = Budget(math.inf)
    assert not budget.is_private
    assert str(budget) == "no privacy promised (epsilon is infinite)"
    budget.check_population(10)


def test_infinite_epsilon_still_refuses_a_nan_delta() -> None:
    with pytest.raises(InputError, match="delta"):
        Budget(math.inf, math.nan)


def test_an_unknown_unit_names_the_choices() -> None:
    with pytest.raises(InputError, match='unit \'clients\' is unknown; choose "record" or "client"'):
        Budget(1.0, 1e-5, "clients")  # type: ignore[arg-type]


def test_an_unknown_relation_names_the_choices() -> None:
    with pytest.raises(InputError, match='unknown; choose "add-or-remove-one" or "replace-one"'):
        Budget(1.0, 1e-5, relation="replace one")  # type: ignore[arg-type]


@given(population=st.integers(min_value=1, max_value=10**9))
def test_delta_must_be_below_one_over_the_population(population: int) -> None:
    Budget(1.0, 0.5 / population).check_population(population)
    if population > 1:
        with pytest.raises(InputError, match="publishing a whole record"):
            Budget(1.0, 1 / population).check_population(population)


@pytest.mark.parametrize("population", [0, -1, 1.5, math.nan, True])
def test_population_must_be_a_count(population: object) -> None:
    with pytest.raises(InputError, match="population"):
        Budget(1.0, 1e-5).check_population(population)  # type: ignore[arg-type]


def test_printed_form_names_unit_and_relation() -> None:
    assert str(Budget(1.0, 1e-5, Unit.CLIENT)) == "(1, 1e-05) per client, add-or-remove-one"


def test_budget_cannot_be_changed() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        Budget(1.0, 1e-5).epsilon = 2.0  # type: ignore[misc]
