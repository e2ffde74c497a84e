"""Random allocation: exactly k steps of an epoch for each record, and a cost that is never below the truth."""

from __future__ import annotations

import itertools
import json
import math
import warnings
from collections import Counter
from collections.abc import Callable

import dp_accounting
import numpy as np
import pytest
import torch
from dp_accounting import pld, rdp
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import integrate, stats

from sfumato.data.allocated import RandomAllocation
from sfumato.errors import InputError, PlanError
from sfumato.privacy import events
from sfumato.privacy.allocation import Pld, pld_of_random_allocation
from sfumato.privacy.randomness import SecureSource, SeededSource

few = settings(max_examples=25, deadline=None)
fewest = settings(max_examples=5, deadline=None)


def rate_fits(hits: int, n: int, rate: float) -> bool:
    """Tell whether `hits` of `n` flips could have come at `rate` (one false alarm in about 1e9)."""
    return abs(hits - n * rate) < 6 * math.sqrt(n * rate * (1 - rate))


# The draw.

SAMPLERS = st.integers(min_value=1, max_value=12).flatmap(
    lambda steps: st.builds(RandomAllocation, st.just(steps), st.integers(min_value=1, max_value=steps))
)


@few
@given(sampler=SAMPLERS, count=st.integers(min_value=0, max_value=40), epochs=st.integers(min_value=1, max_value=3))
def test_every_record_takes_part_in_exactly_so_many_steps_of_each_epoch(
    sampler: RandomAllocation, count: int, epochs: int
) -> None:
    draws = sampler.start(count, SecureSource())
    for epoch in range(epochs):
        first = epoch * sampler.steps_per_epoch
        batches = [draws.batch(first + step) for step in range(sampler.steps_per_epoch)]
        for batch in batches:
            assert batch.dtype is torch.int64
            assert batch.tolist() == sorted(set(batch.tolist()))
        taken = torch.bincount(torch.cat(batches), minlength=count)
        assert taken.tolist() == [sampler.selected] * count


@pytest.mark.parametrize(("steps", "selected"), [(4, 1), (5, 2), (5, 4), (6, 3)])
def test_the_set_of_steps_is_uniform(steps: int, selected: int) -> None:
    count = 20_000
    draws = RandomAllocation(steps, selected).start(count, SecureSource())
    sets = torch.zeros(count, steps, dtype=torch.bool)
    for step in range(steps):
        sets[draws.batch(step), step] = True
    found = Counter(map(tuple, sets.tolist()))
    wanted = math.comb(steps, selected)
    assert len(found) == wanted
    for hits in found.values():
        assert rate_fits(hits, count, 1 / wanted)
        assert not rate_fits(hits, count, 1 / wanted * 2 / 3)
        assert not rate_fits(hits, count, 1 / wanted * 3 / 2)


def test_records_and_epochs_are_independent() -> None:
    count, epochs, sampler = 300, 200, RandomAllocation(4)
    draws = sampler.start(count, SecureSource())
    first = torch.zeros(epochs, count, dtype=torch.bool)
    for epoch in range(epochs):
        first[epoch, draws.batch(4 * epoch)] = True
    assert rate_fits(int((first[:, 1:] & first[:, :-1]).sum()), epochs * (count - 1), 1 / 16)
    assert rate_fits(int((first[1:] & first[:-1]).sum()), (epochs - 1) * count, 1 / 16)
    sizes = first.sum(1).to(torch.float64)
    assert abs(float(sizes.var()) / (count * 3 / 16) - 1) < 6 * math.sqrt(2 / epochs)


@few
@given(sampler=SAMPLERS, stop=st.integers(min_value=0, max_value=30))
def test_a_resumed_run_goes_on_with_the_same_steps(sampler: RandomAllocation, stop: int) -> None:
    draws = sampler.start(30, SecureSource())
    if stop:
        draws.batch(stop - 1)
    resumed = sampler.start(30, SecureSource(), json.loads(json.dumps(draws.state())))
    for step in range(stop, stop + 2 * sampler.steps_per_epoch):
        assert torch.equal(resumed.batch(step), draws.batch(step))


