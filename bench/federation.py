"""Time and memory of a federated round: sfumato, pfl, Flower's simulation and a plain loop, in turns, in one run.

Every engine trains the same model on the same clients (FedAvg, one local epoch, batches of 10, SGD) in processes of its
own, in the environment of its library, on two cores; only one engine computes at a time. A turn is one untimed round and a
few timed ones; what is told is the median. An engine whose first round does not lower the loss on pooled records as the
plain loop's does has not done the work, and is told as failed.

`first_round_s` runs from the library's import to the end of the first round, so it holds what an engine sets up; what of it
passed before the first round, reading the records for one, is `start_s`.
`peak_mb` is taken in rounds of its own: the most memory that all of an engine's processes hold together, without what is
mapped from files (libraries and the records), which they share.

Two parts for sfumato alone: `--population`, rounds of 1,000 clients from 10,000 and from 1,000,000; `--memory`, the
memory that is held over 1,000 rounds: looked at after each round, once Python's garbage is collected. Its growth is that of
the median of the last 100 rounds over the median of rounds 51 to 150, beside the least-squares slope from round 51 on.

Rows are written after every turn. A file keeps its rows of other tasks and engines, and the last good row of an engine that
fails; the file beside it, `-machine.json`, says for each row where and with what it was taken.

Usage: python bench/federation.py [--tasks logistic mlp] [--engines plain sfumato] [--turns 5] [--quick] [--out FILE]
       python bench/federation.py --population | --memory [--quick] [--out FILE]
The task mnist-writers needs SFUMATO_DATA, the folder that holds mnist and qmnist_writers.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

from federation_models import ALL, MEMORY, POPULATIONS, SIZES, TASKS
from federation_worker import ENGINES, THREADS

from gradients import StepError, Worker, set_up
from sfumato._files import replace_file
from sfumato.report.describe import describe_machine

HERE = Path(__file__).parent
OURS = ("plain", "sfumato")
WARM_UP = 2
SECONDS = 2.0  # of a turn
SAMPLE_EVERY = 0.02  # seconds between two looks at the memory
MEMORY_ROUNDS, QUICK_ROUNDS = 1000, 250
SETTLED, COMPARED, TOLD_EVERY = 50, 100, 50  # rounds that settle, rounds of a median that is compared, and of one told

Row = dict[str, Any]


class Engine(Worker):
    """One engine's processes on one task. They compute nothing until they are asked for rounds."""

    def __init__(self, name: str, task: str, folder: Path) -> None:
        python, processes = str(python_of(name)), processes_of(name)
        launch = (
            [] if processes == 1 else ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
        )
        environment = {
            **os.environ, "PYTHONWARNINGS": "ignore", "RAY_USAGE_STATS_ENABLED": "0", "FLWR_TELEMETRY_ENABLED": "0",
        }  # fmt: skip
        if name != "flower":  # Ray gives each of its actors as many threads as cores
            environment["OMP_NUM_THREADS"] = str(THREADS // processes)
        self._said = tempfile.TemporaryFile("w+")  # noqa: SIM115 - lives as long as the engine
        self._process = subprocess.Popen(
            [python, *launch, str(HERE / "federation_worker.py"), name, task, str(folder)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._said, text=True, env=environment,
        )  # fmt: skip
        self.times: list[float] = []
        self.turns = 0
        self.usual = math.inf
        self.peak: float | None = None
        try:
            begun = self._answer()
            self.versions = begun["versions"]
            self.loss_at_start = self.loss()
            self.start = begun["start_s"]
            self.first = self.start + self.take(1)[0]
            self.loss_after_one = self.loss()
        except StepError:
            self.close()
            raise

    def take(self, steps: int) -> list[float]:
        """Return the seconds of each of `steps` rounds."""
        seconds: list[float] = self._ask(str(steps))["s"]
        return seconds

    def loss(self) -> float:
        """Return the global model's loss on pooled records."""
        loss: float = self._ask("loss")["loss"]
        return loss

    def collect(self) -> None:
        """Have the engine's garbage collected."""
        self._ask("collect")

    def turn(self) -> None:
        """Take the rounds of one turn."""
        # The first round of a turn finds the caches full of another process's data.
        self.times += self.take(1 + max(2, min(10, int(SECONDS / self.usual))))[1:]
        self.turns += 1

    def watch(self) -> None:
        """Take rounds, and keep the most memory that the processes hold meanwhile."""
        over = threading.Event()
        seen: list[float] = []

        def look() -> None:
            while not over.is_set():
                with contextlib.suppress(OSError):
                    seen.append(self.megabytes())
                over.wait(SAMPLE_EVERY)

        looking = threading.Thread(target=look)
        looking.start()
        try:
            self.take(max(2, min(50, int(SECONDS / self.usual))))
        finally:
            over.set()
            looking.join()
        self.peak = max(seen, default=None)

    def megabytes(self) -> float:
        """Return the memory that all processes hold together, without what is mapped from files."""
        return sum(map(_held, _tree(self._process.pid))) / 2**20

    def _ask(self, request: str) -> dict[str, Any]:
        assert self._process.stdin is not None
        self._signal(signal.SIGCONT)
        try:
            with contextlib.suppress(BrokenPipeError):  # the missing answer tells why
                print(request, file=self._process.stdin, flush=True)
            return self._answer()
        finally:
            # What waits must not compute: Ray's processes watch one another, and that takes some of a core.
            self._signal(signal.SIGSTOP)

    def close(self) -> None:
        """End the processes."""
        self._signal(signal.SIGCONT)
        super().close()

    def _signal(self, which: signal.Signals) -> None:
        for process in _tree(self._process.pid):
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, which)


Key = tuple[str, str]  # task and engine
Tell = Callable[[list[Row], Mapping[Key, Engine]], None]


def _tree(process: int) -> Iterator[int]:
    """Yield a process and all that it started; one that ends meanwhile is left out."""
    yield process
    for children in Path(f"/proc/{process}/task").glob("*/children"):
        with contextlib.suppress(OSError):
            for child in children.read_text().split():
                yield from _tree(int(child))


def _held(process: int) -> int:
    """Return the bytes that a process holds, its share of what it shares; files are not counted."""
    try:
        lines = Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()
    except (FileNotFoundError, ProcessLookupError):
        return 0
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith(("Pss_Anon:", "Pss_Shmem:")))


