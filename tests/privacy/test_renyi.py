"""One Renyi order: costs of events against exact arithmetic, and the way to epsilon and back."""

from __future__ import annotations

import math
from fractions import Fraction

import dp_accounting
import mpmath
import pytest
from dp_accounting import rdp
from hypothesis import given, settings
from hypothesis import strategies as st

from sfumato.errors import AccountingError, InputError
from sfumato.privacy import events, renyi
from sfumato.privacy.budget import Relation
from sfumato.privacy.events import RenyiFilterDpEvent
from sfumato.privacy.exact import exact, rounded_down, rounded_up

ORDERS = st.integers(2, 512)
NOISES = st.floats(0.1, 300)
DELTAS = st.floats(1e-12, 0.4)


def sampled(rate: float, noise: float) -> events.Event:
    return events.poisson_sampled(rate, events.gaussian(noise))


def truth(rate: float, noise: float, order: int) -> mpmath.mpf:
    """Mironov, Talwar and Zhang 2019, for integer orders, to 50 digits."""
    with mpmath.workdps(50):
        q, sigma = mpmath.mpf(repr(rate)), mpmath.mpf(repr(noise))
        terms = (
            mpmath.binomial(order, i) * (1 - q) ** (order - i) * q**i * mpmath.exp((i * i - i) / (2 * sigma**2))
            for i in range(order + 1)
        )
        return mpmath.log(mpmath.fsum(terms)) / (order - 1)


# What an event costs


@settings(max_examples=60, deadline=None)
@given(st.floats(1e-9, 0.999), NOISES, ORDERS)
def test_sampled_noise_never_costs_less_than_in_exact_arithmetic(rate: float, noise: float, order: int) -> None:
    cost, exactly = renyi.cost(sampled(rate, noise), order), truth(rate, noise, order)
    assert exactly <= cost <= exactly * (1 + 2e-9) + 2e-11


@settings(max_examples=60)
@given(st.lists(st.tuples(NOISES, st.integers(0, 10**6)), max_size=6), ORDERS)
def test_unsampled_noise_is_added_up_exactly_and_rounded_up(parts: list[tuple[float, int]], order: int) -> None:
    event = events.composed([events.repeated(events.gaussian(noise), times) for noise, times in parts])
    exactly = sum(times * order / (2 * exact(noise) ** 2) for noise, times in parts)
    assert exactly <= exact(renyi.cost(event, order)) <= exactly * (1 + Fraction(1, 10**15))


@pytest.mark.parametrize("order", [2, 3, 7, 12, 33, 128])
@pytest.mark.parametrize(
    "event",
    [
        events.repeated(sampled(0.01, 1.0), 1000),
        events.composed([sampled(0.5, 0.7), events.gaussian(2.0), dp_accounting.LaplaceDpEvent(3.0)]),
        events.repeated(events.composed([sampled(0.1, 2.0), events.repeated(events.gaussian(5.0), 3)]), 20),
        events.poisson_sampled(0.2, events.composed([events.gaussian(2.0), events.repeated(events.gaussian(3.0), 4)])),
    ],
)
def test_costs_are_those_of_dp_accounting(event: events.Event, order: int) -> None:
    theirs = rdp.RdpAccountant(orders=[order]).compose(event).rdp[0]
    assert theirs <= renyi.cost(event, order) <= theirs * (1 + 1e-8) + 1e-7


@pytest.mark.parametrize("shape", [math.inf, 0.0, 0.5, 1.0])
def test_the_best_of_a_random_number_of_runs_costs_what_dp_accounting_says(shape: float) -> None:
    event = events.repeat_and_select(events.repeated(sampled(0.05, 1.5), 40), 5.0, shape)
    orders = [2, 4, 8, 12, 16, 32, 64, 128, 256, 512]
    theirs = rdp.RdpAccountant(orders=orders).compose(event).rdp[orders.index(12)]
    ours = renyi.cost(event, 12)
    assert theirs <= ours <= theirs * (1 + 1e-6) + 1e-6
    assert ours > renyi.cost(event.event, 12)
    assert ours <= rdp.RdpAccountant(orders=[12]).compose(event).rdp[0] * (1 + 1e-6)


