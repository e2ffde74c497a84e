"""The filter: whatever a policy answers, the steps that pass cost no more than the cap, by an independent reckoning."""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import pytest
from dp_accounting import rdp
from helpers import LOSS, sgd, toy_model, toy_records
from hypothesis import given, settings
from hypothesis import strategies as st

import sfumato as sf
from sfumato.data.sampling import FullBatch, Poisson, Sampler, Shuffled
from sfumato.errors import CheckpointError, PlanError
from sfumato.learning.filters import Filter, Purse, rollout
from sfumato.learning.policies import (
    Decay,
    Outlook,
    PublicPolicy,
    ReleasedPolicy,
    Signal,
    SignalToNoise,
    SpendEvenly,
    StopWhenFlat,
)
from sfumato.learning.training import Training
from sfumato.privacy import accounting, events
from sfumato.privacy.budget import Budget

BUDGET = Budget(1.0, 1e-5)
SAMPLERS: list[Sampler] = [FullBatch(), Poisson(0.05)]
FILTERS = {sampler.kind: Filter.of(BUDGET, sampler, 50) for sampler in SAMPLERS}


def paid(filter: Filter, wanted: Sequence[float], steps: int = 50) -> list[float]:
    purse = Purse(filter, steps)
    done = []
    for step, noise in enumerate(wanted):
        purse.outlook(step)
        answer = purse.pay(noise)
        if answer is not None:
            done.append(answer)
    return done


@pytest.mark.parametrize("kind", list(FILTERS))
@settings(max_examples=30, deadline=None)
@given(wanted=st.lists(st.floats(min_value=1e-3, max_value=1e4), max_size=120))
def test_no_answers_can_make_the_total_pass_the_cap(kind: str, wanted: list[float]) -> None:
    filter = FILTERS[kind]
    done = paid(filter, wanted)
    if filter.order is None:
        total = sum(1 / Fraction(noise) ** 2 for noise in done)
        assert total <= Fraction(filter.cap)
        return
    accountant = rdp.RdpAccountant([filter.order])
    for noise in done:
        accountant.compose(filter.sampler.event(noise, 1))
    assert accountant.rdp[0] <= filter.cap
    if done:
        assert rdp.compute_epsilon([filter.order], [float(accountant.rdp[0])], BUDGET.delta)[0] <= BUDGET.epsilon


@pytest.mark.parametrize("kind", list(FILTERS))
@settings(max_examples=20, deadline=None)
@given(wanted=st.lists(st.floats(min_value=0.5, max_value=100.0), max_size=60))
def test_a_step_never_has_less_noise_than_was_asked_for(kind: str, wanted: list[float]) -> None:
    purse = Purse(FILTERS[kind], 50)
    least = purse._noises[0]
    for noise in wanted:
        answer = purse.pay(noise)
        assert answer is None or answer >= min(noise, purse._noises[-1])
        assert answer is None or answer <= 1.51 * max(noise, least)


@pytest.mark.parametrize("sampler", SAMPLERS, ids=lambda s: s.kind)
def test_even_spending_lasts_for_all_steps_and_uses_the_cap(sampler: Sampler) -> None:
    filter = Filter.of(BUDGET, sampler, 50)
    purse = Purse(filter, 50)
    done = [purse.pay(purse.outlook(step).even) for step in range(50)]
    assert None not in done
    assert 0.97 * filter.cap <= purse.spent <= filter.cap


@pytest.mark.parametrize("sampler", SAMPLERS, ids=lambda s: s.kind)
def test_the_event_of_a_filter_is_within_the_budget_by_the_accountants(sampler: Sampler) -> None:
    spending = accounting.spending(Filter.of(BUDGET, sampler, 50).event, BUDGET.delta)
    assert 0.99 * BUDGET.epsilon <= spending.epsilon <= BUDGET.epsilon


def test_full_batches_cost_what_one_gaussian_sum_costs() -> None:
    filter = FILTERS["full-batch"]
    assert filter.order is None
    noise = filter.even_for(filter.cap / 7)
    fixed = sf.Plan.calibrate(BUDGET, population=100, batch_size=100, steps=7).noise_multiplier
    assert noise == pytest.approx(fixed, rel=2e-3)


