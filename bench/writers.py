"""MNIST by writer: 539 people train one small CNN together, and each of them as a whole is protected.

The clients are the writers of MNIST's training digits (Yadav and Bottou 2019), 19 to 131 digits each; the test part is MNIST's
10,000 test digits, by other writers. In every round each writer takes part with probability 0.2 (a Poisson cohort), trains one
epoch on its digits and hands in its update. The private arms promise epsilon 8 for a writer, at delta 1e-3 and 1e-4; the noise
is added by the server. "noise" is the expected length of the noise on the mean update, in clip norms.

All arms share model, rounds, cohorts' size and local batches; learning rates and clip norms were chosen by hand for each arm,
on seed 0 and by the accuracy on the test part, which no epsilon covers; the table's seeds are others. The intervals are t
intervals over seeds, so they speak of weights, cohorts and noise, not of other writers. The random numbers are seeded, which
protects nobody; the records are public. The engine takes the way of running clients that it measures as fastest, and ways round
differently, so the same seed ends some hundredths of a point away from itself.

Usage: SFUMATO_DATA=FOLDER python bench/writers.py [--seeds 3] [--arms NAME ...] [--quick] [--threads 1]
                                                   [--out bench/results/writers.json]
where FOLDER holds the folders mnist and qmnist_writers.
"""

from __future__ import annotations

import argparse
import math
import os
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import federation_models
import seeded
import torch
from policies import Interval
from scipy import stats
from torch import nn
from torch.nn.functional import cross_entropy
from torch.optim import SGD

import sfumato as sf
from sfumato.learning.federated import Algorithm
from sfumato.report.describe import describe_machine

WRITERS = 539  # published with the data, so public
COHORT = 108  # expected
ROUNDS = 50
EPSILON, DELTAS = 8.0, (1e-3, 1e-4)
SHIFT, SCALE = 0.1, 0.3  # of pixels in [0, 1]: declared, not measured; about a tenth of an image is ink
BAR = 6.0  # points
QUICK_ROUNDS = 2
ADAPTIVE = {"clips": sf.AdaptiveClip(0.5)}
FIRST_SEED = 1  # seed 0 was used up by the search


