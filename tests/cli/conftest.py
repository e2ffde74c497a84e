"""A tiny table of two clinics and the configuration that trains on it."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from sfumato.cli import app

CONFIG: dict[str, Any] = {
    "data": {
        "path": "clinics.csv",
        "test_fraction": 0.25,
        "columns": {
            "age": {"kind": "numeric", "low": 0, "high": 100},
            "smoker": {"kind": "category", "values": ["no", "yes"]},
            "clinic": {"kind": "owner", "values": ["north", "south"]},
            "ill": {"kind": "target", "values": ["no", "yes"]},
        },
    },
    "privacy": {
        "epsilon": 2.0, "delta": 1e-4, "population": 60, "batch_size": 60, "steps": 4, "clip": 1.0
    },
    "model": {"kind": "logistic"},
    "training": {"mode": "central", "learning_rate": 0.5},
}  # fmt: skip


def toml(value: Any) -> str:
    if isinstance(value, dict):
        return "{ " + ", ".join(f"{json.dumps(key)} = {toml(item)}" for key, item in value.items()) + " }"
    return json.dumps(value)


class Study:
    """A folder with the table and a configuration that a test may change."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.out = folder, folder / "out"
        self.config = copy.deepcopy(CONFIG)
        draw = random.Random(7)
        self.rows = ["age,smoker,clinic,ill"]
        for index in range(80):
            age, clinic = draw.randint(1, 99), ("north", "south")[index % 2]
            self.rows.append(f"{age},{draw.choice(('no', 'yes'))},{clinic},{'yes' if age > 50 else 'no'}")

    @property
    def path(self) -> Path:
        return self.folder / "study.toml"

    def write(self) -> None:
        (self.folder / "clinics.csv").write_text("\n".join(self.rows))
        plain = [(name, value) for name, value in self.config.items() if not isinstance(value, dict)]
        sections = [(name, value) for name, value in self.config.items() if isinstance(value, dict)]
        lines = [f"{name} = {toml(value)}" for name, value in plain]
        lines += [
            f"[{name}]\n" + "".join(f"{key} = {toml(value)}\n" for key, value in section.items())
            for name, section in sections
        ]
        self.path.write_text("\n".join(lines))

    def train(self, *more: str) -> Result:
        self.write()
        return sfumato("train", str(self.path), "--out", str(self.out), *more)

    def result(self) -> dict[str, Any]:
        content: dict[str, Any] = json.loads((self.out / "result.json").read_text())
        return content


def sfumato(*arguments: str) -> Result:
    return CliRunner().invoke(app, list(arguments))


@pytest.fixture(autouse=True)
def no_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever ran before may have set the width of a terminal that is not there (importing `readline` does)."""
    monkeypatch.delenv("COLUMNS", raising=False)


@pytest.fixture
def study(tmp_path: Path) -> Study:
    return Study(tmp_path)


@pytest.fixture
def command() -> Callable[..., Result]:
    return sfumato


@pytest.fixture
def refused() -> Callable[[Result], str]:
    """Check that a command was refused in one line, and return the line."""

    def check(result: Result) -> str:
        assert result.exit_code == 2, result.output
        assert result.stdout == ""
        assert result.stderr.startswith("sfumato: ")
        assert result.stderr.count("\n") == 1
        return result.stderr

    return check