def processes_of(engine: str) -> int:
    """Return how many processes of the engine are started; Flower starts its own."""
    return int(engine.partition("-")[2] or 1)


def environment_of(engine: str) -> Path | None:
    """Return the folder of the engine's own environment, or None for those that run in this one."""
    return None if engine in OURS else HERE / ".envs" / engine.partition("-")[0]


def python_of(engine: str) -> Path:
    folder = environment_of(engine)
    return Path(sys.executable) if folder is None else folder / "bin" / "python"


def started(
    names: Iterable[str], task: str, folder: Path, errors: dict[str, str], stack: ExitStack
) -> dict[str, Engine]:
    """Return the engines that took their first rounds; `errors` gets why the others could not."""
    engines: dict[str, Engine] = {}
    for name in names:
        if name in errors:
            continue
        try:
            engine = Engine(name, task, folder)
            stack.callback(engine.close)
            engine.usual = min(engine.take(WARM_UP))
            engines[name] = engine
        except StepError as error:
            errors[name] = str(error)
    return engines


def in_turns(engines: dict[str, Engine], turns: int, errors: dict[str, str], told: Callable[[], None]) -> None:
    """Time the engines in turns, then look at their memory; one that fails is taken out. Calls `told` after each."""
    for what in (*[Engine.turn] * turns, Engine.watch):
        for name, engine in list(engines.items()):
            try:
                what(engine)
            except StepError as error:
                errors[name] = str(error)
                del engines[name]
        told()


def compare(task: str, names: list[str], turns: int, broken: dict[str, str], tell: Tell) -> list[Row]:
    """Return a row for each engine on one task; `tell` gets those that there are after each turn."""
    errors = dict(broken)
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        try:
            ALL[task].write(Path(folder))
        except OSError as error:
            return [{"task": task, "engine": name, "error": str(error)} for name in names]
        engines = started(names, task, Path(folder), errors, stack)
        plain = engines.get("plain")
        for name, engine in list(engines.items()):
            if why := idle(engine, plain, ALL[task].tolerance):
                errors[name] = why
                del engines[name]

        def rows() -> list[Row]:
            return [_row(task, name, engines.get(name), errors.get(name)) for name in names]

        in_turns(engines, turns, errors, lambda: tell(rows(), {(task, name): one for name, one in engines.items()}))
        return rows()


def idle(engine: Engine, plain: Engine | None, tolerance: float) -> str | None:
    """Return what shows that an engine has not done the plain loop's work, if anything does."""
    fell = engine.loss_at_start - engine.loss_after_one
    if not fell > 0:
        return f"the loss went from {engine.loss_at_start:.4f} to {engine.loss_after_one:.4f} in the first round"
    if plain is None:
        return None
    wanted = plain.loss_at_start - plain.loss_after_one
    if not abs(fell / wanted - 1) <= tolerance:
        return f"the loss fell by {fell:.5f} in the first round, the plain loop's by {wanted:.5f}"
    return None


