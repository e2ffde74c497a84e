"""Time and memory of one whole optimiser step, private against plain: sfumato and its peers, in turns, in one run.

Every mode trains the same model on the same batch in a process of its own, in the environment of its library, with two
threads; only one process computes at a time. A turn is one untimed step and a few timed ones; what is told is the median.
Peers' environments are made under bench/.envs from bench/requirements-*.txt where they are missing.

Usage: python bench/gradients.py [--models mlp lstm] [--modes plain sfumato] [--rounds 4] [--device cuda]
                                 [--out bench/results/gradients.json]
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from gradient_models import WORKLOADS
from gradient_worker import MODES, STEPS, THREADS

from sfumato.report.describe import describe_machine

HERE = Path(__file__).parent
WARM_UP = 3
TIMED = 5
OURS = ("plain", "plain-noised", "sfumato")


class StepError(Exception):
    """A mode that cannot be set up, or cannot train a model. The text is one line."""


class Worker:
    """One mode's process on one model. It waits, and computes nothing, until it is asked for steps."""

    def __init__(self, mode: str, model: str, device: str) -> None:
        self._said = tempfile.TemporaryFile("w+")  # noqa: SIM115 - lives as long as the worker
        self._process = subprocess.Popen(
            [str(python_of(mode)), str(HERE / "gradient_worker.py"), mode, model, device],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._said, text=True,
            env={**os.environ, "OMP_NUM_THREADS": str(THREADS), "PYTHONWARNINGS": "ignore"},
        )  # fmt: skip
        self.times: list[float] = []
        self.peak = 0.0
        try:
            self.versions: dict[str, str] = self._answer()["versions"]
        except StepError:
            self.close()
            raise

    def take(self, steps: int) -> list[float]:
        """Return the milliseconds of each of `steps` steps."""
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # the missing answer tells why
            print(steps, file=self._process.stdin, flush=True)
        answer = self._answer()
        self.peak = answer["peak_mb"]
        return answer["ms"]

    def close(self) -> None:
        self._process.communicate()
        self._said.close()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            code = self._process.wait()
            self._said.seek(0)
            last = (self._said.read().strip().splitlines() or ["it said nothing"])[-1]
            raise StepError(f"the process ended with code {code}: {last}")
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise StepError(answer["error"])
        return answer


def environment_of(mode: str) -> Path | None:
    """Return the folder of the mode's own environment, or None for those that run in this one."""
    return None if mode in OURS else HERE / ".envs" / mode.split("-", maxsplit=1)[0]


def python_of(mode: str) -> Path:
    folder = environment_of(mode)
    return Path(sys.executable) if folder is None else folder / "bin" / "python"


