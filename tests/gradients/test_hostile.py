"""Attacks on the bound that once worked: models that remember, records that cancel, one giant among many, threads, hooks."""

from __future__ import annotations

import threading

import pytest
import torch
from gradient_checks import normals, squares, with_values
from torch import Tensor, nn

from sfumato.errors import UnsupportedModelError
from sfumato.gradients.clipped import ClippedSum
from sfumato.gradients.clipping import Clipping
from sfumato.gradients.per_record import clipped_gradient_sum
from sfumato.gradients.private import PrivateGradient
from sfumato.gradients.terms.product import Product
from sfumato.gradients.terms.term import Weighting

KEPT: list[Tensor] = []


class Remembers(nn.Module):
    """Keeps a value of the records somewhere and uses it the next time."""

    def __init__(self, where: str) -> None:
        super().__init__()
        self.layer, self.where = nn.Linear(3, 2), where
        self.kept: object = None
        self.register_buffer("mean", torch.zeros(1, 2, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        out = torch.tanh(self.layer(x))
        if self.where == "attribute":
            self.kept = out.detach()
        elif self.where == "list":
            self.kept = [{"out": (out.detach(),)}]
        elif self.where == "buffer":
            self.mean = 0.9 * self.mean + out.detach()
        else:
            KEPT.append(out.detach())
        return out


@pytest.mark.parametrize("where", ["attribute", "list", "buffer"])
@pytest.mark.parametrize("path", ["fast", "reference"])
def test_a_model_that_keeps_values_of_the_records_is_refused_by_name(where: str, path: str) -> None:
    model = with_values(Remembers(where), 1)
    features, targets = normals(1, 4, 3), normals(2, 4)

    def run() -> None:
        if path == "fast":
            PrivateGradient(model, squares, Clipping(1.0)).sum(features, targets)
        else:
            clipped_gradient_sum(model, squares, features, targets, clipping=Clipping(1.0))

    with pytest.raises(UnsupportedModelError, match=r'attribute "(kept|mean)", keeps a value of the records'):
        run()


def test_what_is_kept_outside_of_the_model_is_refused_too() -> None:
    KEPT.clear()
    model = with_values(Remembers("a global list"), 1)
    try:
        with pytest.raises(UnsupportedModelError, match="keeps a value of the records"):
            PrivateGradient(model, squares, Clipping(1.0)).sum(normals(1, 4, 3), normals(2, 4))
    finally:
        KEPT.clear()


def test_a_loss_that_keeps_values_of_the_records_is_refused() -> None:
    class Centre(nn.Module):
        def forward(self, outputs: Tensor, targets: Tensor) -> Tensor:
            self.centre = outputs.detach()
            return outputs.square().mean()

    with pytest.raises(UnsupportedModelError, match='attribute "centre"'):
        PrivateGradient(nn.Linear(3, 2), Centre(), Clipping(1.0)).sum(torch.ones(4, 3), torch.zeros(4))


@pytest.mark.parametrize(("positions", "m", "n"), [(16, 256, 256), (2, 1024, 512), (64, 256, 128)])
def test_positions_that_nearly_cancel_stay_within_the_clip_norm_by_every_strategy(
    positions: int, m: int, n: int
) -> None:
    sign = torch.tensor([1.0, -1.0]).repeat(positions // 2)
    for base, rest in ((1.1427462697029114, 0.0584), (1.0859872698783875, 2e-3), (1.3592376708984375, 1e-4)):
        left = ((base * sign + rest).view(1, positions, 1) * torch.ones(1, positions, m)).float()
        term = Product("w", left, torch.full((1, positions, n), base), torch.Size((m, n)))
        for name, way in term.strategies().items():
            part = way.make()
            factors, _ = Clipping(1.0).factors({"w": part.squared}, ["w"])
            moved = part.weighted_sum(Weighting(factors["w"])).double().norm()
            assert float(moved) <= 1.0, name


@pytest.mark.parametrize("giant", [1.0, 1e25])
def test_in_a_large_batch_no_record_moves_the_sum_by_more_giants_or_not(giant: float) -> None:
    count = 20_000
    model = nn.Linear(4, 1)
    features = torch.ones(count, 4)
    features[0] *= giant
    gradient = PrivateGradient(model, lambda out, _: out.sum(), Clipping(0.9))

    def flat(result: ClippedSum) -> Tensor:
        return torch.cat([tensor.double().flatten() for tensor in result.bounded.value.values()])

    targets = torch.zeros(count)
    whole = flat(gradient.sum(features, targets))
    for gone in (0, 7, count - 1):
        kept = torch.arange(count) != gone
        assert float((whole - flat(gradient.sum(features[kept], targets[kept]))).norm()) <= 0.9


def test_threads_that_share_a_gradient_take_turns() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Tanh(), nn.Flatten(), nn.Linear(8 * 14 * 14, 2))
    gradient = PrivateGradient(model, lambda out, _: out.square().mean(), Clipping(1.0))
    small, large = torch.randn(16, 3, 16, 16) * 1e-3, torch.randn(16, 3, 16, 16) * 1e3
    gradient.sum(small, torch.zeros(16))
    norms: list[float] = []

    def work(features: Tensor) -> None:
        for _ in range(10):
            value = gradient.sum(features, torch.zeros(16)).bounded.value
            norms.append(float(torch.cat([tensor.flatten() for tensor in value.values()]).norm()))

    threads = [threading.Thread(target=work, args=(features,)) for features in (small, large)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(norms) == 20
    assert max(norms) <= 16


def test_hooks_on_gradients_are_refused_because_they_would_be_passed_by() -> None:
    hooked = nn.Linear(3, 2)
    hooked.weight.register_hook(lambda gradient: gradient * 0.1)
    with pytest.raises(UnsupportedModelError, match='Parameter "weight" has a gradient hook'):
        PrivateGradient(hooked, squares, Clipping(1.0))
    module = nn.Sequential(nn.Linear(3, 2))
    module[0].register_full_backward_hook(lambda *_: None)
    with pytest.raises(UnsupportedModelError, match='Module "0" is Linear with a backward hook'):
        PrivateGradient(module, squares, Clipping(1.0))


def test_a_parameter_may_have_any_name_beside_a_computed_one() -> None:
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_parameter("computed 0", nn.Parameter(torch.ones(2, 3, dtype=torch.float64)))
            self.scale = nn.Parameter(torch.ones(2, 1, dtype=torch.float64))

        def forward(self, x: Tensor) -> Tensor:
            weight = getattr(self, "computed 0")
            return nn.functional.linear(x, weight * self.scale) + nn.functional.linear(x, weight)

    model = with_values(Named(), 4)
    features, targets = normals(1, 5, 3), normals(2, 5)
    fast = PrivateGradient(model, squares, Clipping(0.1)).sum(features, targets).bounded.value
    slow = clipped_gradient_sum(model, squares, features, targets, clipping=Clipping(0.1)).bounded.value
    for name, tensor in slow.items():
        assert torch.allclose(fast[name], tensor, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("frozen", [True, False])
def test_a_number_for_each_record_is_not_taken_for_a_vector_over_the_records(frozen: bool) -> None:
    """As many inputs as records: opened, the numbers of all records would fit a layer that none of them fits alone."""

    class Mixing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mixes, self.head = nn.Linear(4, 4, bias=False).requires_grad_(not frozen), nn.Linear(3, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(x) + nn.functional.linear(x.sum(), self.mixes.weight).sum()

    private = PrivateGradient(with_values(Mixing(), 1), squares, Clipping(1.0))
    with pytest.raises(UnsupportedModelError, match="RuntimeError"):
        private.sum(normals(1, 4, 3), normals(2, 4))
