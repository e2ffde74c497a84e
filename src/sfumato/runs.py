"""A training run from its configuration to the three files of a finished run: model, report and result."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from torch import nn
from torch.nn import functional as F

from sfumato import _checks
from sfumato import report as reports
from sfumato._files import replace_file
from sfumato._numbers import bound, floor
from sfumato._version import __version__
from sfumato.config import Experiment
from sfumato.data.records import Records
from sfumato.data.schema import validated
from sfumato.engines.simulation import Simulation
from sfumato.errors import BudgetExhaustedError, InputError, SfumatoError
from sfumato.learning.aggregation import LocalNoise, ServerNoise, SharedNoise
from sfumato.learning.api import federate, train
from sfumato.learning.checkpoint import Checkpoint
from sfumato.learning.fedavg import FedAvg
from sfumato.learning.fedsgd import FedSGD
from sfumato.learning.plan import Plan
from sfumato.learning.training import Step, TrainingResult
from sfumato.privacy.budget import Unit
from sfumato.privacy.ledger import Ledger
from sfumato.privacy.statement import PrivacyStatement
from sfumato.report.describe import curves_of, describe_machine, ledger_extract, privacy_of, score_of
from sfumato.report.result import PRIVATE

_OWN_LEDGER = (
    "Other runs on the same records: this run brought its own ledger, so nobody adds them up. "
    "Name a shared one in [ledger]."
)
_UNCOVERED_ACCURACY = (
    "The accuracy in this report: it was measured on the test records without noise and is not covered by the budget."
)


@dataclass(frozen=True)
class Finished:
    """What a finished run has to say: its promise, and its accuracy on the test part where there is one; steps lost."""

    privacy: PrivacyStatement
    score: reports.Score | None
    lost: int


def run_experiment(experiment: Experiment, folder: Path, *, resume: bool) -> Finished:
    """Train as a configuration says; write model.pt, report.html and, last of all, result.json to `folder`.

    Args:
        experiment: What to train on what, and how.
        folder: Made if it is missing; empty, unless the run is resumed.
        resume: Whether to go on from the checkpoint in `folder`.

    Raises:
        InputError: the folder does not fit, or the configuration does not fit the records.
        BudgetExhaustedError: the ledger that the configuration names cannot pay for the run.
        SfumatoError: the training was refused; a folder without charge and checkpoint is taken away again.
    """
    _check_folder(folder, experiment, resume)
    training, test = experiment.records()
    chosen, model = experiment.plan(), experiment.model(training)
    run = _runner(experiment, model, training, chosen)
    with contextlib.ExitStack() as stack:
        shared = _granted(experiment, chosen, resume)
        if shared is not None:
            stack.enter_context(shared)
        stack.enter_context(_tidy(folder))
        ledger = shared
        if ledger is None and chosen.is_private:
            ledger = stack.enter_context(Ledger(folder / "ledger.sqlite"))
            if not ledger.has_grant(experiment.dataset):
                ledger.grant(experiment.dataset, chosen.budget, note="exactly the budget of this run")
        start = time.perf_counter()
        with experiment.blamed("the run was refused:"):
            result = run(ledger, _checkpoint(experiment, folder, resume))
        said = result.privacy
        if chosen.is_private and shared is None:
            said = dataclasses.replace(said, not_covered=(*said.not_covered, _OWN_LEDGER))
        seconds, score = time.perf_counter() - start, _score(model, test)
        _publish(folder, model, _result(experiment, chosen, said, ledger, score, seconds, result.steps))
    return Finished(said, score, result.lost)


def _check_folder(folder: Path, experiment: Experiment, resume: bool) -> None:
    if resume and experiment.config.checkpoint is None:
        raise InputError(f"{experiment.path} has no [checkpoint], so there is nothing to go on with; add one.")
    if (folder / "result.json").exists():
        raise InputError(f"{folder} already holds a finished run; choose another folder with --out.")
    if folder.exists() and not folder.is_dir():
        raise InputError(f"{folder} is a file; choose another folder with --out.")
    if not resume and folder.exists() and any(folder.iterdir()):
        raise InputError(f"{folder} is not empty; choose another folder with --out, or go on with --resume.")
    if resume and not (folder / "checkpoint.pt").is_file():
        raise InputError(f"{folder} holds no checkpoint to go on with; start without --resume.")


def _granted(experiment: Experiment, chosen: Plan, resume: bool) -> Ledger | None:
    """Return the ledger that the configuration names, if it can pay; the charge itself decides in the end."""
    if experiment.ledger_path is None or not chosen.is_private:
        return None
    ledger = Ledger.existing(experiment.ledger_path)
    left = ledger.balance(experiment.dataset)
    spending = chosen.spending
    # Under Renyi composition epsilons do not add up: what is left in epsilon does not say whether a run fits.
    short = left.composition == "basic" and (
        spending.epsilon > left.remaining_epsilon or spending.delta > left.remaining_delta
    )
    if short and not resume:
        ledger.close()
        raise BudgetExhaustedError(
            f"The run costs epsilon {bound(spending.epsilon)} and delta {bound(spending.delta)}, but data set "
            f'"{left.dataset}" has only {floor(left.remaining_epsilon)} and {floor(left.remaining_delta)} left in '
            f"{experiment.ledger_path}; "
            "choose a smaller budget, or ask for a larger grant."
        )
    return ledger


@contextlib.contextmanager
def _tidy(folder: Path) -> Iterator[None]:
    """Make the folder; if the run fails before anything was charged or saved, take it away again."""
    made = not folder.exists()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{folder} cannot be made ({error.strerror}); choose another folder with --out.") from None
    try:
        yield
    except BaseException:
        if not _is_worth_keeping(folder):
            for file in folder.glob("ledger.sqlite*"):
                file.unlink()
            if made:
                with contextlib.suppress(OSError):
                    folder.rmdir()
        raise


def _is_worth_keeping(folder: Path) -> bool:
    if (folder / "checkpoint.pt").exists():
        return True
    if not (folder / "ledger.sqlite").exists():
        return False
    try:
        with Ledger.existing(folder / "ledger.sqlite") as ledger:
            return any(entry.kind == "charge" for entry in ledger.history())
    except SfumatoError:
        return True


def _checkpoint(experiment: Experiment, folder: Path, resume: bool) -> Checkpoint | None:
    wanted = experiment.config.checkpoint
    return None if wanted is None else Checkpoint(folder / "checkpoint.pt", wanted.every, resume)


def _runner(
    experiment: Experiment, model: nn.Module, records: Records, chosen: Plan
) -> Callable[[Ledger | None, Checkpoint | None], TrainingResult]:
    """Check all that the run needs, and return what runs it."""

    def squared(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return F.mse_loss(outputs.squeeze(-1), targets)

    wanted = experiment.config.training
    make = experiment.optimizer()
    loss = F.cross_entropy if records.classes else squared
    dataset, purpose = experiment.dataset, f"train {experiment.name}"
    if wanted.mode == "central":

        def central(ledger: Ledger | None, checkpoint: Checkpoint | None) -> TrainingResult:
            with _progress(chosen) as on_step:
                return train(
                    model, records, chosen, loss=loss, optimizer=make(model.parameters()), ledger=ledger,
                    dataset=dataset, purpose=purpose, checkpoint=checkpoint, on_step=on_step,
                    compute=experiment.compute(),
                )  # fmt: skip

        return central
    with experiment.blamed("[data]"):
        clients = records.by_owner()
    _check_populations(experiment, chosen, clients)
    noises = {
        "server": ServerNoise(), "shared": SharedNoise(tolerate=wanted.tolerate or 0), "local": LocalNoise()
    }  # fmt: skip
    noise = noises[wanted.noise] if wanted.noise else None
    algorithm: FedAvg | FedSGD = FedSGD(optimizer=make)
    if wanted.algorithm == "fedavg":
        algorithm = FedAvg(local=make, local_steps=wanted.local_steps or 1, batch_size=wanted.local_batch_size)

    def federated(ledger: Ledger | None, checkpoint: Checkpoint | None) -> TrainingResult:
        with _progress(chosen) as on_step:
            return federate(
                model, clients, chosen, algorithm=algorithm, engine=Simulation(), loss=loss, noise=noise,
                populations=experiment.config.privacy.populations, ledger=ledger, dataset=dataset, purpose=purpose,
                checkpoint=checkpoint, on_step=on_step,
                    compute=experiment.compute(),
            )  # fmt: skip

    return federated


def _check_populations(experiment: Experiment, chosen: Plan, clients: Iterable[str]) -> None:
    """Refuse populations of clients that there are not, and, where each client's is needed, a missing one."""
    declared = experiment.config.privacy.populations or {}
    names, where = [*clients], f"{experiment.path}: [privacy.populations]"
    for name in declared:
        if name not in names:
            raise InputError(
                f'{where} names "{name}", which is no owner in the data.{_checks.did_you_mean(name, names)}'
            )
    by_records = chosen.is_private and chosen.budget.unit is Unit.RECORD
    missing = [name for name in names if name not in declared]
    if missing and by_records and experiment.config.training.algorithm == "fedavg":
        raise InputError(
            f"{where} has no entry for {', '.join(missing)}: fedavg that protects records divides each client's sums by "
            f"its public size; add a line such as {json.dumps(missing[0], ensure_ascii=False)} = 100 for each."
        )


