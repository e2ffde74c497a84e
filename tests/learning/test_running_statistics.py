"""Running statistics of batch normalisations: who moves them, who keeps them, and what noise may touch."""

from __future__ import annotations

import copy
import functools
from collections.abc import Iterator

import pytest
import torch
from helpers import LOSS
from torch import Tensor, nn

import sfumato as sf
from sfumato.learning.federated import Algorithm
from sfumato.learning.training import Training

LOCAL = functools.partial(torch.optim.SGD, lr=0.1)
ENGINE = sf.Simulation(workers=1, way="alone")


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def clients(sizes: tuple[int, ...], shifts: tuple[float, ...]) -> dict[str, sf.Records]:
    generator = torch.Generator().manual_seed(0)
    return {
        f"site-{row}": sf.Records(
            shift + torch.randn(size, 3, generator=generator), torch.randint(0, 2, (size,), generator=generator)
        )
        for row, (size, shift) in enumerate(zip(sizes, shifts, strict=True))
    }


def normalised() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 2))


def begun(model: nn.Module, given: dict[str, sf.Records], algorithm: Algorithm, steps: int, private: bool) -> Training:
    plan = sf.Plan.without_privacy(population=len(given), batch_size=len(given), steps=steps, unit="client")
    if private:
        plan = sf.Plan(sf.Budget(50.0, 1e-3, unit="client"), sf.FullBatch(), 1.0, 2.0, steps, len(given))
    return sf.rounds(
        model, given, plan, algorithm=algorithm, engine=ENGINE, loss=LOSS, weighting=sf.Uniform(),
        source=sf.SeededSource(1),
    )  # fmt: skip


def statistics(model: nn.Module) -> tuple[Tensor, Tensor]:
    state = model.state_dict()
    return state["0.running_mean"], state["0.running_var"]


@pytest.mark.parametrize("declared", [None, 5.0])
def test_fednova_averages_statistics_as_they_are(declared: float | None) -> None:
    given, found = clients((4, 400), (3.0, 3.0)), []
    for algorithm in (
        sf.FedAvg(LOCAL, local_epochs=1, batch_size=4),
        sf.FedNova(LOCAL, local_epochs=1, batch_size=4, effective_steps=declared),
    ):
        model = normalised()
        next(begun(model, given, algorithm, 1, private=False))
        found.append(statistics(model))
    for one, other in zip(*found, strict=True):
        assert torch.allclose(one, other, rtol=0, atol=1e-6)


def test_a_dittos_own_model_has_statistics_of_its_own() -> None:
    given = clients((40, 40), (4.0, -4.0))
    run = begun(normalised(), given, sf.Ditto(LOCAL, pull=0.1, local_steps=10), 6, private=False)
    for _ in run:
        pass
    assert bool((statistics(run.model)[0].abs() < 1).all())
    for name, own in given.items():
        mean, variance = statistics(run.personal_model(name))
        assert torch.allclose(mean, own.features.mean(0), atol=0.05)
        assert torch.allclose(variance, own.features.var(0), atol=0.05)


FROZEN: list[Algorithm] = [
    sf.FedAvg(LOCAL), sf.FedNova(LOCAL, effective_steps=1.0), sf.Ditto(LOCAL), sf.FedPer(LOCAL, ("1.bias",)),
]  # fmt: skip


@pytest.mark.parametrize("private", [False, True])
@pytest.mark.parametrize("algorithm", FROZEN)
def test_statistics_in_eval_mode_stay_and_carry_no_noise(algorithm: Algorithm, private: bool) -> None:
    model = normalised()
    model[0].eval()
    before = copy.deepcopy(model.state_dict())
    run = begun(model, clients((4, 6), (1.0, -1.0)), algorithm, 3, private)
    assert not any("running" in name for name in run._procedure.shapes() or ())
    for _ in run:
        pass
    for name, value in model.state_dict().items():
        if name not in ("1.bias", "0.num_batches_tracked"):
            assert torch.equal(value, before[name]) == ("running" in name), name
    assert run.result().refused == 0


def test_a_mode_that_changes_meanwhile_changes_no_names() -> None:
    model = normalised()
    run = begun(model, clients((4, 6), (1.0, -1.0)), sf.FedAvg(LOCAL), 4, private=False)
    next(run)
    moved = statistics(model)[0].clone()
    assert bool(moved.any())
    model.eval()
    weight = model[1].weight.detach().clone()
    next(run)
    assert torch.equal(statistics(model)[0], moved)
    assert not torch.equal(model[1].weight, weight)
    model.train()
    next(run)
    assert not torch.equal(statistics(model)[0], moved)
    assert run.result().refused == 0