def _row(task: str, name: str, engine: Engine | None, error: str | None) -> Row:
    row: Row = {"task": task, "engine": name}
    if engine is not None:
        row |= {
            "round_s": round(statistics.median(engine.times), 5),
            "peak_mb": None if engine.peak is None else round(engine.peak, 1),
            "first_round_s": round(engine.first, 3),
            "start_s": round(engine.start, 3),
            "rounds": len(engine.times),
            "fastest_s": round(min(engine.times), 5),
            "loss": [round(engine.loss_at_start, 5), round(engine.loss_after_one, 5)],
        }
    return row if error is None else {**row, "error": error}


def table(rows: list[Row]) -> str:
    """Return the rows of one task as text: seconds, memory, and how many of ours go into one of theirs."""
    ours = next((row for row in rows if row["engine"] == "sfumato" and "error" not in row), None)
    lines = []
    for row in rows:
        head = f"{row['task']:18} {row['engine']:8}"
        if "error" in row:
            lines.append(f"{head} failed: {row['error']}")
            continue
        ratio = f"{row['round_s'] / ours['round_s']:10.2f}" if ours else f"{'':10}"
        peak = f"{row['peak_mb']:9.1f}" if row["peak_mb"] is not None else f"{'':9}"
        lines.append(f"{head} {row['round_s']:9.4f} {row['fastest_s']:9.4f} {row['first_round_s']:9.2f} {peak} {ratio}")
    return "\n".join(lines)


HEAD = f"{'task':18} {'engine':8} {'round s':>9} {'fastest':>9} {'first s':>9} {'peak MB':>9} {'/ sfumato':>10}"


def compare_engines(asked: argparse.Namespace) -> None:
    # Both peers want other versions than ours (of dp-accounting, packaging, rich), so their files pin what matters.
    failed = {folder: set_up(folder, None) for name in asked.engines if (folder := environment_of(name)) is not None}
    broken = {name: why for name in asked.engines if (why := failed.get(environment_of(name)))}
    print(HEAD)
    for task in asked.tasks:
        print(table(compare(task, asked.engines, asked.turns, broken, partial(write, asked))), flush=True)


def compare_populations(asked: argparse.Namespace) -> None:
    """Time rounds of the same cohort from a small and a large population, in turns."""
    print(HEAD)
    for model in sorted({name.rpartition("-")[0] for name in POPULATIONS}):
        rows = compare_sizes(model, asked.turns, partial(write, asked))
        print(table(rows), flush=True)
        if ratio := rows[-1].get("ratio_to_smaller"):
            print(f"  {SIZES[1]:,} clients / {SIZES[0]:,} clients: {ratio:.3f}")


def compare_sizes(model: str, turns: int, tell: Tell) -> list[Row]:
    """Return a row for each population of one model; `tell` gets those that there are after each turn."""
    tasks = [f"{model}-{size}" for size in SIZES]
    errors: dict[str, str] = {}
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        ALL[tasks[0]].write(Path(folder))
        engines = {task: alone(task, Path(folder), stack) for task in tasks}

        def rows() -> list[Row]:
            found = [_row(task, "sfumato", engines.get(task), errors.get(task)) for task in tasks]
            if not errors:
                small, large = (row["round_s"] for row in found)
                found[1]["ratio_to_smaller"] = round(large / small, 4)
            return found

        def told() -> None:
            tell(rows(), {(task, "sfumato"): one for task, one in engines.items()})

        in_turns(engines, turns, errors, told)
        return rows()


def alone(task: str, folder: Path, stack: ExitStack) -> Engine:
    """Return sfumato's processes on one task."""
    errors: dict[str, str] = {}
    found = started(["sfumato"], task, folder, errors, stack)
    if errors:
        raise SystemExit(f"federation: {task}: {errors['sfumato']}")
    return found["sfumato"]


def watch_memory(asked: argparse.Namespace) -> None:
    """Look at the memory that is held after each of many rounds."""
    rounds = QUICK_ROUNDS if asked.quick else MEMORY_ROUNDS
    print("Memory that is held after a round, once garbage is collected, without what is mapped from files, in MB:")
    print(
        f"the median of rounds {SETTLED + 1} to {SETTLED + COMPARED}, that of the last {COMPARED}, its growth over the "
        f"first, and the least-squares slope from round {SETTLED + 1} on."
    )
    print(f"{'task':18} {'rounds':>7} {'MB first':>9} {'MB last':>9} {'growth %':>9} {'MB / 1,000 rounds':>18}")
    for task in MEMORY:
        with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
            ALL[task].write(Path(folder))
            engine = alone(task, Path(folder), stack)
            held: list[float] = []
            for _ in range(rounds):
                engine.take(1)
                engine.collect()
                held.append(engine.megabytes())
        row = {"task": task, "engine": "sfumato", **trend(held)}
        print(
            f"{task:18} {rounds:7} {row['settled_mb']:9.1f} {row['last_mb']:9.1f} {row['growth_percent']:9.2f} "
            f"{row['slope_mb_per_1000_rounds']:18.2f}",
            flush=True,
        )
        write(asked, [row], {(task, "sfumato"): engine})


