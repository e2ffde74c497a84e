"""Noise that changes over the steps against fixed noise, at the same epsilon and delta, on heart, Adult and MNIST.

All arms of a data set share model, optimiser, learning rate, first clip norm and number of steps. In one seed they also share
the split, the first weights and the random stream behind batches and noise (an adaptive clip norm draws one more number a step,
so there the stream soon differs); differences are taken seed by seed. That needs a seeded source, which protects nobody; the
data are public.

Fixed noise is not handicapped: learning rate and clip norm are those that serve *it* best, searched first by test loss on
seeds of their own (SEARCH_SEEDS); other arms might want others. An arm is called better or worse, + or - in the table, only if
the 95 % t interval of the paired difference excludes 0; `!` says that it still does when widened for all arms (Bonferroni).
Adult and MNIST have one test part, so their intervals speak of weights, batches and noise, not of other people. No epsilon
covers the search.

Usage: SFUMATO_DATA=FOLDER python bench/policies.py [--data heart adult mnist] [--seeds 10] [--quick] [--threads 1]
                                                    [--out bench/results/policies.json]
where FOLDER holds the folders adult and mnist; heart needs none.
"""

from __future__ import annotations

import argparse
import functools
import math
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import seeded
import torch
from scipy import stats
from torch import nn
from torch.nn import functional as F

from sfumato import Budget, Plan, Records, SeededSource, SfumatoError, load, train
from sfumato.config import Experiment
from sfumato.learning.adaptive_clip import AdaptiveClip
from sfumato.learning.policies import Decay, SignalToNoise, StopWhenFlat
from sfumato.privacy.schedules import Cosine, Exponential, Linear
from sfumato.report.describe import describe_machine

EXAMPLES = Path(__file__).parents[1] / "examples"
SEARCH_SEEDS = (1000, 1001)
MOMENTUM = 0.9
FIXED = "fixed"
RISING_BATCH = "rising batch 0.5 -> 1.5"
# The quantile 0.8 and the gentle setting were chosen among a few on seeds 1000 to 1003 of heart and of Adult at epsilon 0.2.
ARMS: dict[str, dict[str, Any]] = {
    FIXED: {},
    "linear 2 -> 1": {"noise": Linear(2, 1)},
    "cosine 2 -> 1": {"noise": Cosine(2, 1)},
    "exponential 4 -> 1": {"noise": Exponential(4, 1)},
    "linear rising 1 -> 2": {"noise": Linear(1, 2)},
    "Decay(2)": {"noise": Decay(2.0)},
    "SignalToNoise": {"noise": SignalToNoise()},
    "SignalToNoise, gentle": {"noise": SignalToNoise(power=0.25, window=5, most=1.3)},
    "StopWhenFlat": {"noise": StopWhenFlat()},
    "AdaptiveClip(0.5)": {"clips": AdaptiveClip(0.5)},
    "AdaptiveClip(0.8)": {"clips": AdaptiveClip(0.8)},
    "clip 1 -> 0.5": {"clips": Linear(1, 0.5)},
    "Decay(2) + AdaptiveClip(0.8)": {"noise": Decay(2.0), "clips": AdaptiveClip(0.8)},
    RISING_BATCH: {"rates": Linear(0.5, 1.5)},
}
QUICK_SHARE = 5  # of the steps


