"""The promise of the fast path: no record moves the sum by more than the clip norm, however the work is cut up."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from gradient_checks import (
    DOUBLE,
    SINGLE,
    Case,
    First,
    check_agreement,
    check_bound,
    flat,
    normals,
    tokens,
    with_values,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from sfumato.errors import InputError, UnsupportedModelError
from sfumato.gradients.clipping import KINDS, MAX_UNITS, Clipping
from sfumato.gradients.compute import Compute
from sfumato.gradients.private import PrivateGradient

CLASSES, WIDTH, STEPS = 3, 4, 3


def classes(outputs: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(outputs.float() if outputs.dtype is torch.bfloat16 else outputs, targets)


def head() -> list[nn.Module]:
    return [nn.Flatten(), nn.Linear(STEPS * WIDTH, CLASSES)]


class Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale


MODELS: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: nn.Sequential(*head()),
    "two layers": lambda: nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh(), *head()),
    "convolution": lambda: nn.Sequential(nn.Conv1d(STEPS, STEPS, 3, padding=1), nn.ReLU(inplace=True), *head()),
    "norms": lambda: nn.Sequential(nn.GroupNorm(1, STEPS), nn.LayerNorm(WIDTH), nn.InstanceNorm1d(STEPS, affine=True), *head()),
    "recurrence": lambda: nn.Sequential(First(nn.LSTM(WIDTH, WIDTH, batch_first=True)), *head()),
    "attention": lambda: nn.Sequential(First(nn.MultiheadAttention(WIDTH, 2, batch_first=True), 3), *head()),
    "a scale": lambda: nn.Sequential(Scaled(), nn.PReLU(), *head()),
}  # fmt: skip


def case_of(model: str, seed: int, count: int, dtype: torch.dtype = DOUBLE) -> Case:
    made = with_values(MODELS[model](), seed, dtype)
    features = normals(seed + 1, count, STEPS, WIDTH).to(dtype)
    return Case(made, features, torch.arange(count) % CLASSES, classes)


HUGE = st.sampled_from([0.0, 1.0, -1e3, 1e-30, 1e18, -1e18, 1e20, -1e38, 3e38, math.inf, -math.inf, math.nan])
CLIPS = st.sampled_from([1e-12, 1e-6, 3.3e-5, 1e-3, 1.0, 100.0])


@pytest.mark.parametrize("model", MODELS)
@settings(max_examples=12, deadline=None)
@given(
    hostile=st.lists(HUGE, min_size=STEPS * WIDTH, max_size=STEPS * WIDTH),
    dtype=st.sampled_from([SINGLE, DOUBLE]),
    clip=CLIPS,
    kind=st.sampled_from(KINDS),
    seed=st.integers(0, 10**6),
)
def test_removing_any_one_record_moves_the_sum_by_at_most_the_clip_norm(
    model: str, hostile: list[float], dtype: torch.dtype, clip: float, kind: str, seed: int
) -> None:
    case = case_of(model, seed, 4, dtype)
    case.features[2] = torch.tensor(hostile, dtype=dtype).view(STEPS, WIDTH)
    check_bound(case, Clipping(clip, kind), range(4))


@settings(max_examples=60, deadline=None)
@given(
    size=st.sampled_from([1e-38, 1e-23, 1e-8, 1.0, 1e18, 1e37, 3e38]),
    steep=st.sampled_from([1e-38, 1e-23, 1e-8, 1.0, 1e8, 1e18, 1e37]),
    positions=st.sampled_from([1, 4]),
    clipping=st.builds(Clipping, CLIPS, st.sampled_from(KINDS)),
    seed=st.integers(0, 10**6),
)
def test_inputs_and_gradients_of_any_scale_stay_within_the_clip_norm(
    size: float, steep: float, positions: int, clipping: Clipping, seed: int
) -> None:
    """The gradient is input times slope, each as large or as small as single precision takes."""
    inputs = normals(seed, 3, positions, WIDTH).clamp(-1, 1).to(SINGLE)
    inputs[1] *= size
    slopes = torch.ones(3)
    slopes[1] = steep
    model = with_values(nn.Linear(WIDTH, 2), seed, SINGLE)
    case = Case(model, inputs, slopes, lambda out, slope: (out.sum(2) * slope).sum())
    check_bound(case, clipping, range(3))


@pytest.mark.parametrize("clip", [1e-5, 3.3e-6, 1e-6])
def test_a_factor_below_the_smallest_normal_number_is_not_rounded_up(clip: float) -> None:
    """Cross-entropy of a new model, one input near the largest float32: its factor is as small as 1e-44."""
    model = nn.Linear(3, 2)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    case = Case(model, torch.tensor([[3e38, 0.0, 0.0]]), torch.zeros(1).long(), F.cross_entropy)
    assert float(flat(case.fast(Clipping(clip))).norm()) <= clip


def test_a_factor_above_one_does_not_make_a_large_factor_infinite() -> None:
    case = Case(
        nn.Linear(3, 2, bias=False), torch.full((2, 3), 1e-37), torch.zeros(2), lambda out, _: (out * 1e37).sum()
    )
    total = flat(case.fast(Clipping(100.0, "normalised")))
    assert bool(torch.isfinite(total).all())
    assert 100 < float(total.norm()) <= 200


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 10**6), scale=st.floats(-15, 15), apart=st.floats(-8, 0),
    clipping=st.builds(Clipping, st.sampled_from([1e-6, 1.0, 100.0]), st.sampled_from(KINDS)),
)  # fmt: skip
def test_a_record_whose_positions_cancel_moves_the_sum_by_at_most_the_clip_norm(
    seed: int, scale: float, apart: float, clipping: Clipping
) -> None:
    """64 positions with huge factors, half of which nearly take back what the other half adds."""
    inputs = normals(seed, 3, 64, 12)
    near = inputs[1, :32] * (1 + 10**apart * normals(seed + 1, 32, 12))
    inputs[1] = torch.cat([inputs[1, :32], near]) * 10**scale
    signs = torch.cat([torch.ones(32), -torch.ones(32)]).view(64, 1)
    model = with_values(nn.Linear(12, 10), seed, SINGLE)
    ramp = torch.linspace(-1, 2, 10)
    case = Case(model, inputs.to(SINGLE), torch.zeros(3), lambda out, _: (out * ramp * signs).sum())
    check_bound(case, clipping, range(3))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("broken", [math.nan, math.inf])
@pytest.mark.parametrize("model", MODELS)
def test_broken_records_add_zero_and_are_counted(model: str, broken: float, kind: str) -> None:
    case = case_of(model, 0, 6)
    case.features[[1, 4]] = broken
    sound = torch.tensor([0, 2, 3, 5])
    whole = case.fast(Clipping(1.0, kind))
    kept = Case(case.model, case.features[sound], case.targets[sound], classes).fast(Clipping(1.0, kind))
    assert (whole.nonfinite, kept.nonfinite) == (2, 0)
    assert torch.allclose(flat(whole), flat(kept), rtol=1e-10, atol=1e-14)
    assert float(flat(whole).norm()) > 0.1


def test_a_batch_of_broken_records_adds_nothing() -> None:
    case = case_of("two layers", 0, 11)
    case.features.fill_(math.nan)
    result = case.fast(Clipping(1.0))
    assert result.nonfinite == 11
    assert not bool(flat(result).any())


def test_a_record_that_is_clipped_moves_the_sum_by_nearly_the_clip_norm() -> None:
    """The bound is no slack one: without this, a sum of zeros would pass all tests above."""
    for model in MODELS:
        case = case_of(model, 0, 1, SINGLE)
        assert 0.99e-3 < float(flat(case.fast(Clipping(1e-3))).norm()) < 1e-3


@pytest.mark.parametrize("model", MODELS)
@settings(max_examples=8, deadline=None)
@given(
    count=st.integers(0, 30), megabytes=st.floats(-8, 1), kind=st.sampled_from(KINDS), dtype=st.sampled_from([SINGLE, DOUBLE])
)  # fmt: skip
def test_the_microbatch_changes_nothing_but_rounding(
    model: str, count: int, megabytes: float, kind: str, dtype: torch.dtype
) -> None:
    case = case_of(model, count, count, dtype)
    if count:
        case.features[count // 2] = math.nan
    clipping = Clipping(0.7, kind)
    check_agreement(
        case.fast(clipping, compute=Compute(memory_mb=10**megabytes)),
        case.loop(clipping),
        1e-10 if dtype is DOUBLE else 1e-4,
    )


def test_one_gradient_serves_batches_of_any_size() -> None:
    case = case_of("convolution", 0, 40)
    gradient = PrivateGradient(case.model, case.loss, Clipping(0.5))
    for count in (1, 40, 0, 9, 8, 3):
        part = replace(case, features=case.features[:count], targets=case.targets[:count])
        check_agreement(gradient.sum(part.features, part.targets), part.loop(Clipping(0.5)), 1e-10)


def test_an_empty_batch_adds_zero_in_the_shapes_of_the_parameters() -> None:
    case = case_of("attention", 0, 0)
    result = case.fast(Clipping(1.0))
    assert {n: t.shape for n, t in result.bounded.value.items()} == {
        n: p.shape for n, p in case.model.named_parameters()
    }
    assert not bool(flat(result).any())
    assert (result.nonfinite, result.bounded.norm_bound) == (0, 1.0)


@pytest.mark.parametrize("dtype", [SINGLE, DOUBLE])
@pytest.mark.parametrize("count", [0, 1, 8, 9])
def test_names_order_and_bound_do_not_depend_on_the_batch(count: int, dtype: torch.dtype) -> None:
    case = case_of("recurrence", 0, count, dtype)
    result = case.fast(Clipping(0.25))
    assert list(result.bounded.value) == [name for name, _ in case.model.named_parameters()]
    assert result.bounded.norm_bound == 0.25
    assert all(t.is_floating_point() and not t.requires_grad for t in result.bounded.value.values())


def test_a_batch_beyond_what_the_margin_covers_is_refused() -> None:
    gradient = PrivateGradient(nn.Linear(1, 1), lambda out, _: out.sum(), Clipping(1.0))
    with pytest.raises(UnsupportedModelError, match="at most 1048576 records"):
        gradient.sum(torch.zeros(1, 1).expand(MAX_UNITS + 1, 1), torch.zeros(1).expand(MAX_UNITS + 1))


def test_the_loss_is_called_with_one_record_at_a_time() -> None:
    shapes: list[tuple[torch.Size, torch.Size]] = []

    def loss(out: Tensor, target: Tensor) -> Tensor:
        shapes.append((out.shape, target.shape))
        return out.square().sum()

    PrivateGradient(nn.Linear(3, 2), loss, Clipping(1.0)).sum(torch.ones(20, 3), torch.zeros(20, 5))
    assert set(shapes) == {((1, 2), (1, 5))}


@settings(max_examples=15, deadline=None)
@given(views=st.integers(1, 4), count=st.integers(1, 10), kind=st.sampled_from(KINDS), seed=st.integers(0, 10**6))
def test_equal_views_of_a_record_count_as_the_record(views: int, count: int, kind: str, seed: int) -> None:
    case = case_of("two layers", seed, count)
    many = replace(case, features=case.features.unsqueeze(1).expand(-1, views, -1, -1))
    clipping = Clipping(0.05, kind)
    check_agreement(many.fast(clipping, views=True), case.loop(clipping), 1e-10)


@settings(max_examples=15, deadline=None)
@given(hostile=st.lists(HUGE, min_size=STEPS * WIDTH, max_size=STEPS * WIDTH), kind=st.sampled_from(KINDS))
def test_a_hostile_view_moves_the_sum_by_at_most_the_clip_norm(hostile: list[float], kind: str) -> None:
    case = case_of("two layers", 3, 3, SINGLE)
    views = torch.stack([case.features, case.features * 2], 1)
    views[1, 1] = torch.tensor(hostile).view(STEPS, WIDTH)
    kept = torch.tensor([0, 2])
    whole = flat(replace(case, features=views).fast(Clipping(0.3, kind), views=True))
    rest = replace(case, features=views[kept], targets=case.targets[kept])
    assert float((whole - flat(rest.fast(Clipping(0.3, kind), views=True))).norm()) <= 0.3


AUTOCAST = Compute(autocast=True)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("model", MODELS)
def test_autocast_stays_near_the_single_precision_sum_and_within_the_clip_norm(model: str, kind: str) -> None:
    case, clipping = case_of(model, 5, 6, SINGLE), Clipping(0.5, kind)
    plain, mixed = flat(case.fast(clipping)), flat(case.fast(clipping, compute=AUTOCAST))
    assert bool(torch.isfinite(mixed).all())
    assert float((mixed - plain).norm()) <= 0.05 * float(plain.norm())
    check_bound(case, clipping, range(6), compute=lambda: AUTOCAST)
    for record in range(6):
        kept = torch.arange(6) == record
        alone = replace(case, features=case.features[kept], targets=case.targets[kept])
        assert float(flat(alone.fast(Clipping(1e-4, kind), compute=AUTOCAST)).norm()) <= 1e-4


class Matrix(nn.Module):
    """A matrix product with a parameter of the model's own, after a layer whose output is bfloat16."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.matrix = nn.Linear(WIDTH, WIDTH), nn.Parameter(torch.ones(WIDTH, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) @ self.matrix


