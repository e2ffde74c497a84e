"""The `sfumato` command: plan, train, keep the ledger, report. What takes long to import is imported when needed."""

from __future__ import annotations

import contextlib
import io
import json
import math
import os
import time
import uuid
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.progress_bar import ProgressBar
from rich.table import Table
from typer.core import TyperGroup

from sfumato.errors import BudgetExhaustedError, InputError, SfumatoError
from sfumato.privacy.budget import Budget, Relation, Unit
from sfumato.privacy.ledger import Ledger

if TYPE_CHECKING:
    import torch
    from torch import nn

    import sfumato as sf
    from sfumato.config import Experiment
    from sfumato.report import Result, Score
    from sfumato.report.result import Mode

_FAILED, _INTERRUPTED = 2, 130
_WIDE = 160  # columns of a table that is not read on a terminal
_UNCOVERED_ACCURACY = (
    "The accuracy in this report: it was measured on the test records without noise and is not covered by the budget."
)


class _Commands(TyperGroup):
    """Turns every refusal into one line on stderr and an exit code."""

    def invoke(self, ctx: Any) -> Any:
        """Run the command that was asked for."""
        try:
            return super().invoke(ctx)
        except SfumatoError as error:
            _last_line(" ".join(str(error).split()))
            raise typer.Exit(_FAILED) from None
        except KeyboardInterrupt:
            _last_line("stopped by Ctrl-C; no result was written.")
            raise typer.Exit(_INTERRUPTED) from None


app = typer.Typer(
    cls=_Commands, no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False,
    help="Privacy-preserving machine learning: declare a budget, train, release, prove what was spent.",
)  # fmt: skip
ledger_app = typer.Typer(no_args_is_help=True, help="What was granted and spent on each data set.")
app.add_typer(ledger_app, name="ledger")

Epsilon = Annotated[float, typer.Option(help="The epsilon of the promise, above 0.")]
Delta = Annotated[float, typer.Option(help="The delta of the promise, below one over the population.")]
Protects = Annotated[str, typer.Option(help="Who is protected: record or client.")]
Neighbours = Annotated[str, typer.Option(help="add-or-remove-one or replace-one.")]
LedgerPath = Annotated[Path, typer.Argument(help="The ledger file.")]
OneDataset = Annotated[str | None, typer.Argument(help="The data set; all of them unless given.")]


def main() -> None:
    """Run the command line; exit code 2 for a refusal, 130 for Ctrl-C."""
    app(prog_name="sfumato")


@app.command()
def demo(
    seeds: Annotated[int, typer.Option(min=1, help="Runs to average over.")] = 10,
    out: Annotated[Path, typer.Option(help="The folder for the result and the report.")] = Path("runs/demo"),
) -> None:
    """Train on four hospitals' records, alone, pooled and federated, with and without privacy."""
    from sfumato.demo import run_demo  # noqa: PLC0415

    run_demo(out, seeds, _console())