def test_without_its_state_a_run_would_not_resume_and_a_seed_repeats_it() -> None:
    sampler = RandomAllocation(3)
    assert not torch.equal(sampler.start(99, SecureSource()).batch(1), sampler.start(99, SecureSource()).batch(1))
    one, two = sampler.start(99, SeededSource(2)), sampler.start(99, SeededSource(2))
    assert all(torch.equal(one.batch(step), two.batch(step)) for step in range(7))


def test_of_batches_rounds_the_rate_down() -> None:
    assert RandomAllocation.of_batches(100, 607) == RandomAllocation(7)
    assert RandomAllocation.of_batches(100, 600, selected=2) == RandomAllocation(12, 2)
    assert RandomAllocation.of_batches(600, 600) == RandomAllocation(1)
    assert RandomAllocation(12, 2).rate == 1 / 6
    assert RandomAllocation(12, 2).describe()["selected"] == 2
    with pytest.raises(PlanError, match="larger than the population"):
        RandomAllocation.of_batches(601, 600)


@pytest.mark.parametrize("arguments", [(0, 1), (3, 0), (3, 4), (1.5, 1), (True, 1)])
def test_counts_that_do_not_fit_are_refused(arguments: tuple[int, int]) -> None:
    with pytest.raises(InputError):
        RandomAllocation(*arguments)
    with pytest.raises(InputError):
        events.RandomAllocationDpEvent(1.0, *arguments)


# The event.


def test_the_event_counts_epochs_begun_at_their_least_noise() -> None:
    sampler = RandomAllocation(4, 2)
    assert sampler.event(2.0, 9) == events.RandomAllocationDpEvent(2.0, 4, 2, 3)
    assert sampler.event_of([3.0, 2.0, 3.0, 4.0, 2.0, 5.0, 5.0, 5.0, 9.0]) == events.composed(
        [events.RandomAllocationDpEvent(2.0, 4, 2, 2), events.RandomAllocationDpEvent(9.0, 4, 2, 1)]
    )
    # Charged in two parts, an epoch is paid for twice.
    assert sampler.event_of([2.0, 2.0, 2.0], first=3) == events.RandomAllocationDpEvent(2.0, 4, 2, 2)
    assert RandomAllocation(3, 3).event(2.0, 4) == dp_accounting.SelfComposedDpEvent(
        dp_accounting.GaussianDpEvent(2.0), 4
    )


@few
@given(sampler=SAMPLERS, z=st.floats(min_value=0.1, max_value=50), steps=st.integers(min_value=1, max_value=60))
def test_the_event_survives_json_and_is_sampled(sampler: RandomAllocation, z: float, steps: int) -> None:
    event = sampler.event(z, steps)
    assert events.from_dict(json.loads(events.to_json(event))) == event
    assert events.is_sampled(event) == (sampler.selected < sampler.steps_per_epoch)
    assert sampler.event_of([z] * steps) == event


@pytest.mark.parametrize("noise", [0, -1, math.nan, math.inf])
def test_an_event_without_noise_is_refused(noise: float) -> None:
    with pytest.raises(InputError, match="noise_multiplier"):
        events.RandomAllocationDpEvent(noise, 4)


# What it costs.


def allocated(z: float, steps: int, selected: int = 1, epochs: int = 1, interval: float = 1e-3) -> Pld:
    return pld_of_random_allocation(events.RandomAllocationDpEvent(z, steps, selected, epochs), interval)


def call(strike: float, s: float) -> float:
    """Return E max(0, L - strike) for L lognormal of mean 1."""
    if strike <= 0:
        return 1 - strike
    d = (s * s / 2 - math.log(strike)) / s
    return float(stats.norm.cdf(d) - strike * stats.norm.cdf(d - s))


def integrated(inner: Callable[[float], float], s: float, kink: float) -> float:
    """Return E inner(L) for L lognormal of mean 1."""
    ends = sorted({-14.0, 14 + 2 * s, (math.log(kink) + s * s / 2) / s})

    def weighted(x: float) -> float:
        return float(stats.norm.pdf(x)) * inner(math.exp(s * x - s * s / 2))

    return sum(integrate.quad(weighted, a, b, limit=400, epsabs=1e-15)[0] for a, b in itertools.pairwise(ends))


