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
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import nn
from torch.nn import functional as F

from sfumato import _checks
from sfumato import report as reports
from sfumato._files import replace_file
from sfumato._numbers import bound, floor
from sfumato._version import __version__
from sfumato.config import Experiment
from sfumato.data.population import Population
from sfumato.data.records import Records
from sfumato.data.schema import validated
from sfumato.engines.simulation import Simulation
from sfumato.errors import BudgetExhaustedError, InputError, SfumatoError
from sfumato.federation_config import FederationSection, RollCall
from sfumato.learning.api import federate, train
from sfumato.learning.checkpoint import Checkpoint
from sfumato.learning.plan import Plan
from sfumato.learning.training import Step, TrainingResult
from sfumato.personal_models import FOLDER, write_personal_models
from sfumato.privacy.budget import Unit
from sfumato.privacy.ledger import Ledger
from sfumato.privacy.statement import PrivacyStatement
from sfumato.report.client_plots import ForOwner, clients_figure
from sfumato.report.describe import (
    curves_of,
    describe_machine,
    ledger_extract,
    parts_of,
    privacy_of,
    rights_of,
    score_of,
)
from sfumato.report.partition_plots import partition_figure
from sfumato.report.result import PRIVATE

_OWN_LEDGER = (
    "Other runs on the same records: this run brought its own ledger, so nobody adds them up. "
    "Name a shared one in [ledger]."
)
_UNCOVERED_ACCURACY = (
    "The accuracy in this report: it was measured on the test records without noise and is not covered by the budget."
)
_UNCOVERED_PICTURES = "The sections for the data's owner, who holds what and each client's part: they are exact."
_UNCOVERED_MODELS = (
    f"The clients' own models in the folder {FOLDER}: each is made from one client's records without noise, so it is for that "
    "client alone."
)
_PERSONAL = ("ditto", "fedper")
_LOOKS = 20  # at the test part while a run goes on


@dataclass(frozen=True)
class Finished:
    """What a finished run has to say.

    Attributes:
        privacy: Its promise.
        score: Its accuracy on the test part, where there is one.
        lost: Steps lost in a crash.
        void: Rounds in which too few clients answered.
        stopped: Why it ended before its plan, after how many of how many steps; empty if it did not.
        personal: The folder of the clients' own models, where they were asked for.
    """

    privacy: PrivacyStatement
    score: reports.Score | None
    lost: int
    void: int
    stopped: str
    personal: Path | None = None


@dataclass(frozen=True)
class _Job:
    """A run whose parts are checked.

    Attributes:
        run: Called with the ledger and the checkpoint.
        clients: The clients of a federation.
        called: Who was asked and who answered, where the report will tell.
    """

    run: Callable[[Ledger | None, Checkpoint | None], TrainingResult]
    clients: Population | None = None
    called: RollCall | None = None


def run_experiment(
    experiment: Experiment, folder: Path, *, resume: bool, owner_report: bool = False, personal_models: bool = False
) -> Finished:
    """Train as a configuration says; write model.pt, report.html and, last of all, result.json to `folder`.

    Args:
        experiment: What to train on what, and how.
        folder: Made if it is missing; empty, unless the run is resumed.
        resume: Whether to go on from the checkpoint in `folder`.
        owner_report: Whether the page of a private federation shows who holds what and each client's part, which no
            budget covers. The page of one without privacy always does.
        personal_models: Whether to write each client's own model, which no budget covers, to a folder in `folder`.

    Raises:
        InputError: the folder does not fit, or the configuration does not fit the records.
        BudgetExhaustedError: the ledger that the configuration names cannot pay for the run.
        SfumatoError: the training was refused; a folder without charge and checkpoint is taken away again.
    """
    _check_folder(folder, experiment, resume)
    if owner_report and experiment.config.training.mode == "central":
        raise InputError(f'--owner-report shows clients, and {experiment.path} has mode = "central"; leave it out.')
    if personal_models and experiment.config.training.algorithm not in _PERSONAL:
        raise InputError(
            f"--personal-models writes each client's own model, and {experiment.path} trains one model for all; leave it out, "
            'or choose algorithm = "ditto" or "fedper".'
        )
    training, test = experiment.records()
    chosen, model = experiment.plan(), experiment.model(training)
    job = _job(experiment, model, training, test, chosen, owner_report or not chosen.is_private)
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
            result = job.run(ledger, _checkpoint(experiment, folder, resume))
        seconds = time.perf_counter() - start
        said = result.privacy
        if chosen.is_private and shared is None:
            said = dataclasses.replace(said, not_covered=(*said.not_covered, _OWN_LEDGER))
        score = _score(experiment, result, test)
        owner = _for_owner(experiment, job, result, training, test)
        personal = None
        if personal_models and job.clients is not None:
            personal = write_personal_models(folder, job.clients, result.personal_model)
        exact = {
            _UNCOVERED_ACCURACY: score is not None, _UNCOVERED_PICTURES: owner is not None,
            _UNCOVERED_MODELS: personal is not None,
        }  # fmt: skip
        open_ones = [sentence for sentence, there in exact.items() if there]
        told = _result(experiment, chosen, said, ledger, score, seconds, result.steps, open_ones)
        _publish(folder, model, told, owner)
    stopped = result.stopped  # a private run tells its steps and its charge there
    if stopped and result.steps and not chosen.is_private:  # no step is left where it had stopped before
        stopped += f", at step {result.steps[-1].index} of {chosen.steps}"
    return Finished(said, score, result.lost, result.void, stopped, personal)


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


