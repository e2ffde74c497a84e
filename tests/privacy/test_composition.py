"""Many different steps: accounted quickly, never below the exact composition, and close above it."""

from __future__ import annotations

import math

import dp_accounting
import pytest
from dp_accounting import pld
from hypothesis import given, settings
from hypothesis import strategies as st

from sfumato.errors import AccountingError, InputError
from sfumato.privacy import accounting, composition, events

DELTA = 1e-5


def uneven(rates: list[float], noises: list[float]) -> events.Event:
    return events.composed([events.poisson_sampled(q, events.gaussian(z)) for q, z in zip(rates, noises, strict=True)])


def exact(event: events.Event, interval: float = 1e-3) -> float:
    """dp-accounting's own composition, step by step, on the same grid."""
    accountant = pld.PLDAccountant(value_discretization_interval=interval)
    accountant.compose(event)
    return float(accountant.get_epsilon(DELTA))


def cosine(steps: int, start: float, end: float) -> list[float]:
    return [end + (start - end) * (1 + math.cos(math.pi * t / (steps - 1))) / 2 for t in range(steps)]


@settings(max_examples=12, deadline=None)
@given(
    steps=st.integers(min_value=2, max_value=60),
    rate=st.floats(min_value=0.001, max_value=0.5),
    noise=st.floats(min_value=0.7, max_value=5.0),
    spread=st.floats(min_value=1.0, max_value=4.0),
    rising=st.booleans(),
)
def test_grouping_never_claims_less_than_the_exact_composition(
    steps: int, rate: float, noise: float, spread: float, rising: bool
) -> None:
    noises = cosine(steps, noise, noise * spread)
    rates = [rate * (1 + (t / steps if rising else 0)) for t in range(steps)]
    event = uneven(rates, noises)
    total = composition.epsilons([event], DELTA, 1e-3)[0]
    truth = exact(event)
    assert total >= truth * (1 - 1e-6)
    assert total <= truth * 1.04 + 2e-3


def test_two_hundred_steps_of_a_cosine_lie_within_two_percent_above_the_exact_composition() -> None:
    # 0.40639 is dp-accounting's own answer on its grid of 1e-4 for noises falling linearly from 2 to 0.9.
    noises = [2.0 + (0.9 - 2.0) * t / 199 for t in range(200)]
    event = uneven([256 / 60000] * 200, noises)
    truth = exact(event)
    assert truth <= accounting.spending(event, DELTA).epsilon <= 1.02 * truth


def test_each_step_has_a_partner_that_costs_no_less() -> None:
    noises, rates = cosine(300, 3.0, 1.0), [0.01 + 0.00001 * t for t in range(300)]
    found = composition.leaves(composition.grouped(uneven(rates, noises)))
    partners = [(leaf.sampling_probability, leaf.event.noise_multiplier, n) for leaf, n in found.items()]
    assert sum(times for *_, times in partners) == 300
    assert len(partners) < 300
    for bound in (1.2, 1.7, 2.5):
        assert sum(n for _, z, n in partners if z <= bound) >= sum(z <= bound for z in noises)
    for bound in (0.0105, 0.012):
        assert sum(n for q, _, n in partners if q >= bound) >= sum(q >= bound for q in rates)


def test_an_event_with_few_different_steps_is_left_alone() -> None:
    event = uneven([0.1] * 24, cosine(24, 2.0, 1.0))
    assert composition.grouped(event) is event


def test_gaussian_sums_without_sampling_are_one_sum() -> None:
    event = events.composed([events.gaussian(z) for z in cosine(500, 40.0, 20.0)])
    one = math.fsum(z**-2 for z in cosine(500, 40.0, 20.0)) ** -0.5
    assert len(composition.parts(event)) == 1
    assert composition.epsilons([event], DELTA, 1e-4)[0] == pytest.approx(exact(events.gaussian(one), 1e-4), rel=1e-9)


def test_the_curve_of_a_run_rises_to_its_whole_cost() -> None:
    step = events.poisson_sampled(0.01, events.gaussian(1.0))
    points = accounting.curve([events.repeated(step, 50)] * 4, DELTA)
    assert points == sorted(points)
    assert points[-1] >= accounting.spending(events.repeated(step, 200), DELTA).epsilon * (1 - 1e-6)
    assert points[0] >= accounting.spending(events.repeated(step, 50), DELTA).epsilon * (1 - 1e-6)


def test_a_part_without_privacy_makes_everything_after_it_infinite() -> None:
    points = accounting.curve([events.gaussian(5.0), events.non_private(), events.gaussian(5.0)], DELTA)
    assert math.isfinite(points[0])
    assert points[1:] == [math.inf, math.inf]


def test_what_no_distribution_bounds_is_refused() -> None:
    event = dp_accounting.SampledWithReplacementDpEvent(100, 10, events.gaussian(1.0))
    with pytest.raises(InputError, match="cannot be written"):
        composition.pld_of(event, 1e-3)
    nested = events.poisson_sampled(0.5, events.composed([events.gaussian(1.0)]))
    with pytest.raises(AccountingError, match="sample each part"):
        composition.pld_of(nested, 1e-3)