@pytest.mark.parametrize("z", [0.8, 1.0, 2.0, 5.0])
def test_one_of_two_steps_is_just_above_the_exact_integral(z: float) -> None:
    s = 1 / z
    found = allocated(z, 2, interval=1e-4)
    for epsilon in (-1.0, 0.0, 0.2, 0.5, 1.0, 2.0):
        g = math.exp(epsilon)
        removed = integrated(lambda one: call(2 * g - one, s) / 2, s, 2 * g)  # noqa: B023
        # The put of the same strike, by parity.
        added = integrated(
            lambda one: g / 2 * (call(2 / g - one, s) - 1 + (2 / g - one)) if one < 2 / g else 0.0,  # noqa: B023
            s,
            2 / g,
        )
        for exact, pmf in ((removed, found._pmf_remove), (added, found._pmf_add)):
            bound = float(pmf.get_delta_for_epsilon(epsilon))
            assert exact - 1e-13 <= bound
            if exact > 1e-6:
                assert bound <= exact * (1 + 2e-3)


@pytest.mark.parametrize(("z", "steps", "selected"), [(1.0, 20, 1), (1.5, 7, 3), (0.8, 5, 2)])
def test_it_is_never_below_a_simulation_of_the_draw(z: float, steps: int, selected: int) -> None:
    # The likelihood ratio of k of t steps itself, without blocks: a mean over all sets of steps, from random outcomes.
    generator = np.random.default_rng(7)
    runs = 200_000
    outcomes = generator.normal(0, z, (runs, steps))
    factors = np.exp((outcomes - 0.5) / z**2)
    # The mean of the products over all sets is an elementary symmetric polynomial over its number of terms.
    polynomials = np.zeros((selected + 1, runs))
    polynomials[0] = 1
    for column in factors.T:
        for degree in range(selected, 0, -1):
            polynomials[degree] += polynomials[degree - 1] * column
    ratio = polynomials[selected] / math.comb(steps, selected)
    found = allocated(z, steps, selected)
    for epsilon in (0.0, 0.3, 1.0):
        for values, pmf in (
            (np.maximum(0, ratio - math.exp(epsilon)), found._pmf_remove),
            (np.maximum(0, 1 - math.exp(epsilon) * ratio), found._pmf_add),
        ):
            mean, error = values.mean(), values.std() / math.sqrt(runs)
            bound = float(pmf.get_delta_for_epsilon(epsilon))
            assert mean - 5 * error <= bound
            if selected == 1 and mean > 0.01:
                assert bound <= mean + 5 * error + 1e-4
                assert not bound * 2 / 3 >= mean - 5 * error


@pytest.mark.slow
@pytest.mark.parametrize(("z", "steps", "selected"), [(1.0, 2, 1), (1.0, 10, 1), (2.0, 9, 2)])
def test_it_lies_between_the_bounds_of_the_reference(z: float, steps: int, selected: int) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ImportWarning)  # it is slower without a compiler, and says so
        reference = pytest.importorskip("PLD_accounting")
    params = reference.PrivacyParams(sigma=z, num_steps=steps, num_selected=selected, delta=1e-5)
    config = reference.AllocationSchemeConfig(loss_discretization=0.05)
    ours = allocated(z, steps, selected, interval=1e-4).get_epsilon_for_delta(1e-5)
    low, high = (
        reference.gaussian_allocation_epsilon_configurable(params=params, config=config, bound_type=bound)
        for bound in (reference.BoundType.IS_DOMINATED, reference.BoundType.DOMINATES)
    )
    assert low <= ours <= high * (1 + 1e-4)
    assert high - low < 0.1


GOLDEN = [  # `PLD_accounting` 2.0 (geometric grids, spacing 0.01, delta 1e-5): removed, added
    (1.0, 2, 3.69979, 3.08215),
    (1.0, 10, 2.19025, 1.36837),
    (1.0, 100, 0.62394, 0.42570),
]


