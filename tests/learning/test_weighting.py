from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sfumato.errors import InputError
from sfumato.learning.weighting import ByRecords, Uniform, UpTo

SIZES = st.lists(st.integers(1, 2**40), min_size=1, max_size=8)


@given(SIZES)
def test_uniform_weights_are_ones_and_those_by_records_the_records(sizes: list[int]) -> None:
    assert Uniform().of(torch.tensor(sizes)).tolist() == [1.0] * len(sizes)
    assert ByRecords().of(torch.tensor(sizes)).tolist() == [float(size) for size in sizes]


@given(SIZES, st.integers(1, 2**40))
def test_weights_up_to_a_number_of_records_are_never_above_one(sizes: list[int], most: int) -> None:
    weights = UpTo(most).of(torch.tensor(sizes))
    assert weights.dtype is torch.float64
    assert bool(((weights > 0) & (weights <= 1)).all())
    assert weights.tolist() == [min(size, most) / most for size in sizes]


def test_only_weights_of_at_most_one_are_bounded() -> None:
    assert Uniform().is_bounded
    assert UpTo(5).is_bounded
    assert not ByRecords().is_bounded
    assert (Uniform().expected, UpTo(5, 0.25).expected) == (1.0, 0.25)


def test_what_is_out_of_range_is_refused() -> None:
    for arguments, message in [
        ((0,), "most"),
        ((1.5,), "most"),
        ((3, 0.0), "expected"),
        ((3, 1.1), "expected"),
        ((3, math.nan), "expected"),
    ]:
        with pytest.raises(InputError, match=message):
            UpTo(*arguments)  # type: ignore[arg-type]
