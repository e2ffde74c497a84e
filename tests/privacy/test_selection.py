"""Private selection: the law of the number of runs, and what the best of them costs."""

from __future__ import annotations

import itertools
import json
import math

import dp_accounting
import numpy as np
import pytest
from dp_accounting import rdp
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from sfumato.errors import AccountingError, InputError
from sfumato.privacy import events, selection
from sfumato.privacy.budget import Relation
from sfumato.privacy.randomness import SeededSource
from sfumato.privacy.selection import Repetitions

LAWS = [
    Repetitions(3.0),
    Repetitions(10.0),
    Repetitions(1.0, 1.0),
    Repetitions(3.0, 1.0),
    Repetitions(4.0, 0.0),
    Repetitions(5.0, 0.5),
    Repetitions(4.0, 7.5),
]
DELTA = 1e-4


def masses(law: Repetitions, count: int = 3000) -> np.ndarray:
    return np.array([float(mass) for mass in itertools.islice(law.masses(), count)])


@pytest.mark.parametrize("law", LAWS, ids=str)
def test_the_masses_are_those_of_the_law(law: Repetitions) -> None:
    found, runs = masses(law), np.arange(3000)
    if math.isinf(law.shape):
        wanted = stats.poisson.pmf(runs, law.mean)
    elif law.gamma == 1:
        wanted = (runs == 1).astype(float)
    elif law.shape == 0:
        wanted = stats.logser.pmf(runs, 1 - law.gamma)
    else:
        wanted = np.where(runs > 0, stats.nbinom.pmf(runs, law.shape, law.gamma), 0.0)
        wanted /= wanted.sum()
    assert found == pytest.approx(wanted, rel=1e-6, abs=1e-14)
    # Never more runs in the mean than were paid for, and hardly fewer.
    assert law.mean * (1 - 1e-6) <= float(found @ runs) <= law.mean * (1 + 1e-12)


@pytest.mark.parametrize("shape", [0.0, 0.3, 1.0, 4.0, 60.0])
@pytest.mark.parametrize("mean", [1.0, 1.001, 2.0, 30.0, 1000.0])
def test_the_stopping_probability_is_never_below_the_accountants(mean: float, shape: float) -> None:
    accountants = rdp.rdp_privacy_accountant._gamma_truncated_negative_binomial(shape, mean)
    gamma = Repetitions(mean, shape).gamma
    assert accountants <= gamma <= accountants * (1 + 1e-7)


def looks_like(law: Repetitions, drawn: list[int]) -> bool:
    """Tell by chi-square whether the numbers could come from the law; false alarm one in a million."""
    expected = masses(law, 400) * len(drawn)
    cells = [run for run in range(400) if expected[run] >= 8]
    seen = np.array([drawn.count(run) for run in cells])
    wanted = expected[cells]
    seen, wanted = np.append(seen, len(drawn) - seen.sum()), np.append(wanted, len(drawn) - wanted.sum())
    if wanted[-1] < 1e-6:  # nothing lies outside of the cells
        return bool(seen[-1] == 0) and (
            len(cells) == 1
            or stats.chisquare(seen[:-1], wanted[:-1] * seen[:-1].sum() / wanted[:-1].sum()).pvalue > 1e-6
        )
    return bool(stats.chisquare(seen, wanted).pvalue > 1e-6)


@pytest.mark.parametrize("law", LAWS, ids=str)
def test_numbers_are_drawn_from_the_law_and_from_no_near_one(law: Repetitions) -> None:
    source = SeededSource(20)
    drawn = [law.draw(source) for _ in range(3000)]
    assert looks_like(law, drawn)
    for factor in (2 / 3, 3 / 2):
        near = Repetitions(max(1.0, law.mean * factor), law.shape)
        assert near == law or not looks_like(near, drawn)
    if not math.isinf(law.shape):
        assert min(drawn) >= 1
        assert not looks_like(Repetitions(law.mean), drawn)


def brute_force_delta(law: Repetitions, shift: float, epsilon: float) -> float:
    """Return the exact delta(epsilon) of the largest of K draws of N(0, 1) against N(shift, 1), and the other way round."""
    weights = masses(law, 400)
    grid = np.linspace(-9, 9 + shift, 8_001)

    def density(mean: float) -> np.ndarray:
        below = stats.norm.cdf(grid - mean)
        slope = sum(k * weights[k] * below ** (k - 1) for k in range(1, 400) if weights[k] > 1e-14)
        return slope * stats.norm.pdf(grid - mean)

    one, two, width = density(0.0), density(shift), grid[1] - grid[0]
    there = np.maximum(one - math.exp(epsilon) * two, 0).sum() * width
    back = np.maximum(two - math.exp(epsilon) * one, 0).sum() * width
    return float(max(there, back))