@pytest.mark.parametrize(("z", "steps", "removed", "added"), GOLDEN)
def test_it_is_just_below_the_upper_bounds_of_the_reference(z: float, steps: int, removed: float, added: float) -> None:
    found = allocated(z, steps, interval=1e-4)
    assert removed - 0.01 <= found._pmf_remove.get_epsilon_for_delta(1e-5) <= removed
    assert added - 0.01 <= found._pmf_add.get_epsilon_for_delta(1e-5) <= added


def test_every_step_selected_is_no_sampling() -> None:
    plain = pld.PLDAccountant(value_discretization_interval=1e-3).compose(
        dp_accounting.SelfComposedDpEvent(dp_accounting.GaussianDpEvent(3.0), 12)
    )
    assert allocated(3.0, 4, 4, 3).get_epsilon_for_delta(1e-5) == pytest.approx(plain.get_epsilon(1e-5), abs=2e-3)


def test_blocks_of_two_lengths_lie_between_those_of_one() -> None:
    costs = [allocated(2.0, steps, 3).get_epsilon_for_delta(1e-5) for steps in (12, 13, 14, 15)]
    assert costs == sorted(costs, reverse=True)
    assert len(set(costs)) == 4


def test_too_little_noise_for_the_grid_counts_the_steps_as_known() -> None:
    known = pld.PLDAccountant(value_discretization_interval=1e-3).compose(dp_accounting.GaussianDpEvent(0.3))
    for steps in (2, 50):
        assert allocated(0.3, steps).get_epsilon_for_delta(1e-5) <= known.get_epsilon(1e-5) + 1e-9


def test_very_long_epochs_count_as_shorter_ones() -> None:
    assert allocated(1.0, 10**7).get_epsilon_for_delta(1e-5) == allocated(1.0, 2**16).get_epsilon_for_delta(1e-5)


@fewest
@given(
    z=st.floats(min_value=0.7, max_value=20),
    steps=st.integers(min_value=2, max_value=300),
    selected=st.integers(min_value=1, max_value=4),
    epochs=st.integers(min_value=1, max_value=20),
    delta=st.sampled_from([1e-4, 1e-6, 1e-8]),
)
def test_the_second_accountant_never_lies_below_and_more_noise_costs_less(
    z: float, steps: int, selected: int, epochs: int, delta: float
) -> None:
    selected = min(selected, steps)
    event = events.RandomAllocationDpEvent(z, steps, selected, epochs)
    first = pld_of_random_allocation(event, 1e-3)
    masses = first._pmf_remove._probs.sum() + first._pmf_remove._infinity_mass
    assert 1 - 1e-9 <= masses <= 1 + 1e-9
    second = rdp.RdpAccountant().compose(events.for_renyi(event)).get_epsilon(delta)
    assert first.get_epsilon_for_delta(delta) <= second + 1e-3
    if selected == 1 or steps % selected == 0:
        known = dp_accounting.SelfComposedDpEvent(dp_accounting.GaussianDpEvent(z), selected * epochs)
        unsampled = pld.PLDAccountant(value_discretization_interval=1e-3).compose(known).get_epsilon(delta)
        assert first.get_epsilon_for_delta(delta) <= unsampled + 1e-2
    weaker = allocated(1.2 * z, steps, selected, epochs)
    assert weaker.get_epsilon_for_delta(delta) <= first.get_epsilon_for_delta(delta) + 1e-3


@pytest.mark.parametrize("interval", [0.0, -1.0, math.nan])
def test_an_interval_that_is_none_is_refused(interval: float) -> None:
    with pytest.raises(InputError, match="interval"):
        pld_of_random_allocation(events.RandomAllocationDpEvent(1.0, 4), interval)


def test_the_renyi_event_counts_chosen_sums_wherever_it_stands() -> None:
    inner = events.RandomAllocationDpEvent(2.0, 9, 2, 5)
    tree = events.composed([events.gaussian(1.0), events.repeated(inner, 3)])
    chosen = events.repeated(events.gaussian(2.0), 10)
    assert events.for_renyi(tree) == events.composed([events.gaussian(1.0), events.repeated(chosen, 3)])