@dataclass(frozen=True)
class Task:
    """A data set with its budget, model and search grid. `population` is published with the data, so public."""

    name: str
    epsilon: float
    delta: float
    population: int
    batch_size: int
    steps: int
    hidden: int
    rates: tuple[float, ...]
    clips: tuple[float, ...]

    @property
    def budget(self) -> Budget:
        return Budget(self.epsilon, self.delta)

    def arms(self) -> list[str]:
        """Return the arms that make sense: full batches cannot grow."""
        return [name for name in ARMS if name != RISING_BATCH or self.batch_size < self.population]

    def records(self, seed: int) -> tuple[Records, Records]:
        """Return training and test records; of heart, which comes without a test part, a new fifth for every seed."""
        if self.name == "heart":
            return load("heart").split(0.8, seed=seed, within_owner=False)
        return _parts(self.name)

    def model(self, seed: int, records: Records) -> nn.Module:
        """Return the untrained model: logistic, or with one hidden layer of tanh."""
        assert records.classes is not None
        size, classes = math.prod(records.features.shape[1:]), len(records.classes)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            if not self.hidden:
                return nn.Sequential(nn.Flatten(), nn.Linear(size, classes))
            return nn.Sequential(nn.Flatten(), nn.Linear(size, self.hidden), nn.Tanh(), nn.Linear(self.hidden, classes))

    def plan(self, arm: str, clip: float, steps: int) -> Plan:
        """Return the plan of an arm, calibrated to the budget."""
        return Plan.calibrate(
            self.budget,
            population=self.population, batch_size=self.batch_size, steps=steps, clip=clip, **ARMS[arm],
        )  # fmt: skip


TASKS = {
    task.name: task
    for task in (
        Task("heart", 0.5, 1e-4, 736, 736, 60, 0, (0.01, 0.02, 0.05, 0.1, 0.2, 0.4), (0.3, 3.0)),
        Task("adult", 0.1, 1e-5, 32561, 1024, 150, 0, (0.05, 0.1, 0.2, 0.4), (0.3, 3.0)),
        Task("mnist", 1.0, 1e-5, 60000, 512, 200, 32, (0.05, 0.1, 0.2, 0.4), (0.3, 3.0)),
    )
}


@functools.cache
def _parts(name: str) -> tuple[Records, Records]:
    return Experiment(EXAMPLES / f"{name}.toml").records()


@dataclass(frozen=True)
class Interval:
    """The mean of paired differences and its two t intervals, at 95 % and widened for several arms."""

    mean: float
    low: float
    high: float
    sure: bool

    @classmethod
    def of(cls, differences: Sequence[float], arms: int) -> Interval:
        """Return the intervals of `differences`, at least two; `arms` of them are looked at together."""
        mean, count = statistics.fmean(differences), len(differences)
        error = statistics.stdev(differences) / math.sqrt(count)
        reach = float(stats.t.ppf(0.975, count - 1)) * error
        wide = float(stats.t.ppf(1 - 0.025 / arms, count - 1)) * error
        return cls(mean, mean - reach, mean + reach, abs(mean) > wide)

    def verdict(self, more_is_better: bool) -> str:
        """Return "better" or "worse" than fixed, or "no difference shown"."""
        if self.low <= 0 <= self.high or self.low == self.high:  # without any spread there is nothing to judge by
            return "no difference shown"
        return ("better" if (self.low > 0) == more_is_better else "worse") + ("!" if self.sure else "")


def main() -> None:
    asked = parsed()
    torch.set_num_threads(asked.threads)
    try:
        report(asked)
    except SfumatoError as error:
        raise SystemExit(f"policies: {error}") from None


def parsed(words: Sequence[str] | None = None) -> argparse.Namespace:
    """Return the checked arguments."""
    parser = seeded.arguments(
        __doc__, quick="two seeds and a fifth of the steps; shows that it runs", threads="of a training"
    )
    parser.add_argument("--data", nargs="+", choices=list(TASKS), default=list(TASKS))
    asked = seeded.parsed(parser, words, name="policies", seeds=10)
    if asked.seeds >= min(SEARCH_SEEDS):
        raise SystemExit(f"--seeds must be below {min(SEARCH_SEEDS)}, the first that settings are searched with.")
    return asked