@pytest.mark.parametrize("made", [Matrix, lambda: nn.Sequential(nn.Linear(WIDTH, WIDTH), Scaled())])
def test_autocast_of_an_operation_without_a_rule(made: Callable[[], nn.Module]) -> None:
    model = with_values(nn.Sequential(made(), *head()), 0, SINGLE)
    case = replace(case_of("linear", 0, 6, SINGLE), model=model)
    plain, mixed = (flat(case.fast(Clipping(0.5), compute=compute)) for compute in (Compute(), AUTOCAST))
    assert float((mixed - plain).norm()) <= 0.05 * float(plain.norm())


def test_autocast_really_lowers_the_precision_of_the_forward() -> None:
    seen: list[torch.dtype] = []

    def loss(out: Tensor, target: Tensor) -> Tensor:
        seen.append(out.dtype)
        return out.float().square().sum()

    gradient = PrivateGradient(nn.Linear(3, 2), loss, Clipping(1.0), compute=AUTOCAST)
    assert gradient.sum(torch.ones(2, 3), torch.zeros(2)).bounded.value["weight"].dtype in (SINGLE, DOUBLE)
    assert seen == [torch.bfloat16]
    assert not torch.is_autocast_enabled("cpu")


def test_autocast_of_a_table_of_tokens() -> None:
    model = with_values(nn.Sequential(nn.Embedding(5, WIDTH), *head()), 0, SINGLE)
    case = Case(model, tokens(1, 5, 6, STEPS), torch.arange(6) % CLASSES, classes)
    plain, mixed = (flat(case.fast(Clipping(0.5), compute=compute)) for compute in (Compute(), AUTOCAST))
    assert float((mixed - plain).norm()) <= 0.05 * float(plain.norm())