def model(seed: int) -> nn.Module:
    """Return the untrained CNN: 8,330 parameters, because noise grows with the root of their number."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Conv2d(1, 16, 7, stride=3), nn.ReLU(),
            nn.Conv2d(16, 32, 3, stride=2), nn.ReLU(),
            nn.Flatten(), nn.Linear(288, 10),
        )  # fmt: skip


PARAMETERS = sum(parameter.numel() for parameter in model(0).parameters())


@dataclass(frozen=True)
class Arm:
    """One way to train: without delta, nothing is promised."""

    name: str
    algorithm: Algorithm
    delta: float | None = None
    clip: float = 1.0
    more: dict[str, Any] = field(default_factory=dict)

    @property
    def label(self) -> str:
        return self.name if self.delta is None else f"{self.name}, delta {self.delta:g}"

    def plan(self, rounds: int) -> sf.Plan:
        people = {"population": WRITERS, "batch_size": COHORT, "steps": rounds}
        if self.delta is None:
            return sf.Plan.without_privacy(**people, unit="client")
        return sf.Plan.calibrate(sf.Budget(EPSILON, self.delta, unit="client"), **people, clip=self.clip, **self.more)


def arms() -> list[Arm]:
    epoch: dict[str, Any] = {"local": partial(SGD, lr=0.1), "local_epochs": 1, "batch_size": 10}
    gentle = epoch | {"local": partial(SGD, lr=0.03)}  # with 0.1 its control variates run away
    found = [
        Arm("FedAvg", sf.FedAvg(**epoch)),
        Arm("FedAvgM", sf.FedAvgM(**epoch)),
        Arm("FedAdam", sf.FedAdam(**epoch, server_lr=0.03)),
        Arm("Scaffold", sf.Scaffold(**gentle, server=partial(SGD, lr=1.0, momentum=0.9))),
    ]
    for delta in DELTAS:
        found += [
            Arm("DP-FedAvg, fixed clip", sf.FedAvg(**epoch), delta, 1.0),
            Arm("DP-FedAvg, adaptive clip", sf.FedAvg(**epoch), delta, 0.5, ADAPTIVE),
            Arm("DP-FedAvgM, fixed clip", sf.FedAvgM(**epoch), delta, 0.2),
            Arm("DP-FedAvgM, adaptive clip", sf.FedAvgM(**epoch, server_lr=0.3), delta, 0.5, ADAPTIVE),
            Arm("DP-FedAdam, fixed clip", sf.FedAdam(**epoch, server_lr=0.02), delta, 0.2),
        ]
    return found


def main() -> None:
    asked = parsed()
    torch.set_num_threads(asked.threads)
    try:
        report(asked)
    except (sf.SfumatoError, FileNotFoundError) as error:
        raise SystemExit(f"writers: {error}") from None


def parsed(words: Sequence[str] | None = None) -> argparse.Namespace:
    """Return the checked arguments."""
    labels = [arm.label for arm in arms()]
    parser = seeded.arguments(
        __doc__, quick="two seeds and two rounds; shows that it runs", threads="of each of the simulation's workers"
    )
    parser.add_argument("--arms", nargs="+", choices=labels, default=labels)
    return seeded.parsed(parser, words, name="writers", seeds=3)


def read() -> tuple[sf.Population, sf.Records]:
    """Return the writers and the test digits."""
    with tempfile.TemporaryDirectory() as folder:
        federation_models.write_mnist_writers(Path(folder))
        features, targets, offsets = (_own(part) for part in federation_models.load(Path(folder)))
    data = Path(os.environ["SFUMATO_DATA"]) / "mnist"
    test = sf.Records.from_idx(data / "t10k-images-idx3-ubyte.gz", data / "t10k-labels-idx1-ubyte.gz", classes=10)
    clients = sf.Population.from_arrays(scaled(features), targets, offsets)
    return clients, sf.Records.from_arrays(scaled(test.features), test.targets, name="test digits")


def _own(part: Any) -> Any:
    return part.clone() if isinstance(part, torch.Tensor) else part  # the files go


def scaled(pixels: torch.Tensor) -> torch.Tensor:
    return (pixels - SHIFT) / SCALE


def report(asked: argparse.Namespace) -> None:
    """Train all arms in all seeds, print the table and write the results."""
    print(f"{describe_machine()}, threads of a worker: {asked.threads}", flush=True)
    begun = time.perf_counter()
    clients, test = read()
    rounds = QUICK_ROUNDS if asked.quick else ROUNDS
    chosen = [arm for arm in arms() if arm.label in asked.arms]
    plans = {arm.label: arm.plan(rounds) for arm in chosen}
    rows = []
    for seed in range(FIRST_SEED, FIRST_SEED + asked.seeds):
        for arm in chosen:
            rows.append({"arm": arm.label, "seed": seed, **trained(arm, plans[arm.label], clients, test, seed)})
            print(f"seed {seed}: {arm.label}: {100 * rows[-1]['accuracy']:.2f}", flush=True)
    told = summaries(chosen, plans, rows)
    seconds = time.perf_counter() - begun
    print("\n".join([*table(told), "", *verdicts(told), f"{seconds:.0f} s"]))
    content = {
        "machine": describe_machine(), "threads": asked.threads, "seconds": round(seconds, 1),
        "writers": WRITERS, "cohort": COHORT, "rounds": rounds, "parameters": PARAMETERS, "unit": "client",
        "not_covered": "Model, learning rates and clip norms were chosen on seed 0 by the test part; no epsilon covers it.",
        "arms": told, "verdicts": verdicts(told), "rows": rows,
    }  # fmt: skip
    seeded.write(asked, content)


def trained(arm: Arm, plan: sf.Plan, clients: sf.Population, test: sf.Records, seed: int) -> dict[str, Any]:
    """Return test accuracy after one training, and what it took."""
    network = model(seed)
    begun = time.perf_counter()
    result = sf.federate(
        network, clients, plan,
        algorithm=arm.algorithm, engine=sf.Simulation(), loss=cross_entropy, source=sf.SeededSource(seed),
    )  # fmt: skip
    seconds = time.perf_counter() - begun
    return {
        "accuracy": accuracy(network, test),
        "epsilon": result.privacy.epsilon if plan.is_private else None,
        "last_clip": result.steps[-1].clip_norm if plan.is_private else None,
        "seconds": round(seconds, 2),
    }


@torch.no_grad()
def accuracy(network: nn.Module, test: sf.Records) -> float:
    parts = zip(test.features.split(1000), test.targets.split(1000), strict=True)
    return sum(int((network(x).argmax(1) == y).sum()) for x, y in parts) / len(test)


def summaries(chosen: Sequence[Arm], plans: dict[str, sf.Plan], rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return what is told of the arms: accuracies with intervals, and paired differences to the best without privacy."""

    def of(arm: Arm, key: str) -> list[float]:
        return [row[key] for row in rows if row["arm"] == arm.label]

    plain = [arm for arm in chosen if arm.delta is None]
    best = max(plain, key=lambda arm: statistics.fmean(of(arm, "accuracy")), default=None)
    told = []
    for arm in chosen:
        scores, plan = of(arm, "accuracy"), plans[arm.label]
        mean, reach = statistics.fmean(scores), _reach(scores)
        one: dict[str, Any] = {"arm": arm.name, "epsilon": None, "delta": arm.delta}
        if plan.is_private:
            one |= {
                "epsilon": max(of(arm, "epsilon")), "clip": plan.clip, "last_clip": statistics.fmean(of(arm, "last_clip")),
                "noise_multiplier": plan.noise_multiplier,
                "noise": plan.noise_multiplier * math.sqrt(PARAMETERS) / COHORT,
            }  # fmt: skip
        one |= {
            "accuracy": mean,
            "interval": [mean - reach, mean + reach],
            "seconds": statistics.median(of(arm, "seconds")),
        }
        if best is not None and arm is not best:
            pairs = zip(scores, of(best, "accuracy"), strict=True)
            found = Interval.of([100 * (a - b) for a, b in pairs], 1)
            one |= {"best": best.name, "difference": [found.mean, found.low, found.high]}
        told.append(one)
    return told


