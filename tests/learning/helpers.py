"""Small pieces that the learning tests share."""

from __future__ import annotations

import math

import torch
from torch import nn

import sfumato as sf
from sfumato.learning.local_training import LocalTraining

LOSS = nn.functional.cross_entropy


def toy_records(count: int = 60, features: int = 4, seed: int = 0, owners: int = 3) -> sf.Records:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, features, generator=generator)
    y = (x[:, 0] + 0.3 * torch.randn(count, generator=generator) > 0).long()
    names = [f"site-{index}" for index in range(owners)]
    return sf.Records.from_arrays(x, y, (names, [index * owners // count for index in range(count)]), name="toy")


def toy_model(features: int = 4, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Linear(features, 2)


def toy_plan(
    epsilon: float = 2.0, population: int = 60, batch_size: int = 60, steps: int = 6, **more: object
) -> sf.Plan:
    budget = sf.Budget(epsilon, 1e-3, **{key: more.pop(key) for key in ("unit", "relation") if key in more})  # type: ignore[arg-type]
    return sf.Plan.calibrate(budget, population=population, batch_size=batch_size, steps=steps, **more)  # type: ignore[arg-type]


def sgd(model: nn.Module, lr: float = 0.5) -> torch.optim.SGD:
    return torch.optim.SGD(model.parameters(), lr=lr)


def flat(model: nn.Module) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def expected_steps(training: LocalTraining, records: int) -> int:
    """Return how many steps a client with so many records takes, said again in plain words."""
    if training.steps is not None:
        return training.steps
    assert training.epochs is not None
    return training.epochs * math.ceil(records / min(training.batch_size or records, records))
