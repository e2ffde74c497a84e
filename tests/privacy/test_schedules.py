"""Schedules: the declared ends are met, every factor is above 0, and nonsense is refused."""

from __future__ import annotations

import itertools
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sfumato.errors import InputError, PlanError
from sfumato.privacy.schedules import Constant, Cosine, Exponential, Linear, Listed, Schedule, Stepwise

ENDS = st.floats(min_value=1e-3, max_value=1e3)


@pytest.mark.parametrize("kind", [Linear, Cosine, Exponential])
@given(start=ENDS, end=ENDS, steps=st.integers(min_value=2, max_value=200))
def test_a_curve_goes_from_start_to_end_without_turning(
    kind: type[Linear | Cosine | Exponential], start: float, end: float, steps: int
) -> None:
    factors = kind(start, end).factors(steps)
    assert len(factors) == steps
    assert factors[0] == pytest.approx(start)
    assert factors[-1] == pytest.approx(end)
    rises = [b - a for a, b in itertools.pairwise(factors)]
    slack = 1e-9 * max(start, end)
    assert all(r >= -slack for r in rises) if end >= start else all(r <= slack for r in rises)


def test_known_points_of_the_curves() -> None:
    assert Linear(1.0, 3.0).factors(3) == (1.0, 2.0, 3.0)
    assert Cosine(1.0, 3.0).at(0.5) == pytest.approx(2.0)
    assert Cosine(1.0, 3.0).at(0.25) == pytest.approx(3 - (1 + math.sqrt(0.5)))
    assert Exponential(1.0, 4.0).at(0.5) == pytest.approx(2.0)
    assert Constant().factors(4) == (1.0,) * 4


def test_a_stepwise_schedule_changes_at_its_milestones() -> None:
    assert Stepwise((3.0, 2.0, 1.0), (0.5, 0.75)).factors(5) == (3.0, 3.0, 2.0, 1.0, 1.0)


def test_any_list_is_a_schedule_of_exactly_its_length() -> None:
    assert Listed([1, 2.5]).factors(2) == (1.0, 2.5)
    with pytest.raises(PlanError, match="2 values, the plan 3 steps"):
        Listed([1, 2.5]).factors(3)
    with pytest.raises(PlanError, match="one value for each step"):
        Listed([])


@pytest.mark.parametrize("schedule", [Linear, Cosine, Exponential])
@pytest.mark.parametrize("wrong", [0, -1, math.nan, math.inf, "1"])
def test_an_end_that_is_no_factor_is_refused(schedule: type[Linear], wrong: float) -> None:
    with pytest.raises(InputError, match="the start of the schedule"):
        schedule(wrong, 1.0)
    with pytest.raises(InputError, match="the end of the schedule"):
        schedule(1.0, wrong)


@pytest.mark.parametrize(
    ("values", "milestones"), [((1.0,), (0.5,)), ((1.0, 2.0, 3.0), (0.5, 0.5)), ((1.0, 2.0, 3.0), (0.7, 0.5))]
)
def test_milestones_that_do_not_fit_are_refused(values: tuple[float, ...], milestones: tuple[float, ...]) -> None:
    with pytest.raises(PlanError, match="rising milestones"):
        Stepwise(values, milestones)


def test_one_step_is_the_start() -> None:
    assert Linear(2.0, 1.0).factors(1) == (2.0,)


@pytest.mark.parametrize(
    "schedule", [Constant(), Linear(1, 2), Cosine(1, 2), Exponential(1, 2), Stepwise((1, 2), (0.5,)), Listed([1, 2])]
)
def test_every_kind_describes_itself(schedule: Schedule) -> None:
    assert schedule.describe()["kind"] == type(schedule).__name__.lower()
