"""Values before noise do not get out; values after noise are only made by the mechanisms."""

from __future__ import annotations

import copy
import dataclasses
import math
import pickle

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sfumato.errors import InputError, PlanError, SfumatoError
from sfumato.privacy.bounded import Bounded, Released
from sfumato.privacy.budget import Relation


def bounded(*values: float, bound: float = 1.0) -> Bounded:
    return Bounded({"w": torch.tensor(values, dtype=torch.float64)}, bound)


@pytest.mark.parametrize("bound", [0, -1, math.nan, math.inf])
def test_a_bound_must_be_a_positive_number(bound: float) -> None:
    with pytest.raises(InputError, match="norm_bound"):
        bounded(1.0, bound=bound)


@given(st.floats(min_value=1e-6, max_value=1e6))
def test_sensitivity_doubles_when_a_unit_is_replaced(bound: float) -> None:
    value = bounded(0.0, bound=bound)
    assert value.sensitivity(Relation.ADD_OR_REMOVE_ONE) == bound
    assert value.sensitivity(Relation.REPLACE_ONE) == 2 * bound


def test_an_unknown_relation_has_no_sensitivity() -> None:
    with pytest.raises(PlanError, match="unknown"):
        bounded(0.0).sensitivity("zero-out")  # type: ignore[arg-type]


def test_the_sum_of_two_sums_keeps_the_larger_bound() -> None:
    total = bounded(1.0, 2.0, bound=1.0).plus(bounded(3.0, 4.0, bound=2.5))
    assert total.norm_bound == 2.5
    assert total.value["w"].tolist() == [4.0, 6.0]
    assert total.size == 2


@pytest.mark.parametrize(
    "other",
    [
        Bounded({"v": torch.zeros(2)}, 1.0),
        Bounded({"w": torch.zeros(3)}, 1.0),
        Bounded({"w": torch.zeros(2), "v": torch.zeros(1)}, 1.0),
        Bounded({}, 1.0),
    ],
)
def test_sums_of_other_shapes_are_not_added(other: Bounded) -> None:
    with pytest.raises(SfumatoError, match="cannot be added"):
        bounded(1.0, 2.0).plus(other)


def test_a_bounded_value_has_no_printed_form() -> None:
    value = bounded(123456.0)
    assert "123456" not in repr(value) + str(value) + f"{value}"
    assert "<private>" in repr(value)


@pytest.mark.parametrize("away", [pickle.dumps, copy.copy, copy.deepcopy])
def test_a_bounded_value_cannot_be_pickled_or_copied(away: object) -> None:
    with pytest.raises(TypeError, match="private"):
        away(bounded(1.0))  # type: ignore[operator]


def test_a_bounded_value_cannot_be_changed() -> None:
    value = bounded(1.0)
    with pytest.raises(dataclasses.FrozenInstanceError):
        value.norm_bound = 0.1  # type: ignore[misc]
    with pytest.raises(TypeError):
        value.value["w"] = torch.zeros(1)  # type: ignore[index]


def test_later_changes_of_the_mapping_given_do_not_reach_the_bounded_value() -> None:
    tensors = {"w": torch.zeros(2)}
    value = Bounded(tensors, 1.0)
    tensors["v"] = torch.zeros(5)
    assert value.size == 2


@pytest.mark.parametrize("key", [None, object(), "RELEASE", True])
def test_nobody_else_can_make_a_released_value(key: object) -> None:
    with pytest.raises(SfumatoError, match=r"Only sfumato\.privacy\.mechanisms"):
        Released({"w": torch.zeros(1)}, 1.0, 2.0**-24, 0, key)
