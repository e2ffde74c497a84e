"""Validators written so that NaN never passes: each accepts by a positive comparison."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable

from sfumato.errors import InputError

_SHOWN = 12


def positive(name: str, value: float, *, allow_inf: bool = False) -> float:
    """Return `value` if it is greater than zero (and finite unless `allow_inf`); else raise InputError."""
    if _is_number(value) and value > 0 and (allow_inf or value < math.inf):
        return float(value)
    kind = "a number above 0" if allow_inf else "a finite number above 0"
    raise InputError(f"{name} must be {kind}, not {value!r}.")


def non_negative(name: str, value: float) -> float:
    """Return `value` if it is at least zero and finite; else raise InputError."""
    if _is_number(value) and 0 <= value < math.inf:
        return float(value)
    raise InputError(f"{name} must be a finite number of at least 0, not {value!r}.")


def fraction(name: str, value: float, *, allow_zero: bool = False, allow_one: bool = False) -> float:
    """Return `value` if it lies between 0 and 1 (ends only where allowed); else raise InputError."""
    if _is_number(value):
        above = value >= 0 if allow_zero else value > 0
        below = value <= 1 if allow_one else value < 1
        if above and below:
            return float(value)
    interval = f"{'[' if allow_zero else '('}0, 1{']' if allow_one else ')'}"
    raise InputError(f"{name} must lie in {interval}, not {value!r}.")


def count(name: str, value: int, *, minimum: int = 1) -> int:
    """Return `value` if it is a whole number of at least `minimum`; else raise InputError."""
    if isinstance(value, int) and not isinstance(value, bool) and value >= minimum:
        return value
    raise InputError(f"{name} must be a whole number of at least {minimum}, not {value!r}.")


def did_you_mean(wrong: str, known: Iterable[str], *, every: bool = False) -> str:
    """Return ` Did you mean "x"?` for the closest known word, or the list of known words: of `every` one, or of a few."""
    words = sorted(known)
    close = difflib.get_close_matches(wrong, words, n=1, cutoff=0.6)
    if close:
        return f' Did you mean "{close[0]}"?'
    most = len(words) if every else _SHOWN
    shown = ", ".join(f'"{word}"' for word in words[:most])
    return f" Known are: {shown}{' and others' if len(words) > most else ''}."


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
