"""The main job: four hospitals, one model, one budget, and what each way of training costs in accuracy.

920 heart patients at four hospitals (public records, in the package). Each seed splits every hospital 66/34 and trains
ten ways: each hospital alone, pooled and federated without privacy, both with epsilon 0.5, 1 and 3 for each patient, and
pooled with epsilon 1 where a policy chooses the noise from what was released and what is left.
"""

from __future__ import annotations

import functools
import math
import statistics
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from torch import nn

from sfumato import _checks
from sfumato._numbers import bound
from sfumato._version import __version__
from sfumato.data.records import Records
from sfumato.data.sources import load
from sfumato.engines.simulation import Simulation
from sfumato.errors import InputError, SfumatoError
from sfumato.learning.api import federate, train
from sfumato.learning.fedsgd import FedSGD
from sfumato.learning.models import build
from sfumato.learning.plan import Plan
from sfumato.learning.policies import SignalToNoise
from sfumato.learning.training import TrainingResult
from sfumato.privacy.budget import Budget
from sfumato.privacy.ledger import Ledger
from sfumato.report import Result, read_result, write_report, write_result
from sfumato.report.describe import curves_of, describe_machine, ledger_extract, privacy_of, score_of

EPSILONS = (0.5, 1.0, 3.0)
DRIVEN = 1.0  # the epsilon that is also spent by a policy, which looks at what was released and what is left
DELTA = 1e-4
TRAIN_SHARE = 0.66
# Declared in the study's protocol: how many patients train, rounded. Never read off the records.
POPULATION = 607
POPULATIONS = {"cleveland": 200, "hungary": 194, "switzerland": 81, "long-beach": 132}
STEPS, CLIP = 30, 0.5
PRIVATE = functools.partial(torch.optim.SGD, lr=0.5, momentum=0.9)
PLAIN_STEPS = 100
PLAIN = functools.partial(torch.optim.SGD, lr=0.3, momentum=0.9, weight_decay=0.1)

_TITLE = "Four hospitals, one model, one budget"
_FILES = ("report.html", "result.json", "ledger.sqlite", "ledger.sqlite-wal", "ledger.sqlite-shm")

Outcome = tuple[dict[str, float], dict[str, int], TrainingResult | None]
Trained = tuple[Mapping[str, nn.Module], TrainingResult | None]


@dataclass(frozen=True)
class _Arm:
    """One way to train: its name and mode in the result, its plan, and what makes a model of one split."""

    name: str
    mode: str
    plan: Plan
    train: Callable[[Records, Plan, Ledger, str], Trained]


def run_demo(out: Path, seeds: int, console: Console) -> Path:
    """Run the study and write report.html, result.json and ledger.sqlite into `out`; return the report's path.

    Raises:
        InputError: seeds is below 1. SfumatoError: `out` cannot be written.
    """
    _checks.count("seeds", seeds)
    _prepare(out)
    records = load("heart")
    started = time.perf_counter()
    try:
        with Ledger(out / "ledger.sqlite") as ledger:
            result = _study(records, list(_arms()), seeds, ledger, console)
        report = write_report(result, out)
        write_result(result, out / "result.json")
    except BaseException:
        # These are rehearsals on public records: a ledger of half a study is of no use to anybody.
        _clear(out)
        raise
    _print_table(result, console)
    console.print(
        f"\n{time.perf_counter() - started:.0f} s. Report: {report}\nNumbers: {out / 'result.json'}",
        soft_wrap=True,
    )
    console.print(
        f"Ledger: {out / 'ledger.sqlite'} (check it with: sfumato ledger verify {out / 'ledger.sqlite'})",
        soft_wrap=True,
    )
    return report


def _arms() -> Iterable[_Arm]:
    plain = Plan.without_privacy(population=POPULATION, batch_size=POPULATION, steps=PLAIN_STEPS)
    yield _Arm("alone", "alone", plain, _train_alone)
    yield _Arm("pooled", "pooled", plain, _train_pooled)
    yield _Arm("federated", "federated", plain, _train_federated)
    for epsilon in EPSILONS:
        budget = Budget(epsilon, DELTA)
        plan = Plan.calibrate(budget, population=POPULATION, batch_size=POPULATION, steps=STEPS, clip=CLIP)
        yield _Arm(f"pooled-private, epsilon {epsilon:g}", "pooled-private", plan, _train_pooled)
        yield _Arm(f"federated-private, epsilon {epsilon:g}", "federated-private", plan, _train_federated)
        if epsilon == DRIVEN:
            driven = Plan.calibrate(
                budget, population=POPULATION, batch_size=POPULATION, steps=STEPS, clip=CLIP, noise=SignalToNoise()
            )
            yield _Arm(f"pooled-private, budget-driven, epsilon {epsilon:g}", "pooled-private", driven, _train_pooled)


