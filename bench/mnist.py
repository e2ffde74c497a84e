"""MNIST by examples/mnist.toml: accuracy and wall time of private training and of the same without privacy, in turn.

Both arms train the same network from the same first weights with the same optimiser, for as many steps, on batches of the
same expected size; the plain one neither clips nor adds noise. The noise is secret, so the private accuracies differ a
little from run to run. How much noise is needed is searched before training and timed apart.

Usage: SFUMATO_DATA=FOLDER python bench/mnist.py [--seeds 3] [--threads 2] [--out bench/results/mnist.json]
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
    wanted = experiment.config.privacy
    plain = Plan.without_privacy(
        population=wanted.population, batch_size=wanted.batch_size, steps=private.steps, sampling=wanted.sampling
    )
    plans = {"private": private, "plain": plain}
    print(f"{describe_machine()}, threads used: {asked.threads}")
    print(f"{private.steps} steps; the noise was searched in {calibration:.1f} s", flush=True)
    rows: list[dict[str, Any]] = []
    for seed in range(asked.seeds):
        experiment.config = with_seed(experiment.config, seed)
        for arm in ARMS:
            accuracy, seconds = trained(experiment, plans[arm], training, test)
            rows.append({"arm": arm, "seed": seed, "accuracy": accuracy, "seconds": round(seconds, 2)})
            print(f"seed {seed}  {arm:8} {accuracy:9.4f} {seconds:9.1f} s", flush=True)
    print(table(rows))
    content = {
        "machine": describe_machine(),
        "threads": asked.threads,
        "calibration_seconds": round(calibration, 2),
        "settings": {
            **wanted.model_dump(include={"epsilon", "delta", "batch_size", "clip", "clipping"}),
            "steps": private.steps,
            "noise_multiplier": private.noise_multiplier,
            **experiment.config.training.model_dump(include={"optimizer", "learning_rate", "momentum"}),
        },
        "rows": rows,
    }
    asked.out.parent.mkdir(parents=True, exist_ok=True)
    asked.out.write_text(json.dumps(content, indent=2) + "\n")


def with_seed(config: Config, seed: int) -> Config:
    return config.model_copy(update={"training": config.training.model_copy(update={"seed": seed})})


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
    """Return one line for each arm: the mean accuracy over the seeds and its ends, the median time, also relative to plain."""
    lines = [f"{'':8} {'accuracy':>9} {'least':>7} {'most':>7} {'seconds':>9} {'x plain':>8}"]
    seconds = {arm: statistics.median(row["seconds"] for row in rows if row["arm"] == arm) for arm in ARMS}
    for arm in ARMS:
        found = [row["accuracy"] for row in rows if row["arm"] == arm]
        lines.append(
            f"{arm:8} {statistics.fmean(found):9.4f} {min(found):7.4f} {max(found):7.4f} {seconds[arm]:9.1f} "
            f"{seconds[arm] / seconds['plain']:8.2f}"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
