"""Samplers: what is drawn is what the event says."""

from __future__ import annotations

import json
import math

import dp_accounting
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sfumato.data.sampling import FullBatch, Poisson, Sampler, Shuffled
from sfumato.errors import InputError, PlanError
from sfumato.privacy import events
from sfumato.privacy.accounting import spending
from sfumato.privacy.randomness import SecureSource, SeededSource

few = settings(max_examples=40, deadline=None)


def rate_fits(hits: int, n: int, rate: float) -> bool:
    """Tell whether `hits` of `n` flips could have come at `rate` (one false alarm in about 1e9)."""
    return abs(hits - n * rate) < 6 * math.sqrt(n * rate * (1 - rate))


# Poisson.


@pytest.mark.parametrize("rate", [0.01, 0.1, 0.6])
def test_poisson_draws_at_its_rate_and_at_no_other(rate: float) -> None:
    count, steps = 5000, 60
    draws = Poisson(rate).start(count, SecureSource())
    hits = sum(len(draws.batch(step)) for step in range(steps))
    assert rate_fits(hits, count * steps, rate)
    for wrong in (rate * 2 / 3, rate * 3 / 2):
        assert not rate_fits(hits, count * steps, wrong)


def test_poisson_draws_every_record_at_the_same_rate() -> None:
    count, steps, rate = 20, 3000, 0.3
    draws = Poisson(rate).start(count, SecureSource())
    hits = torch.stack([torch.bincount(draws.batch(step), minlength=count) for step in range(steps)]).sum(0)
    assert all(rate_fits(int(each), steps, rate) for each in hits)


def test_poisson_steps_and_records_are_independent() -> None:
    count, steps, rate = 2000, 100, 0.2
    draws = Poisson(rate).start(count, SecureSource())
    joined = torch.zeros(steps, count, dtype=torch.bool)
    for step in range(steps):
        joined[step, draws.batch(step)] = True
    both_steps = int((joined[1:] & joined[:-1]).sum())
    both_records = int((joined[:, 1:] & joined[:, :-1]).sum())
    assert rate_fits(both_steps, (steps - 1) * count, rate**2)
    assert rate_fits(both_records, steps * (count - 1), rate**2)


def test_poisson_batch_sizes_vary_as_a_binomial_does() -> None:
    count, steps, rate = 400, 3000, 0.25
    draws = Poisson(rate).start(count, SecureSource())
    sizes = torch.tensor([len(draws.batch(step)) for step in range(steps)], dtype=torch.float64)
    variance = count * rate * (1 - rate)
    assert abs(float(sizes.var()) / variance - 1) < 6 * math.sqrt(2 / steps)


def test_poisson_does_not_use_the_step_number_as_a_seed() -> None:
    draws = Poisson(0.5).start(200, SecureSource())
    assert not torch.equal(draws.batch(0), draws.batch(0))


def test_poisson_batches_may_be_empty_and_hold_no_record_twice() -> None:
    draws = Poisson(0.2).start(4, SecureSource())
    batches = [draws.batch(step) for step in range(300)]
    assert any(len(batch) == 0 for batch in batches)
    for batch in batches:
        assert batch.dtype is torch.int64
        assert batch.shape == (batch.unique().numel(),)
    assert Poisson(0.2).start(0, SecureSource()).batch(0).shape == (0,)


def test_poisson_at_rate_one_draws_every_record() -> None:
    assert Poisson(1.0).start(7, SecureSource()).batch(3).tolist() == list(range(7))


@pytest.mark.parametrize("rate", [0, -0.1, 1.1, math.nan, math.inf])
def test_poisson_refuses_a_rate_that_is_no_probability(rate: float) -> None:
    with pytest.raises(InputError, match="sampling_rate"):
        Poisson(rate)


@few
@given(
    rate=st.floats(min_value=1e-6, max_value=1),
    noise=st.floats(min_value=0.1, max_value=50),
    steps=st.integers(min_value=1, max_value=10**6),
)
def test_poisson_states_the_rate_that_it_draws_at(rate: float, noise: float, steps: int) -> None:
    sampler = Poisson(rate)
    sampled = dp_accounting.PoissonSampledDpEvent(rate, dp_accounting.GaussianDpEvent(noise))
    assert sampler.event(noise, steps) == dp_accounting.SelfComposedDpEvent(sampled, steps)
    assert sampler.rate == rate