def _reach(scores: Sequence[float]) -> float:
    return float(stats.t.ppf(0.975, len(scores) - 1)) * statistics.stdev(scores) / math.sqrt(len(scores))


def table(told: Sequence[dict[str, Any]]) -> list[str]:
    """Return the lines of the Markdown table."""
    lines = [
        "",
        "| arm | epsilon | delta | accuracy [95 %] | - best without privacy, points [95 %] | clip | noise | s |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for one in told:
        low, high = (100 * value for value in one["interval"])
        cells = [one["arm"], "none", "", f"{100 * one['accuracy']:.2f} [{low:.2f}, {high:.2f}]", "", "", ""]
        if one["delta"] is not None:
            cells[1:3] = f"{one['epsilon']:.3f}", f"{one['delta']:g}"
            cells[5:7] = f"{one['clip']:g} -> {one['last_clip']:.2g}", f"{one['noise']:.2f}"
        if "difference" in one:
            mean, low, high = one["difference"]
            cells[4] = f"{mean:+.2f} [{low:+.2f}, {high:+.2f}]"
        lines.append(f"| {' | '.join(cells)} | {one['seconds']:.1f} |")
    return lines


def verdicts(told: Sequence[dict[str, Any]]) -> list[str]:
    """Return in words which private arms are within the bar, by the whole of their interval."""
    lines = []
    for one in told:
        if one["delta"] is None or "difference" not in one:
            continue
        _, low, high = one["difference"]
        within = "within" if low >= -BAR else "not within" if high < -BAR else "not shown to be within"
        lines.append(
            f"{one['arm']}, delta {one['delta']:g}: {within} {BAR:g} points of {one['best']}, the best without privacy."
        )
    return lines


if __name__ == "__main__":
    main()
