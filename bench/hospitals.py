"""Four hospitals: federations beside every hospital alone and beside pooled training, in accuracy, on heart.

All arms train the logistic model of the demo on the same splits, 66 % of each hospital's patients, from the same first weights.
Arms of one epsilon share optimiser and number of steps or rounds; `FedAvg` is the default algorithm: one step a round on all
of a hospital's patients, hospitals weighted by their records. "all" is the accuracy over all test patients, each judged by the
model that its hospital would use; "mean" is the mean over hospitals; "elsewhere" is how the four models of an arm do on all
test patients, on average. Ditto and FedPer give every hospital a model of its own; FedPer's hospitals keep their intercept.

Differences are taken seed by seed and are in points of accuracy over all test patients. Splits of different seeds share
patients, so the 95 % t intervals speak of splits and noise rather than of other patients. The random numbers are seeded, which
protects nobody; the records are public. The settings are those of the demo, without momentum where nothing is promised (with
one step a round a client's optimiser is new each time); no epsilon covers how the demo's were found.

Usage: python bench/hospitals.py [--seeds 20] [--quick] [--threads 1] [--out bench/results/hospitals.json]
"""

from __future__ import annotations

import argparse
import functools
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import seeded
import torch
from policies import Interval
from torch import nn
from torch.nn.functional import cross_entropy
from torch.optim import SGD

import sfumato as sf
from sfumato.demo import CLIP, DELTA, POPULATION, POPULATIONS, PRIVATE, STEPS, TRAIN_SHARE
from sfumato.learning.federated import Algorithm
from sfumato.learning.models import build
from sfumato.report.describe import describe_machine

ROUNDS = 100
MANY = 20  # local steps of the arms that take many
PLAIN = partial(SGD, lr=0.3, weight_decay=0.1)
BARE = partial(SGD, lr=0.3)  # Scaffold takes no weight decay
INTERCEPT = ("1.bias",)
ALONE, POOLED, DEFAULT = "alone", "pooled", "FedAvg"
BAR = 1.0  # points that the default may lie below pooled

Models = Mapping[str, nn.Module]


@dataclass(frozen=True)
class Arm:
    """One way to train; `train` is called with the training records, the epsilon and the seed."""

    name: str
    epsilon: float
    train: Callable[[sf.Records, float, int], Models]


def arms() -> list[Arm]:
    plain: dict[str, Callable[[sf.Records, float, int], Models]] = {
        ALONE: alone,
        POOLED: pooled,
        DEFAULT: federated(sf.FedAvg(PLAIN)),
        "FedAdam": federated(sf.FedAdam(PLAIN)),
        f"FedAvg, {MANY} local steps": federated(sf.FedAvg(PLAIN, local_steps=MANY)),
        f"FedProx, {MANY} local steps": federated(sf.FedProx(PLAIN, mu=0.1, local_steps=MANY)),
        f"Scaffold, {MANY} local steps": federated(sf.Scaffold(BARE, local_steps=MANY)),
        "Ditto": federated(sf.Ditto(PLAIN, pull=0.1)),
        "FedPer": federated(sf.FedPer(PLAIN, personal_layers=INTERCEPT)),
    }
    private: dict[str, Callable[[sf.Records, float, int], Models]] = {
        ALONE: alone,
        POOLED: pooled,
        "FedSGD": federated(sf.FedSGD(PRIVATE)),
        "FedAvg, 5 local steps": federated(sf.FedAvg(PRIVATE, local_steps=5)),
    }
    return [Arm(name, math.inf, train) for name, train in plain.items()] + [
        Arm(name, epsilon, train) for epsilon in (8.0, 1.0) for name, train in private.items()
    ]


@functools.cache
def plan_for(epsilon: float, population: int) -> sf.Plan:
    """Return the plan for a declared number of patients, all of them in every step."""
    if math.isinf(epsilon):
        return sf.Plan.without_privacy(population=population, batch_size=population, steps=ROUNDS)
    budget = sf.Budget(epsilon, DELTA)
    return sf.Plan.calibrate(budget, population=population, batch_size=population, steps=STEPS, clip=CLIP)


