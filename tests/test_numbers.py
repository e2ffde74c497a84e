from __future__ import annotations

from decimal import Decimal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sfumato._numbers import bound, floor, number, percent, percent_bound

positive = st.floats(min_value=1e-300, max_value=1e300, allow_nan=False)


def value_of(text: str) -> Decimal:
    plain = text.translate(str.maketrans("⁻⁰¹²³⁴⁵⁶⁷⁸⁹", "-0123456789"))
    mantissa, times, power = plain.rpartition(" \u00d7 ")
    if times:
        return Decimal(mantissa).scaleb(int(power[2:]))
    is_power = text != plain
    return Decimal(1).scaleb(int(plain[2:])) if is_power else Decimal(plain)


@given(positive)
def test_a_bound_is_never_below_the_value_and_within_a_thousandth(value: float) -> None:
    shown, exact = value_of(bound(value)), Decimal(repr(value))
    assert exact <= shown <= exact * Decimal("1.001")


@given(positive)
def test_a_floor_is_never_above_the_value_and_within_a_thousandth(value: float) -> None:
    shown, exact = value_of(floor(value)), Decimal(repr(value))
    assert exact * Decimal("0.999") <= shown <= exact


@given(positive)
def test_a_number_is_near_the_value(value: float) -> None:
    exact = Decimal(repr(value))
    assert abs(value_of(number(value)) - exact) <= exact * Decimal("0.00005")


@given(st.floats(min_value=0, max_value=1))
def test_a_percent_bound_is_never_below_the_share(value: float) -> None:
    shown = Decimal(percent_bound(value).removesuffix(" %"))
    assert Decimal(repr(value)) * 100 <= shown <= Decimal(repr(value)) * 100 + Decimal("0.1")


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.0, "0"),
        (0.1, "0.1"),
        (1.0, "1"),
        (0.99991, "1"),
        (0.86672468, "0.8668"),
        (12345.0, "12350"),
        (0.0001, "0.0001"),
        (1e-5, "10⁻⁵"),
        (2.5e-7, "2.5 \u00d7 10⁻⁷"),
        (3e9, "3 \u00d7 10⁹"),
    ],
)
def test_bound_as_text(value: float, text: str) -> None:
    assert bound(value) == text


@pytest.mark.parametrize(
    ("value", "text"), [(0.0, "0"), (0.1, "0.1"), (0.99999, "0.9999"), (0.86679, "0.8667"), (1e-5, "10⁻⁵")]
)
def test_floor_as_text(value: float, text: str) -> None:
    assert floor(value) == text


def test_percent_has_one_digit() -> None:
    assert percent(0.81234) == "81.2"
