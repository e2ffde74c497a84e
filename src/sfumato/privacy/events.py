"""What was done, as data: `dp_accounting` event trees, built, written as JSON and read back.

sfumato has no event language of its own. Everything that draws noise describes itself with these constructors, and an
accountant (ours or anybody's) turns the description into an epsilon. The JSON form names the `dp_accounting` class under
`"type"` and its fields beside it, so six lines of Python rebuild the event without sfumato.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import dp_accounting

from sfumato import _checks
from sfumato.errors import InputError

Event: TypeAlias = dp_accounting.DpEvent
"""A `dp_accounting.DpEvent`: the description of a private computation."""

_FIELDS: dict[str, tuple[str, ...]] = {
    "NonPrivateDpEvent": (),
    "NoOpDpEvent": (),
    "GaussianDpEvent": ("noise_multiplier",),
    "LaplaceDpEvent": ("noise_multiplier",),
    "PoissonSampledDpEvent": ("sampling_probability", "event"),
    "SelfComposedDpEvent": ("event", "count"),
    "ComposedDpEvent": ("events",),
}


def gaussian(noise_multiplier: float) -> Event:
    """Return the event of one sum with Gaussian noise of std `noise_multiplier` times its sensitivity."""
    return dp_accounting.GaussianDpEvent(_checks.positive("noise_multiplier", noise_multiplier))


def poisson_sampled(rate: float, event: Event) -> Event:
    """Return `event` applied to a batch that every unit joins independently with probability `rate`."""
    return dp_accounting.PoissonSampledDpEvent(_checks.fraction("sampling rate", rate, allow_one=True), event)


def repeated(event: Event, times: int) -> Event:
    """Return `event` done `times` times on the same data; zero times is the event of doing nothing."""
    if _checks.count("times", times, minimum=0) == 0:
        return dp_accounting.NoOpDpEvent()  # the accountants refuse a count of zero
    return dp_accounting.SelfComposedDpEvent(event, times)


def composed(events: Sequence[Event]) -> Event:
    """Return all `events` done on the same data."""
    return dp_accounting.ComposedDpEvent(list(events))


def non_private() -> Event:
    """Return the event of a computation that promises nothing; its epsilon is infinite by type."""
    return dp_accounting.NonPrivateDpEvent()


def is_sampled(event: Event) -> bool:
    """Tell whether any part of `event` claims amplification by sampling."""
    if isinstance(event, dp_accounting.ComposedDpEvent):
        return any(is_sampled(part) for part in event.events)
    if isinstance(event, dp_accounting.SelfComposedDpEvent):
        return is_sampled(event.event)
    return not isinstance(event, _UNSAMPLED)


_UNSAMPLED = (
    dp_accounting.GaussianDpEvent,
    dp_accounting.LaplaceDpEvent,
    dp_accounting.NoOpDpEvent,
    dp_accounting.NonPrivateDpEvent,
)


def to_dict(event: Event) -> dict[str, Any]:
    """Return `event` as plain dictionaries, lists and numbers.

    Raises:
        InputError: the event is of a type that sfumato does not write.
    """
    kind = type(event).__name__
    if kind not in _FIELDS:
        raise InputError(f"An event of type {kind} cannot be written as JSON.{_checks.did_you_mean(kind, _FIELDS)}")
    return {"type": kind} | {name: _plain(getattr(event, name)) for name in _FIELDS[kind]}


def from_dict(tree: Mapping[str, Any]) -> Event:
    """Return the event that `to_dict` wrote.

    Raises:
        InputError: the type or the fields are not those of a known event.
    """
    kind = tree.get("type")
    if not isinstance(kind, str) or kind not in _FIELDS:
        raise InputError(f"Event type {kind!r} is unknown.{_checks.did_you_mean(str(kind), _FIELDS)}")
    if set(tree) != {"type", *_FIELDS[kind]}:
        raise InputError(f"An event of type {kind} has the fields {_FIELDS[kind]}, not {sorted(set(tree) - {'type'})}.")
    return getattr(dp_accounting, kind)(**{name: _rebuilt(tree[name]) for name in _FIELDS[kind]})


def to_json(event: Event) -> str:
    """Return `to_dict(event)` as one line of JSON with sorted keys."""
    return json.dumps(to_dict(event), sort_keys=True, allow_nan=False)


def _plain(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value if isinstance(value, int | float) else to_dict(value)


def _rebuilt(value: Any) -> Any:
    if isinstance(value, Mapping):
        return from_dict(value)
    if isinstance(value, list):
        return [_rebuilt(item) for item in value]
    return value
