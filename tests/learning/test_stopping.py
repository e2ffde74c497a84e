from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import pytest
import torch
from helpers import LOSS, toy_model, toy_records
from torch import nn

import sfumato as sf
from sfumato.errors import InputError
from sfumato.learning.stopping import Stop

MODEL = nn.Linear(1, 1)
FEDAVG = sf.FedAvg(functools.partial(torch.optim.SGD, lr=0.1))


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def told(scores: Iterable[float]) -> Callable[[nn.Module], float]:
    """Return a score that says one number after another."""
    left = iter(scores)
    return lambda model: next(left)


def stops_at(rule: Stop, rounds: int = 20) -> tuple[int, str] | None:
    """Return after how many rounds a rule stops and why; None if it does not."""
    asked = rule.begin()
    for done in range(1, rounds + 1):
        if (why := asked(MODEL, done)) is not None:
            return done, why
    return None


def test_rounds_stop_after_as_many() -> None:
    assert stops_at(sf.Rounds(7)) == (7, "7 rounds were asked for")
    assert stops_at(sf.Rounds(21)) is None


def test_a_target_stops_when_it_is_reached() -> None:
    found = stops_at(sf.Target(told([0.1, 0.79, 0.8, 0.9]), 0.8))
    assert found == (3, "the score 0.8 reached the target 0.8")
    assert stops_at(sf.Target(told([0.9] * 4), 0.8, every=5)) == (5, "the score 0.9 reached the target 0.8")
    assert stops_at(sf.Target(told([0.1] * 20), 0.8)) is None


def test_a_plateau_stops_after_looks_without_a_rise() -> None:
    rising = [0.1, 0.2, 0.2, 0.15, 0.25, 0.25, 0.25, 0.25]
    found = stops_at(sf.Plateau(told(rising), patience=3))
    assert found == (8, "the score has not risen above 0.25 in 3 looks")
    assert stops_at(sf.Plateau(told([step / 100 for step in range(20)]), patience=1)) is None
    assert stops_at(sf.Plateau(told([step / 100 for step in range(20)]), patience=2, by=0.015)) is None
    slow = sf.Plateau(told([step / 100 for step in range(20)]), patience=2, by=0.05)
    assert stops_at(slow) == (3, "the score has not risen above 0.05 in 2 looks")
    assert stops_at(sf.Plateau(told([0.5] * 10), patience=2, every=3)) == (
        9,
        "the score has not risen above 0.5 in 2 looks",
    )


def test_the_first_of_several_rules_stops_and_each_counts_every_look() -> None:
    rule = sf.FirstOf((sf.Rounds(6), sf.Plateau(told([0.5] * 20), patience=9), sf.Target(told([0.1] * 4 + [0.9]), 0.8)))
    assert stops_at(rule) == (5, "the score 0.9 reached the target 0.8")
    flat = sf.FirstOf((sf.Rounds(6), sf.Plateau(told([0.5] * 20), patience=5)))
    assert stops_at(flat) == (6, "6 rounds were asked for")


def test_a_rule_may_serve_several_runs() -> None:
    rule = sf.Plateau(lambda model: 0.5, patience=2)
    assert stops_at(rule) == stops_at(rule)
    nested = sf.FirstOf((rule, sf.Rounds(10)))
    assert stops_at(nested) == stops_at(nested)


def test_only_rules_that_look_at_a_score_say_so() -> None:
    assert not sf.Rounds(3).looks
    assert sf.Target(lambda model: 0.0, 1.0).looks
    assert sf.Plateau(lambda model: 0.0).looks
    assert sf.FirstOf((sf.Rounds(3), sf.Target(lambda model: 0.0, 1.0))).looks
    assert not sf.FirstOf((sf.Rounds(3), sf.Rounds(2))).looks


@pytest.mark.parametrize("score", [math.nan, math.inf, "0.5", True, None, torch.tensor(0.5)])
def test_a_score_has_to_be_a_number(score: object) -> None:
    for rule in (sf.Target(lambda model: score, 0.8), sf.Plateau(lambda model: score)):  # type: ignore[arg-type, return-value]
        with pytest.raises(InputError, match="finite number"):
            stops_at(rule)


def test_what_is_out_of_range_is_refused() -> None:
    for make, message in [
        (lambda: sf.Rounds(0), "most"),
        (lambda: sf.Target(lambda model: 0.0, math.nan), "at must be a finite number"),
        (lambda: sf.Target(lambda model: 0.0, 0.5, every=0), "every"),
        (lambda: sf.Plateau(lambda model: 0.0, patience=0), "patience"),
        (lambda: sf.Plateau(lambda model: 0.0, by=-1.0), "by"),
        (lambda: sf.Plateau(lambda model: 0.0, by=math.nan), "by"),
        (lambda: sf.FirstOf(()), "tuple of rules"),
        (lambda: sf.FirstOf((3,)), "tuple of rules"),  # type: ignore[arg-type]
        (lambda: sf.FirstOf(sf.Rounds(3)), "tuple of rules"),  # type: ignore[arg-type]
        (lambda: sf.FirstOf(sf.Rounds(3), sf.Rounds(2)), "one tuple of rules"),  # type: ignore[arg-type]
        (lambda: sf.FirstOf((sf.Rounds(3),), sf.Rounds(2)), "one tuple of rules"),
        (sf.FirstOf, "one tuple of rules"),
    ]:
        with pytest.raises(InputError, match=message):
            make()