def set_up(folder: Path, constraints: Path | None = HERE.parent / "constraints.txt") -> str | None:
    """Make the environment that the requirements of its name describe, unless it is there; return what went wrong."""
    requirements = HERE / f"requirements-{folder.name}.txt"
    ready = folder / ".ready"
    if ready.exists() and ready.read_text() == requirements.read_text():
        return None
    print(f"Setting up {requirements.name} in {folder} ...", flush=True)
    install = ["-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    pins = [*(("-c", str(constraints)) if constraints else ()), "-r", str(requirements)]
    for command in (
        [sys.executable, "-m", "venv", "--clear", str(folder)],
        [str(folder / "bin" / "python"), *install, *pins],
    ):
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            lines = done.stderr.strip().splitlines() or ["it said nothing"]
            why = next((line for line in lines if line.startswith("ERROR")), lines[-1])
            return f"the environment of {requirements.name} could not be made: {why}"
    ready.write_text(requirements.read_text())
    return None


def measure(
    model: str, modes: list[str], rounds: int, device: str, broken: dict[str, str]
) -> tuple[list[dict[str, Any]], dict[str, dict[str, str]]]:
    """Return a row for each mode, timed in turns, and the modes' libraries; `broken` tells which cannot run, and why."""
    workers: dict[str, Worker] = {}
    errors: dict[str, str] = {}
    try:
        for mode in modes:
            try:
                if mode in broken:
                    raise StepError(broken[mode])
                workers[mode] = Worker(mode, model, device)
                workers[mode].take(WARM_UP)
            except StepError as error:
                errors[mode] = str(error)
        for _ in range(rounds):
            for mode, worker in workers.items():
                if mode in errors:
                    continue
                try:
                    # The first step of a turn finds the caches full of another process's data.
                    worker.times += worker.take(1 + TIMED)[1:]
                except StepError as error:
                    errors[mode] = str(error)
        found = {mode: worker for mode, worker in workers.items() if mode not in errors}
        plain = statistics.median(found["plain"].times) if "plain" in found else None
        rows = [_row(model, mode, found.get(mode), plain, errors.get(mode)) for mode in modes]
        return rows, {mode: worker.versions for mode, worker in workers.items()}
    finally:
        for worker in workers.values():
            worker.close()


def _row(model: str, mode: str, worker: Worker | None, plain: float | None, error: str | None) -> dict[str, Any]:
    median = statistics.median(worker.times) if worker else None
    row = {
        "model": model,
        "batch": WORKLOADS[model].batch,
        "mode": mode,
        "median_ms": round(median, 3) if median else None,
        "peak_mb": round(worker.peak, 1) if worker else None,
        "ratio_to_plain": round(median / plain, 3) if median and plain else None,
    }
    return row if error is None else {**row, "error": error}


def table(rows: list[dict[str, Any]]) -> str:
    """Return the rows of one model as text, and what they come to."""
    lines = []
    for row in rows:
        head = f"{row['model']:12} {row['batch']:5} {row['mode']:17}"
        if "error" in row:
            lines.append(f"{head} failed: {row['error']}")
            continue
        ratio = f"{row['ratio_to_plain']:7.2f}" if row["ratio_to_plain"] else f"{'':7}"
        lines.append(f"{head} {row['median_ms']:10.2f} {row['peak_mb']:9.1f} {ratio}")
    done = {row["mode"]: row for row in rows if "error" not in row}
    ours, plain = done.get("sfumato"), done.get("plain")
    peers = [row for mode, row in done.items() if mode not in OURS]
    if ours and peers:
        best = min(peers, key=lambda row: row["median_ms"])
        lines.append(f"  best peer / sfumato: {best['median_ms'] / ours['median_ms']:.2f} ({best['mode']})")
    if ours and plain and plain["peak_mb"] > 0:
        lines.append(f"  sfumato's memory / plain: {ours['peak_mb'] / plain['peak_mb']:.2f}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=WORKLOADS, default=list(WORKLOADS))
    parser.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES))
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--out", type=Path, default=HERE / "results" / "gradients.json")
    asked = parser.parse_args()
    most = (STEPS - WARM_UP) // (1 + TIMED)
    if not 1 <= asked.rounds <= most:
        raise SystemExit(f"--rounds must be from 1 to {most}, which is as far as the plan of {STEPS} steps goes.")
    if asked.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("--device cuda needs a GPU that torch can use, and there is none here; use --device cpu.")
    failed = {folder: set_up(folder) for mode in asked.modes if (folder := environment_of(mode)) is not None}
    broken = {mode: why for mode in asked.modes if (why := failed.get(environment_of(mode)))}
    rows: list[dict[str, Any]] = []
    machine = {"machine": describe_machine(), "device": asked.device, "threads": THREADS, "rounds": asked.rounds}
    if asked.device == "cuda":
        machine["gpu"] = torch.cuda.get_device_name()
    machine["libraries"] = {}
    print(f"{machine['machine']}; {THREADS} threads, {asked.rounds} rounds of {TIMED} steps, on {asked.device}")
    print(f"{'model':12} {'batch':>5} {'mode':17} {'median ms':>10} {'peak MB':>9} {'/ plain':>7}")
    asked.out.parent.mkdir(parents=True, exist_ok=True)
    for model in asked.models:
        found, libraries = measure(model, asked.modes, asked.rounds, asked.device, broken)
        print(table(found), flush=True)
        rows += found
        machine["libraries"].update(libraries)
        # Written after every model, so that a run that is stopped keeps what it has.
        asked.out.write_text(json.dumps(rows, indent=2) + "\n")
        asked.out.with_name(f"{asked.out.stem}-machine.json").write_text(json.dumps(machine, indent=2) + "\n")


if __name__ == "__main__":
    main()
