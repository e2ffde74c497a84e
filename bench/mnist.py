"""MNIST by examples/mnist.toml: accuracy and wall time of private and of plain training, in turn, in one run.

Both train the same network from the same first weights for the same number of steps on batches of the same expected size.
Plain training has a learning rate of its own: the example's is meant for clipped gradients and diverges without clipping.
The noise is secret, so accuracies differ a little from run to run. The noise is searched before training and timed apart.

Usage: SFUMATO_DATA=FOLDER python bench/mnist.py [--seeds 3] [--plain-learning-rate 0.1] [--threads 2]
                                                 [--out bench/results/mnist.json]
where FOLDER holds the folder mnist with its four files.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from sfumato import Plan, Records, SfumatoError, train
from sfumato.config import Config, Experiment
from sfumato.report.describe import describe_machine

HERE = Path(__file__).parent
EXAMPLE = HERE.parent / "examples" / "mnist.toml"
ARMS = ("private", "plain")
AT_ONCE = 1000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--plain-learning-rate", type=float, default=0.1)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--out", type=Path, default=HERE / "results" / "mnist.json")
    asked = parser.parse_args()
    if asked.seeds < 1 or asked.threads < 1:
        raise SystemExit("--seeds and --threads must be at least 1.")
    torch.set_num_threads(asked.threads)
    try:
        report(asked)
    except SfumatoError as error:
        raise SystemExit(f"mnist: {error}") from None


def report(asked: argparse.Namespace) -> None:
    """Train all arms, print the table and write the results."""
    experiment = Experiment(EXAMPLE)
    training, test = experiment.records()
    begun = time.perf_counter()
    private = experiment.plan()
    calibration = time.perf_counter() - begun
    plain = Plan.without_privacy(
        population=private.population, batch_size=experiment.config.privacy.batch_size, steps=private.steps
    )
    plans = {"private": private, "plain": plain}
    rates = {"private": experiment.config.training.learning_rate, "plain": asked.plain_learning_rate}
    print(describe_machine(), f"{asked.threads} threads", sep=", ")
    print(f"{private.steps} steps; the noise was searched in {calibration:.1f} s", flush=True)
    rows: list[dict[str, Any]] = []
    for seed in range(asked.seeds):
        for arm in ARMS:
            tuned = Experiment(EXAMPLE)
            tuned.config = with_training(experiment.config, seed=seed, learning_rate=rates[arm])
            accuracy, seconds = trained(tuned, plans[arm], training, test)
            rows.append({"arm": arm, "seed": seed, "accuracy": accuracy, "seconds": round(seconds, 2)})
            print(f"seed {seed}  {arm:8} {accuracy:9.4f} {seconds:9.1f} s", flush=True)
    print(table(rows))
    content = {
        "machine": describe_machine(),
        "threads": asked.threads,
        "calibration_seconds": round(calibration, 2),
        "settings": {
            **experiment.config.privacy.model_dump(include={"epsilon", "delta", "batch_size", "clip", "clipping"}),
            "steps": private.steps,
            "noise_multiplier": private.noise_multiplier,
            "learning_rate": rates,
            "momentum": experiment.config.training.momentum,
        },
        "rows": rows,
    }
    asked.out.parent.mkdir(parents=True, exist_ok=True)
    asked.out.write_text(json.dumps(content, indent=2) + "\n")


def with_training(config: Config, **changes: object) -> Config:
    return config.model_copy(update={"training": config.training.model_copy(update=changes)})


def trained(experiment: Experiment, plan: Plan, training: Records, test: Records) -> tuple[float, float]:
    """Return the accuracy on the test records after one training, and how many seconds the training took."""
    model = experiment.model(training)
    optimizer = experiment.optimizer()(model.parameters())
    begun = time.perf_counter()
    train(model, training, plan, loss=F.cross_entropy, optimizer=optimizer)
    seconds = time.perf_counter() - begun
    return accuracy_of(model, test), seconds


@torch.no_grad()
def accuracy_of(model: nn.Module, test: Records) -> float:
    parts = zip(test.features.split(AT_ONCE), test.targets.split(AT_ONCE), strict=True)
    return sum(int((model(features).argmax(1) == targets).sum()) for features, targets in parts) / len(test)


def table(rows: list[dict[str, Any]]) -> str:
    """Return one line for each arm: means over the seeds, the spread of accuracy, and the time relative to plain."""
    lines = [f"{'':8} {'accuracy':>9} {'least':>7} {'most':>7} {'seconds':>9} {'x plain':>8}"]
    seconds = {arm: statistics.fmean(row["seconds"] for row in rows if row["arm"] == arm) for arm in ARMS}
    for arm in ARMS:
        found = [row["accuracy"] for row in rows if row["arm"] == arm]
        lines.append(
            f"{arm:8} {statistics.fmean(found):9.4f} {min(found):7.4f} {max(found):7.4f} {seconds[arm]:9.1f} "
            f"{seconds[arm] / seconds['plain']:8.2f}"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
