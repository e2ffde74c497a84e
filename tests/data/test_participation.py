"""Minimum separation: who takes part and how often, and that the event counts what a client can move."""

from __future__ import annotations

import io
import itertools
import json
import math
from collections import Counter

import dp_accounting
import numpy as np
import pytest
import torch
from dp_accounting import rdp
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import sfumato as sf
from sfumato.data.participation import MinSeparation, SeparatedDraws, _subset
from sfumato.errors import CheckpointError, InputError, PlanError, SfumatoError
from sfumato.privacy import events
from sfumato.privacy.accounting import spending
from sfumato.privacy.budget import Relation
from sfumato.privacy.randomness import SecureSource, SeededSource

few = settings(max_examples=40, deadline=None)


def rate_fits(hits: int, n: int, rate: float) -> bool:
    """Tell whether `hits` of `n` flips could have come at `rate` (one false alarm in about 1e10)."""
    return abs(hits - n * rate) < 7 * math.sqrt(n * rate * (1 - rate))


def kept(draws: SeparatedDraws) -> dict[str, object]:
    """Return the draws' state as a checkpoint would bring it back."""
    file = io.BytesIO()
    torch.save(draws.state(), file)
    file.seek(0)
    return torch.load(file, weights_only=True)  # type: ignore[no-any-return]


# The draw.

SAMPLERS = st.tuples(st.integers(1, 6), st.integers(1, 5), st.integers(1, 4), st.integers(0, 12)).map(
    lambda drawn: MinSeparation(drawn[0], drawn[0] * drawn[1] + drawn[3], drawn[1], drawn[2])
)


def keeps_apart(sampler: MinSeparation, batches: list[list[int]]) -> bool:
    steps: dict[int, list[int]] = {}
    for step, batch in enumerate(batches):
        for client in batch:
            steps.setdefault(client, []).append(step)
    return all(
        len(taken) <= sampler.participations
        and all(later - earlier >= sampler.separation for earlier, later in itertools.pairwise(taken))
        for taken in steps.values()
    )


@few
@given(sampler=SAMPLERS, steps=st.integers(0, 25))
def test_nobody_takes_part_too_soon_or_too_often(sampler: MinSeparation, steps: int) -> None:
    draws = sampler.start(sampler.population, SecureSource())
    batches = []
    for step in range(steps):
        batch = draws.batch(step)
        assert batch.dtype is torch.int64
        batches.append(batch.tolist())
        assert batches[-1] == sorted(set(batches[-1]))
        assert len(batches[-1]) <= sampler.cohort
    assert keeps_apart(sampler, batches)


@few
@given(sampler=SAMPLERS, data=st.data())
def test_nobody_who_came_takes_part_too_soon_or_too_often(sampler: MinSeparation, data: st.DataObject) -> None:
    draws = sampler.start(sampler.population, SecureSource())
    batches = []
    for step in range(15):
        come = data.draw(st.lists(st.integers(0, sampler.population - 1), max_size=12))
        batches.append(draws.batch(step, torch.tensor(come, dtype=torch.int64)).tolist())
        assert set(batches[-1]) <= set(come)
    assert keeps_apart(sampler, batches)


@few
@given(sampler=SAMPLERS)
def test_cohorts_are_full_while_there_are_clients_for_them(sampler: MinSeparation) -> None:
    draws, last, times = sampler.start(sampler.population, SecureSource()), dict[int, int](), Counter[int]()
    for step in range(3 * sampler.separation + 2):
        able = [
            client
            for client in range(sampler.population)
            if step - last.get(client, -99) >= sampler.separation and times[client] < sampler.participations
        ]
        batch = draws.batch(step).tolist()
        assert len(batch) == min(sampler.cohort, len(able))
        assert set(batch) <= set(able)
        times.update(batch)
        last |= dict.fromkeys(batch, step)