@pytest.mark.parametrize("law", LAWS, ids=str)
@pytest.mark.parametrize("noise", [1.5, 6.0])
def test_the_best_of_a_gaussian_mechanism_costs_no_more_than_claimed_and_more_than_one_run(
    law: Repetitions, noise: float
) -> None:
    whole, alone = law.spending(events.gaussian(noise), DELTA)
    assert brute_force_delta(law, 1 / noise, whole.epsilon) <= DELTA
    assert brute_force_delta(law, 1 / noise, whole.pld) <= DELTA * (1 + 1e-6)
    if law.mean > 1:
        # The price of one run is not enough: this test would see a search that is not paid for.
        assert brute_force_delta(law, 1 / noise, alone.epsilon) > 1.2 * DELTA


def theorem(law: Repetitions, noise: float, delta: float) -> float:
    """Return the paper's bound for one Gaussian release, from its formulas alone."""
    orders = np.concatenate([np.linspace(1.02, 40, 1200), np.geomspace(40, 4096, 400)])
    one = orders / (2 * noise**2)
    if math.isinf(law.shape):  # theorem 6
        hat = np.log1p(1 / (orders - 1))
        # From Renyi to delta: Canonne, Kamath and Steinke 2020, proposition 12.
        logs = (
            (orders - 1) * (one[None, :] - hat[:, None]) + (orders - 1) * np.log1p(-1 / orders) - np.log(orders)
        ).min(1)
        whole = one + law.mean * np.exp(np.minimum(logs, 0)) + math.log(law.mean) / (orders - 1)
    else:  # theorem 2
        gamma = law.gamma
        other = ((1 - 1 / orders) * one + math.log(1 / gamma) / orders).min()
        whole = one + (1 + law.shape) * other + math.log(law.mean) / (orders - 1)
    epsilon = whole + np.log1p(-1 / orders) - (math.log(delta) + np.log(orders)) / (orders - 1)
    return float(epsilon.min())


@pytest.mark.parametrize("law", LAWS, ids=str)
@pytest.mark.parametrize("noise", [1.5, 6.0, 20.0])
def test_the_claim_is_that_of_the_papers_formulas(law: Repetitions, noise: float) -> None:
    claim = law.renyi(events.gaussian(noise), DELTA)
    # dp-accounting has fewer orders, and for theorem 6 also other ways from Renyi to delta.
    assert claim == pytest.approx(theorem(law, noise, DELTA), rel=0.02)


@pytest.mark.parametrize("law", LAWS, ids=str)
def test_the_claim_is_what_dp_accounting_says_of_the_event(law: Repetitions) -> None:
    one = events.composed(
        [events.repeated(events.poisson_sampled(0.05, events.gaussian(1.5)), 40), events.gaussian(5.0)]
    )
    whole, alone = law.spending(one, DELTA)
    accountant = rdp.RdpAccountant()
    accountant.compose(law.event(one))
    theirs = float(accountant.get_epsilon(DELTA))
    assert whole.epsilon == whole.rdp
    assert 0.97 * theirs <= whole.epsilon <= theirs
    assert alone.epsilon <= whole.epsilon


def exact_delta(epsilon: float, noise: float) -> float:
    """Return the delta of one Gaussian sum (Balle and Wang 2018, theorem 8)."""
    half, far = 0.5 / noise, epsilon * noise
    return float(stats.norm.cdf(half - far) - math.exp(epsilon) * stats.norm.cdf(-half - far))


def test_the_second_opinion_is_the_average_of_all_compositions() -> None:
    law = Repetitions(3.0)
    second = law.spending(events.gaussian(6.0), DELTA)[0].pld
    average = [
        sum(p * exact_delta(epsilon, 6.0 / math.sqrt(k)) for k, p in enumerate(masses(law, 60)) if k)
        for epsilon in (second, 0.85 * second)
    ]
    assert average[0] <= DELTA < average[1]


def test_the_numbers_that_are_not_composed_are_paid_for_in_delta(monkeypatch: pytest.MonkeyPatch) -> None:
    # Little noise, so that an outcome beyond the last composed one costs much, and few numbers before it.
    monkeypatch.setattr(selection, "_TAIL", 0.9)
    law = Repetitions(1.0)
    second = law.spending(events.gaussian(0.8), DELTA)[0].pld
    assert sum(p * exact_delta(second, 0.8 / math.sqrt(k)) for k, p in enumerate(masses(law, 60)) if k) <= DELTA