def test_a_model_of_half_precision_is_summed_in_more() -> None:
    case = case_of("two layers", 0, 20, SINGLE)
    plain = flat(case.fast(Clipping(0.5)))
    half = Case(case.model.bfloat16(), case.features.bfloat16(), case.targets, classes)
    result = half.fast(Clipping(0.5))
    assert all(t.dtype in (SINGLE, DOUBLE) for t in result.bounded.value.values())
    assert float((flat(result) - plain).norm()) <= 0.05 * float(plain.norm())


@pytest.mark.parametrize("megabytes", [0, -1.0, math.nan, math.inf])
def test_a_memory_limit_that_limits_nothing_is_refused(megabytes: float) -> None:
    with pytest.raises(InputError, match="memory_mb"):
        Compute(memory_mb=megabytes)


@pytest.mark.slow
@settings(max_examples=40, deadline=None)
@given(
    rows=st.lists(st.lists(HUGE, min_size=STEPS * WIDTH, max_size=STEPS * WIDTH), min_size=1, max_size=4),
    clip=CLIPS, kind=st.sampled_from(KINDS), seed=st.integers(0, 99),
)  # fmt: skip
def test_several_hostile_records_each_move_the_sum_by_at_most_the_clip_norm(
    rows: list[list[float]], clip: float, kind: str, seed: int
) -> None:
    usual = case_of("two layers", seed, 3, SINGLE)
    features = torch.cat([torch.tensor(rows).view(-1, STEPS, WIDTH), usual.features])
    case = replace(usual, features=features, targets=torch.arange(len(features)) % CLASSES)
    check_bound(case, Clipping(clip, kind), range(len(features)))
