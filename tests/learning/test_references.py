"""A parameter that a model or a loss also reaches past its module: no client would train it there, so it is refused by name."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator

import pytest
import torch
from helpers import LOSS
from torch import Tensor, nn
from torch.nn import functional as F

import sfumato as sf
from sfumato.errors import UnsupportedModelError
from sfumato.learning.federated import Algorithm

SGD = functools.partial(torch.optim.SGD, lr=0.1)
ADAM = functools.partial(torch.optim.Adam, lr=0.1)


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


class InAList(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 2)
        self.held = [self.layer.weight, self.layer.bias]

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, *self.held)


class InADict(nn.Module):
    def __init__(self, least: int = 0) -> None:
        super().__init__()
        self.first, self.head, self.least = nn.Linear(3, 4), nn.Linear(4, 2), least
        self.layers = [self.first]  # a module is found wherever it is held
        self.held = {"weight": self.head.weight}

    def forward(self, x: Tensor) -> Tensor:
        weight = self.held["weight"] if len(x) >= self.least else self.head.weight
        return F.linear(torch.tanh(self.layers[0](x)), weight, self.head.bias)


class Decayed:
    """A loss that adds the size of the server's own weights, which no client moves."""

    def __init__(self, model: nn.Module) -> None:
        self.parameters = list(model.parameters())

    def __call__(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return LOSS(outputs, targets) + 0.1 * sum(value.square().sum() for value in self.parameters)


def clients(sizes: tuple[int, ...] = (4, 4, 4)) -> dict[str, sf.Records]:
    generator = torch.Generator().manual_seed(0)
    return {
        f"site-{row}": sf.Records(
            torch.randn(size, 3, generator=generator), torch.randint(0, 2, (size,), generator=generator)
        )
        for row, size in enumerate(sizes)
    }


def plan(private: bool, population: int = 3) -> sf.Plan:
    if private:
        return sf.Plan(sf.Budget(50.0, 1e-3, unit="client"), sf.FullBatch(), 1.0, 2.0, 2, population)
    return sf.Plan.without_privacy(population=population, batch_size=population, steps=2, unit="client")


@pytest.mark.parametrize("private", [False, True])
@pytest.mark.parametrize("way", ["alone", "stacked"])
@pytest.mark.parametrize("algorithm", [sf.FedAvg(SGD, local_steps=2), sf.FedAvg(ADAM), sf.FedSGD(SGD)])
@pytest.mark.parametrize(("make", "name"), [(InAList, "layer.weight"), (InADict, "head.weight")])
def test_a_parameter_that_is_also_held_elsewhere_is_refused_before_anything_is_charged(
    make: Callable[[], nn.Module], name: str, algorithm: Algorithm, way: str, private: bool
) -> None:
    ledger = sf.Ledger.in_memory()
    ledger.grant("federation", sf.Budget(100.0, 1e-2, unit="client"))
    with pytest.raises(UnsupportedModelError, match=rf'^Client "site-0", step 1: .* parameter "{name}" by another'):
        sf.federate(
            make(), clients(), plan(private), algorithm=algorithm, engine=sf.Simulation(way=way), loss=LOSS,
            ledger=ledger,
        )  # fmt: skip
    assert not any(entry.kind == "charge" for entry in ledger.history())


def test_it_is_found_at_the_first_client_that_uses_it() -> None:
    sizes = (2,) * 5 + (9,)
    with pytest.raises(UnsupportedModelError, match=r'^Client "site-5", step 1: .*"head.weight"'):
        sf.federate(
            InADict(least=9), clients(sizes), plan(False, 6), algorithm=sf.FedAvg(SGD), engine=sf.Simulation(), loss=LOSS
        )  # fmt: skip


@pytest.mark.parametrize("algorithm", [sf.FedAvg(SGD), sf.FedSGD(SGD)])
def test_a_loss_may_not_hold_the_servers_parameters(algorithm: Algorithm) -> None:
    model = nn.Linear(3, 2)
    with pytest.raises(UnsupportedModelError, match='the parameter "weight" by another reference'):
        sf.federate(model, clients(), plan(False), algorithm=algorithm, engine=sf.Simulation(), loss=Decayed(model))


class Sound(nn.Module):
    """Everything is reached by its module; a recurrent layer holds a list of its weights, two layers share theirs."""

    def __init__(self) -> None:
        super().__init__()
        self.recurrent, self.one, self.two = nn.GRU(1, 4, batch_first=True), nn.Linear(4, 4), nn.Linear(4, 4)
        self.two.weight = self.one.weight
        self.head = nn.utils.parametrizations.weight_norm(nn.Linear(4, 2))
        self.kept = [self.head.bias.detach()]  # without a gradient it is no matter

    def forward(self, x: Tensor) -> Tensor:
        found = self.recurrent(x.unsqueeze(2))[0][:, -1]
        return self.head(self.two(torch.tanh(self.one(found)))) + 0 * self.kept[0].sum()


@pytest.mark.parametrize("way", ["alone", "stacked", None])
def test_layers_that_hold_or_share_their_weights_are_trained(way: str | None) -> None:
    model = Sound()
    before = {name: value.detach().clone() for name, value in model.named_parameters()}
    sf.federate(
        model, clients(), plan(False), algorithm=sf.FedAvg(SGD, local_steps=2), engine=sf.Simulation(way=way), loss=LOSS
    )
    assert all(not torch.equal(value.detach(), before[name]) for name, value in model.named_parameters())