# Full batch.


def test_full_batch_draws_everything_and_claims_no_amplification() -> None:
    draws = FullBatch().start(5, SecureSource())
    for step in range(3):
        assert draws.batch(step).tolist() == [0, 1, 2, 3, 4]
    event = FullBatch().event(2.0, 9)
    assert event == dp_accounting.SelfComposedDpEvent(dp_accounting.GaussianDpEvent(2.0), 9)
    assert not events.is_sampled(event)
    assert FullBatch().rate == 1


def test_samplers_without_a_position_keep_no_state() -> None:
    assert FullBatch().start(3, SecureSource()).state() == {}
    assert Poisson(0.5).start(3, SecureSource()).state() == {}


# Shuffled.

SHUFFLED = st.integers(min_value=1, max_value=60).flatmap(
    lambda population: st.builds(Shuffled, st.integers(min_value=1, max_value=population), st.just(population))
)


@few
@given(sampler=SHUFFLED, epochs=st.integers(min_value=1, max_value=3))
def test_shuffled_draws_each_record_once_an_epoch_in_batches_of_fixed_size(sampler: Shuffled, epochs: int) -> None:
    draws = sampler.start(sampler.population, SecureSource())
    for epoch in range(epochs):
        first = epoch * sampler.steps_per_epoch
        batches = [draws.batch(first + i) for i in range(sampler.steps_per_epoch)]
        assert sorted(torch.cat(batches).tolist()) == list(range(sampler.population))
        assert all(len(batch) == sampler.batch_size for batch in batches[:-1])
        assert 1 <= len(batches[-1]) <= sampler.batch_size


@few
@given(sampler=SHUFFLED, count=st.integers(min_value=0, max_value=90))
def test_shuffled_uses_no_record_twice_when_the_data_are_not_the_population(sampler: Shuffled, count: int) -> None:
    draws = sampler.start(count, SecureSource())
    batches = [draws.batch(step) for step in range(sampler.steps_per_epoch)]
    used = torch.cat(batches)
    assert used.unique().numel() == used.numel()
    if sampler.steps_per_epoch == 1:
        assert used.numel() == count
    else:
        assert used.numel() == min(count, sampler.population)
        assert all(len(batch) <= sampler.batch_size for batch in batches)


def test_shuffled_takes_a_new_order_every_epoch() -> None:
    draws = Shuffled(50, 100).start(100, SecureSource())
    orders = [torch.cat([draws.batch(2 * epoch), draws.batch(2 * epoch + 1)]) for epoch in range(3)]
    assert not torch.equal(orders[0], orders[1])
    assert not torch.equal(orders[1], orders[2])
    assert not torch.equal(orders[0], torch.arange(100))


