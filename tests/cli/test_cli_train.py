"""`sfumato train` and `sfumato report` on a tiny table: what is written, and what happens on Ctrl-C."""

from __future__ import annotations

import math
import signal
import subprocess
import sys
import time

import pytest
import torch
from arms import FEDERATED

from sfumato import Budget, Ledger

MARKING = """
from pathlib import Path
from torch import nn

class Marking(nn.Module):
    def __init__(self, inputs, outputs):
        super().__init__()
        self.layer = nn.Linear(inputs, outputs)
        self.calls = 0

    def forward(self, x):
        self.calls += 1
        here = Path(__file__).parent
        (here / "started").touch()
        if self.calls > 5 and (here / "stop").exists():
            raise KeyboardInterrupt
        return self.layer(x)

def make(shape, outputs):
    return Marking(shape[0], outputs)
"""


OWN_LEDGER = "Other runs on the same records: this run brought its own ledger, so nobody adds them up."


def files(folder):
    return {path.name for path in folder.iterdir()}


@pytest.mark.parametrize(
    ("training", "mode"), [({}, "central-private"), (FEDERATED, "federated-private")], ids=["central", "federated"]
)
def test_a_private_run_leaves_model_report_and_result(study, command, training, mode):
    study.config["training"] |= training
    done = study.train()
    assert done.exit_code == 0, done.output
    assert {"model.pt", "report.html", "result.json", "ledger.sqlite"} <= files(study.out)
    (run,) = study.result()["runs"]
    assert run["mode"] == mode
    assert 1.9 < run["privacy"]["epsilon"] <= 2
    assert set(run["metrics"]["accuracy"]["per_owner"]) == {"north", "south"}
    assert any("accuracy" in sentence for sentence in run["privacy"]["not_covered"])
    assert "not covered by the budget" in done.stdout
    weights = torch.load(study.out / "model.pt", weights_only=True)
    assert {tuple(tensor.shape) for tensor in weights.values()} == {(2, 3), (2,)}
    alone = f"{OWN_LEDGER} Name a shared one in [ledger]."
    assert alone in run["privacy"]["not_covered"]
    assert f"  - {alone}\n" in done.stdout
    assert OWN_LEDGER in (study.out / "report.html").read_text()
    assert run["metrics"]["accuracy"]["seeds"] == 1
    with Ledger.existing(study.out / "ledger.sqlite") as ledger:
        assert ledger.digest == study.result()["ledger"]["digest"]
        assert ledger.balance("study").spent_epsilon == pytest.approx(run["privacy"]["epsilon"])
    page = (study.out / "report.html").read_bytes()
    (study.out / "report.html").unlink()
    assert command("report", str(study.out)).exit_code == 0
    assert (study.out / "report.html").read_bytes() == page


def test_training_without_privacy_learns_and_promises_nothing(study):
    study.config["privacy"] |= {"epsilon": "inf", "steps": 200}
    done = study.train()
    assert done.exit_code == 0, done.output
    (run,) = study.result()["runs"]
    assert run["privacy"] is None
    assert run["mode"] == "central"
    assert run["metrics"]["accuracy"]["mean"] > 0.8
    assert not (study.out / "ledger.sqlite").exists()


def test_federated_averaging_protects_records_and_clients(study):
    averaging = {"mode": "federated", "algorithm": "fedavg", "learning_rate": 0.1, "local_steps": 2}
    study.config["training"] = averaging
    study.config["privacy"]["populations"] = {"north": 30, "south": 30}
    assert study.train().exit_code == 0
    assert study.result()["dataset"]["owners"] == {"north": 30, "south": 30}
    study.out = study.folder / "clients"
    del study.config["privacy"]["populations"]
    study.config["privacy"] |= {"unit": "client", "population": 2, "batch_size": 2}
    done = study.train()
    assert done.exit_code == 0, done.output
    assert study.result()["runs"][0]["privacy"]["unit"] == "client"


