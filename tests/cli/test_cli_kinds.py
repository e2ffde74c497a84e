"""Kinds of input, model and noise that a configuration may name, each trained for a few steps; and the demo."""

from __future__ import annotations

import csv

import polars as pl
import pytest
import torch
from arms import FEDERATED

from sfumato.report import read_result


def read_back(study):
    return read_result(study.out / "result.json")


@pytest.mark.parametrize("by_owner", [False, True])
def test_parquet_files_train_like_csv(study, by_owner):
    rows = list(csv.DictReader(study.rows))
    frame = pl.DataFrame(rows).with_columns(pl.col("age").cast(pl.Int64))
    if by_owner:
        for name in ("north", "south"):
            frame.filter(pl.col("clinic") == name).drop("clinic").write_parquet(study.folder / f"{name}.parquet")
        study.config["data"]["path"] = {"north": "north.parquet", "south": "south.parquet"}
        del study.config["data"]["columns"]["clinic"]
        study.config["training"] = FEDERATED
    else:
        frame.write_parquet(study.folder / "clinics.parquet")
        study.config["data"]["path"] = "clinics.parquet"
    done = study.train()
    assert done.exit_code == 0, done.output
    assert set(read_back(study).runs[0].metrics.accuracy.per_owner) == {"north", "south"}


def test_a_damaged_parquet_file_is_refused(study, refused):
    (study.folder / "clinics.parquet").write_bytes(b"PAR1 and then nothing")
    study.config["data"]["path"] = "clinics.parquet"
    assert "clinics.parquet is not a readable Parquet file" in refused(study.train())
    assert not study.out.exists()


@pytest.mark.parametrize(("kind", "outputs"), [("cnn", 10), ("mlp", 10)])
def test_digits_train_with_either_kind_of_network(study, kind, outputs):
    study.config["data"] = {"builtin": "digits"}
    study.config["model"] = {"kind": kind, "hidden": [8]}
    study.config["privacy"] |= {"population": 1200, "batch_size": 60, "steps": 3}
    done = study.train()
    assert done.exit_code == 0, done.output
    weights = torch.load(study.out / "model.pt", weights_only=True)
    assert list(weights.values())[-1].shape == (outputs,)
    assert weights["0.weight" if kind == "cnn" else "1.weight"].ndim == (4 if kind == "cnn" else 2)
    assert read_back(study).dataset.name == "digits"


def test_a_number_is_learnt_and_has_no_accuracy(study):
    study.config["data"]["columns"] |= {
        "age": {"kind": "target", "low": 0, "high": 100},
        "ill": {"kind": "category", "values": ["no", "yes"]},
    }
    study.config["privacy"] |= {"epsilon": 5.0, "steps": 200}
    study.config["training"]["learning_rate"] = 5.0
    done = study.train()
    assert done.exit_code == 0, done.output
    assert "Accuracy" not in done.stdout
    (run,) = read_back(study).runs
    assert run.metrics.accuracy is None
    assert not any("accuracy" in sentence for sentence in run.privacy.not_covered)
    weights = torch.load(study.out / "model.pt", weights_only=True)
    assert weights["1.bias"].shape == (1,)
    # Ages up to 50 are not ill, above 50 they are: the two labels must stand well apart.
    no, yes = weights["1.weight"][0, -2:]
    assert yes - no > 10


@pytest.mark.parametrize(
    ("noise", "words"),
    [
        ({"noise": "server"}, "The server is trusted"),
        ({"noise": "shared", "tolerate": 1}, "adds a part of the noise"),
        ({"noise": "local"}, "adds"),
    ],
    ids=["server", "shared", "local"],
)
def test_every_place_of_the_noise_can_be_named(study, noise, words):
    study.config["training"] = FEDERATED | noise
    done = study.train()
    assert done.exit_code == 0, done.output
    (run,) = read_back(study).runs
    assert any(words in sentence for sentence in run.privacy.not_covered)
    assert 1.9 < run.privacy.epsilon <= 2


@pytest.mark.slow
def test_the_demo_runs_with_one_seed_and_claims_no_spread(command, tmp_path):
    done = command("demo", "--seeds", "1", "--out", str(tmp_path / "demo"))
    assert done.exit_code == 0, done.output
    result = read_result(tmp_path / "demo" / "result.json")
    assert all(run.metrics.accuracy.seeds == 1 for run in result.runs)
    rows = [line.split("│") for line in done.stdout.splitlines() if "│ federated-private" in line]
    assert len(rows) == 3
    assert all(row[4].strip() == "-" for row in rows)
    assert command("ledger", "verify", str(tmp_path / "demo" / "ledger.sqlite")).exit_code == 0
