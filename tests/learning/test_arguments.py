"""An argument of the wrong kind is refused in one sentence that names it and the fix, and never tells what it holds."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import LOSS, sgd, toy_model, toy_plan, toy_records
from torch import nn

import sfumato as sf
from sfumato.errors import InputError, PlanError, UnsupportedModelError

NUMBERS = torch.full((5, 4), 4711.0)

COMMON: dict[str, tuple[str, Any, str, str]] = {
    "a model's class": ("model", nn.Linear, "the class Linear", "pass an instance"),
    "a function for a model": ("model", LOSS, "function", "pass an instance"),
    "a budget for a plan": ("plan", sf.Budget(1.0, 1e-3), "Budget", "Plan.calibrate"),
    "the class of plans": ("plan", sf.Plan, "the class Plan", "Plan.calibrate"),
    "a loss's class": ("loss", nn.CrossEntropyLoss, "the class CrossEntropyLoss", "loss module"),
    "a loss by name": ("loss", "cross_entropy", "str", "pass a function"),
    "no loss": ("loss", None, "NoneType", "pass a function"),
    "a ledger by path": ("ledger", "ledger.sqlite", "str", "Ledger("),
    "a ledger's path": ("ledger", Path("ledger.sqlite"), "", "Ledger("),
    "a checkpoint by path": ("checkpoint", "run.pt", "str", "Checkpoint("),
    "a limit for speed knobs": ("compute", 200, "int", "Compute(memory_mb=200)"),
    "knobs in a dictionary": ("compute", {"memory_mb": 200}, "dict", "Compute(memory_mb=200)"),
    "no knobs": ("compute", None, "NoneType", "Compute(memory_mb=200)"),
}
CENTRAL: dict[str, tuple[str, Any, str, str]] = {
    "a tensor for records": ("records", NUMBERS, "Tensor", "Records.from_arrays"),
    "a data set for records": ("records", torch.utils.data.TensorDataset(NUMBERS), "TensorDataset", "Records.from_arrays"),
    "many records": ("records", {"north": toy_records()}, "dict", "Records.from_arrays"),
    "an optimiser's class": ("optimizer", torch.optim.SGD, "the class SGD", "SGD(model.parameters(), lr=0.1)"),
    "half an optimiser": ("optimizer", functools.partial(torch.optim.SGD), "partial", "SGD(model.parameters(), lr=0.1)"),
    "an optimiser by name": ("optimizer", "sgd", "str", "SGD(model.parameters(), lr=0.1)"),
    "views for augment": ("augment", NUMBERS, "Tensor", "pass a function"),
    "a class for augment": ("augment", nn.Identity, "the class Identity", "pass a function"),
}  # fmt: skip
FEDERATED: dict[str, tuple[str, Any, str, str]] = {
    "records for clients": ("clients", toy_records(), "Records", "records.by_owner()"),
    "a list of clients": ("clients", [toy_records()], "list", "records.by_owner()"),
    "clients that hold tensors": ("clients", {"north": NUMBERS}, "Tensor", "records.by_owner()"),
    "clients by number": ("clients", {3: toy_records()}, "int", "records.by_owner()"),
    "an algorithm's class": ("algorithm", sf.FedSGD, "the class FedSGD", "FedSGD(partial(SGD, lr=0.1))"),
    "an engine's class": ("engine", sf.Simulation, "the class Simulation", "for example Simulation()"),
    "an engine by name": ("engine", "simulation", "str", "for example Simulation()"),
    "an algorithm by name": ("algorithm", "fedavg", "str", "FedSGD(partial(SGD, lr=0.1))"),
}


def arguments(way: str) -> dict[str, Any]:
    model = toy_model()
    if way in ("train", "steps"):
        return {
            "model": model, "records": toy_records(), "plan": toy_plan(steps=1), "loss": LOSS, "optimizer": sgd(model),
        }  # fmt: skip
    return {
        "model": model, "clients": toy_records().by_owner(), "plan": toy_plan(steps=1), "loss": LOSS,
        "algorithm": sf.FedSGD(functools.partial(torch.optim.SGD, lr=0.1)), "engine": sf.Simulation(),
    }  # fmt: skip


CASES = [
    *((way, *case) for way in ("train", "steps") for case in (COMMON | CENTRAL).items()),
    *((way, *case) for way in ("federate", "rounds") for case in (COMMON | FEDERATED).items()),
]


@pytest.mark.parametrize(("way", "name", "case"), CASES, ids=[f"{way}: {name}" for way, name, _ in CASES])
def test_an_argument_of_the_wrong_kind_is_refused_with_the_fix(
    way: str, name: str, case: tuple[str, Any, str, str]
) -> None:
    argument, value, kind, fix = case
    run: Callable[..., Any] = getattr(sf, way)
    with pytest.raises(InputError) as caught:
        run(**{**arguments(way), argument: value})
    message = str(caught.value)
    assert argument in message or "The name of a client" in message
    assert f"not {kind}" in message
    assert fix in message
    assert message.count(". ") == 0
    assert "\n" not in message
    assert "4711" not in message


@pytest.mark.parametrize("way", ["train", "steps", "federate", "rounds"])
def test_arguments_of_the_right_kind_are_taken(way: str) -> None:
    run: Callable[..., Any] = getattr(sf, way)
    assert run(**{**arguments(way), "loss": nn.CrossEntropyLoss()}) is not None
    assert run(**{**arguments(way), "ledger": None, "checkpoint": None}) is not None


def test_a_client_with_records_of_the_wrong_kind_is_named() -> None:
    clients = {**toy_records().by_owner(), "north": NUMBERS}
    with pytest.raises(InputError, match=r'^clients\["north"\] must be of type Records, not Tensor; pass a mapping'):
        sf.federate(**{**arguments("federate"), "clients": clients})


def test_a_result_is_no_model_to_evaluate() -> None:
    result = sf.train(**arguments("train"))
    with pytest.raises(InputError, match=r"^model must be of type Module, not TrainingResult; pass result\.model\.$"):
        sf.evaluate(result, toy_records())  # type: ignore[arg-type]
    with pytest.raises(InputError, match=r"^model must be of type Module, not the class Linear; pass an instance\.$"):
        sf.evaluate(nn.Linear, toy_records())  # type: ignore[arg-type]


def test_a_private_federation_tells_the_shapes_that_do_not_fit() -> None:
    given = {**arguments("federate"), "plan": toy_plan(population=3, batch_size=3, steps=1, unit="client")}
    wrong = {**given, "model": nn.Sequential(nn.Linear(7, 3), nn.Tanh(), nn.Linear(3, 2))}
    with pytest.raises(UnsupportedModelError, match=r'"0" expects features of shape \(n, 7\), .* shape \(n, 4\)\.$'):
        sf.federate(**wrong)
    conv = {**given, "model": nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten(), nn.Linear(2, 2))}
    with pytest.raises(UnsupportedModelError, match=r"shape \(n, 1, any, any\), .* shape \(n, 4\)\.$"):
        sf.federate(**conv)
    wide = {"a": sf.Records(torch.zeros(3, 4).double(), torch.zeros(3, dtype=torch.int64))}
    plan = toy_plan(population=1, batch_size=1, steps=1, unit="client")
    with pytest.raises(UnsupportedModelError, match=r"features are float64 and the model is float32; .*from_arrays\.$"):
        sf.federate(**{**given, "clients": wide, "plan": plan})
    other = {**given, "model": nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(7, 2))}
    with pytest.raises(UnsupportedModelError) as caught:
        sf.federate(**other)
    assert "expects features" not in str(caught.value)


def test_fedavg_for_records_names_five_clients_of_many() -> None:
    clients = toy_records(owners=30).by_owner()
    plan = toy_plan(steps=1)
    algorithm = sf.FedAvg(functools.partial(torch.optim.SGD, lr=0.1))
    with pytest.raises(PlanError, match=r"\(site-0, site-1, site-2, site-3, site-4 and 25 more\)"):
        sf.federate(**{**arguments("federate"), "clients": clients, "plan": plan, "algorithm": algorithm})


@pytest.mark.parametrize("way", ["train", "federate"])
def test_nothing_is_charged_for_a_run_with_a_loss_that_depends_on_nothing(way: str) -> None:
    run: Callable[..., Any] = getattr(sf, way)
    with sf.Ledger.in_memory() as ledger:
        ledger.grant("toy", sf.Budget(4.0, 1e-2))
        given = {**arguments(way), "loss": lambda out, target: out.detach().square().mean(), "ledger": ledger}
        with pytest.raises(sf.SfumatoError, match="does not depend on any trained parameter of Linear"):
            run(**given, dataset="toy")
        assert [entry.kind for entry in ledger.history("toy")] == ["grant"]
