"""The `sfumato` command: plan, train, keep the ledger, report. What takes long to import is imported when needed."""

from __future__ import annotations

import contextlib
import csv
import dataclasses
import io
import json
import math
import os
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, NoReturn, cast

import typer
from rich.console import Console
from rich.progress_bar import ProgressBar
from rich.table import Table
from typer.core import TyperGroup

from sfumato._numbers import bound, floor
from sfumato._version import __version__
from sfumato.errors import InputError, SfumatoError
from sfumato.privacy.accounts import Balance
from sfumato.privacy.books import Entry
from sfumato.privacy.budget import Budget, Relation, Unit
from sfumato.privacy.ledger import Ledger

_FAILED, _INTERRUPTED = 2, 130
_STOPPED = "stopped by Ctrl-C; no result was written."
_WIDE = 160  # columns of a table that is not read on a terminal
# By this road, because Typer uses click's class or, in later versions, its own copy of it.
_UsageError = cast("type[Exception]", typer.BadParameter.__base__)


class _Commands(TyperGroup):
    """Turns every refusal into one line on stderr and an exit code."""

    def main(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Parse the arguments, run the command and end the process."""
        try:
            code = super().main(*args, **(kwargs | {"standalone_mode": False}))
        except _UsageError as error:
            _tell_usage(error)
            code = _FAILED
        except (KeyboardInterrupt, typer.Abort):
            _last_line(_STOPPED)
            code = _INTERRUPTED
        sys.exit(code if isinstance(code, int) else 0)

    def invoke(self, ctx: Any) -> Any:
        """Run the command that was asked for."""
        try:
            return super().invoke(ctx)
        except SfumatoError as error:
            _last_line(" ".join(str(error).split()))
            raise typer.Exit(_FAILED) from None
        except KeyboardInterrupt:
            _last_line(_STOPPED)
            raise typer.Exit(_INTERRUPTED) from None


def _tell_usage(error: Any) -> None:
    if type(error).__name__ == "NoArgsIsHelpError":
        if error.format_message().strip():  # else the help is printed already
            error.show()
        return
    path = error.ctx.command_path if error.ctx else "sfumato"
    _last_line(f"{' '.join(error.format_message().split())} (see {path} --help)")


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"sfumato {__version__}")
        raise typer.Exit


@contextlib.contextmanager
def _loading() -> Iterator[None]:
    """Let Ctrl-C end the process at once while large libraries are imported.

    Some of them swallow an exception that is raised in their midst, or report another in its place.
    """

    def stop(*_: object) -> NoReturn:
        os.write(2, f"sfumato: {_STOPPED}\n".encode())
        os._exit(_INTERRUPTED)

    if signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield  # somebody else decides what Ctrl-C means
        return
    signal.signal(signal.SIGINT, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)


app = typer.Typer(
    name="sfumato", cls=_Commands, no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False,
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
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def main() -> None:
    """Run the command line; exit code 2 for a refusal, 130 for Ctrl-C."""
    app(prog_name="sfumato")


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=_show_version, is_eager=True)
    ] = False,
) -> None:
    """What comes before the command."""


@app.command()
def demo(
    seeds: Annotated[int, typer.Option(min=1, help="Runs to average over.")] = 10,
    out: Annotated[Path, typer.Option(help="The folder for the result and the report.")] = Path("runs/demo"),
) -> None:
    """Train on four hospitals' records, alone, pooled and federated, with and without privacy."""
    with _loading():
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
    sampling: Annotated[
        str, typer.Option(help="poisson, truncated-poisson, random-allocation, shuffled, full-batch or min-separation.")
    ] = "poisson",
    max_batch: Annotated[int | None, typer.Option(help="The largest batch of truncated-poisson.")] = None,
    separation: Annotated[
        int | None,
        typer.Option(help="Of min-separation: the fewest steps from one time that a unit takes part to its next."),
    ] = None,
    participations: Annotated[
        int | None, typer.Option(help="Of min-separation: how often a unit takes part at most.")
    ] = None,
    unit: Protects = Unit.RECORD.value,
    relation: Neighbours = Relation.ADD_OR_REMOVE_ONE.value,
    as_json: AsJson = False,
) -> None:
    """Find the least noise that keeps a budget."""
    budget = _budget(epsilon, delta, unit, relation)
    if not budget.is_private:
        raise InputError("An infinite epsilon needs no noise, so there is nothing to plan; choose a finite one.")
    with _loading():
        from sfumato.learning.plan import Plan  # noqa: PLC0415

    start = time.perf_counter()
    found = Plan.calibrate(
        budget,
        population=population,
        batch_size=batch_size,
        steps=steps,
        epochs=epochs,
        sampling=sampling,
        max_batch=max_batch,
        separation=separation,
        participations=participations,
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
    typer.echo(f"Noise multiplier: {bound(found.noise_multiplier)} (noise std over clip norm).")
    typer.echo(f"Epsilon: {bound(spent.pld)} by PLD (the claim), {bound(spent.rdp)} by RDP (second opinion).")
    table = Table("steps", "epsilon spent at most")
    for step in sorted({math.ceil(found.steps * part / 8) for part in range(1, 9)}):
        table.add_row(str(step), bound(found.epsilon_after(step)))
    _console().print(table)


@ledger_app.command()
def grant(
    path: LedgerPath,
    dataset: Annotated[str, typer.Argument(help="The data set.")],
    epsilon: Epsilon,
    delta: Delta,
    unit: Protects = Unit.RECORD.value,
    relation: Neighbours = Relation.ADD_OR_REMOVE_ONE.value,
    composition: Annotated[
        str | None, typer.Option(help="How runs add up, set by the first grant: basic (the default) or renyi.")
    ] = None,
    order: Annotated[int | None, typer.Option(help="The Renyi order; a good one unless given.")] = None,
    user: Annotated[str | None, typer.Option(help="Cap only what this user charges.")] = None,
    by: Annotated[str | None, typer.Option(help="Who grants; your login unless given.")] = None,
    note: Annotated[str, typer.Option(help="Why.")] = "",
) -> None:
    """Set the cap on everything that is ever spent on a data set; the file is made if missing."""
    cap = _budget(epsilon, delta, unit, relation)
    if user is None and not path.exists():
        # A refused grant must not leave an empty ledger behind.
        Ledger.in_memory().grant(dataset, cap, composition=composition, order=order, by=by, note=note)
    with Ledger(path) if user is None else Ledger.existing(path) as ledger:
        known = ledger.has_grant(dataset) if user is None else user in ledger.users(dataset)
        before = ledger.balance(dataset, user).cap if known else None
        ledger.grant(dataset, cap, composition=composition, order=order, user=user, by=by, note=note)
        how = _how(ledger.balance(dataset))
    whose = dataset if user is None else f"{user} on {dataset}"
    typer.echo(f"Set the cap of {whose} to {cap}{how}{f' (it was {before})' if before else ''}.")


@ledger_app.command()
def show(path: LedgerPath, dataset: OneDataset = None, as_json: AsJson = False) -> None:
    """Show what is spent and left of each cap, by purpose and by user."""
    columns = ("data set", "spent", "epsilon spent", "epsilon left", "delta spent", "delta left")
    table = Table(*columns, "composition", "promise")
    accounts = []
    with Ledger.existing(path) as ledger:
        for name in [dataset] if dataset is not None else ledger.datasets():
            have, purposes = ledger.balance(name), ledger.by_purpose(name)
            users = [ledger.balance(name, user) for user in ledger.users(name)]
            accounts.append(_plain(have) | {"purposes": list(map(_plain, purposes)), "users": list(map(_plain, users))})
            how = f"renyi, order {have.order}" if have.order else str(have.composition)
            table.add_row(name, *_told(have), how, str(have.cap))
            for spent in purposes:
                runs = f"{spent.runs} run{'s' if spent.runs != 1 else ''}"
                amount = f"divergence {bound(spent.amount)}" if have.order else bound(spent.amount)
                table.add_row(f"  {spent.purpose}", _bar(spent.share), amount, "", "", "", "", runs)
            for share in users:
                table.add_row(
                    f"  user {share.user}", *_told(share), "", f"({share.cap.epsilon:g}, {share.cap.delta:g})"
                )
    if as_json:
        typer.echo(json.dumps(accounts))
        return
    _console().print(table)


@ledger_app.command()
def history(path: LedgerPath, dataset: OneDataset = None, as_json: AsJson = False) -> None:
    """List every entry, oldest first."""
    with Ledger.existing(path) as ledger:
        entries = ledger.history(dataset)
    if as_json:
        typer.echo(json.dumps([_plain(entry) for entry in entries]))
        return
    renyi = any(entry.renyi_order for entry in entries)
    divergence = ["divergence"] if renyi else []
    table = Table("no.", "time (UTC)", "what", "data set", "epsilon", "delta", *divergence, "by", "purpose or note")
    for entry in entries:
        costs = ["", "", *([""] if renyi else [])]
        if entry.kind in ("grant", "charge"):
            told = floor if entry.kind == "grant" else bound
            costs[:2] = [told(entry.epsilon), told(entry.delta)]
        if entry.renyi_order and entry.kind in ("charge", "settle"):
            costs[2] = bound(entry.rdp)
        table.add_row(
            str(entry.seq),
            entry.at[: len("2026-01-31T12:00:00")].replace("T", " "),
            f"{entry.kind} to {entry.user}" if entry.user else entry.kind,
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
    as_json: AsJson = False,
) -> None:
    """Check every entry of a ledger and print the digest of the last."""
    with Ledger.existing(path) as ledger:
        found = ledger.verify(digest)
    typer.echo(json.dumps({"whole": True, "digest": found}) if as_json else f"The ledger is whole. Digest: {found}")


@ledger_app.command()
def export(
    path: LedgerPath,
    dataset: OneDataset = None,
    form: Annotated[str, typer.Option("--format", help="jsonl (one JSON object a line) or csv.")] = "jsonl",
    out: Annotated[Path | None, typer.Option(help="A new file; printed unless given.")] = None,
) -> None:
    """Write every entry with all its fields and digests, for other programs."""
    if form not in ("jsonl", "csv"):
        raise InputError(f"format {form!r} is unknown; choose jsonl or csv.")
    with Ledger.existing(path) as ledger:
        rows = [_plain(entry) for entry in ledger.history(dataset)]
    if form == "jsonl":
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    else:
        page = io.StringIO()
        writer = csv.DictWriter(page, [field.name for field in dataclasses.fields(Entry)], lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        text = page.getvalue()
    if out is None:
        typer.echo(text, nl=False)
        return
    try:
        with out.open("x", encoding="utf-8", newline="") as file:
            file.write(text)
    except FileExistsError:
        raise InputError(f"{out} is there already; name a new file with --out.") from None
    except OSError as error:
        raise InputError(f"{out} cannot be written ({error.strerror}); name another file with --out.") from error
    typer.echo(f"Wrote {len(rows)} entries to {out}.")


@app.command()
def report(folder: Annotated[Path, typer.Argument(help="A folder with a result.json.")]) -> None:
    """Write report.html from result.json."""
    with _loading():
        from sfumato.report import read_result, write_report  # noqa: PLC0415

    typer.echo(f"Wrote {write_report(read_result(folder / 'result.json'), folder)}")


@app.command()
def train(
    config: Annotated[Path, typer.Argument(help="A configuration in TOML.")],
    out: Annotated[Path | None, typer.Option(help="The output folder; runs/NAME unless given.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with a stopped run in that folder.")] = False,
    owner_report: Annotated[
        bool,
        typer.Option("--owner-report", help="Show in the report, beyond any budget, what each client holds and did."),
    ] = False,
    personal_models: Annotated[
        bool,
        typer.Option(
            "--personal-models",
            help="Write each client's own model (ditto, fedper), which no budget covers, to personal/.",
        ),
    ] = False,
) -> None:
    """Train as a configuration says; write model.pt, report.html and, last of all, result.json."""
    with _loading():
        from sfumato.config import Experiment  # noqa: PLC0415
        from sfumato.runs import run_experiment  # noqa: PLC0415

    experiment = Experiment(config)
    folder = out or Path("runs") / experiment.name
    try:
        finished = run_experiment(
            experiment, folder, resume=resume, owner_report=owner_report, personal_models=personal_models
        )
    except KeyboardInterrupt:
        if not _can_go_on(folder):
            raise
        _last_line(f"{_STOPPED[:-1]}; go on with --resume.")
        raise typer.Exit(_INTERRUPTED) from None
    typer.echo(str(finished.privacy))
    if finished.lost:
        typer.echo(
            f"Steps paid for and lost in a crash: {finished.lost}. They count as spent; the model did without them."
        )
    if finished.void:
        typer.echo(f"Rounds in which too few clients answered: {finished.void}. They are spent and released nothing.")
    if finished.stopped:
        typer.echo(f"Stopped early: {finished.stopped}.")
    if finished.score is not None:
        typer.echo(f"Accuracy on the test part: {finished.score.mean:.1%} (not covered by the budget).")
    if finished.personal is not None:
        typer.echo(
            f"Wrote {finished.personal}: each client's own model, for that client alone. No budget covers what they tell."
        )
    typer.echo(f"Wrote {folder / 'report.html'}")


def _can_go_on(folder: Path) -> bool:
    return (folder / "checkpoint.pt").is_file() and not (folder / "result.json").exists()


def _budget(epsilon: float, delta: float, unit: str, relation: str) -> Budget:
    # The words are checked by Budget, whose message suggests the right one.
    return Budget(epsilon, delta, unit, relation)  # type: ignore[arg-type]


def _how(have: Balance) -> str:
    return f", Renyi composition at order {have.order}" if have.order else ""


def _told(have: Balance) -> tuple[ProgressBar, str, str, str, str]:
    # Under Renyi composition the bar shows the divergences, which add up; epsilon does not.
    whole, spent = have.cap.epsilon, have.spent_epsilon
    if have.spent_rdp is not None and have.remaining_rdp is not None:
        whole, spent = have.spent_rdp + have.remaining_rdp, have.spent_rdp
    costs = (have.spent_epsilon, have.remaining_epsilon, have.spent_delta, have.remaining_delta)
    return _bar(spent / whole), bound(costs[0]), floor(costs[1]), bound(costs[2]), floor(costs[3])


def _bar(share: float) -> ProgressBar:
    return ProgressBar(total=1.0, completed=min(share, 1.0), width=20)


def _plain(value: Any) -> dict[str, Any]:
    return dataclasses.asdict(value)


def _console() -> Console:
    console = Console(markup=False, highlight=False, emoji=False)
    if console.is_terminal or os.environ.get("COLUMNS", "").isdigit():
        return console
    return Console(markup=False, highlight=False, emoji=False, width=_WIDE)


def _last_line(message: str) -> None:
    typer.echo(f"sfumato: {message}", err=True)


if __name__ == "__main__":
    main()