def _job(
    experiment: Experiment, model: nn.Module, records: Records, test: Records, chosen: Plan, pictures: bool
) -> _Job:
    """Check all that the run needs, and return it."""

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

        return _Job(central)
    clients = experiment.clients(records)
    _check_populations(experiment, chosen, clients)
    federation = experiment.config.federation or FederationSection()
    with experiment.blamed("[training]"):
        algorithm = wanted.make_algorithm(make)
    drop_out, delay = federation.make_drop_out(), federation.make_delay()
    called = RollCall(drop_out, delay, federation.deadline) if pictures else None
    if test.classes is None and federation.stop is not None and federation.stop.looks:
        raise InputError(
            f"{experiment.path}: [federation] stop looks at the accuracy on the test part, and these targets are no "
            "classes; remove it, or choose rounds."
        )

    def accuracy(model: nn.Module) -> float:
        return _mean(rights_of(model, test))

    look = None if test.classes is None or wanted.algorithm == "fedper" else lambda: accuracy(model)

    def federated(ledger: Ledger | None, checkpoint: Checkpoint | None) -> TrainingResult:
        with _progress(chosen, _cohort(chosen, clients), look) as on_step:
            return federate(
                model, clients, chosen, algorithm=algorithm, loss=loss,
                noise=wanted.make_noise(experiment.config.privacy.separation),
                engine=Simulation(
                    drop_out=called or drop_out, delay=delay, deadline=federation.deadline, workers=wanted.workers
                ),
                weighting=wanted.make_weighting(), quorum=wanted.quorum or 0, stop=federation.make_stop(accuracy),
                populations=experiment.config.privacy.populations, ledger=ledger, dataset=dataset, purpose=purpose,
                checkpoint=checkpoint, on_step=on_step, compute=experiment.compute(),
            )  # fmt: skip

    return _Job(federated, clients, called)


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


def _cohort(chosen: Plan, clients: Population) -> str:
    """Say how many clients a round expects; never how many were drawn, which a private run must not tell."""
    count, expected = len(clients), round(chosen.expected_batch)
    if chosen.budget.unit is Unit.RECORD or expected == count:
        return f"{count:,} clients"
    return f"about {expected:,} of {count:,} clients"


