"""Models that use a linear layer's weight in another way too: fused or not, alone or stacked, the steps stay a plain loop's."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import sfumato as sf
from sfumato.gradients.support import trainable
from sfumato.learning.group_data import ALONE, STACKED
from sfumato.learning.groups import Group, Hints
from sfumato.learning.local_training import LocalTraining

SGD = functools.partial(torch.optim.SGD, lr=0.1)
STEPS = 4


class Base(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(5, 8)
        self.fc = nn.Linear(8, 3)


class ReturnsItsWeight(Base):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.fc(torch.tanh(self.a(x))), self.fc.weight


class InPlace(Base):
    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.a(x).relu_())


class Saliency(Base):
    def forward(self, x: Tensor) -> Tensor:
        x = x.detach().requires_grad_()
        (seen,) = torch.autograd.grad(self.a(x).sigmoid().sum(), x)
        return self.fc(torch.tanh(self.a(x * seen.detach())))


class VectorWeight(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.linspace(-1, 1, 5))
        self.fc = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x) * torch.sigmoid(F.linear(x.mean(0), self.w))


class Empty(Base):
    def forward(self, x: Tensor) -> Tensor:
        return self.fc(torch.tanh(self.a(x))) + self.a(x[:0]).sum()


class InnerVmap(Base):
    def forward(self, x: Tensor) -> Tensor:
        return torch.vmap(self.fc)(torch.tanh(self.a(x)))


class Recomputed(Base):
    def forward(self, x: Tensor) -> Tensor:
        hidden = checkpoint(lambda given: torch.tanh(self.a(given)), x, use_reentrant=False)
        assert isinstance(hidden, Tensor)
        return self.fc(hidden)


class OneBias(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w, self.b = nn.Parameter(torch.eye(3, 5)), nn.Parameter(torch.ones(1))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.w, self.b)


def penalised(outputs: tuple[Tensor, Tensor], targets: Tensor) -> Tensor:
    return F.cross_entropy(outputs[0], targets) + outputs[1].square().sum()


def some_records(clients: int = 3) -> list[sf.Records]:
    generator = torch.Generator().manual_seed(0)
    return [
        sf.Records(torch.randn(4, 5, generator=generator), torch.randint(0, 3, (4,), generator=generator))
        for _ in range(clients)
    ]


def by_hand(model: nn.Module, loss: Callable[..., Tensor], records: sf.Records) -> dict[str, Tensor]:
    own = copy.deepcopy(model)
    optimizer = SGD(own.parameters())
    for _ in range(STEPS):
        optimizer.zero_grad()
        loss(own(records.features), records.targets).backward()
        optimizer.step()
    return {name: value.detach() for name, value in trainable(own).items()}


@pytest.mark.parametrize("way", [ALONE, STACKED])
@pytest.mark.parametrize(
    "kind", [InPlace, ReturnsItsWeight, Saliency, VectorWeight, Empty, InnerVmap, Recomputed, OneBias]
)
def test_the_steps_are_those_of_a_plain_loop_or_the_way_is_refused(kind: type[nn.Module], way: str) -> None:
    torch.manual_seed(0)
    model, records = kind(), some_records()
    loss = penalised if kind is ReturnsItsWeight else F.cross_entropy
    group = Group(model, loss, range(len(records)), records, 1, way, Hints())
    if way == STACKED and kind in (Saliency, Recomputed):
        with pytest.raises(RuntimeError):  # which an engine takes for a way that does not do
            group.train(LocalTraining(SGD, steps=STEPS), {})
        return
    found = group.train(LocalTraining(SGD, steps=STEPS), {}).weights
    for row, one in enumerate(records):
        for name, value in by_hand(model, loss, one).items():
            assert torch.allclose(found[name][row], value, atol=1e-5), name


class Clipped(torch.optim.SGD):
    """Looks at all that it holds at once, so that stacked clients would move one another."""

    def step(self, closure: object = None) -> None:  # type: ignore[override]
        torch.nn.utils.clip_grad_norm_([p for group in self.param_groups for p in group["params"]], 0.01)
        super().step()


def test_an_optimiser_that_is_not_known_to_work_by_element_never_stacks_clients() -> None:
    def hooked(parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
        optimizer = SGD(parameters)
        optimizer.register_step_pre_hook(lambda *_: None)
        return optimizer

    assert sf.FedAvg(SGD).is_stackable(nn.Linear(2, 2))
    assert not sf.FedAvg(functools.partial(Clipped, lr=0.1)).is_stackable(nn.Linear(2, 2))
    assert not sf.FedAvg(hooked).is_stackable(nn.Linear(2, 2))
    clients = {f"c{index}": one for index, one in enumerate(some_records(40))}
    plan = sf.Plan.without_privacy(population=40, batch_size=40, steps=3, unit="client", sampling="full-batch")
    moved = []
    for engine in (sf.Simulation(), sf.Simulation(debug=True)):
        torch.manual_seed(0)
        model = nn.Linear(5, 3)
        algorithm = sf.FedAvg(functools.partial(Clipped, lr=0.1), local_steps=2)
        sf.federate(model, clients, plan, algorithm=algorithm, engine=engine, loss=F.cross_entropy)
        moved.append(model.weight.detach())
    assert torch.allclose(*moved, atol=1e-6)