@contextlib.contextmanager
def _progress(chosen: Plan) -> Iterator[Callable[[Step], None]]:
    console = Console(stderr=True)
    columns = (TextColumn("training"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}"))
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("", total=chosen.steps)

        def on_step(step: Step) -> None:
            words = "no privacy promised"
            if math.isfinite(step.epsilon):
                words = f"epsilon {bound(step.epsilon)} spent, {floor(step.remaining)} left"
            progress.update(task, completed=step.index, description=words)

        yield on_step


def _score(model: nn.Module, test: Records) -> reports.Score | None:
    if test.classes is None:
        return None
    was_training = model.training
    model.eval()
    with torch.no_grad():
        right = (model(test.features).argmax(dim=1) == test.targets).double()
    model.train(was_training)
    per_owner = {}
    if test.owner_codes is not None:
        for code, owner in enumerate(test.owner_names):
            held = test.owner_codes == code
            if held.any():
                per_owner[owner] = float(right[held].mean())
    return reports.Score.model_validate(score_of([float(right.mean())], per_owner))


def _result(
    experiment: Experiment, chosen: Plan, said: PrivacyStatement, ledger: Ledger | None, score: reports.Score | None,
    seconds: float, steps: Sequence[Step],
) -> reports.Result:  # fmt: skip
    privacy, curves = None, None
    if chosen.is_private:
        privacy = privacy_of(chosen, said, [_UNCOVERED_ACCURACY] if score else [])
        curves = curves_of(chosen, experiment.name, steps)
    owners: dict[str, int | None] = dict.fromkeys(score.per_owner if score else ())
    content = {
        "title": f"Training {experiment.name}",
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "version": __version__,
        "machine": describe_machine(),
        "dataset": {"name": experiment.dataset, "owners": owners | (experiment.config.privacy.populations or {})},
        "runs": [
            {
                "name": experiment.name,
                "mode": experiment.config.training.mode + (PRIVATE if chosen.is_private else ""),
                "seconds": seconds,
                "metrics": {"accuracy": score},
                "privacy": privacy,
            }
        ],
        "ledger": None if ledger is None else ledger_extract(ledger, experiment.dataset),
        "curves": curves,
    }
    return validated(reports.Result, content, f"The result of {experiment.path}")


def _publish(folder: Path, model: nn.Module, result: reports.Result) -> None:
    """Write the three files, `result.json` last: where it stands, the run is finished."""
    try:
        replace_file(folder / "model.pt", lambda file: torch.save(model.state_dict(), file))
    except OSError as error:
        raise InputError(f"{folder / 'model.pt'} cannot be written ({error.strerror}); make room.") from None
    reports.write_report(result, folder)
    reports.write_result(result, folder / "result.json")