def federate(plan: sf.Plan, stop: Stop) -> sf.TrainingResult:
    records = toy_records(owners=6).by_owner()
    engine = sf.Simulation(workers=1, way="alone")
    return sf.federate(toy_model(), records, plan, algorithm=FEDAVG, engine=engine, loss=LOSS, stop=stop)


def test_a_run_ends_when_its_rule_says_so() -> None:
    plan = sf.Plan.without_privacy(population=60, batch_size=60, steps=9)
    result = federate(plan, sf.Rounds(4))
    assert (len(result.steps), result.stopped) == (4, "4 rounds were asked for")
    result = federate(plan, sf.Rounds(40))
    assert (len(result.steps), result.stopped) == (9, "")
    seen: list[int] = []
    looked = sf.Target(lambda model: seen.append(1) or len(seen) / 10, 0.3, every=2)  # type: ignore[func-returns-value]
    assert len(federate(plan, looked).steps) == 6


def resumed(path: Path, rule: Stop, pauses: tuple[int, ...]) -> tuple[list[int], sf.TrainingResult]:
    """Return the rounds of a run that is paused after some of its rounds, and once more after its end."""
    records, rounds = toy_records(owners=6).by_owner(), []
    plan = sf.Plan.without_privacy(population=60, batch_size=60, steps=20)
    for pause in (*pauses, None, None):
        training = sf.rounds(
            toy_model(), records, plan, algorithm=FEDAVG, engine=sf.Simulation(workers=1, way="alone"), loss=LOSS,
            stop=rule, checkpoint=sf.Checkpoint(path, resume=path.exists()),
        )  # fmt: skip
        for step in training:
            rounds.append(step.index)
            if step.index == pause:
                training.pause()
                break
    return rounds, training.result()


@pytest.mark.parametrize("pauses", [(), (4,), (1, 4)])
@pytest.mark.parametrize(
    ("rule", "said"),
    [
        (sf.Rounds(6), "6 rounds were asked for"),
        (sf.Plateau(lambda model: 0.5, patience=5), "the score has not risen above 0.5 in 5 looks"),
        (sf.Target(lambda model: 0.9, 0.8, every=6), "the score 0.9 reached the target 0.8"),
        (sf.FirstOf((sf.Rounds(9), sf.Plateau(lambda model: 0.5, patience=5))), "not risen above 0.5 in 5 looks"),
    ],
)
def test_a_run_that_is_resumed_stops_where_it_would_have_and_stays_stopped(
    rule: Stop, said: str, pauses: tuple[int, ...], tmp_path: Path
) -> None:
    rounds, result = resumed(tmp_path / "run.pt", rule, pauses)
    assert rounds == [1, 2, 3, 4, 5, 6]
    assert said in result.stopped


def test_a_private_run_that_has_stopped_stays_stopped_and_draws_nothing_more(tmp_path: Path) -> None:
    plan = sf.Plan(sf.Budget(50.0, 1e-3, unit="client"), sf.FullBatch(), 1.0, 2.0, 8, 6)
    taken = []
    for resume in (False, True):
        with sf.Ledger(tmp_path / "ledger.sqlite") as ledger:
            if not resume:
                ledger.grant("federation", plan.budget)
            training = sf.rounds(
                toy_model(), toy_records(owners=6).by_owner(), plan, algorithm=FEDAVG, loss=LOSS, stop=sf.Rounds(3),
                engine=sf.Simulation(workers=1, way="alone"), ledger=ledger,
                checkpoint=sf.Checkpoint(tmp_path / "run.pt", resume=resume),
            )  # fmt: skip
            taken.append([step.index for step in training])
            assert training.result().stopped.startswith("3 rounds were asked for (3 of 8 steps were taken")
            assert len([entry for entry in ledger.history() if entry.kind == "charge"]) == 1
    assert taken == [[1, 2, 3], []]


def test_a_private_run_that_stops_early_has_cost_the_whole_plan_and_says_what_it_looked_at() -> None:
    plan = sf.Plan(sf.Budget(50.0, 1e-3, unit="client"), sf.FullBatch(), 1.0, 2.0, 5, 6)
    whole = plan.spending.epsilon
    early = federate(plan, sf.Target(lambda model: 1.0, 0.5))
    assert len(early.steps) == 1
    assert early.privacy.epsilon == pytest.approx(whole)
    why = "the score 1 reached the target 0.5"
    assert early.stopped == f"{why} (1 of 5 steps were taken; the whole plan stays charged)"
    assert any("stopping rule" in sentence for sentence in early.privacy.not_covered)
    assert not any("stopping rule" in sentence for sentence in federate(plan, sf.Rounds(2)).privacy.not_covered)
