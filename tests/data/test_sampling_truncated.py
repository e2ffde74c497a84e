"""Truncated Poisson sampling: the draw is the one that the event describes, and the event's cost is never below the truth."""

from __future__ import annotations

import functools
import itertools
import json
import logging
import math
from collections import Counter

import dp_accounting
import numpy as np
import pytest
import torch
from dp_accounting import pld, rdp
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import special, stats

from sfumato.data.truncated import TruncatedPoisson
from sfumato.errors import InputError, PlanError
from sfumato.privacy import events
from sfumato.privacy.randomness import SecureSource, SeededSource

few = settings(max_examples=15, deadline=None)


def rate_fits(hits: int, n: int, rate: float) -> bool:
    """Tell whether `hits` of `n` flips could have come at `rate` (one false alarm in about 1e9)."""
    return abs(hits - n * rate) < 6 * math.sqrt(n * rate * (1 - rate))


# The draw.


def test_a_record_is_kept_at_the_stated_rate_and_at_no_other() -> None:
    sampler = TruncatedPoisson(0.3, 8, 30)
    steps = 6000
    draws = sampler.start(20, SecureSource())
    hits = torch.stack([torch.bincount(draws.batch(step), minlength=20) for step in range(steps)]).sum(0)
    assert sampler.rate < 0.27
    assert all(rate_fits(int(each), steps, sampler.rate) for each in hits)
    for wrong in (0.3, sampler.rate * 2 / 3, sampler.rate * 3 / 2):
        assert not rate_fits(int(hits.sum()), 20 * steps, wrong)


def test_a_full_data_set_has_batches_of_a_cut_binomial_size() -> None:
    sampler = TruncatedPoisson(0.3, 8, 30)
    steps = 6000
    draws = sampler.start(30, SecureSource())
    sizes = Counter(len(draws.batch(step)) for step in range(steps))
    assert max(sizes) == 8
    for size in range(3, 8):
        assert rate_fits(sizes[size], steps, stats.binom.pmf(size, 30, 0.3))
    assert rate_fits(sizes[8], steps, stats.binom.sf(7, 30, 0.3))


def test_what_is_kept_of_too_many_is_a_uniform_subset() -> None:
    draws = TruncatedPoisson(1.0, 2, 5).start(5, SecureSource())
    steps = 6000
    pairs = Counter(tuple(draws.batch(step).tolist()) for step in range(steps))
    assert set(pairs) == set(itertools.combinations(range(5), 2))
    assert all(rate_fits(hits, steps, 0.1) for hits in pairs.values())


def test_empty_places_take_part_in_the_cut() -> None:
    # With 2 records in 20 places and all places drawn, both are kept as rarely as if the places were full.
    draws = TruncatedPoisson(1.0, 5, 20).start(2, SecureSource())
    steps = 6000
    both = sum(len(draws.batch(step)) == 2 for step in range(steps))
    assert rate_fits(both, steps, 5 * 4 / (20 * 19))


@few
@given(
    rate=st.floats(min_value=0.01, max_value=1),
    most=st.integers(min_value=1, max_value=40),
    population=st.integers(min_value=1, max_value=40),
    share=st.floats(min_value=0, max_value=1),
)
def test_batches_never_pass_the_size_and_hold_no_record_twice(
    rate: float, most: int, population: int, share: float
) -> None:
    sampler = TruncatedPoisson(rate, most, population)
    count = round(share * population)
    draws = sampler.start(count, SecureSource())
    for step in range(5):
        batch = draws.batch(step)
        assert batch.dtype is torch.int64
        assert batch.tolist() == sorted(set(batch.tolist()) & set(range(count)))
        assert len(batch) <= most
    sizes = np.minimum(np.arange(population + 1), most)
    assert sampler.rate == pytest.approx(
        float(sizes @ stats.binom.pmf(np.arange(population + 1), population, rate)) / population
    )
    assert 0 < sampler.rate <= rate * (1 + 1e-12)
    assert draws.state() == {}


def test_seeded_draws_repeat() -> None:
    sampler = TruncatedPoisson(0.5, 3, 12)
    one, two = sampler.start(12, SeededSource(1)), sampler.start(12, SeededSource(1))
    assert all(torch.equal(one.batch(step), two.batch(step)) for step in range(9))


def test_more_records_than_declared_are_refused_without_their_number_and_before_a_draw() -> None:
    used, fresh = SeededSource(3), SeededSource(3)
    with pytest.raises(PlanError, match="population of 12") as refusal:
        TruncatedPoisson(0.5, 3, 12).start(4711, used)
    assert "4711" not in str(refusal.value)
    assert torch.equal(used.words(4), fresh.words(4))


