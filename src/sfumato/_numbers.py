"""Numbers as text. A cost is rounded up and what is left of a budget down: neither ever reads better than it is."""

from __future__ import annotations

from decimal import ROUND_CEILING, ROUND_FLOOR, ROUND_HALF_EVEN, Decimal
from typing import Final

_SUPERSCRIPT: Final = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")
_PLAIN_FROM: Final = Decimal("0.0001")
_PLAIN_BELOW: Final = Decimal(1_000_000)


def bound(value: float) -> str:
    """Return four significant digits, rounded up."""
    return _significant(value, 4, ROUND_CEILING)


def floor(value: float) -> str:
    """Return four significant digits, rounded down."""
    return _significant(value, 4, ROUND_FLOOR)


def number(value: float) -> str:
    """Return five significant digits, rounded to the nearest."""
    return _significant(value, 5, ROUND_HALF_EVEN)


def percent(value: float) -> str:
    """Return a share as percent with one digit after the point, without the sign."""
    return f"{100 * value:.1f}"


def percent_bound(value: float) -> str:
    """Return a share as percent with its sign, rounded up to one digit after the point, at most 100 %."""
    shown = (Decimal(repr(value)) * 100).quantize(Decimal("0.1"), rounding=ROUND_CEILING)
    return f"{min(shown, Decimal(100)):f} %"


def _significant(value: float, digits: int, rounding: str) -> str:
    # The decimal text of a float is what its author wrote; its binary value would round 0.1 up to 0.1001.
    exact = Decimal(repr(float(value)))
    if not exact:
        return "0"
    rounded = exact.quantize(Decimal(1).scaleb(exact.adjusted() - digits + 1), rounding=rounding).normalize()
    if _PLAIN_FROM <= rounded < _PLAIN_BELOW:
        return f"{rounded:f}"
    mantissa, _, exponent = f"{rounded:e}".partition("e")
    power = f"10{str(int(exponent)).translate(_SUPERSCRIPT)}"
    return power if mantissa == "1" else f"{mantissa} \u00d7 {power}"