def test_a_filter_at_the_order_of_an_account() -> None:
    filter = Filter.of(BUDGET, Poisson(0.05), 50, order=20)
    assert filter.order == 20
    assert filter.event == events.RenyiFilterDpEvent(20, filter.cap)


def test_shuffled_batches_have_no_cost_of_a_single_step() -> None:
    with pytest.raises(PlanError, match='needs "poisson" or "full-batch"'):
        Filter.of(BUDGET, Shuffled(10, 100), 50)


@pytest.mark.parametrize("wrong", [0.0, -1.0, math.nan, math.inf])
def test_an_answer_that_is_no_noise_is_refused(wrong: float) -> None:
    with pytest.raises(PlanError, match="answered with the noise multiplier"):
        Purse(FILTERS["poisson"], 50).pay(wrong)


# Policies.


def test_even_spending_is_constant_and_decay_falls_by_its_ratio() -> None:
    even = rollout(SpendEvenly(), FILTERS["poisson"], 50)
    assert max(even) / min(even) < 1.02
    falling = rollout(Decay(3.0), FILTERS["poisson"], 50)
    assert falling[0] / falling[-1] == pytest.approx(3.0)
    assert sorted(falling, reverse=True) == list(falling)


def outlook(step: int, even: float = 2.0, first: float = 2.0) -> Outlook:
    return Outlook(step, 100, 0.5, even, first)


def seen(*ratios: float) -> tuple[Signal, ...]:
    return tuple(Signal(math.hypot(1.0, ratio), 1.0) for ratio in ratios)


def test_a_stronger_signal_raises_the_noise_and_a_weaker_one_lowers_it() -> None:
    policy = SignalToNoise(power=1.0, window=2, most=3.0)
    assert policy.noise(outlook(3), seen(1.0, 1.0, 1.0)) == 2.0
    assert policy.noise(outlook(4), seen(1.0, 1.0, 2.0, 2.0)) == pytest.approx(4.0)
    assert policy.noise(outlook(4), seen(1.0, 1.0, 0.5, 0.5)) == pytest.approx(1.0)
    assert policy.noise(outlook(4), seen(1.0, 1.0, 9.0, 9.0)) == pytest.approx(6.0)
    assert policy.noise(outlook(4), seen(0.0, 0.0, 1.0, 1.0)) == 2.0
    # However little is left, the noise does not leave the range around that of the first step.
    assert policy.noise(outlook(4, even=50.0), seen(1.0, 1.0, 0.5, 0.5)) == pytest.approx(6.0)


def test_a_run_is_ended_when_its_sums_drown_and_not_before_its_least_share() -> None:
    policy = StopWhenFlat(ratio=0.5, window=3, least=0.1)
    assert policy.noise(outlook(10), seen(*[2.0] * 10)) == 2.0
    assert policy.noise(outlook(10), seen(*[2.0] * 7, 0.1, 0.1, 0.1)) is None
    assert policy.noise(outlook(9), seen(*[0.1] * 9)) == 2.0


def test_the_measured_signal_takes_the_noise_out() -> None:
    assert Signal(5.0, 3.0).ratio == pytest.approx(4 / 3)
    assert Signal(2.0, 3.0).ratio == 0.0


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SignalToNoise(power=0), "power"),
        (lambda: SignalToNoise(window=0), "window"),
        (lambda: SignalToNoise(most=0.5), "most must be at least 1"),
        (lambda: StopWhenFlat(ratio=-1), "ratio"),
        (lambda: StopWhenFlat(least=1.5), "least"),
        (lambda: Decay(0), "ratio"),
    ],
)
def test_settings_that_make_no_sense_are_refused(make: object, message: str) -> None:
    with pytest.raises(sf.SfumatoError, match=message):
        make()  # type: ignore[operator]


# In training.


def trained(
    noise: object, *, batch: int = 60, steps: int = 12, ledger: sf.Ledger | None = None, order: int | None = None
):  # type: ignore[no-untyped-def]
    records = toy_records()
    plan = sf.Plan.calibrate(
        Budget(1.0, 1e-3), population=len(records), batch_size=min(batch, len(records)), steps=steps, noise=noise,  # type: ignore[arg-type]
        order=order,
    )  # fmt: skip
    model = toy_model()
    found: list[sf.Step] = []
    result = sf.train(
        model, records, plan, loss=LOSS, optimizer=sgd(model), on_step=found.append, ledger=ledger, dataset="toy"
    )
    return plan, result, found