def first_model(records: sf.Records) -> nn.Module:
    model = build("logistic", tuple(records.features.shape[1:]), 2)
    for parameter in model.parameters():
        nn.init.zeros_(parameter)
    return model


def on_one_curator(records: sf.Records, plan: sf.Plan, seed: int) -> nn.Module:
    model = first_model(records)
    optimizer = (PRIVATE if plan.is_private else PLAIN)(model.parameters())
    sf.train(model, records, plan, loss=cross_entropy, optimizer=optimizer, source=sf.SeededSource(seed))
    return model


def alone(records: sf.Records, epsilon: float, seed: int) -> Models:
    # A stream of noise for each hospital: seeds of hospitals do not meet those of other arms or seeds.
    return {
        name: on_one_curator(own, plan_for(epsilon, POPULATIONS[name]), 1_000_000 + 4 * seed + place)
        for place, (name, own) in enumerate(records.by_owner().items())
    }


def pooled(records: sf.Records, epsilon: float, seed: int) -> Models:
    return dict.fromkeys(records.owner_names, on_one_curator(records, plan_for(epsilon, POPULATION), seed))


def federated(algorithm: Algorithm) -> Callable[[sf.Records, float, int], Models]:
    def train(records: sf.Records, epsilon: float, seed: int) -> Models:
        model = first_model(records)
        result = sf.federate(
            model, records.by_owner(), plan_for(epsilon, POPULATION),
            algorithm=algorithm, engine=sf.Simulation(), loss=cross_entropy,
            populations=POPULATIONS, source=sf.SeededSource(seed),
        )  # fmt: skip
        if isinstance(algorithm, sf.Ditto | sf.FedPer):
            return {name: result.personal_model(name) for name in records.owner_names}
        return dict.fromkeys(records.owner_names, model)

    return train


def main() -> None:
    asked = parsed()
    torch.set_num_threads(asked.threads)
    try:
        report(asked)
    except sf.SfumatoError as error:
        raise SystemExit(f"hospitals: {error}") from None


def parsed(words: Sequence[str] | None = None) -> argparse.Namespace:
    """Return the checked arguments."""
    parser = seeded.arguments(
        __doc__, quick="two seeds; shows that it runs", threads="the model is tiny: more threads wait for each other"
    )
    return seeded.parsed(parser, words, name="hospitals", seeds=20)


def report(asked: argparse.Namespace) -> None:
    """Train all arms in all seeds, print the table and write the results."""
    print(f"{describe_machine()}, threads used: {asked.threads}", flush=True)
    begun = time.perf_counter()
    records, rows = sf.load("heart"), []
    for seed in range(asked.seeds):
        learning, held_out = records.split(TRAIN_SHARE, seed=seed)
        for arm in arms():
            rows.append(
                {"arm": arm.name, "epsilon": finite(arm.epsilon), "seed": seed, **run(arm, learning, held_out, seed)}
            )
        print(f"seed {seed} done", flush=True)
    told = [summary(arm, rows) for arm in arms()]
    seconds = time.perf_counter() - begun
    print("\n".join([*table(told), "", *verdicts(told), f"{seconds:.0f} s"]))
    content = {
        "machine": describe_machine(), "threads": asked.threads, "seconds": round(seconds, 1), "seeds": asked.seeds,
        "train_share": TRAIN_SHARE, "delta": DELTA, "rounds": ROUNDS, "private_steps": STEPS, "clip": CLIP,
        "arms": told, "verdicts": verdicts(told), "rows": rows,
    }  # fmt: skip
    seeded.write(asked, content)