def report(asked: argparse.Namespace) -> None:
    """Run all data sets, print a table for each and write the results."""
    print(f"{describe_machine()}, threads used: {asked.threads}", flush=True)
    found = []
    for name in dict.fromkeys(asked.data):
        task = TASKS[name]
        steps = max(1, task.steps // QUICK_SHARE) if asked.quick else task.steps
        found.append(compared(task, steps, asked.seeds))
        print("\n".join(table(found[-1])), flush=True)
    print("\n".join(conclusion(found)))
    content = {"machine": describe_machine(), "threads": asked.threads, "data": found}
    seeded.write(asked, content)


def compared(task: Task, steps: int, seeds: int) -> dict[str, Any]:
    """Search for the best setting of fixed noise, then train every arm in every seed."""
    rate, clip, search = searched(task, steps)
    plans, calibrations = {}, {}
    for arm in task.arms():
        begun = time.perf_counter()
        plans[arm] = task.plan(arm, clip, steps)
        calibrations[arm] = time.perf_counter() - begun
    rows = []
    for seed in range(seeds):
        for arm, plan in plans.items():
            rows.append({"arm": arm, "seed": seed, **trained(task, plan, rate, seed)})
        print(f"{task.name}: seed {seed} done", flush=True)
    return {
        "name": task.name,
        "epsilon": task.epsilon, "delta": task.delta, "population": task.population, "batch_size": task.batch_size,
        "steps": steps, "hidden": task.hidden, "optimizer": "sgd", "momentum": MOMENTUM,
        "learning_rate": rate, "clip": clip,
        "search": {"seeds": list(SEARCH_SEEDS), "rows": search},
        "arms": [summary(arm, rows, calibrations[arm], plans) for arm in plans],
        "rows": rows,
    }  # fmt: skip


def searched(task: Task, steps: int) -> tuple[float, float, list[dict[str, float]]]:
    """Return learning rate and clip norm with which fixed noise has the least test loss, and all that was tried.

    First the rate at clip norm 1, then the clip norm with the step length, rate times clip norm, kept, then the rate again.
    """
    tried: list[dict[str, float]] = []

    def tries(rate: float, clip: float) -> None:
        plan = task.plan(FIXED, clip, steps)
        runs = [trained(task, plan, rate, seed) for seed in SEARCH_SEEDS]
        mean = {key: statistics.fmean(run[key] for run in runs) for key in ("loss", "accuracy")}
        tried.append({"learning_rate": rate, "clip": clip, **mean})

    for rate in task.rates:
        tries(rate, 1.0)
    best = _best(tried)["learning_rate"]
    for clip in task.clips:
        tries(best / clip, clip)
    best, clip = _best(tried)["learning_rate"], _best(tried)["clip"]
    for factor in (0.5, 2.0, 4.0):
        if not any(row["clip"] == clip and math.isclose(row["learning_rate"], factor * best) for row in tried):
            tries(factor * best, clip)
    found = _best(tried)
    print(f"{task.name}: fixed noise is best at learning rate {found['learning_rate']:g}, clip {found['clip']:g}")
    return found["learning_rate"], found["clip"], tried


def _best(tried: list[dict[str, float]]) -> dict[str, float]:
    return min(tried, key=lambda row: row["loss"])


def trained(task: Task, plan: Plan, rate: float, seed: int) -> dict[str, Any]:
    """Return test accuracy and loss after one training, and what it took."""
    training, test = task.records(seed)
    model = task.model(seed, training)
    optimizer = torch.optim.SGD(model.parameters(), lr=rate, momentum=MOMENTUM)
    begun = time.perf_counter()
    result = train(model, training, plan, loss=F.cross_entropy, optimizer=optimizer, source=SeededSource(seed))
    seconds = time.perf_counter() - begun
    with torch.no_grad():
        outputs = model(test.features)
    last = result.steps[-1]
    return {
        "accuracy": float((outputs.argmax(1) == test.targets).double().mean()),
        "loss": float(F.cross_entropy(outputs.double(), test.targets)),
        "steps": len(result.steps),
        "epsilon": result.privacy.epsilon,
        "left": last.left,
        "noise": [result.steps[0].noise_multiplier, last.noise_multiplier],
        "clip": last.clip_norm,
        "seconds": round(seconds, 2),
    }


def summary(arm: str, rows: list[dict[str, Any]], calibration: float, plans: dict[str, Plan]) -> dict[str, Any]:
    """Return what is told of an arm: means, paired differences to fixed noise, steps, epsilon, times."""
    own = [row for row in rows if row["arm"] == arm]
    base = [row for row in rows if row["arm"] == FIXED]
    told: dict[str, Any] = {
        "arm": arm,
        "accuracy": statistics.fmean(row["accuracy"] for row in own),
        "loss": statistics.fmean(row["loss"] for row in own),
        "steps": statistics.fmean(row["steps"] for row in own),
        "epsilon": max(row["epsilon"] for row in own),
        "left": statistics.fmean(row["left"] for row in own),
        "calibration_seconds": round(calibration, 2),
        "seconds": statistics.median(row["seconds"] for row in own),
    }
    if arm != FIXED:
        for key, more_is_better in (("accuracy", True), ("loss", False)):
            differences = [a[key] - b[key] for a, b in zip(own, base, strict=True)]
            interval = Interval.of(differences, len(plans) - 1)
            told[f"{key}_difference"] = [interval.mean, interval.low, interval.high]
            told[f"{key}_verdict"] = interval.verdict(more_is_better)
    return told


def table(found: dict[str, Any]) -> list[str]:
    """Return the lines of one data set's table."""
    lines = [
        "",
        f"{found['name']}: epsilon {found['epsilon']:g}, delta {found['delta']:g}, {found['steps']} steps of "
        f"{found['batch_size']}, learning rate {found['learning_rate']:g}, clip {found['clip']:g}",
        f"{'arm':28} {'accuracy':>8} {'- fixed, points [95 %]':>23}  {'loss':>6} {'- fixed [95 %]':>25} "
        f"{'steps':>5} {'epsilon':>7} {'plan s':>6} {'run s':>6}",
    ]
    for arm in found["arms"]:
        more = [f"{'':23} ", f"{'':25}"]
        if "accuracy_difference" in arm:
            mark = _mark(arm["accuracy_verdict"]), _mark(arm["loss_verdict"])
            mean, low, high = (100 * value for value in arm["accuracy_difference"])
            more[0] = f"{f'{mean:+.2f} [{low:+.2f}, {high:+.2f}]':>23}{mark[0]:1}"
            mean, low, high = arm["loss_difference"]
            more[1] = f"{f'{mean:+.4f} [{low:+.4f}, {high:+.4f}]':>25}{mark[1]:1}"
        lines.append(
            f"{arm['arm']:28} {100 * arm['accuracy']:8.2f} {more[0]} {arm['loss']:6.4f} {more[1]} "
            f"{arm['steps']:5.0f} {arm['epsilon']:7.4f} {arm['calibration_seconds']:6.1f} {arm['seconds']:6.2f}"
        )
    return lines


def _mark(verdict: str) -> str:
    return "" if verdict == "no difference shown" else verdict[0].replace("b", "+").replace("w", "-")


def conclusion(found: list[dict[str, Any]]) -> list[str]:
    """Return plain sentences: which arms are better or worse than fixed noise, on which data."""
    lines = ["", "Beyond the 95 % interval (! also when widened for all arms); all others: no difference shown."]
    for one in found:
        for key in ("accuracy", "loss"):
            for verdict in ("better", "worse"):
                names = [
                    arm["arm"] + arm[f"{key}_verdict"].removeprefix(verdict)
                    for arm in one["arms"]
                    if arm.get(f"{key}_verdict", "").startswith(verdict)
                ]
                lines.append(f"{one['name']}, {key}: {verdict} than fixed: {', '.join(names) or 'none'}")
    return lines


if __name__ == "__main__":
    main()
