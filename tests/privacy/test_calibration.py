"""Calibration: the noise found keeps the budget, and wastes next to nothing of it."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sfumato.errors import AccountingError, PlanError
from sfumato.privacy import events
from sfumato.privacy.accounting import spending
from sfumato.privacy.budget import Budget, Relation
from sfumato.privacy.calibration import calibrate


@settings(max_examples=3, deadline=None)
@given(
    epsilon=st.floats(min_value=0.3, max_value=8.0),
    delta=st.sampled_from([1e-4, 1e-6]),
    rate=st.floats(min_value=0.01, max_value=1.0),
    steps=st.integers(min_value=1, max_value=60),
)
def test_the_noise_found_keeps_the_budget_and_uses_it(epsilon: float, delta: float, rate: float, steps: int) -> None:
    def event_of(noise: float) -> events.Event:
        return events.repeated(events.poisson_sampled(rate, events.gaussian(noise)), steps)

    found = calibrate(event_of, Budget(epsilon, delta))
    assert 0.995 * epsilon <= found.spending.epsilon <= epsilon
    assert found.spending == spending(event_of(found.noise_multiplier), delta)


def test_a_single_gaussian_is_calibrated_to_the_analytic_answer() -> None:
    # Balle and Wang 2018: the least std for (1, 1e-5) at sensitivity 1 is 3.7306.
    found = calibrate(events.gaussian, Budget(1.0, 1e-5))
    assert found.noise_multiplier == pytest.approx(3.7306, rel=2e-3)
    assert found.noise_multiplier >= 3.7306


def test_replace_one_is_calibrated_without_sampling() -> None:
    budget = Budget(1.0, 1e-5, relation=Relation.REPLACE_ONE)
    found = calibrate(lambda noise: events.repeated(events.gaussian(noise), 4), budget)
    assert 0.995 <= found.spending.epsilon <= 1.0


def test_replace_one_with_sampling_is_refused() -> None:
    budget = Budget(1.0, 1e-5, relation=Relation.REPLACE_ONE)
    with pytest.raises(AccountingError, match="add-or-remove-one"):
        calibrate(lambda noise: events.poisson_sampled(0.1, events.gaussian(noise)), budget)


def test_an_infinite_epsilon_is_not_calibrated() -> None:
    with pytest.raises(PlanError, match="needs no noise"):
        calibrate(events.gaussian, Budget(math.inf))


def test_a_budget_that_no_noise_can_keep_is_refused() -> None:
    with pytest.raises(PlanError, match="use fewer steps or a larger budget"):
        calibrate(lambda _: events.gaussian(0.5), Budget(1.0, 1e-5))


def test_a_budget_that_every_noise_keeps_is_refused() -> None:
    with pytest.raises(PlanError, match="choose a smaller epsilon"):
        calibrate(lambda _: events.gaussian(50.0), Budget(1.0, 1e-5))