def test_where_all_outcomes_cannot_be_composed_there_is_no_second_bound() -> None:
    whole, _ = Repetitions(500.0, 1.0).spending(events.gaussian(8.0), DELTA)
    assert math.isinf(whole.pld)
    assert math.isfinite(whole.epsilon)


def test_more_runs_cost_more_but_hardly() -> None:
    one = events.gaussian(8.0)
    costs = [Repetitions(mean, 1.0).renyi(one, DELTA) for mean in (2.0, 10.0, 100.0, 1000.0)]
    assert costs == sorted(costs)
    assert costs[-1] < 2.5 * costs[0]  # a fixed number would cost about 22 times as much


@settings(deadline=None, max_examples=30)
@given(st.floats(1, 60), st.sampled_from([math.inf, 0.0, 0.5, 1.0, 3.0]), st.floats(1.0, 60.0), st.floats(1e-8, 1e-3))
def test_a_search_never_costs_less_than_one_of_its_runs(mean: float, shape: float, noise: float, delta: float) -> None:
    law, one = Repetitions(mean, shape), events.gaussian(noise)
    alone = dp_accounting.get_epsilon_gaussian(noise, delta)
    assert law.renyi(one, delta) >= alone


def test_a_claim_below_one_run_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Repetitions, "renyi", lambda *_: 0.01)
    with pytest.raises(AccountingError, match="contradict each other"):
        Repetitions(3.0).spending(events.gaussian(2.0), DELTA)


def test_what_is_not_private_stays_so() -> None:
    whole, alone = Repetitions(3.0).spending(events.non_private(), DELTA)
    assert math.isinf(whole.epsilon)
    assert math.isinf(alone.epsilon)


def test_replace_one_is_accounted_without_sampling_only() -> None:
    law, sampled = Repetitions(3.0), events.poisson_sampled(0.1, events.gaussian(2.0))
    with pytest.raises(AccountingError, match="Amplification"):
        law.spending(sampled, DELTA, Relation.REPLACE_ONE)
    unsampled = law.spending(events.gaussian(4.0), DELTA, Relation.REPLACE_ONE)
    assert unsampled == law.spending(events.gaussian(4.0), DELTA)
    assert events.is_sampled(law.event(sampled))
    assert not events.is_sampled(law.event(events.gaussian(2.0)))


@pytest.mark.parametrize("shape", [math.inf, 0.0, 1.0])
def test_the_event_survives_json(shape: float) -> None:
    event = Repetitions(3.0, shape).event(events.composed([events.gaussian(2.0)]))
    text = events.to_json(event)
    assert events.from_dict(json.loads(text, parse_constant=lambda _: pytest.fail("JSON has no infinity"))) == event


@pytest.mark.parametrize("mean", [0.99, 0, -1, 1001, math.nan, math.inf])
def test_a_mean_that_is_no_mean_is_refused(mean: float) -> None:
    with pytest.raises(InputError, match="mean_trials"):
        Repetitions(mean)


@pytest.mark.parametrize("shape", [-0.1, 101, math.nan, -math.inf])
def test_a_shape_that_is_no_shape_is_refused(shape: float) -> None:
    with pytest.raises(InputError, match="shape"):
        Repetitions(3.0, shape)


@pytest.mark.parametrize(
    ("mean", "shape"), [(0.5, 1.0), (math.nan, 1.0), (math.inf, 1.0), (2.0, -1.0), (2.0, math.nan)]
)
def test_an_event_of_no_law_is_refused(mean: float, shape: float) -> None:
    with pytest.raises(InputError, match="no such law"):
        events.repeat_and_select(events.gaussian(1.0), mean, shape)


def test_laws_have_names() -> None:
    assert Repetitions.named("poisson", 3, 1.0) == Repetitions(3)
    assert Repetitions.named("negative-binomial", 3, 0.5) == Repetitions(3, 0.5)
    assert {Repetitions(3).name, Repetitions(3, 0.0).name} == {"poisson", "negative-binomial"}
    with pytest.raises(InputError, match='Did you mean "poisson"'):
        Repetitions.named("poison", 3, 1.0)
    with pytest.raises(InputError, match="shape"):
        Repetitions.named("negative-binomial", 3, math.inf)
