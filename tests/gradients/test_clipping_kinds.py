"""The kinds of clipping: what each does to a record, and that none lets a record through above the clip norm."""

from __future__ import annotations

import math

import pytest
import torch
from gradient_checks import DOUBLE, Case, flat, normals, with_values
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from sfumato.errors import InputError
from sfumato.gradients.clipping import KINDS, Clipping, check_kind

NAMES = ["body.weight", "body.bias", "head.weight", "scale"]
CLIP = st.floats(min_value=1e-6, max_value=1e6)
SQUARED = st.lists(
    st.lists(st.floats(0, 1e150) | st.sampled_from([0.0, math.inf, math.nan]), min_size=4, max_size=4),
    min_size=1,
    max_size=5,
)


def by_name(rows: list[list[float]]) -> dict[str, Tensor]:
    columns = torch.tensor(rows, dtype=DOUBLE).t()
    return dict(zip(NAMES, columns, strict=True))


@given(rows=SQUARED, clip=CLIP, kind=st.sampled_from(KINDS))
def test_no_kind_leaves_a_record_above_the_clip_norm(rows: list[list[float]], clip: float, kind: str) -> None:
    squared = by_name(rows)
    factors, broken = Clipping(clip, kind).factors(squared, NAMES)
    assert list(factors) == NAMES
    assert broken.tolist() == [not all(map(math.isfinite, row)) for row in rows]
    for name in NAMES:
        assert factors[name].dtype is DOUBLE
        assert bool((factors[name][broken] == 0).all())
        assert bool((factors[name] >= 0).all())
    sound = ~broken
    total = sum((factors[name] * squared[name].sqrt())[sound].square() for name in NAMES)
    assert bool((torch.as_tensor(total).sqrt() < clip).all())


def test_flat_scales_the_whole_gradient_by_one_factor() -> None:
    factors, _ = Clipping(2.0).factors(by_name([[9.0, 0, 7, 0], [0.1, 0.1, 0.1, 0.1]]), NAMES)
    for name in NAMES:
        assert factors[name].tolist() == pytest.approx([0.5, 1.0], rel=1e-3)


def test_per_layer_scales_each_layer_to_its_share() -> None:
    """Three layers: body, head and the model itself, each may have 3 / sqrt(3)."""
    squared = by_name([[9.0, 16.0, 0.01, 100.0]])
    factors, _ = Clipping(3.0, "per-layer").factors(squared, NAMES)
    share = 3 / math.sqrt(3)
    found = [float(factors[name]) for name in NAMES]
    assert found == pytest.approx([share / 5, share / 5, 1.0, share / 10], rel=1e-3)


def test_per_layer_counts_trained_layers_whether_or_not_the_loss_reached_them() -> None:
    alone, _ = Clipping(1.0, "per-layer").factors({"head.weight": torch.tensor([1e4], dtype=DOUBLE)}, NAMES)
    assert float(alone["head.weight"]) == pytest.approx(0.01 / math.sqrt(3), rel=1e-3)


def test_normalised_makes_large_gradients_the_clip_norm_and_lets_small_ones_be_small() -> None:
    squared = by_name([[1e8, 0, 0, 0], [1e-8, 0, 0, 0], [0.0] * 4])
    factors, broken = Clipping(5.0, "normalised").factors(squared, NAMES)
    norms = factors["head.weight"] * squared["body.weight"].sqrt()
    assert norms.tolist() == pytest.approx([5.0, 5 * 1e-4 / 0.0101, 0.0], rel=1e-3)
    assert not bool(broken.any())


@pytest.mark.parametrize("kind", KINDS)
def test_a_record_broken_in_one_layer_is_left_out_of_all(kind: str) -> None:
    factors, broken = Clipping(1.0, kind).factors(by_name([[1.0, 1.0, math.nan, 1.0]]), NAMES)
    assert broken.tolist() == [True]
    assert [float(factor) for factor in factors.values()] == [0.0] * 4


@settings(deadline=None, max_examples=15)
@given(seed=st.integers(0, 10**6), clip=st.sampled_from([0.01, 1.0, 1000.0]))
def test_the_kinds_of_one_record_differ_as_they_should(seed: int, clip: float) -> None:
    model = with_values(nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)), seed)
    case = Case(model, normals(seed, 1, 3), normals(seed + 1, 1))
    whole = {kind: case.fast(Clipping(clip, kind)) for kind in KINDS}
    raw = flat(case.fast(Clipping(1e9)))
    norm = float(raw.norm())
    assert torch.allclose(flat(whole["flat"]), raw * min(1.0, clip / norm), rtol=1e-3, atol=1e-12)
    assert torch.allclose(flat(whole["normalised"]), raw * clip / (norm + 0.01), rtol=1e-3, atol=1e-12)
    for layer in ("0.", "2."):
        mine = torch.cat(
            [t.flatten() for name, t in whole["per-layer"].bounded.value.items() if name.startswith(layer)]
        )
        assert float(mine.norm()) <= clip / math.sqrt(2)


def test_an_unknown_kind_is_refused_with_the_nearest_known_one() -> None:
    with pytest.raises(InputError, match=r'no clipping "per-laier".*per-layer'):
        Clipping(1.0, "per-laier")
    assert check_kind("flat") == "flat"


@pytest.mark.parametrize("norm", [0, -1.0, math.nan, math.inf])
def test_a_clip_norm_that_bounds_nothing_is_refused(norm: float) -> None:
    with pytest.raises(InputError, match="clip norm"):
        Clipping(norm)