def test_the_cohort_is_uniform_among_those_that_may_take_part() -> None:
    runs, sampler = 4000, MinSeparation(2, 5, 2, 3)
    firsts, seconds = Counter[tuple[int, ...]](), Counter[tuple[int, ...]]()
    for _ in range(runs):
        draws = sampler.start(5, SecureSource())
        first, second = draws.batch(0).tolist(), draws.batch(1).tolist()
        firsts[tuple(first)] += 1
        rest = [client for client in range(5) if client not in first]
        seconds[tuple(rest.index(client) for client in second)] += 1
    for found, wanted in ((firsts, 10), (seconds, 3)):
        assert len(found) == wanted
        for hits in found.values():
            assert rate_fits(hits, runs, 1 / wanted)
        assert not rate_fits(max(found.values()), runs, 1 / wanted * 2 / 3)
        assert not rate_fits(min(found.values()), runs, 1 / wanted * 3 / 2)


@pytest.mark.parametrize(("count", "size"), [(6, 2), (12, 2), (5, 1)])
def test_sets_of_every_kind_are_uniform(count: int, size: int) -> None:
    runs, source = 12_000, SecureSource()
    found = Counter(tuple(_subset(count, size, source).tolist()) for _ in range(runs))
    assert set(found) == set(itertools.combinations(range(count), size))
    for hits in found.values():
        assert rate_fits(hits, runs, 1 / math.comb(count, size))


@pytest.mark.parametrize(("count", "size"), [(0, 3), (3, 3), (2, 5), (7, 3), (1000, 249), (1000, 251)])
def test_a_set_holds_as_many_different_numbers_as_there_are(count: int, size: int) -> None:
    chosen = _subset(count, size, SecureSource())
    assert len(chosen) == len(set(chosen.tolist())) == min(count, size)
    assert chosen.dtype == np.int64
    assert all(0 <= number < count for number in chosen)
    assert chosen.tolist() == sorted(chosen)


@few
@given(sampler=SAMPLERS, seed=st.integers(0, 99), missing=st.integers(1, 4))
def test_the_others_are_drawn_the_same_with_and_without_a_client(
    sampler: MinSeparation, seed: int, missing: int
) -> None:
    fewer = max(0, sampler.population - missing)
    whole = sampler.start(sampler.population, SeededSource(seed))
    less = sampler.start(fewer, SeededSource(seed))
    for step in range(12):
        assert less.batch(step).tolist() == [client for client in whole.batch(step).tolist() if client < fewer]


def test_the_cohorts_are_secret_and_repeat_from_a_seed() -> None:
    sampler = MinSeparation(20, 200, 3, 2)
    assert not torch.equal(sampler.start(200, SecureSource()).batch(0), sampler.start(200, SecureSource()).batch(0))
    one, two = sampler.start(200, SeededSource(4)), sampler.start(200, SeededSource(4))
    assert all(torch.equal(one.batch(step), two.batch(step)) for step in range(8))


def test_a_step_has_one_cohort_and_steps_have_an_order() -> None:
    draws = MinSeparation(3, 30, 2, 4).start(30, SecureSource())
    first, second = draws.batch(0), draws.batch(1)
    assert torch.equal(draws.batch(1), second)
    assert not torch.equal(first, second)
    with pytest.raises(SfumatoError, match="step 1 was asked for after that of step 2"):
        draws.batch(0)
    with pytest.raises(SfumatoError, match="asked for"):
        MinSeparation(1, 3, 1, 1).start(3, SecureSource()).batch(-1)


# Resuming.


@few
@given(sampler=SAMPLERS, stop=st.integers(0, 6), lost=st.integers(0, 4))
def test_a_resumed_run_goes_on_and_draws_lost_cohorts_again(sampler: MinSeparation, stop: int, lost: int) -> None:
    draws = sampler.start(sampler.population, SecureSource())
    for step in range(stop + 1):
        draws.batch(step)
    resumed = sampler.start(sampler.population, SecureSource(), kept(draws))
    assert torch.equal(resumed.batch(stop), draws.batch(stop))
    for step in range(stop + 1, stop + 1 + lost):
        draws.batch(step)
    for step in range(stop + 1 + lost, stop + lost + 8):
        assert torch.equal(resumed.batch(step), draws.batch(step))


