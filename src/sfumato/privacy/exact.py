"""Sums without rounding: a float stands for the decimal that it prints, and goes back to a float in a stated direction."""

from __future__ import annotations

import math
from fractions import Fraction


def exact(value: float) -> Fraction:
    """Return the printed decimal of a finite float: 0.1 three times is 0.3, and no digit is ever rounded away."""
    return Fraction(repr(float(value)))


def rounded_up(value: Fraction) -> float:
    """Return a float that prints as `value`, or else the next one above it."""
    near = float(value)
    return near if exact(near) >= value else math.nextafter(near, math.inf)


def rounded_down(value: Fraction) -> float:
    """Return a float that prints as `value`, or else the next one below it."""
    near = float(value)
    return near if exact(near) <= value else math.nextafter(near, -math.inf)
