"""What was done, as data: `dp_accounting` event trees, built, written as JSON and read back.

sfumato has no event language of its own. Everything that draws noise describes itself with these constructors, and an
accountant (ours or anybody's) turns the description into an epsilon. The JSON form names the `dp_accounting` class under
`"type"` and its fields beside it, so six lines of Python rebuild the event without sfumato. An infinite `shape`, for
which JSON has no number, is null.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import dp_accounting

from sfumato import _checks
from sfumato.errors import InputError

Event: TypeAlias = dp_accounting.DpEvent
"""A `dp_accounting.DpEvent`: the description of a private computation."""


@dataclass(frozen=True)
class RenyiFilterDpEvent(Event):  # type: ignore[misc]  # dp_accounting has no types
    """Anything that a Renyi filter let through: (order, rdp)-Renyi differential privacy, whatever the steps were.

    It describes a run that chooses its noise as it goes: what such a run did is only known when it is over, but the
    filter stops it before the divergences at this one order pass `rdp` (see `privacy.renyi`, which knows what it costs).

    Args:
        order: A whole number of at least 2.
        rdp: Finite, at least 0.

    Raises:
        InputError: one of them is not.
    """

    order: int
    rdp: float

    def __post_init__(self) -> None:
        _checks.count("order", self.order, minimum=2)
        object.__setattr__(self, "rdp", _checks.non_negative("rdp", self.rdp))


@dataclass(frozen=True)
class RandomAllocationDpEvent(Event):  # type: ignore[misc]  # dp_accounting has no types
    """Epochs of Gaussian sums, in each of which a unit takes part in `selected` of the `steps` sums: a set of its own, uniform.

    See `privacy.allocation`, which knows what it costs.

    Args:
        noise_multiplier: Of each sum, above 0.
        steps: Of an epoch, at least 1.
        selected: At least 1, at most `steps`.
        epochs: At least 1.

    Raises:
        InputError: one of them is out of range.
    """

    noise_multiplier: float
    steps: int
    selected: int = 1
    epochs: int = 1

    def __post_init__(self) -> None:
        _checks.positive("noise_multiplier", self.noise_multiplier)
        for name in ("steps", "selected", "epochs"):
            _checks.count(name, getattr(self, name))
        if self.selected > self.steps:
            raise InputError(f"A unit cannot take part in {self.selected} of {self.steps} steps; select fewer.")


_FIELDS: dict[str, tuple[str, ...]] = {
    "NonPrivateDpEvent": (),
    "NoOpDpEvent": (),
    "GaussianDpEvent": ("noise_multiplier",),
    "LaplaceDpEvent": ("noise_multiplier",),
    "PoissonSampledDpEvent": ("sampling_probability", "event"),
    "SelfComposedDpEvent": ("event", "count"),
    "ComposedDpEvent": ("events",),
    "RepeatAndSelectDpEvent": ("event", "mean", "shape"),
    "RenyiFilterDpEvent": ("order", "rdp"),
    "RandomAllocationDpEvent": ("noise_multiplier", "steps", "selected", "epochs"),
    "TruncatedSubsampledGaussianDpEvent": (
        "dataset_size",
        "sampling_probability",
        "truncated_batch_size",
        "noise_multiplier",
    ),
}

_OWN: dict[str, type[Event]] = {
    "RenyiFilterDpEvent": RenyiFilterDpEvent,
    "RandomAllocationDpEvent": RandomAllocationDpEvent,
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


def truncated_poisson_sampled(rate: float, max_batch: int, population: int, noise_multiplier: float) -> Event:
    """Return the event of one Gaussian sum over a Poisson draw from `population` places; at most `max_batch` are kept."""
    return dp_accounting.TruncatedSubsampledGaussianDpEvent(
        dataset_size=_checks.count("population", population),
        sampling_probability=_checks.fraction("sampling rate", rate, allow_one=True),
        truncated_batch_size=_checks.count("max_batch", max_batch),
        noise_multiplier=_checks.positive("noise_multiplier", noise_multiplier),
    )


def repeat_and_select(event: Event, mean: float, shape: float) -> Event:
    """Return the best outcome of a random number of runs of `event`, which is all that is kept of them.

    Args:
        event: One run.
        mean: Of the number of runs, at least 1.
        shape: Of its distribution: infinite for Poisson, finite for the truncated negative binomial (1 is geometric).
    """
    if not math.inf > mean >= 1 or not shape >= 0:
        raise InputError(f"A mean of {mean!r} and a shape of {shape!r} are no such law; use mean >= 1 and shape >= 0.")
    return dp_accounting.dp_event.RepeatAndSelectDpEvent(event, float(mean), float(shape))


def non_private() -> Event:
    """Return the event of a computation that promises nothing; its epsilon is infinite by type."""
    return dp_accounting.NonPrivateDpEvent()


def is_sampled(event: Event) -> bool:
    """Tell whether any part of `event` claims amplification by sampling."""
    if isinstance(event, dp_accounting.ComposedDpEvent):
        return any(is_sampled(part) for part in event.events)
    if isinstance(event, dp_accounting.SelfComposedDpEvent | dp_accounting.dp_event.RepeatAndSelectDpEvent):
        return is_sampled(event.event)
    return not isinstance(event, _UNSAMPLED)


_UNSAMPLED = (
    dp_accounting.GaussianDpEvent,
    dp_accounting.LaplaceDpEvent,
    dp_accounting.NoOpDpEvent,
    dp_accounting.NonPrivateDpEvent,
    RenyiFilterDpEvent,  # its `rdp` holds in the relation in which the filter added it up
)


def is_own(event: Event) -> bool:
    """Tell whether any part of `event` is of a kind that only sfumato knows."""
    if isinstance(event, dp_accounting.ComposedDpEvent):
        return any(is_own(part) for part in event.events)
    if isinstance(event, dp_accounting.SelfComposedDpEvent | dp_accounting.dp_event.RepeatAndSelectDpEvent):
        return is_own(event.event)
    return type(event).__name__ in _OWN


def for_renyi(event: Event) -> Event:
    """Return an event that a Renyi accountant knows and that costs at least as much, at every order, in add-or-remove-one.

    **Random allocation** becomes its chosen sums without sampling. For a > 1, exp((a - 1) D_a) is jointly convex, so the
    mixture over the sets of steps that a unit may have chosen is no further than the worst of them, and each is `selected`
    Gaussian sums.

    **Truncated Poisson sampling** becomes four Poisson-sampled sums at the same rate q with half the noise. Given how many
    other places were drawn, either nothing is cut, and the draw is a Poisson one; or the unit is kept with a chance r <= q in
    the stead of another. Then the two sides are (1-r)A + rB and (1-r)A + rC, three Gaussians of which A and B are at most two
    clip norms apart and C at most one from both. By advanced joint convexity (Balle, Barthe and Gaboardi 2018, theorem 2)
    the hockey-stick divergences of the first from the second are at most r D(2), and of the second from the first r D(1), less
    than those of a Poisson-sampled sum of sensitivity 2 whose unit is removed. So two such sums, one of them the other way
    round, dominate both ways; so they do for a whole Poisson draw; and exp((a - 1) D_a) of the mixture over all such cases
    is, being jointly convex, no larger. Two more are added because `dp_accounting` counts a pair that is four clip norms apart.
    """
    if isinstance(event, dp_accounting.ComposedDpEvent):
        return composed([for_renyi(part) for part in event.events])
    if isinstance(event, dp_accounting.SelfComposedDpEvent):
        return repeated(for_renyi(event.event), event.count)
    if isinstance(event, dp_accounting.dp_event.RepeatAndSelectDpEvent):
        return repeat_and_select(for_renyi(event.event), event.mean, event.shape)
    if isinstance(event, RandomAllocationDpEvent):
        return repeated(gaussian(event.noise_multiplier), event.selected * event.epochs)
    return _untruncated(event)


def _untruncated(event: Event) -> Event:
    if not isinstance(event, dp_accounting.TruncatedSubsampledGaussianDpEvent):
        return event
    rate, noise = event.sampling_probability, event.noise_multiplier
    if event.truncated_batch_size >= event.dataset_size:
        return poisson_sampled(rate, gaussian(noise))
    return repeated(poisson_sampled(rate, gaussian(noise / 2)), 4)


def to_dict(event: Event) -> dict[str, Any]:
    """Return `event` as plain dictionaries, lists and numbers.

    Raises:
        InputError: the event is of a type that sfumato does not write.
    """
    kind = type(event).__name__
    if kind not in _FIELDS:
        raise InputError(f"An event of type {kind} cannot be written as JSON.{_checks.did_you_mean(kind, _FIELDS)}")
    return {"type": kind} | {name: _plain(getattr(event, name), name) for name in _FIELDS[kind]}


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
    made = _OWN.get(kind) or getattr(dp_accounting.dp_event, kind)
    return made(**{name: _rebuilt(tree[name], name) for name in _FIELDS[kind]})


def to_json(event: Event) -> str:
    """Return `to_dict(event)` as one line of JSON with sorted keys."""
    return json.dumps(to_dict(event), sort_keys=True, allow_nan=False)


def from_json(text: str) -> Event:
    """Return the event that `to_json` wrote.

    Raises:
        InputError: the text is not JSON, or not that of a known event.
    """
    try:
        tree = json.loads(text)
    except ValueError:
        raise InputError(f"An event must be JSON, not {text[:80]!r}.") from None
    if not isinstance(tree, dict):
        raise InputError(f"An event must be an object with a type, not {text[:80]!r}.")
    return from_dict(tree)


def _plain(value: Any, name: str = "") -> Any:
    if name == "shape" and value == math.inf:
        return None  # JSON has no infinity
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value if isinstance(value, int | float) else to_dict(value)


def _rebuilt(value: Any, name: str = "") -> Any:
    if name == "shape" and value is None:
        return math.inf
    if isinstance(value, Mapping):
        return from_dict(value)
    if isinstance(value, list):
        return [_rebuilt(item) for item in value]
    return value
