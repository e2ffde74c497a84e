from __future__ import annotations

import dataclasses
import math

import dp_accounting
import pytest
from dp_accounting import pld
from hypothesis import given, settings
from hypothesis import strategies as st

import sfumato as sf
from sfumato.errors import InputError, PlanError
from sfumato.privacy import events


@settings(max_examples=8, deadline=None)
@given(
    epsilon=st.floats(0.2, 8),
    batch=st.sampled_from([50, 200, 1000]),
    steps=st.integers(1, 200),
    sampling=st.sampled_from(["poisson", "shuffled"]),
)
def test_epsilon_recomputed_from_the_event_by_dp_accounting_alone_is_the_claim(
    epsilon: float, batch: int, steps: int, sampling: str
) -> None:
    plan = sf.Plan.calibrate(
        sf.Budget(epsilon, 1e-5), population=1000, batch_size=batch, steps=steps, sampling=sampling
    )

    def rebuild(tree: object) -> object:
        if isinstance(tree, list):
            return [rebuild(item) for item in tree]
        if isinstance(tree, dict):
            fields = {name: rebuild(value) for name, value in tree.items() if name != "type"}
            return getattr(dp_accounting, tree["type"])(**fields)
        return tree

    recomputed = pld.PLDAccountant().compose(rebuild(events.to_dict(plan.event))).get_epsilon(1e-5)
    assert recomputed == pytest.approx(plan.spending.epsilon, rel=1e-9)
    assert plan.spending.epsilon <= epsilon
    assert plan.spending.epsilon >= 0.995 * epsilon
    assert plan.spending.rdp >= plan.spending.pld


def test_a_plan_that_costs_more_than_its_budget_cannot_be_made() -> None:
    plan = sf.Plan.calibrate(sf.Budget(1.0, 1e-5), population=100, batch_size=100, steps=10)
    with pytest.raises(PlanError, match=r"costs epsilon .* more than the budget"):
        dataclasses.replace(plan, noise_multiplier=plan.noise_multiplier * 0.9)
    with pytest.raises(PlanError, match="more than the budget"):
        dataclasses.replace(plan, steps=11)


def test_epsilon_after_never_understates_and_ends_at_the_claim() -> None:
    plan = sf.Plan.calibrate(sf.Budget(1.0, 1e-5), population=1000, batch_size=50, steps=40)
    exact = [0.0] + [
        pld.PLDAccountant().compose(plan.event_after(step)).get_epsilon(1e-5) for step in (1, 7, 20, 39, 40)
    ]
    shown = [plan.epsilon_after(step) for step in (0, 1, 7, 20, 39, 40)]
    assert all(one >= other - 1e-12 for one, other in zip(shown, exact, strict=True))
    assert shown[-1] == plan.spending.epsilon
    assert shown == sorted(shown)


@pytest.mark.parametrize("delta", [1e-2, 0.5])
def test_delta_that_would_allow_publishing_a_record_is_refused(delta: float) -> None:
    with pytest.raises(InputError, match=r"delta .* not below 1/100"):
        sf.Plan.calibrate(sf.Budget(1.0, delta), population=100, batch_size=10, steps=5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"batch_size": 200, "steps": 5}, "larger than the population"),
        ({"batch_size": 10}, "either steps or epochs"),
        ({"batch_size": 10, "steps": 5, "epochs": 1}, "either steps or epochs"),
        ({"batch_size": 10, "steps": 0}, "steps must be"),
        ({"batch_size": 10, "steps": 5, "sampling": "poison"}, 'Did you mean "poisson"'),
        ({"batch_size": 10, "steps": 5, "sampling": "full-batch"}, "equal to the population"),
        ({"batch_size": 10, "steps": 5, "clip": math.nan}, "clip must be"),
        ({"batch_size": 10, "epochs": math.nan}, "epochs must be"),
    ],
)
def test_contradictory_arguments_are_refused_with_the_fix(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        sf.Plan.calibrate(sf.Budget(1.0, 1e-5), population=100, **arguments)  # type: ignore[arg-type]


def test_without_privacy_nothing_is_promised() -> None:
    plan = sf.Plan.without_privacy(population=100, batch_size=10, epochs=2)
    assert plan.steps == 20
    assert math.isinf(plan.spending.epsilon)
    assert isinstance(plan.event, dp_accounting.NonPrivateDpEvent)


def test_noise_beyond_exact_floats_is_refused_before_any_charge() -> None:
    with pytest.raises(PlanError, match="noise_multiplier"):
        sf.Plan(sf.Budget(1.0, 1e-5), sf.FullBatch(), 1.0, 3e6, 1, 100)