def _study(records: Records, arms: list[_Arm], seeds: int, ledger: Ledger, console: Console) -> Result:
    outcomes: dict[str, list[Outcome]] = {arm.name: [] for arm in arms}
    seconds = dict.fromkeys(outcomes, 0.0)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("training", total=seeds * len(arms))
        for seed in range(seeds):
            learning, held_out = records.split(TRAIN_SHARE, seed=seed)
            for arm in arms:
                progress.update(task, description=f"seed {seed + 1}: {_promise(arm.plan)}, {arm.mode}")
                begun = time.perf_counter()
                # Every seed is a study of its own; in each, the patients' records are used once in each arm.
                world = f"heart, {arm.name}, seed {seed}"
                if arm.plan.is_private:
                    ledger.grant(world, arm.plan.budget, note="rehearsal on public records")
                models, result = arm.train(learning, arm.plan, ledger, world)
                seconds[arm.name] += time.perf_counter() - begun
                correct, total = _test(models, held_out)
                outcomes[arm.name].append((correct, total, result))
                progress.advance(task)
    runs = [_run(arm, outcomes[arm.name], seconds[arm.name]) for arm in arms]
    curves: dict[str, dict[str, object]] = {}
    for arm in arms:
        first = outcomes[arm.name][0][2]
        for kind, points in (curves_of(arm.plan, arm.name, first.steps) if first else {}).items():
            curves.setdefault(kind, {}).update(points)
    return Result.model_validate(
        {
            "title": _TITLE,
            "created": datetime.now(UTC).isoformat(timespec="seconds"),
            "version": __version__,
            "machine": describe_machine(),
            "dataset": {
                "name": "heart",
                "owners": POPULATIONS,
                "description": "UCI Heart Disease, processed files of four hospitals, CC BY 4.0: 920 public records, "
                "66 percent of each hospital for training. The sizes are the declared training sizes.",
            },
            "runs": runs,
            "ledger": ledger_extract(ledger),
            "curves": curves,
        }
    )


def _model(records: Records) -> nn.Module:
    model = build("logistic", tuple(records.features.shape[1:]), 2, ())
    for parameter in model.parameters():
        nn.init.zeros_(parameter)
    return model


def _train_alone(learning: Records, plan: Plan, ledger: Ledger, world: str) -> Trained:
    models = {}
    for name, own in learning.by_owner().items():
        model = models[name] = _model(own)
        train(model, own, plan, loss=nn.functional.cross_entropy, optimizer=PLAIN(model.parameters()))
    return models, None


def _train_pooled(learning: Records, plan: Plan, ledger: Ledger, world: str) -> Trained:
    model = _model(learning)
    optimizer = (PRIVATE if plan.is_private else PLAIN)(model.parameters())
    result = train(
        model,
        learning,
        plan,
        loss=nn.functional.cross_entropy,
        optimizer=optimizer,
        ledger=ledger,
        dataset=world,
    )
    return dict.fromkeys(learning.owner_names, model), result if plan.is_private else None


def _train_federated(learning: Records, plan: Plan, ledger: Ledger, world: str) -> Trained:
    model = _model(learning)
    result = federate(
        model,
        learning.by_owner(),
        plan,
        algorithm=FedSGD(PRIVATE if plan.is_private else PLAIN),
        engine=Simulation(),
        loss=nn.functional.cross_entropy,
        ledger=ledger,
        dataset=world,
    )
    return dict.fromkeys(learning.owner_names, model), result if plan.is_private else None


def _test(models: Mapping[str, nn.Module], held_out: Records) -> tuple[dict[str, float], dict[str, int]]:
    correct, total = {}, {}
    for name, own in held_out.by_owner().items():
        with torch.no_grad():
            guesses = models[name](own.features).argmax(1)
        correct[name], total[name] = float((guesses == own.targets).sum()), len(own)
    return correct, total


def _run(arm: _Arm, outcomes: list[Outcome], seconds: float) -> dict[str, object]:
    overall = [sum(correct.values()) / sum(total.values()) for correct, total, _ in outcomes]
    owners = outcomes[0][0]
    per_owner = {
        name: statistics.fmean(correct[name] / total[name] for correct, total, _ in outcomes) for name in owners
    }
    first = outcomes[0][2]
    extra = (
        "Accuracy on the held-out patients: it is measured without noise.",
        "The other arms and seeds of this study: each is accounted as if it were the only one on these patients.",
    )
    return {
        "name": arm.name,
        "mode": arm.mode,
        "seconds": seconds,
        "metrics": {"accuracy": score_of(overall, per_owner)},
        "privacy": None if first is None else privacy_of(arm.plan, first.privacy, extra),
    }


def _promise(plan: Plan) -> str:
    return f"epsilon {plan.budget.epsilon:g}" if math.isfinite(plan.budget.epsilon) else "no privacy"


def _prepare(out: Path) -> None:
    """Make the folder, or empty it of an earlier demo; a folder with anything else in it is refused."""
    try:
        if out.exists() and any(out.iterdir()) and not _is_earlier_demo(out):
            raise InputError(f"{out} holds files that are not an earlier demo's; choose another folder with --out.")
        out.mkdir(parents=True, exist_ok=True)
        _clear(out)
    except OSError as error:
        raise SfumatoError(
            f"The folder {out} cannot be used for the demo ({error.strerror}); choose another with --out."
        ) from error


def _is_earlier_demo(out: Path) -> bool:
    try:
        return {path.name for path in out.iterdir()} <= set(_FILES) and read_result(out / "result.json").title == _TITLE
    except SfumatoError:
        return False


def _clear(out: Path) -> None:
    for name in _FILES:
        (out / name).unlink(missing_ok=True)


def _print_table(result: Result, console: Console) -> None:
    table = Table(title="Accuracy over all test patients (mean and standard deviation over seeds)")
    for heading in ("arm", "epsilon per patient", "accuracy", "sd"):
        table.add_column(heading, justify="left" if heading == "arm" else "right")
    for run in result.runs:
        score = run.metrics.accuracy
        assert score is not None
        epsilon = "none promised" if run.privacy is None else bound(run.privacy.epsilon)
        table.add_row(
            run.name.partition(", epsilon")[0],
            epsilon,
            f"{score.mean:.3f}",
            f"{score.sd:.3f}" if score.seeds > 1 else "-",
        )
    console.print(table)