def test_shuffled_puts_a_record_in_each_batch_equally_often() -> None:
    runs = 4000
    sampler = Shuffled(2, 8)
    first = sum(int((sampler.start(8, SecureSource()).batch(0) == 0).any()) for _ in range(runs // 4))
    draws = sampler.start(8, SecureSource())
    later = sum(int((draws.batch(4 * epoch) == 0).any()) for epoch in range(runs))
    assert rate_fits(first, runs // 4, 0.25)
    assert rate_fits(later, runs, 0.25)
    assert not rate_fits(later, runs, 0.25 * 2 / 3)
    assert not rate_fits(later, runs, 0.25 * 3 / 2)


@few
@given(sampler=SHUFFLED, stop=st.integers(min_value=0, max_value=150))
def test_shuffled_resumes_the_same_order_from_its_state(sampler: Shuffled, stop: int) -> None:
    draws = sampler.start(sampler.population, SecureSource())
    if stop:
        draws.batch(stop - 1)
    kept = json.loads(json.dumps(draws.state()))
    resumed = sampler.start(sampler.population, SecureSource(), kept)
    for step in range(stop, stop + 2 * sampler.steps_per_epoch):
        assert torch.equal(resumed.batch(step), draws.batch(step))


def test_shuffled_without_its_state_would_not_resume() -> None:
    sampler = Shuffled(50, 100)
    draws, fresh = sampler.start(100, SecureSource()), sampler.start(100, SecureSource())
    assert not torch.equal(draws.batch(1), fresh.batch(1))


def test_shuffled_repeats_from_a_seed() -> None:
    sampler = Shuffled(3, 10)
    one, two = sampler.start(10, SeededSource(4)), sampler.start(10, SeededSource(4))
    assert all(torch.equal(one.batch(step), two.batch(step)) for step in range(8))


@few
@given(
    sampler=SHUFFLED,
    noise=st.floats(min_value=0.1, max_value=50),
    steps=st.integers(min_value=1, max_value=500),
)
def test_shuffled_pays_for_every_epoch_begun(sampler: Shuffled, noise: float, steps: int) -> None:
    whole = dp_accounting.GaussianDpEvent(noise)
    if sampler.batch_size == sampler.population:
        assert sampler.event(noise, steps) == dp_accounting.SelfComposedDpEvent(whole, steps)
    else:
        epoch = dp_accounting.ComposedDpEvent([dp_accounting.GaussianDpEvent(noise / 2), whole])
        begun = len({step // sampler.steps_per_epoch for step in range(steps)})
        assert sampler.event(noise, steps) == dp_accounting.SelfComposedDpEvent(epoch, begun)


@few
@given(sampler=SHUFFLED, steps=st.integers(min_value=1, max_value=100))
def test_a_neighbour_moves_what_the_shuffled_event_says(sampler: Shuffled, steps: int) -> None:
    # One epoch, one record more: swap the extra record to the end of the order, and compare batch by batch.
    count = sampler.population - 1
    more = sampler.start(count + 1, SeededSource(steps))
    batches = [set(more.batch(i).tolist()) for i in range(sampler.steps_per_epoch)]
    order = [int(i) for step in range(sampler.steps_per_epoch) for i in more.batch(step)]
    extra = order.index(count)
    order[extra] = order[-1]
    fewer = [
        set(order[i : i + sampler.batch_size][: max(0, count - i)])
        for i in range(0, sampler.steps_per_epoch * sampler.batch_size, sampler.batch_size)
    ]
    moved = sorted(len(a ^ b) for a, b in zip(batches, fewer, strict=True) if a != b)
    assert moved in ([1], [1, 2])


def has_poisson(event: events.Event) -> bool:
    return "PoissonSampledDpEvent" in events.to_json(event)


@pytest.mark.parametrize(("batch", "population", "steps"), [(50, 1000, 20), (50, 1000, 60), (500, 1000, 4)])
def test_shuffled_is_never_accounted_as_poisson(batch: int, population: int, steps: int) -> None:
    shuffled, poisson = Shuffled(batch, population), Poisson(batch / population)
    assert shuffled.rate == poisson.rate
    assert has_poisson(poisson.event(1.5, steps))
    assert not has_poisson(shuffled.event(1.5, steps))
    assert not events.is_sampled(shuffled.event(1.5, steps))
    assert spending(shuffled.event(1.5, steps), 1e-5).epsilon > spending(poisson.event(1.5, steps), 1e-5).epsilon


@pytest.mark.parametrize(("batch", "population"), [(0, 5), (-1, 5), (2, 0), (1.5, 5), (math.nan, 5), (True, 5)])
def test_shuffled_refuses_sizes_that_are_no_counts(batch: int, population: int) -> None:
    with pytest.raises(InputError):
        Shuffled(batch, population)


def test_shuffled_refuses_a_batch_larger_than_the_population() -> None:
    with pytest.raises(PlanError, match="batch_size 6 is larger than the population 5"):
        Shuffled(6, 5)


@pytest.mark.parametrize("sampler", [FullBatch(), Poisson(0.1), Shuffled(10, 100)])
def test_no_steps_cost_nothing(sampler: Sampler) -> None:
    assert spending(sampler.event(1.0, 0), 1e-5).epsilon == 0