def test_samplers_that_renyi_accounting_does_not_know_cost_their_bound() -> None:
    allocation = events.RandomAllocationDpEvent(3.0, 10, 2, 4)
    assert renyi.cost(allocation, 6) == renyi.cost(events.repeated(events.gaussian(3.0), 8), 6)
    truncated = dp_accounting.TruncatedSubsampledGaussianDpEvent(1000, 0.05, 60, 2.0)
    bound = events.repeated(sampled(0.05, 1.0), 4)
    assert renyi.cost(events.repeated(truncated, 7), 6) == renyi.cost(events.repeated(bound, 7), 6)
    with pytest.raises(AccountingError, match="No Renyi bound is known"):
        renyi.cost(dp_accounting.dp_event.ZCDpEvent(0.1), 6)
    with pytest.raises(AccountingError, match="add-or-remove-one"):
        renyi.cost(allocation, 6, Relation.REPLACE_ONE)


def test_edges_of_the_cost() -> None:
    nothing = events.repeated(events.gaussian(1.0), 0)
    assert renyi.cost(nothing, 5) == 0.0
    assert renyi.cost(events.composed([]), 5) == 0.0
    assert renyi.cost(dp_accounting.SelfComposedDpEvent(events.non_private(), 0), 5) == 0.0
    for infinite in (
        events.non_private(),
        dp_accounting.GaussianDpEvent(0),
        events.composed([events.gaussian(1.0), events.non_private()]),
        events.repeated(events.non_private(), 3),
        events.repeat_and_select(events.non_private(), 2.0, 1.0),
        dp_accounting.PoissonSampledDpEvent(0.1, dp_accounting.GaussianDpEvent(0.0)),
    ):
        assert renyi.cost(infinite, 5) == math.inf


def test_sampling_in_replace_one_is_refused() -> None:
    assert renyi.cost(events.gaussian(2.0), 4, Relation.REPLACE_ONE) == 0.5
    with pytest.raises(AccountingError, match="add-or-remove-one"):
        renyi.cost(sampled(0.1, 2.0), 4, Relation.REPLACE_ONE)
    with pytest.raises(AccountingError, match="add-or-remove-one"):
        renyi.cost(events.repeat_and_select(sampled(0.1, 2.0), 2.0, 1.0), 4, Relation.REPLACE_ONE)


@pytest.mark.parametrize(
    "event",
    [
        dp_accounting.GaussianDpEvent(math.nan),
        dp_accounting.GaussianDpEvent(-1.0),
        dp_accounting.SelfComposedDpEvent(dp_accounting.GaussianDpEvent(1.0), -1),
        dp_accounting.SelfComposedDpEvent(dp_accounting.GaussianDpEvent(1.0), 0.5),
        dp_accounting.PoissonSampledDpEvent(1.5, dp_accounting.GaussianDpEvent(1.0)),
        dp_accounting.PoissonSampledDpEvent(math.nan, dp_accounting.GaussianDpEvent(1.0)),
        dp_accounting.PoissonSampledDpEvent(
            0.5, dp_accounting.SelfComposedDpEvent(dp_accounting.GaussianDpEvent(1.0), -3)
        ),
        dp_accounting.PoissonSampledDpEvent(0.1, dp_accounting.LaplaceDpEvent(1.0)),
        dp_accounting.LaplaceDpEvent(-1.0),
        dp_accounting.dp_event.RepeatAndSelectDpEvent(dp_accounting.GaussianDpEvent(1.0), 0.5, 1.0),
    ],
)
def test_a_number_without_sense_claims_nothing(event: events.Event) -> None:
    with pytest.raises(AccountingError):
        renyi.cost(event, 4)