def run(arm: Arm, learning: sf.Records, held_out: sf.Records, seed: int) -> dict[str, Any]:
    """Return the accuracies of one arm in one seed, and the seconds its training took."""
    begun = time.perf_counter()
    models = arm.train(learning, arm.epsilon, seed)
    seconds = time.perf_counter() - begun
    own = held_out.by_owner()
    right = {name: rights(models[name], test) for name, test in own.items()}
    return {
        "accuracy": sum(right.values()) / len(held_out),
        "mean": statistics.fmean(right[name] / len(test) for name, test in own.items()),
        "elsewhere": statistics.fmean(rights(model, held_out) / len(held_out) for model in models.values()),
        "hospitals": {name: right[name] / len(test) for name, test in own.items()},
        "seconds": round(seconds, 3),
    }


@torch.no_grad()
def rights(model: nn.Module, records: sf.Records) -> int:
    return int((model(records.features).argmax(1) == records.targets).sum())


def finite(epsilon: float) -> float | None:
    return None if math.isinf(epsilon) else epsilon


def summary(arm: Arm, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return what is told of an arm: means, and paired differences to alone and pooled at the same epsilon."""

    def of(name: str) -> list[dict[str, Any]]:
        return [row for row in rows if row["arm"] == name and row["epsilon"] == finite(arm.epsilon)]

    own = of(arm.name)
    told: dict[str, Any] = {"arm": arm.name, "epsilon": finite(arm.epsilon)}
    told |= {key: statistics.fmean(row[key] for row in own) for key in ("accuracy", "mean", "elsewhere")}
    told["hospitals"] = {name: statistics.fmean(row["hospitals"][name] for row in own) for name in POPULATIONS}
    told["seconds"] = statistics.median(row["seconds"] for row in own)
    for other in (ALONE, POOLED):
        if arm.name == other:
            continue
        for key in ("accuracy", "mean", "elsewhere"):
            pairs = zip(own, of(other), strict=True)
            interval = Interval.of([100 * (a[key] - b[key]) for a, b in pairs], 1)
            told[f"{key}_minus_{other}"] = [interval.mean, interval.low, interval.high]
    return told


def table(told: Sequence[dict[str, Any]]) -> list[str]:
    """Return the lines of the Markdown table."""
    lines = [
        "",
        "| arm | epsilon | all | mean | elsewhere | - alone, points [95 %] | - pooled, points [95 %] | s |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for arm in told:
        epsilon = "none" if arm["epsilon"] is None else f"{arm['epsilon']:g}"
        scores = " | ".join(f"{100 * arm[key]:.2f}" for key in ("accuracy", "mean", "elsewhere"))
        apart = " | ".join(_shown(arm.get(f"accuracy_minus_{other}")) for other in (ALONE, POOLED))
        lines.append(f"| {arm['arm']} | {epsilon} | {scores} | {apart} | {arm['seconds']:.2f} |")
    return lines


def _shown(interval: Sequence[float] | None) -> str:
    if interval is None:
        return ""
    mean, low, high = interval
    return f"{mean:+.2f} [{low:+.2f}, {high:+.2f}]"


def verdicts(told: Sequence[dict[str, Any]]) -> list[str]:
    """Return in words whether federations beat alone and keep up with pooled; only what lies outside 0 is a difference."""
    lines = []
    for arm in told:
        if arm["arm"] not in (DEFAULT, "FedSGD"):
            continue
        promise = "no privacy" if arm["epsilon"] is None else f"epsilon {arm['epsilon']:g}"
        own, mean, abroad = (_judged(arm[f"{key}_minus_{ALONE}"]) for key in ("accuracy", "mean", "elsewhere"))
        low = arm[f"accuracy_minus_{POOLED}"][1]
        within = "is shown to be" if low >= -BAR else "is not shown to be"
        lines.append(
            f"{arm['arm']}, {promise}: against the hospitals alone, on their own patients {own} "
            f"(in the mean over hospitals {mean}), on everybody's {abroad}; "
            f"it {within} within {BAR:g} point of pooled."
        )
    return lines


def _judged(interval: Sequence[float]) -> str:
    _, low, high = interval
    return "better" if low > 0 else "worse" if high < 0 else "no difference shown"


if __name__ == "__main__":
    main()
