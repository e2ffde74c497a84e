"""The reference path: clipped per-record gradients, against a loop that anybody can check by eye."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from sfumato.errors import InputError, UnsupportedModelError
from sfumato.gradients.clipped import ClippedSum
from sfumato.gradients.clipping import Clipping
from sfumato.gradients.per_record import clipped_gradient_sum
from sfumato.privacy.randomness import SeededSource

few = settings(max_examples=25, deadline=None)
FEATURES, CLASSES = 5, 3


def draw(seed: int, *shape: int) -> Tensor:
    return SeededSource(seed).normal(math.prod(shape)).view(shape)


def mlp(seed: int = 0, dtype: torch.dtype = torch.float64) -> nn.Module:
    model = nn.Sequential(nn.Linear(FEATURES, 4), nn.Tanh(), nn.Linear(4, CLASSES)).to(dtype)
    with torch.no_grad():
        for index, parameter in enumerate(model.parameters()):
            parameter.copy_(draw(100 * seed + index, *parameter.shape) * 0.5)
    return model


def batch(seed: int, count: int, scale: float = 1.0) -> tuple[Tensor, Tensor]:
    return draw(seed, count, FEATURES) * scale, torch.arange(count) % CLASSES


def naive(model: nn.Module, features: Tensor, targets: Tensor, clip: float) -> dict[str, Tensor]:
    names, parameters = zip(*model.named_parameters(), strict=True)
    total = {name: torch.zeros_like(p) for name, p in zip(names, parameters, strict=True)}
    for feature, target in zip(features, targets, strict=True):
        loss = F.cross_entropy(model(feature[None]), target[None])
        gradients = torch.autograd.grad(loss, parameters)
        norm = math.sqrt(sum(float(g.square().sum()) for g in gradients))
        factor = min(1.0, clip * (1 - 2.0**-11) / norm) if norm else 1.0
        for name, gradient in zip(names, gradients, strict=True):
            total[name] += factor * gradient
    return total


def clipped(model: nn.Module, features: Tensor, targets: Tensor, clip: float, **more: int) -> ClippedSum:
    return clipped_gradient_sum(model, F.cross_entropy, features, targets, clipping=Clipping(clip), **more)


def flat(result: ClippedSum) -> Tensor:
    return torch.cat([tensor.flatten() for tensor in result.bounded.value.values()])


@few
@given(
    seed=st.integers(min_value=0, max_value=99),
    count=st.integers(min_value=1, max_value=12),
    scale=st.sampled_from([0.01, 1.0, 30.0]),
    clip=st.floats(min_value=0.01, max_value=20.0),
)
def test_the_sum_equals_a_loop_over_records_with_plain_autograd(
    seed: int, count: int, scale: float, clip: float
) -> None:
    model = mlp(seed)
    features, targets = batch(seed, count, scale)
    result = clipped(model, features, targets, clip)
    expected = naive(model, features, targets, clip)
    assert result.nonfinite == 0
    assert result.bounded.norm_bound == clip
    assert list(result.bounded.value) == list(expected)
    for name, tensor in result.bounded.value.items():
        assert tensor.dtype is torch.float64
        assert torch.allclose(tensor, expected[name], rtol=1e-9, atol=1e-12 * clip)


HUGE = st.sampled_from([0.0, 1.0, -1e3, 1e20, -1e38, 3e38, math.inf, -math.inf, math.nan])
ROWS = st.lists(st.lists(HUGE, min_size=FEATURES, max_size=FEATURES), min_size=1, max_size=6)


@few
@given(
    rows=ROWS,
    dtype=st.sampled_from([torch.float32, torch.float64]),
    clip=st.floats(min_value=1e-3, max_value=100.0),
    seed=st.integers(min_value=0, max_value=9),
)
def test_removing_any_one_record_moves_the_sum_by_at_most_the_clip_norm(
    rows: list[list[float]], dtype: torch.dtype, clip: float, seed: int
) -> None:
    model = mlp(seed, dtype)
    usual = draw(seed, 4, FEATURES).to(dtype) * 3
    features = torch.cat([torch.tensor(rows, dtype=dtype), usual])
    targets = torch.arange(len(features)) % CLASSES
    whole = flat(clipped(model, features, targets, clip))
    assert bool(torch.isfinite(whole).all())
    for gone in range(len(features)):
        kept = torch.arange(len(features)) != gone
        moved = whole - flat(clipped(model, features[kept], targets[kept], clip))
        assert float(moved.norm()) <= clip


def test_a_record_that_is_clipped_moves_the_sum_by_nearly_the_clip_norm() -> None:
    features, targets = batch(0, 1, 1000.0)
    assert 0.9 * 0.1 < float(flat(clipped(mlp(), features, targets, 0.1)).norm()) < 0.1


@pytest.mark.parametrize("broken", [math.nan, math.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_records_with_broken_gradients_add_zero_and_are_counted(broken: float, dtype: torch.dtype) -> None:
    features, targets = batch(1, 6)
    features = features.to(dtype)
    sound = torch.tensor([0, 2, 3, 5])
    features[[1, 4], 0] = broken
    with_broken = clipped(mlp(dtype=dtype), features, targets, 1.0)
    without = clipped(mlp(dtype=dtype), features[sound], targets[sound], 1.0)
    assert (with_broken.nonfinite, without.nonfinite) == (2, 0)
    assert torch.allclose(flat(with_broken), flat(without), rtol=1e-5, atol=1e-6)
    assert float(flat(with_broken).norm()) > 0.1


def test_a_batch_of_broken_records_adds_nothing() -> None:
    result = clipped(mlp(), torch.full((3, FEATURES), math.nan, dtype=torch.float64), torch.zeros(3).long(), 1.0)
    assert result.nonfinite == 3
    assert not bool(flat(result).any())


@few
@given(count=st.integers(min_value=1, max_value=20), microbatch=st.integers(min_value=1, max_value=25))
def test_the_microbatch_does_not_change_the_result(count: int, microbatch: int) -> None:
    features, targets = batch(2, count)
    features[count // 2, 1] = math.nan
    one = clipped(mlp(), features, targets, 0.7)
    other = clipped(mlp(), features, targets, 0.7, microbatch=microbatch)
    assert one.nonfinite == other.nonfinite == 1
    assert torch.allclose(flat(one), flat(other), rtol=1e-10, atol=1e-13)


def test_an_empty_batch_adds_zero() -> None:
    result = clipped(mlp(), *batch(0, 0), 1.0)
    assert result.nonfinite == 0
    assert {name: t.shape for name, t in result.bounded.value.items()} == {
        name: p.shape for name, p in mlp().named_parameters()
    }
    assert not bool(flat(result).any())


def test_a_parameter_that_the_output_does_not_depend_on_adds_zero() -> None:
    class WithSpare(nn.Linear):
        def __init__(self) -> None:
            super().__init__(FEATURES, CLASSES, dtype=torch.float64)
            self.unused = nn.Parameter(torch.ones(2, dtype=torch.float64))

    value = clipped(WithSpare(), *batch(0, 3), 1.0).bounded.value
    assert value["unused"].tolist() == [0.0, 0.0]
    assert bool(value["weight"].any())


def test_each_record_draws_its_own_dropout_mask() -> None:
    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(64, dtype=torch.float64))

        def forward(self, x: Tensor) -> Tensor:
            return F.dropout(x * self.weight, 0.5, self.training).sum(1)

    features = torch.ones(40, 64, dtype=torch.float64)
    result = clipped_gradient_sum(Masked(), lambda out, _: out.sum(), features, torch.zeros(40), clipping=Clipping(1e6))
    # One mask for all would leave every coordinate at 0 or at 2 * 40.
    hits = result.bounded.value["weight"] / 2
    assert bool(((hits > 0) & (hits < 40)).all())


def test_frozen_parameters_are_left_out() -> None:
    model = mlp()
    model[0].requires_grad_(False)
    assert list(clipped(model, *batch(0, 3), 1.0).bounded.value) == ["2.weight", "2.bias"]


def test_the_model_is_left_as_it_was() -> None:
    model = mlp()
    before, module_types = copy.deepcopy(model.state_dict()), [type(m) for m in model.modules()]
    parameters = [id(p) for p in model.parameters()]
    attributes = [sorted(vars(m)) for m in model.modules()]
    own = [sorted(vars(p)) for p in model.parameters()]
    clipped(model, *batch(0, 5), 1.0)
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert [type(m) for m in model.modules()] == module_types
    assert [id(p) for p in model.parameters()] == parameters
    assert [sorted(vars(m)) for m in model.modules()] == attributes
    assert [sorted(vars(p)) for p in model.parameters()] == own
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    assert not any(
        m._forward_hooks or m._forward_pre_hooks or m._backward_hooks or m._backward_pre_hooks for m in model.modules()
    )
    assert model.training


def test_the_sum_holds_no_graph() -> None:
    for tensor in clipped(mlp(), *batch(0, 3), 1.0).bounded.value.values():
        assert not tensor.requires_grad


def test_batch_norm_is_refused_by_name_with_group_norm_as_the_fix() -> None:
    model = nn.Sequential(nn.Linear(FEATURES, 4), nn.BatchNorm1d(4), nn.Linear(4, CLASSES)).double()
    with pytest.raises(UnsupportedModelError, match=r'"1" is BatchNorm1d.*GroupNorm'):
        clipped(model, *batch(0, 3), 1.0)


def test_a_model_that_cannot_run_one_record_at_a_time_is_refused() -> None:
    class Decides(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x if x.sum() > 0 else -x)

    with pytest.raises(UnsupportedModelError, match=r"Decides or the loss .* a decision on a tensor's value"):
        clipped(Decides(FEATURES, CLASSES).double(), *batch(0, 3), 1.0)


@pytest.mark.parametrize("clip", [0, -1.0, math.nan, math.inf])
def test_a_clip_norm_that_bounds_nothing_is_refused(clip: float) -> None:
    with pytest.raises(InputError, match="clip norm"):
        clipped(mlp(), *batch(0, 3), clip)