@pytest.mark.parametrize("order", [1, 0, -2, 2.0, True, 513, math.nan])
def test_the_order_is_a_whole_number_in_range(order: int) -> None:
    for asked in (
        lambda: renyi.cost(events.gaussian(1.0), order),
        lambda: renyi.epsilon(order, 0.1, 1e-5),
        lambda: renyi.cap(order, 1.0, 1e-5),
    ):
        with pytest.raises(InputError, match="order"):
            asked()


# The event of a filter


def test_a_filter_costs_what_it_lets_through_at_its_own_order() -> None:
    event = RenyiFilterDpEvent(8, 0.3)
    assert renyi.cost(event, 8) == 0.3
    assert renyi.cost(events.composed([event, events.repeated(event, 2)]), 8) == 0.9
    assert events.from_json(events.to_json(event)) == event
    assert events.to_dict(event) == {"type": "RenyiFilterDpEvent", "order": 8, "rdp": 0.3}
    assert renyi.cost(event, 8, Relation.REPLACE_ONE) == 0.3
    with pytest.raises(AccountingError, match=r"order 8 cannot be added up at order 9\. Fix: run it at the order"):
        renyi.cost(event, 9)


@pytest.mark.parametrize(("order", "rdp"), [(1, 0.1), (2.0, 0.1), (8, -0.1), (8, math.nan), (8, math.inf), (8, "1")])
def test_a_filter_has_an_order_and_a_finite_divergence(order: int, rdp: float) -> None:
    with pytest.raises(InputError, match=r"order|rdp"):
        RenyiFilterDpEvent(order, rdp)
    if isinstance(rdp, float) and math.isfinite(rdp):
        with pytest.raises(InputError, match=r"order|rdp"):
            events.from_dict({"type": "RenyiFilterDpEvent", "order": order, "rdp": rdp})


@pytest.mark.parametrize("text", ["", "[]", "1", '{"type": "Gaussian"}', '{"type": "GaussianDpEvent"}'])
def test_json_that_is_no_event_is_refused(text: str) -> None:
    with pytest.raises(InputError, match=r"event|Event"):
        events.from_json(text)


# To epsilon and back


@settings(max_examples=200)
@given(ORDERS, st.floats(0, 50), DELTAS)
def test_epsilon_is_that_of_dp_accounting_and_never_less(order: int, divergence: float, delta: float) -> None:
    theirs, _ = rdp.compute_epsilon([order], [divergence], delta)
    ours = renyi.epsilon(order, divergence, delta)
    assert ours >= theirs * (1 - 1e-12) - 1e-12
    if theirs > 0:  # else they may use another bound, which is better for tiny divergences
        assert ours == pytest.approx(theirs, rel=1e-9, abs=1e-9)


@settings(max_examples=200)
@given(ORDERS, st.floats(1e-3, 50), DELTAS)
def test_the_cap_is_the_largest_divergence_that_keeps_the_promise(order: int, epsilon: float, delta: float) -> None:
    try:
        largest = renyi.cap(order, epsilon, delta)
    except InputError:
        assert renyi.epsilon(order, 5e-324, delta) >= epsilon
        return
    assert renyi.epsilon(order, largest, delta) <= epsilon
    assert renyi.epsilon(order, largest * (1 + 1e-12) + 1e-12, delta) > epsilon


def test_epsilon_rounds_up() -> None:
    with mpmath.workdps(60):
        for order, divergence, delta in [(2, 0.1, 1e-5), (12, 1 / 3, 1e-6), (512, 1e-7, 1e-12), (33, 7.7, 0.2)]:
            exactly = mpmath.mpf(repr(divergence)) + mpmath.log(mpmath.mpf(order - 1) / order)
            exactly -= (mpmath.log(mpmath.mpf(repr(delta))) + mpmath.log(order)) / (order - 1)
            found = renyi.epsilon(order, divergence, delta)
            assert mpmath.mpf(repr(math.nextafter(found, 0))) < exactly <= mpmath.mpf(repr(found))


