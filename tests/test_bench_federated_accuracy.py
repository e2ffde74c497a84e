"""The benches of federations' accuracy: their arguments, arms, tables and verdicts, and that hospitals go through."""

from __future__ import annotations

import importlib.util
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

import sfumato as sf

BENCH = Path(__file__).parent.parent / "bench"


def loaded(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"bench_{name}", BENCH / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[f"bench_{name}"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module", autouse=True)
def _beside() -> Iterator[None]:
    before = list(sys.path)
    sys.path.insert(0, str(BENCH))  # as for a script: it imports what lies beside it
    yield
    sys.path[:] = before


@pytest.fixture(scope="module")
def hospitals(_beside: None) -> ModuleType:
    return loaded("hospitals")


@pytest.fixture(scope="module")
def writers(_beside: None) -> ModuleType:
    return loaded("writers")


@pytest.mark.parametrize("words", [["--seeds", "1"], ["--seeds", "0"], ["--threads", "0"]])
def test_too_few_seeds_or_threads_are_refused(hospitals: ModuleType, writers: ModuleType, words: list[str]) -> None:
    for bench in (hospitals, writers):
        with pytest.raises(SystemExit, match="at least"):
            bench.parsed(words)


def test_only_a_full_run_overwrites_the_results(hospitals: ModuleType, writers: ModuleType) -> None:
    for bench, name in ((hospitals, "hospitals"), (writers, "writers")):
        assert bench.parsed([]).out == BENCH / "results" / f"{name}.json"
        assert bench.parsed(["--quick"]).out is None


@pytest.fixture
def few_rounds(hospitals: ModuleType, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(hospitals, "ROUNDS", 20)
    hospitals.plan_for.cache_clear()
    yield
    hospitals.plan_for.cache_clear()


@pytest.mark.usefixtures("few_rounds")
def test_the_default_algorithm_is_pooled_training_and_every_arm_is_scored(hospitals: ModuleType) -> None:
    learning, held_out = sf.load("heart").split(hospitals.TRAIN_SHARE, seed=0)
    arms = {arm.name: arm for arm in hospitals.arms() if math.isinf(arm.epsilon)}
    found = {name: arms[name].train(learning, math.inf, 0) for name in ("pooled", "FedAvg", "alone", "FedPer")}
    pooled, default = (next(iter(found[name].values())).state_dict() for name in ("pooled", "FedAvg"))
    for name, value in pooled.items():
        assert torch.allclose(default[name], value, atol=1e-4)
    own, other = (found["alone"][name].state_dict()["1.weight"] for name in ("cleveland", "hungary"))
    assert not torch.allclose(own, other, atol=1e-2)
    weights = [model.state_dict() for model in found["FedPer"].values()]
    assert all(torch.equal(one["1.weight"], weights[0]["1.weight"]) for one in weights)
    assert not torch.allclose(weights[0]["1.bias"], weights[1]["1.bias"], atol=1e-3)
    scores = hospitals.run(arms["alone"], learning, held_out, 0)
    sizes = {name: len(test) for name, test in held_out.by_owner().items()}
    again = sum(scores["hospitals"][name] * size for name, size in sizes.items()) / sum(sizes.values())
    assert scores["accuracy"] == pytest.approx(again)
    assert 0.6 < scores["elsewhere"] < scores["accuracy"] < 0.95


def test_private_arms_keep_their_epsilon(hospitals: ModuleType) -> None:
    for epsilon in (1.0, 8.0):
        plan = hospitals.plan_for(epsilon, hospitals.POPULATION)
        assert 0.95 * epsilon < plan.epsilon_after(plan.steps) <= epsilon


def row(arm: str, accuracy: float, **more: Any) -> dict[str, Any]:
    return {"arm": arm, "accuracy": accuracy, "seconds": 1.0, **more}


def hospital_row(arm: str, seed: int, accuracy: float, elsewhere: float) -> dict[str, Any]:
    names = ("cleveland", "hungary", "switzerland", "long-beach")
    scores = {"mean": accuracy, "elsewhere": elsewhere, "hospitals": dict.fromkeys(names, accuracy)}
    return row(arm, accuracy, epsilon=None, seed=seed, **scores)


@pytest.mark.parametrize(
    ("gain", "said"), [(0.02, "own patients better"), (-0.02, "own patients worse"), (0.0, "own patients no")]
)
def test_the_verdict_follows_the_paired_interval(hospitals: ModuleType, gain: float, said: str) -> None:
    rows = []
    for seed, base in enumerate((0.80, 0.83, 0.81, 0.84)):
        wobble = 0.001 * (-1) ** seed
        rows += [
            hospital_row("alone", seed, base, 0.7),
            hospital_row("pooled", seed, base + gain, base),
            hospital_row("FedAvg", seed, base + gain + wobble, base),
        ]
    arm = next(arm for arm in hospitals.arms() if arm.name == "FedAvg")
    told = hospitals.summary(arm, rows)
    assert told["accuracy_minus_alone"][0] == pytest.approx(100 * gain)
    (line,) = hospitals.verdicts([told])
    assert said in line
    assert "everybody's better" in line
    assert "is shown to be within 1 point" in line


def test_writers_are_protected_as_a_whole_by_poisson_cohorts(writers: ModuleType) -> None:
    arms = writers.arms()
    assert len({arm.label for arm in arms}) == len(arms)
    for arm in {arm.delta is None: arm for arm in reversed(arms)}.values():
        plan = arm.plan(2)
        assert plan.budget.unit is sf.Unit.CLIENT
        assert plan.population == 539
        assert plan.sampler.kind == "poisson"
        assert plan.is_private == (arm.delta is not None)
        if plan.is_private:
            assert (plan.budget.epsilon, plan.budget.delta) == (8.0, arm.delta)


@pytest.mark.parametrize(
    ("accuracy", "said"), [(0.93, "within"), (0.89, "not within"), (0.91, "not shown to be within")]
)
def test_the_bar_is_judged_by_the_whole_interval(writers: ModuleType, accuracy: float, said: str) -> None:
    chosen = [arm for arm in writers.arms() if arm.label in ("FedAvg", "DP-FedAvgM, fixed clip, delta 0.001")]
    rows = []
    for best, wobble in ((0.97, 0.005), (0.97, -0.005), (0.97, 0.0)):
        rows.append(row("FedAvg", best))
        rows.append(row(chosen[1].label, accuracy + wobble, epsilon=7.9, last_clip=0.2))
    told = writers.summaries(chosen, {arm.label: arm.plan(2) for arm in chosen}, rows)
    (line,) = writers.verdicts(told)
    assert f": {said} 6 points of FedAvg" in line
    assert "difference" not in told[0]
    assert len(writers.table(told)) == 5
