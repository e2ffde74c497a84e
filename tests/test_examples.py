"""Every example runs as it stands and says what it should; what needs a data set that is not here is skipped."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from sfumato.cli import app

EXAMPLES = Path(__file__).parents[1] / "examples"
BUILTIN = ["cross_silo", "heart"]
FROM_FILES = {"adult": "adult/adult.data", "cross_device": "mnist/train-images-idx3-ubyte.gz", "mnist": None}
LENGTH = 60  # lines that are still read


def run(name: str) -> str:
    done = subprocess.run(
        [sys.executable, "-W", "error", str(EXAMPLES / f"{name}.py")], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return done.stdout


def train(name: str, folder: Path) -> dict[str, object]:
    done = CliRunner().invoke(app, ["train", str(EXAMPLES / f"{name}.toml"), "--out", str(folder)])
    assert done.exit_code == 0, done.output
    content: dict[str, object] = json.loads((folder / "result.json").read_text())["runs"][0]
    return content


def test_every_example_is_known_here() -> None:
    found = {path.stem for path in EXAMPLES.glob("*.toml")}
    assert found == {*BUILTIN, *FROM_FILES}
    assert {path.stem for path in EXAMPLES.glob("*.py")} == {"cross_device", "cross_silo"}


@pytest.mark.parametrize("name", ["cross_device.py", "cross_device.toml", "cross_silo.py", "cross_silo.toml"])
def test_an_example_of_a_federation_is_short(name: str) -> None:
    assert len((EXAMPLES / name).read_text().splitlines()) <= LENGTH


@pytest.mark.parametrize("name", BUILTIN)
def test_an_example_on_builtin_records_trains(name: str, tmp_path: Path) -> None:
    said = train(name, tmp_path / "out")
    privacy, score = said["privacy"], said["metrics"]["accuracy"]["mean"]  # type: ignore[index]
    assert 0.999 < privacy["epsilon"] <= 1  # type: ignore[index]
    assert score > 0.6  # a coin is right in half of the cases


@pytest.mark.slow
@pytest.mark.parametrize("name", ["cross_device"])
def test_an_example_on_files_trains(name: str, tmp_path: Path) -> None:
    folder, file = os.environ.get("SFUMATO_DATA"), FROM_FILES[name]
    if not folder or not (Path(folder) / str(file)).is_file():
        pytest.skip(f"needs {file} below the folder in SFUMATO_DATA")
    said = train(name, tmp_path / "out")
    assert 3.99 < said["privacy"]["epsilon"] <= 4  # type: ignore[index]
    assert 0.85 < said["metrics"]["accuracy"]["mean"] < 0.96  # type: ignore[index]


def test_hospitals_train_alone_and_together() -> None:
    said = run("cross_silo")
    rows = dict(re.findall(r"^(alone|FedAvg|Scaffold|FedSGD, epsilon 1) +([\d.]+)%", said, re.MULTILINE))
    assert set(rows) == {"alone", "FedAvg", "Scaffold", "FedSGD, epsilon 1"}
    assert all(float(right) > 60 for right in rows.values())
    assert "-differentially private for one record" in said


@pytest.mark.slow
def test_phones_learn_under_a_promise_to_each() -> None:
    said = run("cross_device")
    rows = re.findall(r"^round (\d+): epsilon ([\d.]+), clip norm [\d.]+, accuracy ([\d.]+)%", said, re.MULTILINE)
    assert [int(index) for index, _, _ in rows] == [10, 20, 30, 40, 50, 60]
    assert float(rows[-1][1]) <= 2
    assert float(rows[-1][2]) > 75  # a coin with four sides is right in 25
    assert "-differentially private for one client" in said