def test_nothing_spent_is_nothing_and_everything_is_infinite() -> None:
    assert renyi.epsilon(8, 0, 1e-5) == 0.0
    assert renyi.epsilon(8, math.inf, 1e-5) == math.inf
    assert renyi.epsilon(8, 5e-324, 1e-5) > 1.0
    assert renyi.epsilon(2, 0.01, 0.9) == 0.0  # never below 0


@pytest.mark.parametrize("bad", [-0.1, math.nan, "1"])
def test_a_divergence_is_a_number_from_zero_on(bad: float) -> None:
    with pytest.raises(InputError, match="rdp"):
        renyi.epsilon(8, bad, 1e-5)


@pytest.mark.parametrize(("epsilon", "delta"), [(0.0, 1e-5), (math.nan, 1e-5), (math.inf, 1e-5), (1.0, 0.0), (1, 1)])
def test_a_cap_is_a_finite_promise(epsilon: float, delta: float) -> None:
    for asked in (lambda: renyi.cap(8, epsilon, delta), lambda: renyi.order_for(epsilon, delta)):
        with pytest.raises(InputError, match=r"epsilon|delta"):
            asked()


def test_a_promise_that_no_order_keeps_names_the_fix() -> None:
    with pytest.raises(InputError, match=r"order alone costs epsilon 2\.25 .*Fix: choose a larger epsilon"):
        renyi.cap(5, 0.5, 1e-5)
    with pytest.raises(InputError, match="Fix: choose a larger epsilon or delta, or basic composition"):
        renyi.order_for(0.001, 1e-9)


@settings(max_examples=100)
@given(st.floats(0.1, 30), st.floats(1e-10, 1e-3))
def test_the_order_leaves_most_of_the_room(epsilon: float, delta: float) -> None:
    order = renyi.order_for(epsilon, delta)
    room = {
        each: renyi.cap(each, epsilon, delta) / each for each in (order - 1, order) if _has_room(each, epsilon, delta)
    }
    guide = 1 + 2 * math.log(1 / delta) / epsilon
    assert 2 <= order <= min(512, guide + 2)
    best = max(renyi.cap(each, epsilon, delta) / each for each in range(order, min(2 * order + 4, 513)))
    assert room[order] >= 0.9 * best * (1 - 1e-9)
    assert room.get(order - 1, 0.0) < 0.9 * best * (1 + 1e-9)


def _has_room(order: int, epsilon: float, delta: float) -> bool:
    try:
        return renyi.cap(order, epsilon, delta) > 0
    except InputError:
        return False


def test_one_order_is_nearly_as_good_as_the_best() -> None:
    # At the cap the noise may be a little larger than with the best of all orders, but not by much.
    delta, orders = 1e-5, list(range(2, 65))
    for epsilon in (0.5, 1.0, 3.0, 8.0):
        order = renyi.order_for(epsilon, delta)
        for rate, steps in ((1.0, 100), (0.01, 1000), (256 / 60_000, 14_000)):
            part = lambda noise, rate=rate: sampled(rate, noise)  # noqa: E731
            low, high = 0.3, 300.0
            for _ in range(30):
                noise = math.sqrt(low * high)
                event = events.repeated(part(noise), steps)
                best = rdp.RdpAccountant(orders=orders).compose(event).get_epsilon(delta)
                low, high = (low, noise) if best <= epsilon else (noise, high)
            fits = renyi.cost(events.repeated(part(1.12 * high), steps), order)
            assert fits <= renyi.cap(order, epsilon, delta)


# Floats as decimals


@given(st.fractions(-10, 10) | st.fractions(0, Fraction(1, 10**300)))
def test_rounding_keeps_its_direction_and_stays_close(value: Fraction) -> None:
    up, down = rounded_up(value), rounded_down(value)
    assert exact(down) <= value <= exact(up)
    assert up <= math.nextafter(math.nextafter(down, math.inf), math.inf)


@given(st.floats(-1e300, 1e300))
def test_a_float_survives_its_decimal(value: float) -> None:
    assert rounded_up(exact(value)) == rounded_down(exact(value)) == value