def test_who_came_to_lost_steps_is_unknown() -> None:
    sampler, everybody = MinSeparation(3, 30, 2, 4), torch.arange(30)
    draws = sampler.start(30, SecureSource())
    draws.batch(0, everybody)
    before = kept(draws)
    draws.batch(1, everybody)
    with pytest.raises(CheckpointError, match="Before step 3, 1 steps were lost"):
        sampler.start(30, SecureSource(), before).batch(2, everybody)
    again = sampler.start(30, SecureSource(), kept(draws)).batch(2, everybody)
    assert not set(again.tolist()) & set(draws.batch(1, everybody).tolist())


def test_before_the_first_cohort_nothing_can_be_drawn_again() -> None:
    sampler = MinSeparation(3, 30, 2, 4)
    fresh = kept(sampler.start(30, SecureSource()))
    assert len(sampler.start(30, SecureSource(), fresh).batch(0)) == 3
    for come in (None, torch.arange(30)):
        with pytest.raises(CheckpointError, match="were lost"):
            sampler.start(30, SecureSource(), fresh).batch(1, come)


def test_a_run_draws_from_all_or_from_who_came() -> None:
    one, other = (MinSeparation(3, 30, 2, 4).start(30, SecureSource()) for _ in range(2))
    one.batch(0)
    other.batch(0, torch.arange(5))
    with pytest.raises(InputError, match="in every step or in none"):
        one.batch(1, torch.arange(5))
    with pytest.raises(InputError, match="in every step or in none"):
        other.batch(1)


def test_kept_participations_of_another_population_are_refused() -> None:
    state = kept(MinSeparation(3, 30, 2, 4).start(30, SecureSource()))
    with pytest.raises(InputError, match="31 places"):
        MinSeparation(3, 31, 2, 4).start(31, SecureSource(), state)


def test_a_state_is_a_copy_of_eight_bytes_a_place() -> None:
    draws = MinSeparation(5, 1000, 2, 3).start(1000, SecureSource())
    state = draws.state()
    held = [value for value in state.values() if isinstance(value, Tensor)]
    assert sum(value.nbytes for value in held) == 8 * 1000
    draws.batch(0)
    assert not state["times"].any()
    assert int(draws.state()["times"].sum()) == 5


@pytest.mark.parametrize(
    "come", [torch.tensor([0, 3]), torch.tensor([-1]), torch.tensor([[0]]), torch.tensor([0.0]), torch.tensor([True])]
)
def test_what_is_no_list_of_clients_is_refused(come: Tensor) -> None:
    draws = MinSeparation(2, 10, 2, 2).start(3, SecureSource())
    with pytest.raises(InputError, match="available"):
        draws.batch(0, come)
    assert draws.batch(0, torch.tensor([2, 0, 2])).tolist() == [0, 2]


def test_nobody_has_come() -> None:
    draws = MinSeparation(2, 10, 2, 2).start(10, SecureSource())
    assert draws.batch(0, torch.empty(0, dtype=torch.int64)).shape == (0,)


# What it costs.


@few
@given(sampler=SAMPLERS, noise=st.floats(0.1, 50), steps=st.integers(1, 60))
def test_one_client_pays_for_its_participations(sampler: MinSeparation, noise: float, steps: int) -> None:
    times = min(sampler.participations, math.ceil(steps / sampler.separation))
    whole = dp_accounting.SelfComposedDpEvent(dp_accounting.GaussianDpEvent(noise), times)
    assert sampler.event(noise, steps) == whole
    assert sampler.event_of([noise, *[noise * 3] * (steps - 1)]) == whole
    assert sampler.event_of([*[noise * 3] * (steps - 1), noise]) == whole
    assert not events.is_sampled(whole)
    assert not sampler.by_step
    assert sampler.rate * sampler.population == pytest.approx(sampler.cohort)