@pytest.mark.parametrize(
    "arguments",
    [(0, 3, 12), (1.1, 3, 12), (math.nan, 3, 12), (0.5, 0, 12), (0.5, 1.5, 12), (0.5, 3, 0), (0.5, 3, True)],
)
def test_what_is_no_rate_or_size_is_refused(arguments: tuple[float, int, int]) -> None:
    with pytest.raises(InputError):
        TruncatedPoisson(*arguments)


def test_a_batch_that_is_never_full_is_refused() -> None:
    with pytest.raises(PlanError, match="never full"):
        TruncatedPoisson(0.01, 680, 10_000)
    assert TruncatedPoisson(0.01, 9_000, 10_000).rate == pytest.approx(0.01)  # its chance is no number above 0


# The event.


PldAccountant = functools.partial(pld.PLDAccountant, value_discretization_interval=1e-3)


def epsilon(event: events.Event, delta: float) -> float:
    return float(PldAccountant().compose(event).get_epsilon(delta))


def renyi_epsilon(event: events.Event, delta: float) -> float:
    logging.getLogger("absl").setLevel(
        logging.ERROR
    )  # it leaves out, and says so, orders whose series does not converge
    return float(rdp.RdpAccountant().compose(events.for_renyi(event)).get_epsilon(delta))


def test_the_event_names_the_draw_and_survives_json() -> None:
    sampler = TruncatedPoisson(0.1, 150, 1000)
    event = sampler.event(2.0, 7)
    step = dp_accounting.TruncatedSubsampledGaussianDpEvent(
        dataset_size=1000, sampling_probability=0.1, truncated_batch_size=150, noise_multiplier=2.0
    )
    assert event == dp_accounting.SelfComposedDpEvent(step, 7)
    assert events.from_dict(json.loads(events.to_json(event))) == event
    assert events.is_sampled(event)
    two = sampler.event_of([2.0, 2.0, 1.0])
    weaker = dp_accounting.TruncatedSubsampledGaussianDpEvent(1000, 0.1, 150, 1.0)
    assert two == dp_accounting.ComposedDpEvent(
        [dp_accounting.SelfComposedDpEvent(step, 2), dp_accounting.SelfComposedDpEvent(weaker, 1)]
    )
    assert sampler.describe()["max_batch"] == 150


def test_without_a_cut_it_costs_what_poisson_sampling_costs() -> None:
    plain = dp_accounting.SelfComposedDpEvent(
        dp_accounting.PoissonSampledDpEvent(0.1, dp_accounting.GaussianDpEvent(1.0)), 50
    )
    uncut = TruncatedPoisson(0.1, 1000, 1000).event(1.0, 50)
    assert epsilon(uncut, 1e-5) == epsilon(plain, 1e-5)
    assert events.for_renyi(uncut) == plain
    assert epsilon(TruncatedPoisson(0.1, 160, 1000).event(1.0, 50), 1e-5) == pytest.approx(
        epsilon(plain, 1e-5), rel=1e-4
    )
    assert epsilon(TruncatedPoisson(0.1, 100, 1000).event(1.0, 50), 1e-5) > 1.3 * epsilon(plain, 1e-5)


@pytest.mark.parametrize(
    ("sampler", "z", "steps", "golden"),
    [(TruncatedPoisson(0.1, 120, 1000), 1.0, 50, 8.53020), (TruncatedPoisson(0.01, 700, 60_000), 1.1, 1000, 1.53890)],
)
def test_the_cost_is_the_golden_number_of_the_accountant(
    sampler: TruncatedPoisson, z: float, steps: int, golden: float
) -> None:
    assert epsilon(sampler.event(z, steps), 1e-5) == pytest.approx(golden, rel=2e-3)


def divergences(first: list[tuple[float, float]], second: list[tuple[float, float]], z: float) -> tuple[float, ...]:
    """Return hockey-stick divergences at e**0.1, e**0.5, e**1 and exp((a-1) D_a) at a = 2, 4 of two mixtures on a fine grid."""
    x = np.linspace(-10 * z - 6, 10 * z + 6, 8_001)

    def density(parts: list[tuple[float, float]]) -> np.ndarray:
        return sum(w * stats.norm.pdf(x, mean, z) for w, mean in parts)  # type: ignore[return-value]

    p, q = density(first), density(second)
    step = x[1] - x[0]
    sticks = [float(np.maximum(p - math.exp(e) * q, 0).sum() * step) for e in (0.1, 0.5, 1.0)]
    with np.errstate(divide="ignore", invalid="ignore"):
        moments = [float(np.nansum(np.where(q > 0, p**a / q ** (a - 1), 0)) * step) for a in (2, 4)]
    return *sticks, *moments