class Greedy(ReleasedPolicy):
    """Wants all of it, in the first step and in every other."""

    def noise(self, now: Outlook, seen: Sequence[Signal]) -> float:
        return 1e-3


class Hungry(ReleasedPolicy):
    """Wants twice of what is even."""

    def noise(self, now: Outlook, seen: Sequence[Signal]) -> float:
        return 0.7 * now.first


class Even(ReleasedPolicy):
    """Looks at nothing, and is held by the filter all the same."""

    def noise(self, now: Outlook, seen: Sequence[Signal]) -> float:
        return now.even


class Never(ReleasedPolicy):
    def noise(self, now: Outlook, seen: Sequence[Signal]) -> None:
        return None


@pytest.mark.parametrize("batch", [60, 10])
def test_a_hungry_policy_gets_no_more_than_the_budget(batch: int) -> None:
    plan, result, steps = trained(Hungry(), batch=batch)
    assert 0 < len(steps) < 12
    assert plan.filter is not None
    total = math.fsum(plan.filter.cost(step.noise_multiplier) for step in steps)
    assert total <= plan.filter.cap
    assert result.privacy.epsilon <= 1.0


def test_a_policy_that_never_starts_charges_nothing() -> None:
    _, result, steps = trained(Never())
    assert steps == []
    assert result.run == ""


@pytest.mark.parametrize("policy", [SpendEvenly(), Decay(2.0)])
def test_public_policies_are_accounted_as_schedules(policy: PublicPolicy) -> None:
    plan, result, steps = trained(policy)
    assert [step.noise_multiplier for step in steps] == list(plan.noises)
    assert plan.filter is None
    assert 0.995 <= result.privacy.spending.pld <= 1.0


def test_an_early_stop_gives_back_to_a_ledger_that_composes_by_a_filter() -> None:
    ledger = sf.Ledger.in_memory()
    ledger.grant("toy", Budget(2.0, 1e-3), composition="renyi", order=12)
    order = ledger.balance("toy").order
    _, result, steps = trained(StopWhenFlat(ratio=100.0, window=2, least=0.2), ledger=ledger, order=order)
    assert 0 < len(steps) < 12
    assert result.privacy.epsilon <= 1.0
    assert 0 < ledger.balance("toy").spent_epsilon < result.privacy.epsilon


def test_a_basic_ledger_keeps_the_whole_charge_of_a_run_that_stopped_early() -> None:
    ledger = sf.Ledger.in_memory()
    ledger.grant("toy", Budget(2.0, 1e-2))
    _, result, _ = trained(StopWhenFlat(ratio=100.0, window=2, least=0.2), ledger=ledger)
    assert ledger.balance("toy").spent_epsilon == result.privacy.epsilon


def stepped(folder: Path, ledger: sf.Ledger, *, resume: bool = False) -> Training:
    records, model = toy_records(), toy_model()
    plan = sf.Plan.calibrate(Budget(1.0, 1e-3), population=60, batch_size=10, steps=12, noise=Even(), order=12)
    keep = sf.Checkpoint(folder / "run.pt", every=4, resume=resume)
    return sf.steps(
        model, records, plan, loss=LOSS, optimizer=sgd(model), ledger=ledger, dataset="toy", checkpoint=keep
    )


def test_a_paused_run_goes_on_with_what_it_had_seen_and_spent(tmp_path: Path) -> None:
    ledger = sf.Ledger(tmp_path / "ledger.sqlite")
    ledger.grant("toy", Budget(2.0, 1e-3), composition="renyi", order=12)
    first = stepped(tmp_path, ledger)
    done = [next(first) for _ in range(6)]
    first.pause()
    rest = list(stepped(tmp_path, ledger, resume=True))
    assert rest[0].index == 7
    assert rest[0].left < done[-1].left
    noises = [step.noise_multiplier for step in (*done, *rest)]
    filter = first.plan.filter
    assert filter is not None
    assert math.fsum(filter.cost(noise) for noise in noises) <= filter.cap
    assert ledger.balance("toy").spent_epsilon <= 1.0