def test_no_steps_cost_nothing() -> None:
    assert spending(MinSeparation(1, 9, 3, 3).event(1.0, 0), 1e-5).epsilon == 0


def patterns(steps: int, separation: int, most: int) -> list[tuple[int, ...]]:
    """Return all ways of one client to take part, by brute force."""
    return [
        taken
        for size in range(most + 1)
        for taken in itertools.combinations(range(steps), size)
        if all(later - earlier >= separation for earlier, later in itertools.pairwise(taken))
    ]


def banded(coefficients: list[float], steps: int) -> np.ndarray:
    matrix = np.zeros((steps, steps))
    for lag, coefficient in enumerate(coefficients[:steps]):
        matrix += coefficient * np.eye(steps, k=-lag)
    return matrix


def furthest(matrix: np.ndarray, separation: int, most: int, rows: slice = slice(None)) -> float:
    """Return how far, squared, one client can move the rows: the worst participation and the worst signs."""
    steps, worst = len(matrix), 0.0
    for taken in patterns(steps, separation, most):
        for signs in itertools.product((-1.0, 1.0), repeat=len(taken)):
            moved = np.zeros(steps)
            moved[list(taken)] = signs
            worst = max(worst, float(np.square((matrix @ moved)[rows]).sum()))
    return worst


def times_of(event: events.Event) -> int:
    return int(event.count)  # type: ignore[attr-defined]


@few
@given(
    coefficients=st.lists(st.floats(-2, 2), min_size=1, max_size=4), wider=st.integers(0, 2), most=st.integers(1, 3),
    steps=st.integers(1, 8),
)  # fmt: skip
def test_no_client_moves_the_rows_by_more_than_the_event_says(
    coefficients: list[float], wider: int, most: int, steps: int
) -> None:
    separation = len(coefficients) + wider
    sampler = MinSeparation(1, 100, separation, most)
    square, counted = sum(c * c for c in coefficients), times_of(sampler.event(1.0, steps))
    found = furthest(banded(coefficients, steps), separation, most)
    assert found <= counted * square * (1 + 1e-12) + 1e-12
    if steps >= (counted - 1) * separation + len(coefficients):
        assert found == pytest.approx(counted * square)


def test_bands_beyond_the_separation_would_cost_more() -> None:
    coefficients, sampler = [1.0, 0.5, 0.375], MinSeparation(1, 100, 2, 3)
    counted = times_of(sampler.event(1.0, 7)) * sum(c * c for c in coefficients)
    assert furthest(banded(coefficients, 7), 2, 3) > 1.2 * counted


@few
@given(bands=st.integers(1, 4), most=st.integers(1, 3), first=st.integers(0, 6), steps=st.integers(1, 4))
def test_steps_in_the_middle_pay_for_the_participations_that_reach_them(
    bands: int, most: int, first: int, steps: int
) -> None:
    coefficients = [1.0, 0.9, 0.8, 0.7][:bands]
    reaching = max(sum(first - bands < step for step in taken) for taken in patterns(first + steps, bands, most))
    event = MinSeparation(1, 100, bands, most).event_of([1.0] * steps, first=first)
    assert times_of(event) == reaching
    found = furthest(banded(coefficients, first + steps), bands, most, slice(first, None))
    assert found <= times_of(event) * sum(c * c for c in coefficients) + 1e-12