@app.command()
def plan(
    epsilon: Epsilon,
    delta: Delta,
    population: Annotated[int, typer.Option(help="The public number of units.")],
    batch_size: Annotated[int, typer.Option(help="The expected number of units in a step.")],
    steps: Annotated[int | None, typer.Option(help="Number of steps.")] = None,
    epochs: Annotated[float | None, typer.Option(help="Passes over the population, in place of steps.")] = None,
    sampling: Annotated[str, typer.Option(help="poisson, shuffled or full-batch.")] = "poisson",
    unit: Protects = Unit.RECORD.value,
    relation: Neighbours = Relation.ADD_OR_REMOVE_ONE.value,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Find the least noise that keeps a budget."""
    budget = _budget(epsilon, delta, unit, relation)
    if not budget.is_private:
        raise InputError("An infinite epsilon needs no noise, so there is nothing to plan; choose a finite one.")
    from sfumato.learning.plan import Plan  # noqa: PLC0415

    start = time.perf_counter()
    found = Plan.calibrate(
        budget, population=population, batch_size=batch_size, steps=steps, epochs=epochs, sampling=sampling
    )
    spent, seconds = found.spending, time.perf_counter() - start
    if as_json:
        answer = {
            "noise_multiplier": found.noise_multiplier,
            "epsilon": spent.epsilon,
            "accountants": {"pld": spent.pld, "rdp": spent.rdp},
            "seconds": seconds,
        }
        typer.echo(json.dumps(answer))
        return
    typer.echo(f"Budget: {budget}; {found.steps} steps, {found.sampler.kind}, sampling rate {found.sampler.rate:.4g}.")
    typer.echo(f"Noise multiplier: {found.noise_multiplier:.6g} (noise std over clip norm).")
    typer.echo(f"Epsilon: {spent.pld:.4g} by PLD (the claim), {spent.rdp:.4g} by RDP (second opinion).")
    table = Table("steps", "epsilon spent at most")
    for step in sorted({math.ceil(found.steps * part / 8) for part in range(1, 9)}):
        table.add_row(str(step), f"{found.epsilon_after(step):.4g}")
    _console().print(table)


@ledger_app.command()
def grant(
    path: LedgerPath,
    dataset: Annotated[str, typer.Argument(help="The data set.")],
    epsilon: Epsilon,
    delta: Delta,
    unit: Protects = Unit.RECORD.value,
    relation: Neighbours = Relation.ADD_OR_REMOVE_ONE.value,
    by: Annotated[str | None, typer.Option(help="Who grants; your login unless given.")] = None,
    note: Annotated[str, typer.Option(help="Why.")] = "",
) -> None:
    """Set the cap on everything that is ever spent on a data set; the file is made if missing."""
    cap = _budget(epsilon, delta, unit, relation)
    # A refused grant must not leave an empty ledger behind.
    Ledger.in_memory().grant(dataset, cap, by=by, note=note)
    with Ledger(path) as ledger:
        ledger.grant(dataset, cap, by=by, note=note)
    typer.echo(f"Granted {dataset}: {cap}.")


@ledger_app.command()
def show(path: LedgerPath, dataset: OneDataset = None) -> None:
    """Show what is spent and left of each cap."""
    table = Table("data set", "spent", "epsilon spent", "epsilon left", "delta spent", "delta left", "promise")
    with Ledger.existing(path) as ledger:
        for name in [dataset] if dataset is not None else ledger.datasets():
            have = ledger.balance(name)
            table.add_row(
                name, ProgressBar(total=have.cap.epsilon, completed=min(have.spent_epsilon, have.cap.epsilon), width=20),
                f"{have.spent_epsilon:.6g}", f"{have.remaining_epsilon:.6g}",
                f"{have.spent_delta:.3g}", f"{have.remaining_delta:.3g}", str(have.cap),
            )  # fmt: skip
    _console().print(table)


@ledger_app.command()
def history(path: LedgerPath, dataset: OneDataset = None) -> None:
    """List every entry, oldest first."""
    table = Table("no.", "time (UTC)", "what", "data set", "epsilon", "delta", "by", "purpose or note")
    with Ledger.existing(path) as ledger:
        for entry in ledger.history(dataset):
            costs = (f"{entry.epsilon:.6g}", f"{entry.delta:.3g}") if entry.kind in ("grant", "charge") else ("", "")
            table.add_row(
                str(entry.seq),
                entry.at,
                entry.kind,
                entry.dataset,
                *costs,
                entry.by,
                entry.purpose or entry.note,
            )
    _console().print(table)


@ledger_app.command()
def verify(
    path: LedgerPath,
    digest: Annotated[str | None, typer.Option(help="A digest kept elsewhere, which must occur.")] = None,
) -> None:
    """Check every entry of a ledger and print the digest of the last."""
    with Ledger.existing(path) as ledger:
        typer.echo(f"The ledger is whole. Digest: {ledger.verify(digest)}")


@app.command()
def report(folder: Annotated[Path, typer.Argument(help="A folder with a result.json.")]) -> None:
    """Write report.html from result.json."""
    from sfumato.report import read_result, write_report  # noqa: PLC0415

    typer.echo(f"Wrote {write_report(read_result(folder / 'result.json'), folder)}")


@app.command()
def train(
    config: Annotated[Path, typer.Argument(help="A configuration in TOML.")],
    out: Annotated[Path | None, typer.Option(help="The output folder; runs/NAME unless given.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with a stopped run in that folder.")] = False,
) -> None:
    """Train as a configuration says; write model.pt, report.html and, last of all, result.json."""
    from sfumato.config import Experiment  # noqa: PLC0415

    experiment = Experiment(config)
    folder = out or Path("runs") / experiment.name
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
        result = run(ledger, _checkpoint(experiment, folder, resume))
        seconds, score = time.perf_counter() - start, _score(model, test)
        told = _result(experiment, chosen, result, ledger, score, seconds)
        _publish(folder, model, told)
    typer.echo(str(result.privacy))
    if score is not None:
        typer.echo(f"Accuracy on the test part: {score.mean:.1%} (not covered by the budget).")
    typer.echo(f"Wrote {folder / 'report.html'}")


def _budget(epsilon: float, delta: float, unit: str, relation: str) -> Budget:
    # The words are checked by Budget, whose message suggests the right one.
    return Budget(epsilon, delta, unit, relation)  # type: ignore[arg-type]


def _console() -> Console:
    console = Console(markup=False, highlight=False, emoji=False)
    return console if console.is_terminal else Console(markup=False, highlight=False, emoji=False, width=_WIDE)


def _last_line(message: str) -> None:
    typer.echo(f"sfumato: {message}", err=True)


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


def _granted(experiment: Experiment, chosen: sf.Plan, resume: bool) -> Ledger | None:
    """Return the ledger that the configuration names, if it can pay; the charge itself decides in the end."""
    if experiment.ledger_path is None or not chosen.is_private:
        return None
    ledger = Ledger.existing(experiment.ledger_path)
    left = ledger.balance(experiment.dataset)
    spending = chosen.spending
    short = spending.epsilon > left.remaining_epsilon or spending.delta > left.remaining_delta
    if short and not resume:
        ledger.close()
        raise BudgetExhaustedError(
            f'The run costs epsilon {spending.epsilon:.4g} and delta {spending.delta:.3g}, but data set "{left.dataset}" '
            f"has only {left.remaining_epsilon:.4g} and {left.remaining_delta:.3g} left in {experiment.ledger_path}; "
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


def _checkpoint(experiment: Experiment, folder: Path, resume: bool) -> sf.Checkpoint | None:
    from sfumato.learning.checkpoint import Checkpoint  # noqa: PLC0415

    wanted = experiment.config.checkpoint
    return None if wanted is None else Checkpoint(folder / "checkpoint.pt", wanted.every, resume)


def _runner(
    experiment: Experiment, model: nn.Module, records: sf.Records, chosen: sf.Plan
) -> Callable[[Ledger | None, sf.Checkpoint | None], sf.TrainingResult]:
    """Check all that the run needs, and return what runs it."""
    from torch.nn import functional as F  # noqa: PLC0415

    import sfumato as sf  # noqa: PLC0415

    def squared(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return F.mse_loss(outputs.squeeze(-1), targets)

    wanted = experiment.config.training
    make = experiment.optimizer()
    loss = F.cross_entropy if records.classes else squared
    dataset, purpose = experiment.dataset, f"train {experiment.name}"
    if wanted.mode == "central":

        def central(ledger: Ledger | None, checkpoint: sf.Checkpoint | None) -> sf.TrainingResult:
            with _progress(chosen) as on_step:
                return sf.train(
                    model, records, chosen, loss=loss, optimizer=make(model.parameters()), ledger=ledger,
                    dataset=dataset, purpose=purpose, checkpoint=checkpoint, on_step=on_step,
                )  # fmt: skip

        return central
    clients = records.by_owner()
    noises = {
        "server": sf.ServerNoise(), "shared": sf.SharedNoise(tolerate=wanted.tolerate or 0), "local": sf.LocalNoise()
    }  # fmt: skip
    noise = noises[wanted.noise] if wanted.noise else None
    algorithm: sf.FedAvg | sf.FedSGD = sf.FedSGD(optimizer=make)
    if wanted.algorithm == "fedavg":
        algorithm = sf.FedAvg(local=make, local_steps=wanted.local_steps or 1, batch_size=wanted.local_batch_size)

    def federated(ledger: Ledger | None, checkpoint: sf.Checkpoint | None) -> sf.TrainingResult:
        with _progress(chosen) as on_step:
            return sf.federate(
                model, clients, chosen, algorithm=algorithm, engine=sf.Simulation(), loss=loss, noise=noise,
                populations=experiment.config.privacy.populations, ledger=ledger, dataset=dataset, purpose=purpose,
                checkpoint=checkpoint, on_step=on_step,
            )  # fmt: skip

    return federated


@contextlib.contextmanager
def _progress(chosen: sf.Plan) -> Iterator[Callable[[sf.Step], None]]:
    console = Console(stderr=True)
    columns = (TextColumn("training"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}"))
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("", total=chosen.steps)

        def on_step(step: sf.Step) -> None:
            words = "no privacy promised"
            if math.isfinite(step.epsilon):
                words = f"epsilon {step.epsilon:.3g} spent, {step.remaining:.3g} left"
            progress.update(task, completed=step.index, description=words)

        yield on_step


def _score(model: nn.Module, test: sf.Records) -> Score | None:
    import torch  # noqa: PLC0415

    from sfumato.report import Score  # noqa: PLC0415

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
    mean = float(right.mean())
    return Score(mean=mean, sd=0.0, seeds=1, values=(mean,), per_owner=per_owner)


def _result(
    experiment: Experiment, chosen: sf.Plan, result: sf.TrainingResult, ledger: Ledger | None, score: Score | None,
    seconds: float,
) -> Result:  # fmt: skip
    import sfumato as sf  # noqa: PLC0415
    from sfumato import report as reports  # noqa: PLC0415
    from sfumato.privacy import events  # noqa: PLC0415

    wanted, said = experiment.config, result.privacy
    privacy, curves, extract = None, None, None
    if chosen.is_private:
        privacy = reports.Privacy(
            epsilon=said.epsilon, delta=said.delta, unit=said.unit, relation=said.relation,
            noise_multiplier=chosen.noise_multiplier, clip_norm=chosen.clip, steps=chosen.steps,
            sampling=reports.Sampling(kind=chosen.sampler.kind, rate=chosen.sampler.rate),
            accountants=reports.Accountants(pld=said.spending.pld, rdp=said.spending.rdp),
            event=events.to_dict(said.event),
            not_covered=(*said.not_covered, *([_UNCOVERED_ACCURACY] if score else [])),
        )  # fmt: skip
        points = sorted({math.ceil(chosen.steps * part / 16) for part in range(1, 17)})
        curve = tuple((step, chosen.epsilon_after(step)) for step in points)
        curves = reports.Curves(epsilon_over_steps={experiment.name: curve})
    if ledger is not None and ledger.path is not None:
        kept = reports.LedgerEntry.model_fields
        extract = reports.LedgerExtract(
            path=ledger.path.name,
            digest=ledger.digest,
            entries=tuple(
                reports.LedgerEntry(**{key: getattr(entry, key) for key in kept})
                for entry in ledger.history(experiment.dataset)
            ),
        )
    owners: dict[str, int | None] = dict(wanted.privacy.populations or {})
    owners |= {name: None for name in (score.per_owner if score else ()) if name not in owners}
    modes: dict[str, Mode] = {"central": "central", "federated": "federated"}
    if privacy is not None:
        modes = {"central": "central-private", "federated": "federated-private"}
    run = reports.Run(
        name=experiment.name,
        mode=modes[wanted.training.mode],
        seconds=seconds,
        metrics=reports.Metrics(accuracy=score),
        privacy=privacy,
    )
    return reports.Result(
        runs=(run,), title=f"Training {experiment.name}", created=datetime.now(UTC).isoformat(timespec="seconds"),
        version=sf.__version__, dataset=reports.DatasetInfo(name=experiment.dataset, owners=owners),
        ledger=extract, curves=curves,
    )  # fmt: skip


def _publish(folder: Path, model: nn.Module, result: Result) -> None:
    """Write the three files, `result.json` last: where it stands, the run is finished."""
    import torch  # noqa: PLC0415

    from sfumato.report import write_report, write_result  # noqa: PLC0415

    content = io.BytesIO()
    torch.save(model.state_dict(), content)
    temporary = folder / f".model.pt.{uuid.uuid4().hex}"
    try:
        with temporary.open("xb") as file:
            file.write(content.getvalue())
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(folder / "model.pt")
    except OSError as error:
        raise InputError(f"{folder / 'model.pt'} cannot be written ({error.strerror}); make room.") from None
    finally:
        temporary.unlink(missing_ok=True)
    write_report(result, folder)
    write_result(result, folder / "result.json")
