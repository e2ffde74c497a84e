"""`[training] memory_mb` and `autocast`, `[privacy] clipping`: what a configuration says is what the training does."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from arms import FEDERATED

from sfumato.config import Experiment
from sfumato.gradients import private
from sfumato.gradients.clipping import KINDS
from sfumato.gradients.compute import Compute

MODES: dict[str, dict[str, Any]] = {
    "central": {},
    "fedsgd": FEDERATED,
    "fedavg": FEDERATED | {"algorithm": "fedavg", "learning_rate": 0.1},
}


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, Compute]]:
    """Return the clipping and the speed knobs of every private gradient that is made from here on."""
    seen: list[tuple[Any, Compute]] = []
    honest = private.PrivateGradient.__init__

    def spy(self, model, loss, clipping, **more):
        seen.append((clipping, more["compute"]))
        honest(self, model, loss, clipping, **more)

    monkeypatch.setattr(private.PrivateGradient, "__init__", spy)
    return seen


@pytest.mark.parametrize("mode", MODES)
def test_the_knobs_reach_the_training(study, made, mode):
    study.config["training"] |= MODES[mode] | {"memory_mb": 0.25, "autocast": True}
    study.config["privacy"] |= {"clipping": "per-layer", "clip": 0.5, "populations": {"north": 30, "south": 30}}
    done = study.train()
    assert done.exit_code == 0, done.output
    assert made
    for clipping, compute in made:
        assert compute == Compute(memory_mb=0.25, autocast=True)
        assert (clipping.kind, clipping.norm) == ("per-layer", 0.5)


@pytest.mark.parametrize("mode", MODES)
def test_without_the_keys_the_knobs_are_the_defaults(study, made, mode):
    study.config["training"] |= MODES[mode]
    study.config["privacy"]["populations"] = {"north": 30, "south": 30}
    assert study.train().exit_code == 0
    assert made
    assert all(compute == Compute() for _, compute in made)
    assert all((clipping.kind, clipping.norm) == ("flat", 1.0) for clipping, _ in made)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("unit", ["record", "client"])
def test_each_kind_of_clipping_trains_and_costs_the_same(study, unit, kind):
    study.config["privacy"]["clipping"] = kind
    if unit == "client":
        study.config["training"] |= FEDERATED
        study.config["privacy"] |= {"unit": "client", "population": 2, "batch_size": 2}
    done = study.train()
    assert done.exit_code == 0, done.output
    (run,) = study.result()["runs"]
    assert run["privacy"]["unit"] == unit
    assert math.isclose(run["privacy"]["epsilon"], 2, rel_tol=0.01)


def test_the_models_of_different_limits_are_those_of_the_same_plan(study):
    plans = []
    for megabytes in (None, 0.001, 1000):
        if megabytes is not None:
            study.config["training"]["memory_mb"] = megabytes
        study.write()
        experiment = Experiment(study.path)
        assert experiment.compute() == Compute(memory_mb=megabytes)
        plans.append(experiment.plan())
    assert plans[0] == plans[1] == plans[2]


BAD = {
    "memory 0": ("memory_mb", 0, "memory_mb must be a finite number above 0, not 0"),
    "memory below 0": ("memory_mb", -1.5, "memory_mb must be a finite number above 0, not -1.5"),
    "memory a word": ("memory_mb", "all", 'key "training.memory_mb"'),
    "memory true": ("memory_mb", True, 'key "training.memory_mb"'),
    "memory a list": ("memory_mb", [100], 'key "training.memory_mb"'),
    "autocast a word": ("autocast", "sometimes", 'key "training.autocast"'),
    "autocast a number": ("autocast", 16, 'key "training.autocast"'),
    "misspelt memory": ("memory_md", 100, 'Did you mean "memory_mb"?'),
    "misspelt autocast": ("auto_cast", True, 'Did you mean "autocast"?'),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_knobs_are_refused_in_one_line_and_write_nothing(study, refused, case):
    key, value, words = BAD[case]
    study.config["training"][key] = value
    line = refused(study.train())
    assert "study.toml" in line
    assert words in line
    assert not study.out.exists()


@pytest.mark.parametrize("word", ["nan", "inf", "-inf"])
def test_a_limit_that_is_no_number_is_refused(study, refused, command, word):
    study.config["training"]["memory_mb"] = 7
    study.write()
    study.path.write_text(study.path.read_text().replace("memory_mb = 7", f"memory_mb = {word}"))
    assert "training.memory_mb" in refused(command("train", str(study.path), "--out", str(study.out)))
    assert not study.out.exists()


@pytest.mark.parametrize("kind", ["Flat", "per layer", "", 3, True, ["flat"]])
def test_unknown_kinds_of_clipping_are_refused(study, refused, kind):
    study.config["privacy"]["clipping"] = kind
    assert 'study.toml: key "privacy.clipping": ' in refused(study.train())
    assert not study.out.exists()


def test_without_privacy_the_knobs_change_nothing(study):
    study.config["privacy"] |= {"epsilon": "inf", "clipping": "normalised"}
    weights = []
    for knobs in ({}, {"memory_mb": 0.001}):
        study.config["training"] |= knobs
        study.out = study.folder / f"out{len(weights)}"
        done = study.train()
        assert done.exit_code == 0, done.output
        weights.append(torch.load(study.out / "model.pt", weights_only=True)["1.weight"])
    assert torch.equal(*weights)


def test_a_checkpoint_goes_on_with_another_limit_but_not_with_another_kind(study, refused):
    study.config["checkpoint"] = {"every": 1}
    study.config["privacy"]["steps"] = 3
    assert study.train().exit_code == 0
    (study.out / "result.json").unlink()
    study.config["privacy"]["clipping"] = "per-layer"
    assert "another plan" in refused(study.train("--resume"))
    study.config["privacy"]["clipping"] = "flat"
    study.config["training"]["memory_mb"] = 0.001
    done = study.train("--resume")
    assert done.exit_code == 0, done.output