def trend(held: Sequence[float]) -> Row:
    """Return whether memory grows, from what was held after each round.

    Args:
        held: Megabytes, more than `SETTLED + COMPARED` of them.
    """
    settled = statistics.median(held[SETTLED : SETTLED + COMPARED])
    last = statistics.median(held[-COMPARED:])
    later = held[SETTLED:]
    slope = statistics.linear_regression(range(len(later)), later).slope
    return {
        "rounds": len(held),
        "settled_mb": round(settled, 2),
        "last_mb": round(last, 2),
        "growth_percent": round(100 * (last / settled - 1), 3),
        "slope_mb_per_1000_rounds": round(1000 * slope, 3),
        "most_mb": round(max(held), 2),
        "every": TOLD_EVERY,
        "held_mb": [
            round(statistics.median(held[start : start + TOLD_EVERY]), 2) for start in range(0, len(held), TOLD_EVERY)
        ],
    }


def write(asked: argparse.Namespace, rows: list[Row], engines: Mapping[Key, Engine]) -> None:
    """Write rows in place of those of the same task and engine, and beside them the machine of each."""
    if asked.out is None:
        return
    asked.out.parent.mkdir(parents=True, exist_ok=True)
    where = {"machine": describe_machine(), "threads": THREADS}
    about: list[Row] = []
    for row in rows:
        engine = engines.get((row["task"], row["engine"]))
        known = {} if engine is None else {"turns": engine.turns, "libraries": engine.versions}
        failed = {"error": row["error"]} if "error" in row else {}  # takes no place of a measured row's machine either
        about.append({"task": row["task"], "engine": row["engine"], **where, **known, **failed})
    for path, new in ((asked.out, rows), (machine_file(asked.out), about)):
        text = json.dumps(merged(kept_rows(path), new), indent=2) + "\n"
        replace_file(path, lambda file, text=text: file.write(text.encode()))


def merged(old: list[Row], new: list[Row]) -> list[Row]:
    """Return the new rows in the places of the old ones of the same task and engine, and the others after them.

    A row that tells of a failure takes no measured row's place.
    """
    fresh = {(row["task"], row["engine"]): row for row in new}
    there = []
    for row in old:
        now = fresh.pop((row["task"], row["engine"]), row)
        there.append(row if "error" in now and "error" not in row else now)
    return [*there, *fresh.values()]


def machine_file(out: Path) -> Path:
    return out.with_name(f"{out.stem}-machine.json")


def kept_rows(path: Path) -> list[Row]:
    """Return the rows that a file holds; none if there is no file.

    Raises:
        SystemExit: it holds something else, which is not written over.
    """
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return []
    except (OSError, ValueError) as error:
        raise SystemExit(f"federation: {path} cannot be read ({error}); move it, or name another with --out.") from None
    if not isinstance(rows, list) or not all(
        isinstance(row, dict) and {"task", "engine"} <= row.keys() for row in rows
    ):
        raise SystemExit(f"federation: {path} holds no rows of this bench; move it, or name another with --out.")
    return rows


def parsed(words: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--engines", nargs="+", choices=ENGINES, default=list(ENGINES))
    parser.add_argument("--turns", type=int)
    parser.add_argument("--quick", action="store_true", help="one turn; writes nothing unless --out says where")
    part = parser.add_mutually_exclusive_group()
    part.add_argument("--population", action="store_true", help="only sfumato: a small and a large population")
    part.add_argument("--memory", action="store_true", help="only sfumato: memory over many rounds")
    parser.add_argument("--out", type=Path)
    asked = parser.parse_args(words)
    if asked.turns is None:
        asked.turns = 1 if asked.quick else 5
    if asked.turns < 1:
        raise SystemExit("--turns must be at least 1.")
    if asked.out is None and not asked.quick:
        part_name = "-population" if asked.population else "-memory" if asked.memory else ""
        asked.out = HERE / "results" / f"federation{part_name}.json"
    return asked


def main() -> None:
    asked = parsed()
    if asked.out is not None:  # refused now, and not when the first row is there
        for path in (asked.out, machine_file(asked.out)):
            kept_rows(path)
    print(f"{describe_machine()}; {THREADS} cores are used")
    if asked.population:
        compare_populations(asked)
    elif asked.memory:
        watch_memory(asked)
    else:
        compare_engines(asked)


if __name__ == "__main__":
    main()
