"""Schedules, policies and adaptive clip norms by name: how a file of settings says what a program constructs."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any, TypeVar

from sfumato import _checks
from sfumato.errors import InputError, SfumatoError
from sfumato.learning.adaptive_clip import AdaptiveClip
from sfumato.learning.plan import Noise
from sfumato.learning.policies import Decay, SignalToNoise, SpendEvenly, StopWhenFlat
from sfumato.privacy.schedules import Constant, Cosine, Exponential, Linear, Listed, Schedule, Stepwise

_T = TypeVar("_T")

_SCHEDULES: dict[str, type[Schedule]] = {
    "constant": Constant,
    "linear": Linear,
    "cosine": Cosine,
    "exponential": Exponential,
    "stepwise": Stepwise,
    "listed": Listed,
}
_NOISES: dict[str, type[Noise]] = {
    **_SCHEDULES,
    "spend-evenly": SpendEvenly,
    "decay": Decay,
    "signal-to-noise": SignalToNoise,
    "stop-when-flat": StopWhenFlat,
}
_CLIPS: dict[str, type[Schedule | AdaptiveClip]] = {**_SCHEDULES, "adaptive": AdaptiveClip}


def noise_of(settings: Mapping[str, Any] | None) -> Noise:
    """Return the schedule or policy that a table such as {"kind": "cosine", "start": 2, "end": 1} names; constant for None.

    Raises:
        InputError: the kind is unknown, or its settings are not these.
    """
    return _made("noise", settings, _NOISES)


def clips_of(settings: Mapping[str, Any] | None) -> Schedule | AdaptiveClip:
    """Return the schedule or adaptive clip norm that a table names; constant for None.

    Raises:
        InputError: the kind is unknown, or its settings are not these.
    """
    return _made("clips", settings, _CLIPS)


def rates_of(settings: Mapping[str, Any] | None) -> Schedule:
    """Return the schedule that a table names; constant for None.

    Raises:
        InputError: the kind is unknown, or its settings are not these.
    """
    return _made("rates", settings, _SCHEDULES)


def _made(what: str, settings: Mapping[str, Any] | None, kinds: Mapping[str, type[_T]]) -> _T:
    rest = dict(settings or {"kind": "constant"})
    kind = rest.pop("kind", None)
    if kind is None:
        raise InputError(f"{what} needs a kind, one of {', '.join(kinds)}.")
    if kind not in kinds:
        raise InputError(f"{what} of the kind {kind!r} is unknown.{_checks.did_you_mean(str(kind), kinds)}")
    try:
        return kinds[kind](**rest)
    except SfumatoError:
        raise
    except TypeError:
        own = ", ".join(inspect.signature(kinds[kind]).parameters) or "none"
        given = ", ".join(rest) or "none"
        raise InputError(f'{what} of the kind "{kind}" takes the settings {own}, not {given}.') from None