@contextlib.contextmanager
def _progress(
    chosen: Plan, cohort: str = "", look: Callable[[], float] | None = None
) -> Iterator[Callable[[Step], None]]:
    """Show a bar on a terminal: steps, the expected cohort, what is spent, now and then the accuracy, and the time left."""
    console = Console(stderr=True)
    columns = (
        TextColumn("round" if cohort else "training"), BarColumn(), MofNCompleteColumn(),
        TextColumn("{task.description}"), TimeRemainingColumn(),
    )  # fmt: skip
    shown, every, seen = console.is_terminal, max(1, chosen.steps // _LOOKS), ""
    with Progress(*columns, console=console, transient=True, disable=not shown) as progress:
        task = progress.add_task(cohort, total=chosen.steps)

        def on_step(step: Step) -> None:
            nonlocal seen
            words = "no privacy promised"
            if math.isfinite(step.epsilon):
                words = f"epsilon {bound(step.epsilon)} spent, {floor(step.remaining)} left"
            if shown and look is not None and step.index % every == 0:
                said = " (not covered by the budget)" if chosen.is_private else ""
                seen = f"test accuracy {look():.1%}{said}"
            progress.update(task, completed=step.index, description=", ".join(filter(None, (cohort, words, seen))))

        yield on_step


def _score(experiment: Experiment, result: TrainingResult, test: Records) -> reports.Score | None:
    """Return the accuracy on the test part: of the shared model, or of each owner's own where only that is trained whole."""
    held = _by_owner(test)
    personal = experiment.config.training.algorithm == "fedper"
    if test.classes is None or (personal and (_is_dealt_out(experiment) or not held)):
        return None
    if personal:
        right = torch.zeros(len(test), dtype=torch.bool)
        for owner, indices in held.items():
            right[indices] = rights_of(result.personal_model(owner), test.select(indices))
    else:
        right = rights_of(result.model, test)
    per_owner = {owner: _mean(right[indices]) for owner, indices in held.items()}
    return reports.Score.model_validate(score_of([_mean(right)], per_owner))


def _mean(right: torch.Tensor) -> float:
    return float(right.double().mean())


def _by_owner(test: Records) -> dict[str, torch.Tensor]:
    """Return where the records of each owner are, of those that have some."""
    if test.owner_codes is None:
        return {}
    held = {owner: (test.owner_codes == code).nonzero().flatten() for code, owner in enumerate(test.owner_names)}
    return {owner: indices for owner, indices in held.items() if len(indices)}


def _is_dealt_out(experiment: Experiment) -> bool:
    """Whether the clients are parts of the records, so that none of the test records is anybody's own."""
    federation = experiment.config.federation
    return federation is not None and federation.partition is not None


def _for_owner(
    experiment: Experiment, job: _Job, result: TrainingResult, records: Records, test: Records
) -> ForOwner | None:
    """Return the pictures of the clients, if the report has them."""
    if job.called is None or job.clients is None:
        return None
    algorithm, dealt_out = experiment.config.training.algorithm, _is_dealt_out(experiment)
    places = _by_owner(test)

    def scored(name: str, own: Records) -> tuple[float | None, float | None]:
        if own.classes is None or not (dealt_out or name in places):
            return None, None
        held = own if dealt_out else test.select(places[name])
        shared = None if algorithm == "fedper" else _mean(rights_of(result.model, held))
        if algorithm not in _PERSONAL:
            return shared, None
        return shared, _mean(rights_of(result.personal_model(name), held))

    called = job.called
    parts = parts_of(job.clients, len(records), called.asked, called.answered, scored)
    figure = clients_figure(
        parts,
        rounds=max(1, len(result.steps), *(part.asked for part in parts)),
        clients=len(job.clients),
        scored_on="the records it trained on, where a model looks better than it is"
        if dealt_out
        else "its test records",
    )
    left_out = (
        f"Left out: {result.nonfinite:,} parts with NaN or infinite values, {result.refused:,} answers with names or shapes "
        f"that were not asked for. Rounds with too few answers: {result.void:,}."
    )
    return ForOwner(partition_figure(job.clients), figure, (left_out,))


def _result(
    experiment: Experiment, chosen: Plan, said: PrivacyStatement, ledger: Ledger | None, score: reports.Score | None,
    seconds: float, steps: Sequence[Step], open_ones: Sequence[str],
) -> reports.Result:  # fmt: skip
    privacy, curves = None, None
    if chosen.is_private:
        privacy = privacy_of(chosen, said, open_ones)
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


def _publish(folder: Path, model: nn.Module, result: reports.Result, owner: ForOwner | None) -> None:
    """Write the three files, `result.json` last: where it stands, the run is finished."""
    try:
        replace_file(folder / "model.pt", lambda file: torch.save(model.state_dict(), file))
    except OSError as error:
        raise InputError(f"{folder / 'model.pt'} cannot be written ({error.strerror}); make room.") from None
    reports.write_report(result, folder, owner)
    reports.write_result(result, folder / "result.json")
