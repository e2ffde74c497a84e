"""Tuning inside the budget: what is charged and when, what is kept, and what is refused."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import LOSS, sgd, toy_model, toy_records
from scipy import stats
from torch import nn

import sfumato as sf
from sfumato.errors import BudgetExhaustedError, DivergedError, InputError, LedgerError, PlanError
from sfumato.learning.evaluation import evaluate
from sfumato.learning.policies import SignalToNoise
from sfumato.learning.trials import Trial
from sfumato.learning.tuning import Tuned, tune
from sfumato.privacy import accounting, calibration, events
from sfumato.privacy.schedules import Linear
from sfumato.privacy.selection import Repetitions

BUDGET = sf.Budget(2.0, 1e-3)
PLAIN = sf.Budget(math.inf)
RECORDS = toy_records()


@functools.lru_cache
def toy_plan_for(budget: sf.Budget) -> sf.Plan:
    return sf.Plan.calibrate(budget, population=60, batch_size=60, steps=4)


def toy_trial(config: Any, one: Trial) -> tuple[float, nn.Module]:
    model = toy_model()
    rate = config["lr"] if isinstance(config, dict) else config
    sf.train(model, RECORDS, one.plan, loss=LOSS, optimizer=sgd(model, rate), ledger=one.ledger)
    return evaluate(model, RECORDS, one.scoring, ledger=one.ledger).accuracy.value, model


def search(trial: Any = toy_trial, budget: sf.Budget = BUDGET, space: Any = None, **more: Any) -> Tuned[Any]:
    more = {"plan": toy_plan_for, "dataset": "toy", "mean_trials": 2, "distribution": "negative-binomial"} | more
    return tune({"lr": [0.1, 1.0]} if space is None else space, trial, budget, **more)


def seed_for(count: int, law: Repetitions) -> int:
    """Return a seed whose first number of runs is `count`."""
    return next(seed for seed in range(10_000) if law.draw(sf.SeededSource(seed)) == count)


def plainly(scores: list[float], trial: Any = None, space: Any = None) -> Tuned[Any]:
    """Run one plain trial for each score; each returns its score and its number."""
    calls = iter(range(len(scores)))

    def returns(config: Any, one: Trial) -> tuple[float, int]:
        number = next(calls)
        return scores[number], number

    seed = seed_for(len(scores), Repetitions(4.0))
    return search(
        trial or returns, PLAIN, space, mean_trials=4, distribution="poisson", source=sf.SeededSource(seed)
    )  # fmt: skip


def test_a_search_on_the_heart_records_keeps_the_budget_and_finds_a_model() -> None:
    training, held_out = sf.load("heart").split(0.66, seed=0)
    law, rates = Repetitions(3.0, 1.0), [0.01, 0.1, 1.0]

    def planned(seed: int) -> list[int]:
        source = sf.SeededSource(seed)
        return [int(source.words(1)[0]) % 3 for _ in range(law.draw(source))]

    # Four trials, one of them with a learning rate that is too small, which a noisy score must not prefer.
    seed = next(seed for seed in range(10_000) if len(planned(seed)) == 4 and planned(seed).count(0) == 1)
    seen = []

    def trial(config: dict[str, float], one: Trial) -> tuple[float, nn.Module]:
        seen.append(config["lr"])
        model = nn.Linear(training.features.shape[1], 2)
        optimizer = torch.optim.SGD(model.parameters(), lr=config["lr"], momentum=0.9)
        sf.train(model, training, one.plan, loss=LOSS, optimizer=optimizer, ledger=one.ledger)
        return evaluate(model, held_out, one.scoring, ledger=one.ledger).accuracy.value, model

    plan = functools.partial(sf.Plan.calibrate, population=607, batch_size=607, steps=20)
    budget = sf.Budget(3.0, 1e-4)
    tuned = tune(
        {"lr": rates}, trial, budget, plan=plan, dataset="heart", mean_trials=3, distribution="negative-binomial",
        source=sf.SeededSource(seed),
    )  # fmt: skip
    assert seen == [rates[place] for place in planned(seed)]
    assert tuned.config["lr"] in (0.1, 1.0)
    assert 0.995 * 3.0 <= tuned.privacy.epsilon <= 3.0
    accuracy = float((tuned.result(held_out.features).argmax(1) == held_out.targets).float().mean())
    assert 0.7 < accuracy < 0.9
    assert tuned.one_trial.epsilon < tuned.privacy.epsilon < tuned.naive * 2


@pytest.mark.parametrize(("distribution", "shape"), [("poisson", 1.0), ("negative-binomial", 0.5)])
@pytest.mark.parametrize("scoring", [0.0, 0.4])
@pytest.mark.parametrize("epsilon", [0.5, 3.0])
def test_the_whole_lands_on_the_budget_from_below(
    distribution: str, shape: float, scoring: float, epsilon: float
) -> None:
    seen: list[Trial] = []

    def spy(config: Any, one: Trial) -> tuple[float, None]:
        seen.append(one)
        model = toy_model()
        sf.train(model, RECORDS, one.plan, loss=LOSS, optimizer=sgd(model), ledger=one.ledger)
        if one.scoring.is_private:
            evaluate(model, RECORDS, one.scoring, ledger=one.ledger)
        return 0.0, None

    law = Repetitions.named(distribution, 2, shape)
    source = sf.SeededSource(seed_for(1, law))
    budget = sf.Budget(epsilon, 1e-3)
    tuned = search(spy, budget, distribution=distribution, shape=shape, scoring=scoring, source=source)
    assert 0.995 * epsilon <= tuned.privacy.epsilon <= epsilon
    # What is claimed is the price of just that training and that evaluation, chosen from a random number of them.
    parts = [seen[0].plan.event]
    if scoring:
        parts.append(events.gaussian(calibration.calibrate(events.gaussian, seen[0].scoring).noise_multiplier))
        both = seen[0].plan.budget.epsilon + seen[0].scoring.epsilon
        assert seen[0].scoring.epsilon == pytest.approx(scoring * both)
    else:
        assert not seen[0].scoring.is_private
    assert tuned.privacy.event == law.event(events.composed(parts))
    assert law.renyi(events.composed(parts), 1e-3) == tuned.privacy.epsilon
    assert tuned.one_trial == accounting.spending(events.composed(parts), 1e-3)
    assert tuned.naive == accounting.spending(events.repeated(events.composed(parts), 2), 1e-3).epsilon


def test_the_whole_is_charged_once_and_before_the_first_trial(tmp_path: Path) -> None:
    ledger = sf.Ledger(tmp_path / "ledger.sqlite")
    ledger.grant("toy", sf.Budget(5.0, 1e-2))
    spent = []

    def trial(config: Any, one: Trial) -> tuple[float, nn.Module]:
        spent.append(ledger.balance("toy").spent_epsilon)
        return toy_trial(config, one)

    tuned = search(trial, ledger=ledger, by="ada", source=sf.SeededSource(seed_for(3, Repetitions(2.0, 1.0))))
    assert spent == [tuned.privacy.epsilon] * 3
    charges = [entry for entry in ledger.history("toy") if entry.kind == "charge"]
    assert [(entry.run, entry.purpose, entry.by, entry.epsilon) for entry in charges] == [
        (tuned.run, "tuning", "ada", tuned.privacy.epsilon)
    ]
    assert events.from_dict(json.loads(charges[0].event)) == tuned.privacy.event


def test_a_charge_that_is_refused_tries_nothing(tmp_path: Path) -> None:
    ledger = sf.Ledger(tmp_path / "ledger.sqlite")
    ledger.grant("toy", sf.Budget(1.0, 1e-2))
    with pytest.raises(BudgetExhaustedError):
        search(lambda *_: pytest.fail("a trial ran"), ledger=ledger)
    with pytest.raises(LedgerError, match="grant"):
        search(lambda *_: pytest.fail("a trial ran"), ledger=ledger, dataset="other")
    assert ledger.balance("toy").spent_epsilon == 0


def test_an_error_in_a_trial_comes_through_and_the_charge_stays_spent(tmp_path: Path) -> None:
    ledger = sf.Ledger(tmp_path / "ledger.sqlite")
    ledger.grant("toy", sf.Budget(5.0, 1e-2))

    def trial(config: Any, one: Trial) -> tuple[float, None]:
        raise ZeroDivisionError("mine")

    with pytest.raises(ZeroDivisionError, match="mine"):
        search(trial, ledger=ledger)
    assert 1.99 <= ledger.balance("toy").spent_epsilon <= 2.0


def test_no_trial_gives_nothing_and_says_what_was_spent(tmp_path: Path) -> None:
    ledger = sf.Ledger(tmp_path / "ledger.sqlite")
    ledger.grant("toy", sf.Budget(5.0, 1e-2))
    source = sf.SeededSource(seed_for(0, Repetitions(2.0)))
    tuned = search(lambda *_: pytest.fail("a trial ran"), distribution="poisson", source=source, ledger=ledger)
    assert tuned.best is None
    for name in ("config", "score", "result"):
        with pytest.raises(sf.SfumatoError, match=r"There was no trial.*stays spent.*negative-binomial"):
            getattr(tuned, name)
    assert ledger.balance("toy").spent_epsilon == tuned.privacy.epsilon > 1.99
    assert "There was no trial" in str(tuned)


def test_trials_are_independent_of_the_ledger_and_of_each_other(tmp_path: Path) -> None:
    ledger = sf.Ledger(tmp_path / "ledger.sqlite")
    ledger.grant("toy", sf.Budget(5.0, 1e-2))
    seen: list[Trial] = []

    def trial(config: Any, one: Trial) -> tuple[float, nn.Module]:
        seen.append(one)
        assert one.ledger.balance("toy").spent_epsilon == 0
        return toy_trial(config, one)

    search(trial, ledger=ledger, source=sf.SeededSource(seed_for(3, Repetitions(2.0, 1.0))))
    assert len({id(one.ledger) for one in seen}) == 3
    assert not any(one.ledger.is_durable for one in seen)
    assert len({one.plan for one in seen}) == 1


def train_once(one: Trial, plan: sf.Plan | None = None, ledger: sf.Ledger | None = None) -> nn.Module:
    model = toy_model()
    sf.train(model, RECORDS, plan or one.plan, loss=LOSS, optimizer=sgd(model), ledger=ledger or one.ledger)
    return model


@pytest.mark.parametrize(
    "trial",
    [
        lambda config, one: (0.5, None),
        lambda config, one: (0.5, train_once(one)),
        lambda config, one: (evaluate(toy_model(), RECORDS, one.scoring, ledger=one.ledger).accuracy.value, None),
        lambda config, one: (
            evaluate(train_once(one, toy_plan_for(sf.Budget(0.3, 1e-3))), RECORDS, one.scoring, ledger=one.ledger)
            .accuracy.value,
            None,
        ),
    ],
    ids=["nothing", "no score", "no training", "another plan"],
)  # fmt: skip
def test_a_trial_that_does_not_spend_what_was_paid_for_is_refused(trial: Any) -> None:
    with pytest.raises(PlanError, match=r"ledger=one\.ledger"):
        search(trial)


def test_a_trial_cannot_train_twice() -> None:
    releases: list[int] = []

    def trial(config: Any, one: Trial) -> tuple[float, None]:
        train_once(one)
        releases.append(1)
        train_once(one)
        releases.append(2)
        return 0.0, None

    with pytest.raises(BudgetExhaustedError):
        search(trial)
    assert releases == [1]


def test_the_clip_norm_may_be_tuned() -> None:
    def trial(config: float, one: Trial) -> tuple[float, float]:
        model = train_once(one, dataclasses.replace(one.plan, clip=config))
        return evaluate(model, RECORDS, one.scoring, ledger=one.ledger).accuracy.value, config

    assert search(trial, space=[0.25, 4.0]).result in (0.25, 4.0)


def test_only_the_best_is_kept_and_the_first_of_equals() -> None:
    assert (plainly([0.1, 0.7, 0.7, 0.2]).result, plainly([0.1, 0.7, 0.7, 0.2]).score) == (1, 0.7)
    assert plainly([-3.0, -1.0, -2.0]).result == 1


def test_a_score_that_is_nan_loses() -> None:
    assert plainly([math.nan, -1e300, math.nan]).result == 1
    assert plainly([math.nan, math.nan]).score == -math.inf


def test_a_tensor_is_a_score_and_a_metric_with_an_interval_is_not() -> None:
    assert plainly([torch.tensor(0.5), torch.tensor(0.75)]).score == 0.75  # type: ignore[list-item]
    with pytest.raises(InputError, match="must be a number"):
        plainly(["high", "low"])  # type: ignore[list-item]
    with pytest.raises(InputError, match=r"\(score, result\)"):
        plainly([0.0], trial=lambda config, one: 0.3)


def test_a_trial_that_diverges_loses_and_only_the_best_is_reported() -> None:
    def diverging(*outcomes: float) -> Any:
        calls = iter(outcomes)

        def trial(config: Any, one: Trial) -> tuple[float, str]:
            score = next(calls)
            if math.isinf(score):
                raise DivergedError("gone")
            return score, "fine"

        return trial

    assert plainly([0] * 3, diverging(math.inf, -5.0, math.inf)).result == "fine"
    assert plainly([0] * 2, diverging(math.nan, math.inf)).score == -math.inf
    for outcomes in ((math.inf, math.inf), (math.inf, math.nan)):
        with pytest.raises(DivergedError, match="stays spent"):
            plainly([0] * 2, diverging(*outcomes))


def test_a_private_training_that_diverges_loses_too() -> None:
    def trial(config: float, one: Trial) -> tuple[float, float]:
        model = toy_model()
        optimizer = torch.optim.SGD(model.parameters(), lr=config, weight_decay=1.0)
        sf.train(model, RECORDS, one.plan, loss=LOSS, optimizer=optimizer, ledger=one.ledger)
        return evaluate(model, RECORDS, one.scoring, ledger=one.ledger).accuracy.value, config

    with pytest.raises(DivergedError, match="best trial"):
        search(trial, space=[1e30])


def test_an_infinite_epsilon_is_plain_tuning() -> None:
    def trial(config: Any, one: Trial) -> tuple[float, float]:
        assert not one.plan.is_private
        assert not one.scoring.is_private
        return toy_trial(config, one)[0], config["lr"]

    source = sf.SeededSource(seed_for(9, Repetitions(5.0)))
    tuned = search(trial, PLAIN, {"lr": [0.0, 1.0]}, mean_trials=5, distribution="poisson", source=source)
    assert tuned.result == 1.0
    assert math.isinf(tuned.privacy.epsilon)
    assert not tuned.run
    assert "No privacy is promised" in str(tuned)


def test_the_statement_says_what_is_claimed_by_whom_and_what_is_not_covered() -> None:
    tuned = search()
    said = str(tuned.privacy)
    assert f"declared budget: epsilon {BUDGET.epsilon:g}" in said.lower()
    assert "(the claim), PLD" in said
    assert "PLD 2 (the claim)" not in said
    assert tuned.privacy.spending.pld > tuned.privacy.epsilon == tuned.privacy.spending.rdp
    for words in ("How long the search took", "what it computes from the records", "no ledger on disk"):
        assert words in said
    assert "The scores, if" not in said
    assert tuned.privacy.secret_noise
    whole = str(tuned)
    assert "The best of a secret number of trials (mean 2)" in whole
    assert "One trial alone costs epsilon" in whole


def test_a_seeded_search_is_a_rehearsal() -> None:
    said = str(search(source=sf.SeededSource(1)).privacy)
    assert "rehearsal" in said
    assert "Anybody who knows the seed" in said


def test_scores_without_a_share_of_the_budget_are_said_to_be_uncovered() -> None:
    def trial(config: Any, one: Trial) -> tuple[float, None]:
        train_once(one)
        return 0.0, None

    assert "The scores, if they were computed from these records" in str(search(trial, scoring=0).privacy)


@pytest.mark.parametrize("space", [{"a": [1, 2, 3], "b": ["xy", "x", "y"]}, [("p",), ("q",), ("r",)]])
def test_configurations_are_drawn_uniformly_from_all(space: Any) -> None:
    seen: Counter[str] = Counter()

    def trial(config: Any, one: Trial) -> tuple[float, None]:
        seen[str(config)] += 1
        return 0.0, None

    search(trial, PLAIN, space, mean_trials=1000, distribution="poisson", source=sf.SeededSource(5))
    if isinstance(space, dict):
        assert set(seen) == {str({"a": a, "b": b}) for a in (1, 2, 3) for b in ("xy", "x", "y")}
    else:
        assert set(seen) == {str(config) for config in space}
    assert stats.chisquare(list(seen.values())).pvalue > 1e-6
    skewed = [count * (2 if place == 0 else 1) for place, count in enumerate(seen.values())]
    assert stats.chisquare(skewed).pvalue < 1e-6


def test_a_trial_cannot_change_the_configuration_that_is_returned() -> None:
    def trial(config: dict[str, float], one: Trial) -> tuple[float, None]:
        config["lr"] = -1.0
        return 0.0, None

    tuned = plainly([0.0] * 3, trial)
    assert tuned.config["lr"] in (0.1, 1.0)


@pytest.mark.parametrize(
    ("space", "words"),
    [
        ({}, "no configuration"),
        ([], "no configuration"),
        ({"lr": []}, "no configuration"),
        ({"lr": 0.1}, r'space\["lr"\] must be a list'),
        ({"lr": "abc"}, r'space\["lr"\] must be a list'),
        ("abc", "space must be a list"),
        (3, "space must be a list"),
    ],
)
def test_a_space_that_is_none_is_refused(space: Any, words: str) -> None:
    with pytest.raises(InputError, match=words):
        search(space=space)


@pytest.mark.parametrize("scoring", [1.0, -0.1, math.nan])
def test_a_share_that_is_none_is_refused(scoring: float) -> None:
    with pytest.raises(InputError, match="scoring"):
        search(scoring=scoring)


def test_a_plan_for_another_budget_is_refused() -> None:
    with pytest.raises(PlanError, match="the budget that it is called with"):
        search(plan=lambda budget: toy_plan_for(BUDGET))
    with pytest.raises(PlanError, match="must return a Plan"):
        search(plan=lambda budget: None)


def test_a_filter_at_one_renyi_order_is_refused_before_the_charge(tmp_path: Path) -> None:
    ledger = sf.Ledger(tmp_path / "ledger.sqlite")
    ledger.grant("toy", sf.Budget(5.0, 1e-2))
    plan = functools.partial(sf.Plan.calibrate, population=60, batch_size=20, steps=4, noise=SignalToNoise())
    with pytest.raises(PlanError, match="one Renyi order"):
        search(plan=plan, ledger=ledger)
    assert ledger.balance("toy").spent_epsilon == 0


def test_a_filter_on_full_batches_is_one_gaussian_and_is_paid_for() -> None:
    plan = functools.partial(sf.Plan.calibrate, population=60, batch_size=60, steps=4, noise=SignalToNoise())
    assert 0.995 * 2.0 <= search(plan=plan).privacy.epsilon <= 2.0


def test_noise_by_a_schedule_and_sampled_batches_are_paid_for_too() -> None:
    plan = functools.partial(
        sf.Plan.calibrate, population=60, batch_size=20, steps=5, noise=Linear(start=1.5, end=0.5)
    )  # fmt: skip
    tuned = search(plan=plan)
    assert 0.995 * 2.0 <= tuned.privacy.epsilon <= 2.0
    assert events.is_sampled(tuned.privacy.event)


def test_a_budget_too_small_for_a_trial_is_refused_with_the_fix() -> None:
    with pytest.raises(PlanError, match="use fewer trials or a larger budget"):
        search(budget=sf.Budget(0.02, 1e-3), mean_trials=50)


def test_the_relation_is_kept() -> None:
    budget = sf.Budget(2.0, 1e-3, relation=sf.Relation.REPLACE_ONE)
    tuned = search(budget=budget)
    assert tuned.privacy.relation is sf.Relation.REPLACE_ONE
    assert tuned.privacy.epsilon <= 2.0