def test_the_first_weights_follow_the_seed_and_the_noise_does_not(study):
    study.config["training"]["learning_rate"] = 1e-30
    weights = []
    for seed in (0, 0, 1):
        study.config["training"]["seed"] = seed
        study.out = study.folder / f"out{len(weights)}"
        assert study.train().exit_code == 0
        weights.append(torch.load(study.out / "model.pt", weights_only=True)["1.weight"])
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])
    study.config["training"] |= {"learning_rate": 0.5, "seed": 0}
    noised = []
    for name in ("a", "b"):
        study.out = study.folder / name
        assert study.train().exit_code == 0
        noised.append(torch.load(study.out / "model.pt", weights_only=True)["1.weight"])
    assert not torch.equal(*noised)


def test_a_shared_ledger_is_charged_and_keeps_the_grant(study, refused):
    with Ledger(study.folder / "shared.db") as ledger:
        ledger.grant("clinics", Budget(3.0, 1e-3))
    study.config["ledger"] = {"path": "shared.db", "dataset": "clinics"}
    with Ledger(study.folder / "shared.db") as ledger:
        ledger.grant("somebody else's", Budget(3.0, 1e-3))
    done = study.train()
    assert done.exit_code == 0, done.output
    assert OWN_LEDGER not in done.stdout
    assert not any(OWN_LEDGER in sentence for sentence in study.result()["runs"][0]["privacy"]["not_covered"])
    assert {entry["dataset"] for entry in study.result()["ledger"]["entries"]} == {"clinics"}
    with Ledger.existing(study.folder / "shared.db") as ledger:
        ledger.verify(study.result()["ledger"]["digest"])
        assert 1.9 < ledger.balance("clinics").spent_epsilon <= 2
    assert "finished" in refused(study.train())
    study.out = study.folder / "second"
    assert "left" in refused(study.train())
    assert not study.out.exists()


def test_a_stopped_run_goes_on_and_pays_once(study, refused):
    (study.folder / "marking_resume.py").write_text(MARKING)
    (study.folder / "stop").touch()
    study.config["model"] = {"factory": "marking_resume:make"}
    study.config["privacy"]["steps"] = 20
    study.config["checkpoint"] = {"every": 2}
    stopped = study.train()
    assert stopped.exit_code == 130, stopped.output
    assert stopped.stderr == "sfumato: stopped by Ctrl-C; no result was written; go on with --resume.\n"
    assert not (study.out / "result.json").exists()
    (study.folder / "stop").unlink()
    assert "--resume" in refused(study.train())
    done = study.train("--resume")
    assert done.exit_code == 0, done.output
    charges = [entry for entry in study.result()["ledger"]["entries"] if entry["kind"] == "charge"]
    assert len(charges) == 1


def test_ctrl_c_ends_in_one_line_and_leaves_no_result(study):
    (study.folder / "marking_signal.py").write_text(MARKING)
    study.config["model"] = {"factory": "marking_signal:make"}
    study.config["privacy"]["steps"] = 100_000
    study.write()
    code = "from sfumato.cli import main; main()"
    process = subprocess.Popen(
        [sys.executable, "-c", code, "train", str(study.path), "--out", str(study.out)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    while not (study.folder / "started").exists() and process.poll() is None:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    stdout, stderr = process.communicate()
    assert process.returncode == 130, stderr
    assert stdout == ""
    assert stderr == "sfumato: stopped by Ctrl-C; no result was written.\n"  # nor a checkpoint
    assert not (study.out / "result.json").exists()


def test_epsilon_curve_never_falls_and_ends_at_the_claim(study):
    study.config["privacy"]["steps"] = 40
    assert study.train().exit_code == 0
    result = study.result()
    curve = result["curves"]["epsilon_over_steps"]["study"]
    spent = [epsilon for _, epsilon in curve]
    assert spent == sorted(spent)
    assert math.isclose(spent[-1], result["runs"][0]["privacy"]["epsilon"])
    assert curve[-1][0] == 40
