"""What the tests of the fast path share: generated models' parameters, and the sum by a loop of plain autograd over records."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sfumato.gradients.clipped import ClippedSum, Loss
from sfumato.gradients.clipping import Clipping
from sfumato.gradients.compute import DEFAULT, Compute
from sfumato.gradients.per_record import clipped_gradient_sum
from sfumato.gradients.private import PrivateGradient
from sfumato.privacy.bounded import Bounded
from sfumato.privacy.randomness import SeededSource

DOUBLE, SINGLE = torch.float64, torch.float32


def normals(seed: int, *shape: int) -> Tensor:
    return SeededSource(seed).normal(math.prod(shape)).view(shape)


def tokens(seed: int, rows: int, *shape: int) -> Tensor:
    """Return few different tokens, so that some are read twice."""
    return (normals(seed, *shape).abs() * 2.5).long() % rows


def with_values(model: nn.Module, seed: int, dtype: torch.dtype = DOUBLE) -> nn.Module:
    """Return the model with parameters none of which is 0 or 1 by default."""
    model = model.to(dtype)
    with torch.no_grad():
        for index, parameter in enumerate(model.parameters()):
            parameter.copy_(normals(1000 * seed + index, *parameter.shape) * 0.4 + 0.1)
    return model


def squares(outputs: Any, targets: Tensor) -> Tensor:
    """Return a smooth loss in which every output counts differently, also for bfloat16 and for models with several outputs."""
    total = torch.zeros((), dtype=targets.dtype)
    for output in outputs if isinstance(outputs, tuple) else (outputs,):
        if output is not None:
            rows = output.to(targets.dtype).flatten(1)
            ramp = torch.linspace(0.5, 1.5, rows.shape[1], dtype=targets.dtype)
            total = total + ((rows - targets.view(-1, 1)) * ramp).square().mean(1).mean()
    return total


class First(nn.Module):
    """A layer that returns several things, of which the first is wanted; it may want its input several times."""

    def __init__(self, layer: nn.Module, times: int = 1) -> None:
        super().__init__()
        self.layer, self.times = layer, times

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(*[x] * self.times)[0]


@dataclass(frozen=True)
class Case:
    model: nn.Module
    features: Tensor
    targets: Tensor
    loss: Loss = squares

    def fast(self, clipping: Clipping, *, compute: Compute = DEFAULT, views: bool = False) -> ClippedSum:
        gradient = PrivateGradient(self.model, self.loss, clipping, compute=compute, views=views)
        return gradient.sum(self.features, self.targets)

    def reference(self, clipping: Clipping, *, views: bool = False) -> ClippedSum:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch warns where vmap is slow
            return clipped_gradient_sum(
                self.model, self.loss, self.features, self.targets, clipping=clipping, views=views
            )

    def loop(self, clipping: Clipping, *, views: bool = False) -> ClippedSum:
        trained = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        total = {name: torch.zeros_like(p, dtype=DOUBLE) for name, p in trained.items()}
        nonfinite = 0
        for feature, target in zip(self.features, self.targets, strict=True):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                if views:
                    loss = self.loss(self.model(feature), target.expand(len(feature), *target.shape)).mean()
                else:
                    loss = self.loss(self.model(feature[None]), target[None]).sum()
                found = torch.autograd.grad(loss, list(trained.values()), allow_unused=True)
            gradients = {
                name: torch.zeros_like(p, dtype=DOUBLE) if g is None else g.to_dense().to(DOUBLE)
                for (name, p), g in zip(trained.items(), found, strict=True)
            }
            squared = {name: g.square().sum().view(1) for name, g in gradients.items()}
            factors, broken = clipping.factors(squared, trained)
            nonfinite += int(broken)
            if not broken:
                for name, gradient in gradients.items():
                    total[name] += factors[name][0] * gradient
        return ClippedSum(Bounded(total, clipping.norm), nonfinite)

    def without(self, record: int) -> Case:
        kept = torch.arange(len(self.features)) != record
        return Case(self.model, self.features[kept], self.targets[kept], self.loss)


def flat(result: ClippedSum) -> Tensor:
    return torch.cat([tensor.to(DOUBLE).flatten() for tensor in result.bounded.value.values()])


def check_agreement(fast: ClippedSum, expected: ClippedSum, tolerance: float) -> None:
    assert list(fast.bounded.value) == list(expected.bounded.value)
    for name, tensor in fast.bounded.value.items():
        assert tensor.shape == expected.bounded.value[name].shape
        assert not tensor.requires_grad
    assert fast.nonfinite == expected.nonfinite
    assert fast.bounded.norm_bound == expected.bounded.norm_bound
    right = flat(expected)
    # Records may cancel to nearly nothing, so a little of what each of them adds counts too.
    size = float(right.norm()) + 0.02 * min(fast.bounded.norm_bound, 1.0)
    assert float((flat(fast) - right).norm()) <= tolerance * size


def check_bound(
    case: Case, clipping: Clipping, records: Iterable[int], compute: Callable[[], Compute] = Compute
) -> None:
    """Check that removing any one of the records moves the sum by at most the clip norm."""
    whole = flat(case.fast(clipping, compute=compute()))
    assert bool(torch.isfinite(whole).all())
    for record in records:
        moved = whole - flat(case.without(record).fast(clipping, compute=compute()))
        assert float(moved.norm()) <= clipping.norm