@few
@given(noise=st.floats(0.5, 20), most=st.integers(1, 12), delta=st.sampled_from([1e-3, 1e-5, 1e-8]))
def test_the_cost_is_that_of_one_gaussian_sum_by_three_accountants(noise: float, most: int, delta: float) -> None:
    event = MinSeparation(1, 1000, 4, most).event(noise, 200)
    exact = dp_accounting.get_epsilon_gaussian(noise / math.sqrt(most), delta)
    for relation in Relation:
        spent = spending(event, delta, relation)
        assert exact * (1 - 1e-6) <= spent.epsilon <= exact * 1.01 + 1e-3
        assert spent.rdp >= exact * (1 - 1e-6)


@few
@given(noise=st.floats(0.5, 20), depth=st.integers(1, 4), most=st.integers(1, 6))
def test_dp_accounting_counts_a_tree_by_the_norm_of_its_columns_as_well(noise: float, depth: int, most: int) -> None:
    # A tree over 2**(depth - 1) steps is a matrix whose columns have the squared norm `depth`: one node of each level.
    steps = 2 ** (depth - 1)
    tree = np.vstack([np.kron(np.eye(steps // width), np.ones((1, width))) for width in 2 ** np.arange(depth)])
    assert (np.square(tree).sum(0) == depth).all()
    relation = dp_accounting.NeighboringRelation.REPLACE_SPECIAL
    theirs = rdp.RdpAccountant(neighboring_relation=relation)
    theirs.compose(dp_accounting.dp_event.SingleEpochTreeAggregationDpEvent(noise, steps), most)
    ours = rdp.RdpAccountant(neighboring_relation=relation)
    # The same noise over the columns' norm, once for each tree that a client takes part in.
    ours.compose(MinSeparation(1, 100, steps, most).event(noise / math.sqrt(depth), most * steps))
    assert ours.get_epsilon(1e-5) == pytest.approx(theirs.get_epsilon(1e-5), rel=1e-9)


# Numbers that cannot be.


@pytest.mark.parametrize("place", range(4))
@pytest.mark.parametrize("wrong", [0, -1, 1.5, math.nan, True])
def test_what_is_no_count_is_refused(place: int, wrong: object) -> None:
    numbers: list[object] = [1, 100, 2, 3]
    numbers[place] = wrong
    with pytest.raises(InputError, match="whole number"):
        MinSeparation(*numbers)  # type: ignore[arg-type]


def test_cohorts_that_cannot_be_filled_are_refused() -> None:
    with pytest.raises(PlanError, match="need 12 different clients, more than the population of 11"):
        MinSeparation(4, 11, 3, 1)
    sampler = MinSeparation(4, 12, 3, 2)
    sampler.check_steps(6)
    with pytest.raises(PlanError, match="7 steps with cohorts of 4 need 28 participations, and 12 clients have 24"):
        sampler.check_steps(7)


def test_more_clients_than_the_population_are_refused_without_a_number() -> None:
    with pytest.raises(PlanError, match="more clients than the population of 12") as refusal:
        MinSeparation(4, 12, 3, 2).start(57, SecureSource())
    assert "57" not in str(refusal.value)


def test_a_plan_can_be_made_with_it() -> None:
    sampler = MinSeparation(10, 100, 5, 4)
    plan = sf.Plan(sf.Budget(4.0, 1e-3, unit="client"), sampler, 1.0, 3.0, 40, 100)  # type: ignore[arg-type]
    assert plan.expected_batch == pytest.approx(10)
    assert plan.event == events.repeated(events.gaussian(3.0), 4)
    costs = [plan.epsilon_after(step) for step in (1, 6, 40)]
    assert 0 < costs[0] <= costs[1] <= costs[2] <= 4.0
    described = json.loads(json.dumps(plan.describe()))["sampling"]
    assert described == {
        "kind": "min-separation", "rate": 0.1, "cohort": 10, "population": 100, "separation": 5, "participations": 4,
    }  # fmt: skip
    with pytest.raises(PlanError, match="more than the budget"):
        sf.Plan(sf.Budget(1.0, 1e-3), sampler, 1.0, 1.5, 40, 100)