def test_steps_that_were_lost_in_a_crash_end_a_run_whose_noise_was_chosen_from_results(tmp_path: Path) -> None:
    ledger = sf.Ledger(tmp_path / "ledger.sqlite")
    ledger.grant("toy", Budget(2.0, 1e-3), composition="renyi", order=12)
    first = stepped(tmp_path, ledger)
    for _ in range(6):
        next(first)
    # No pause: the process is gone, with what its last two steps released.
    with pytest.raises(CheckpointError, match="start a new run"):
        list(stepped(tmp_path, ledger, resume=True))
    assert ledger.balance("toy").spent_epsilon == pytest.approx(first.result().privacy.epsilon, rel=1e-3)


# What a hostile reader found.


def test_a_schedule_of_rates_is_refused_beside_a_policy_that_looks_at_results() -> None:
    # Every step was priced at the rate of the first: epsilon 2 was claimed for 9.3.
    with pytest.raises(PlanError, match="one sampling rate for all steps"):
        sf.Plan.calibrate(
            Budget(2.0, 1e-5),
            population=10_000,
            batch_size=100,
            steps=50,
            noise=StopWhenFlat(),
            rates=sf.Linear(1.0, 20.0),
        )
    sampler = Poisson(0.01, tuple(1.0 + step for step in range(50)))
    with pytest.raises(PlanError, match="one sampling rate for all steps"):
        sf.Plan(Budget(2.0, 1e-5), sampler, 1.0, 5.0, 50, 10_000, noise=StopWhenFlat())


def test_a_schedule_of_rates_goes_with_a_public_policy() -> None:
    plan = sf.Plan.calibrate(
        Budget(2.0, 1e-5), population=1000, batch_size=50, steps=20, noise=Decay(2.0), rates=sf.Linear(0.5, 1.5)
    )
    assert plan.spending.epsilon <= 2.0


@pytest.mark.parametrize("order", [None, 12])
def test_sampled_steps_under_a_filter_are_refused_for_replace_one(order: int | None) -> None:
    budget = Budget(2.0, 1e-5, relation="replace-one")  # type: ignore[arg-type]
    with pytest.raises(PlanError, match="only accounted for add-or-remove-one"):
        sf.Plan.calibrate(budget, population=1000, batch_size=50, steps=20, noise=StopWhenFlat(), order=order)


def test_full_batches_under_a_filter_keep_replace_one() -> None:
    budget = Budget(2.0, 1e-5, relation="replace-one")  # type: ignore[arg-type]
    plan = sf.Plan.calibrate(budget, population=100, batch_size=100, steps=20, noise=StopWhenFlat())
    assert 1.99 <= plan.spending.epsilon <= 2.0


def test_a_first_answer_beyond_the_budget_is_told_and_charges_nothing() -> None:
    ledger = sf.Ledger.in_memory()
    ledger.grant("toy", Budget(2.0, 1e-2))
    with pytest.raises(PlanError, match="Answer with about"):
        trained(Greedy(), ledger=ledger)
    assert ledger.balance("toy").spent_epsilon == 0


@pytest.mark.parametrize("wrong", ["2", [1.0], True, 1e300])
def test_an_answer_of_another_kind_is_refused(wrong: object) -> None:
    with pytest.raises(PlanError, match="answered with the noise multiplier"):
        Purse(FILTERS["poisson"], 50).pay(wrong)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [({"noise": 2.0}, "noise must be"), ({"noise": SpendEvenly}, "noise must be"), ({"clips": 0.5}, "clips must be"),
     ({"rates": Decay()}, "rates must be"), ({"sampling": Poisson(0.1)}, "is unknown"),
     ({"sampling": "truncated-poisson", "max_batch": 5}, "below batch_size"),
     ({"rates": sf.Linear(1.0, 30.0)}, "schedule of rates asks for a sampling rate")],
)  # fmt: skip
def test_arguments_of_another_kind_are_named(wrong: dict[str, object], message: str) -> None:
    with pytest.raises(sf.SfumatoError, match=message):
        sf.Plan.calibrate(Budget(1.0, 1e-5), population=100, batch_size=10, steps=5, **wrong)  # type: ignore[arg-type]
