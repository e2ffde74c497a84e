"""Clip factors: no vector is left above the clip norm, none is scaled up, none that is broken counts."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sfumato.gradients.clipping import MAX_UNITS, Clipping, clip_factors, clip_vector

CLIP = st.floats(min_value=1e-6, max_value=1e6)
ANY = st.floats(allow_nan=True, allow_infinity=True)
FINITE = st.floats(min_value=-1e30, max_value=1e30)


@given(norms=st.lists(st.floats(min_value=0, max_value=1e150), min_size=1, max_size=20), clip=CLIP)
def test_no_vector_is_left_above_the_clip_norm(norms: list[float], clip: float) -> None:
    length = torch.tensor(norms, dtype=torch.float64)
    factors, broken = clip_factors(length.square(), clip)
    assert not bool(broken.any())
    assert bool((factors * length < clip).all())
    assert bool(((factors >= 0) & (factors <= 1)).all())


@given(norm=st.floats(min_value=0, max_value=0.999), clip=CLIP)
def test_a_vector_within_the_clip_norm_is_not_scaled(norm: float, clip: float) -> None:
    factors, _ = clip_factors(torch.tensor([(norm * clip) ** 2], dtype=torch.float64), clip)
    assert factors.item() == 1.0


@given(norm=st.floats(min_value=1, max_value=1e100), clip=CLIP)
def test_a_vector_beyond_the_clip_norm_is_scaled_to_little_less_than_it(norm: float, clip: float) -> None:
    length = norm * clip
    factors, _ = clip_factors(torch.tensor([length**2], dtype=torch.float64), clip)
    assert 0.999 * clip < factors.item() * length < clip


def test_the_margin_covers_the_rounding_of_the_largest_sum() -> None:
    factors, _ = clip_factors(torch.tensor([4.0], dtype=torch.float64), 1.0)
    rounding = 2 * MAX_UNITS**2 * 2.0**-53
    assert factors.item() * 2 + rounding < 1


# The rows of the table in the docstring of `clip_factors`.


def test_a_zero_vector_keeps_the_factor_one() -> None:
    factors, broken = clip_factors(torch.zeros(1, dtype=torch.float64), 1.0)
    assert (factors.item(), broken.item()) == (1.0, False)


@pytest.mark.parametrize("squared", [math.nan, math.inf])
def test_a_vector_that_is_not_finite_gets_zero_and_is_reported(squared: float) -> None:
    factors, broken = clip_factors(torch.tensor([squared, 0.25], dtype=torch.float64), 1.0)
    assert factors.tolist() == [0.0, 1.0]
    assert broken.tolist() == [True, False]


def test_no_units_get_no_factors() -> None:
    factors, broken = clip_factors(torch.empty(0, dtype=torch.float64), 1.0)
    assert factors.shape == broken.shape == (0,)


@settings(deadline=None)
@given(first=st.lists(ANY, min_size=1, max_size=6), second=st.lists(ANY, min_size=1, max_size=6), clip=CLIP)
def test_any_vector_at_all_is_bounded_by_the_clip_norm(first: list[float], second: list[float], clip: float) -> None:
    vector = {name: torch.tensor(v, dtype=torch.float64) for name, v in (("a", first), ("b", second))}
    bounded, finite = clip_vector(vector, Clipping(clip))
    clipped = torch.cat([bounded.value["a"], bounded.value["b"]])
    assert bounded.norm_bound == clip
    assert float(clipped.norm()) <= clip
    if not finite:
        assert not bool(clipped.any())
    if not all(map(math.isfinite, [*first, *second])):
        assert not finite


@settings(deadline=None)
@given(values=st.lists(FINITE, min_size=1, max_size=6), clip=CLIP)
def test_clipping_keeps_the_direction_and_the_argument(values: list[float], clip: float) -> None:
    given_ = torch.tensor(values, dtype=torch.float64)
    before = given_.clone()
    bounded, finite = clip_vector({"a": given_}, Clipping(clip))
    assert finite
    assert torch.equal(given_, before)
    norm = float(before.norm())
    expected = before if norm <= 0.999 * clip else before * (clip / norm)
    assert torch.allclose(bounded.value["a"], expected, rtol=1e-3, atol=1e-300)


def test_single_precision_is_clipped_in_double() -> None:
    bounded, finite = clip_vector({"a": torch.full((4,), 3e38)}, Clipping(1.0))
    assert finite
    assert bounded.value["a"].dtype is torch.float64
    assert 0.999 < float(bounded.value["a"].norm()) < 1