def outputs(values: tuple[float, ...], rate: float, most: int) -> list[tuple[float, float]]:
    """Return weight and sum of every batch of places that hold these values."""
    found: Counter[float] = Counter()
    for drawn in itertools.product((False, True), repeat=len(values)):
        places = [value for value, joined in zip(values, drawn, strict=True) if joined]
        weight = math.prod(rate if joined else 1 - rate for joined in drawn)
        subsets = list(itertools.combinations(places, min(most, len(places))))
        for subset in subsets:
            found[sum(subset)] += weight / len(subsets)
    return [(weight, mean) for mean, weight in found.items()]


@few
@given(
    others=st.lists(st.sampled_from([-1.0, -0.5, 0.0, 0.5, 1.0]), min_size=0, max_size=4),
    empty=st.integers(min_value=0, max_value=2),
    rate=st.sampled_from([0.05, 0.3, 0.7, 1.0]),
    most=st.integers(min_value=1, max_value=4),
    z=st.sampled_from([0.6, 1.0, 3.0]),
)
def test_no_bound_lies_below_the_truth_whatever_the_others_are(
    others: list[float], empty: int, rate: float, most: int, z: float
) -> None:
    # The true divergence between the sums with and without a record of value 1, over all draws.
    population = len(others) + empty + 1
    with_it = outputs((1.0, *others, *([0.0] * empty)), rate, most)
    without = outputs((0.0, *others, *([0.0] * empty)), rate, most)
    event = TruncatedPoisson(rate, most, population).event(z, 1)
    distribution = PldAccountant().compose(event)
    bound = rdp.RdpAccountant([2, 4]).compose(events.for_renyi(event))._rdp
    for first, second in ((with_it, without), (without, with_it)):
        *sticks, two, four = divergences(first, second, z)
        for e, true in zip((0.1, 0.5, 1.0), sticks, strict=True):
            assert true <= distribution.get_delta(e) * (1 + 1e-4) + 1e-9
        assert math.log(two) <= bound[0] * (1 + 1e-5) + 1e-9
        assert math.log(four) / 3 <= bound[1] * (1 + 1e-5) + 1e-9


def test_what_is_cut_costs_more_than_poisson_sampling_at_the_same_rate() -> None:
    # Nine others that all point the other way, and room for one: an accountant that forgets the cut would say too little.
    with_it, without = (outputs((own, *[-1.0] * 9), 0.1, 1) for own in (1.0, 0.0))
    true = divergences(with_it, without, 1.0)[2]
    forgetful = PldAccountant().compose(dp_accounting.PoissonSampledDpEvent(0.1, dp_accounting.GaussianDpEvent(1.0)))
    known = PldAccountant().compose(TruncatedPoisson(0.1, 1, 10).event(1.0, 1))
    assert 1.5 * forgetful.get_delta(1.0) < true < known.get_delta(1.0)


@pytest.mark.parametrize(("rate", "most", "population"), [(1.0, 1, 2), (0.3, 2, 6), (0.05, 4, 60)])
@pytest.mark.parametrize("e", [0.1, 0.5, 1.0, 3.0])
def test_the_event_is_no_less_than_the_proof_needs(rate: float, most: int, population: int, e: float) -> None:
    def far(distance: float, chance: float) -> float:
        """Return the divergence of a Poisson-sampled sum, the unit removed, by advanced joint convexity."""
        level = math.log1p(math.expm1(e) / chance)
        places = distance / 2 - level / distance, -distance / 2 - level / distance
        return chance * float(special.ndtr(places[0]) - math.exp(level) * special.ndtr(places[1]))

    cut = float(stats.binom.sf(most - 1, population - 1, rate))
    kept = float(stats.binom.sf(most, population, rate)) * most / cut / population
    assert kept <= rate
    needed = (1 - cut) * far(1, rate) + cut * far(2, kept)
    assert needed <= PldAccountant().compose(TruncatedPoisson(rate, most, population).event(1.0, 1)).get_delta(e)


@few
@given(
    rate=st.floats(min_value=1e-3, max_value=0.2),
    spare=st.floats(min_value=0.5, max_value=1.5),
    z=st.floats(min_value=1.0, max_value=20),
    steps=st.integers(min_value=1, max_value=100),
    delta=st.sampled_from([1e-4, 1e-6, 1e-8]),
)
def test_the_second_accountant_never_lies_below_the_first(
    rate: float, spare: float, z: float, steps: int, delta: float
) -> None:
    population = 10_000
    sampler = TruncatedPoisson(rate, max(1, round(spare * rate * population)), population)
    first = epsilon(sampler.event(z, steps), delta)
    assert first <= renyi_epsilon(sampler.event(z, steps), delta) + 1e-3 * steps
    assert epsilon(sampler.event(1.5 * z, steps), delta) <= first + 1e-3 * steps
