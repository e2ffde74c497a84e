"""Privacy loss distributions of whole runs, also where every step has another noise: quick, and never too small.

An event is taken apart into its leaves and how often each occurs, because composition does not mind the order. Gaussian sums
without sampling add up to one. Sampled ones with nearly the same rate and noise multiplier are counted as one another's worst
(`grouped`), so that a thousand different steps cost as much to account as a few dozen.
"""

from __future__ import annotations

import functools
import math
from collections import Counter
from collections.abc import Callable, Sequence
from typing import TypeAlias

import dp_accounting
from dp_accounting.pld import privacy_loss_distribution as plds

from sfumato.errors import AccountingError
from sfumato.privacy import events
from sfumato.privacy.allocation import pld_of_random_allocation

Pld: TypeAlias = plds.PrivacyLossDistribution
_Leaf: TypeAlias = tuple[float, float]

_EXACT = 24  # different sampled sums that are composed one by one
WIDTH = 0.009  # relative, of a group of noise multipliers: epsilon then is within about 1 % of the exact composition
_GROUPS = 128  # at most; a schedule over a wider range has wider groups


def leaves(event: events.Event) -> Counter[events.Event]:
    """Return the events that `event` is composed of, and how often each occurs.

    Raises:
        AccountingError: one of them holds a composition inside, for which nothing is proven.
    """
    found: Counter[events.Event] = Counter()
    try:
        _collect(event, 1, found)
    except TypeError:  # a list inside cannot be hashed
        raise AccountingError(
            f"There is no proven bound for sampling of a composed event ({events.to_json(event)}); sample each part of it."
        ) from None
    return found


def _collect(event: events.Event, times: int, found: Counter[events.Event]) -> None:
    if isinstance(event, dp_accounting.ComposedDpEvent):
        for part in event.events:
            _collect(part, times, found)
    elif isinstance(event, dp_accounting.SelfComposedDpEvent):
        _collect(event.event, times * event.count, found)
    elif not isinstance(event, dp_accounting.NoOpDpEvent):
        found[event] += times


def grouped(event: events.Event, width: float = WIDTH) -> events.Event:
    """Return an event with few different steps that costs at least as much.

    Args:
        event: What was done.
        width: How much the noise multipliers, and the rates, of steps that are counted alike may differ, relatively.

    **Guarantee**: every sampled Gaussian sum of `event` has a partner in the answer with no smaller sampling rate and no
    larger noise multiplier. Such a partner dominates it: less noise can be made into more by adding some, and for a smaller
    rate the hockey-stick divergence is, by joint convexity, at most that of the larger one. Domination survives composition
    (Zhu, Dong and Wang 2022, "Optimal accounting of differential privacy via characteristic function", theorem 10).

    What has few different steps is returned as it is.
    """
    found = leaves(event)
    sampled = _sampled(found)
    if len(sampled) <= _EXACT:
        return event
    noises = _places([noise for _, noise in sampled], width)
    rates = _places([rate for rate, _ in sampled], width)
    members: dict[tuple[int, int], list[_Leaf]] = {}
    for rate, noise in sampled:
        members.setdefault((rates(rate), noises(noise)), []).append((rate, noise))
    rest = [events.repeated(leaf, times) for leaf, times in found.items() if _rate_and_noise(leaf) is None]
    parts = [
        events.repeated(
            events.poisson_sampled(max(rate for rate, _ in group), events.gaussian(min(noise for _, noise in group))),
            sum(sampled[leaf] for leaf in group),
        )
        for _, group in sorted(members.items())
    ]
    return events.composed([*rest, *parts])


def pld_of(event: events.Event, interval: float) -> Pld | None:
    """Return a privacy loss distribution that dominates `event` under add-or-remove-one; None if nothing is promised.

    Args:
        event: What was done.
        interval: Spacing of the privacy losses; the error falls with its square.

    Raises:
        AccountingError: nothing is proven for a part of the event.
    """
    total = plds.identity(value_discretization_interval=interval)
    for part in parts(event):
        composed = _pld_of_part(part, interval)
        if composed is None:
            return None
        total = total.compose(composed)
    return total


def epsilons(segments: Sequence[events.Event], delta: float, interval: float) -> list[float]:
    """Return what the first, the first two, ... of the segments cost together: upper bounds on epsilon at `delta`."""
    answers: list[float] = []
    total = plds.identity(value_discretization_interval=interval)
    for segment in segments:
        part = pld_of(segment, interval)
        if part is None:
            return [*answers, *[math.inf] * (len(segments) - len(answers))]
        total = total.compose(part)
        answers.append(float(total.get_epsilon_for_delta(delta)))
    return answers


def parts(event: events.Event) -> list[tuple[events.Event, int]]:
    """Return different events and how often each is done; all Gaussian sums without sampling are one."""
    found = leaves(grouped(event))
    gaussian = [(leaf, times) for leaf, times in found.items() if isinstance(leaf, dp_accounting.GaussianDpEvent)]
    others = [(leaf, times) for leaf, times in found.items() if not isinstance(leaf, dp_accounting.GaussianDpEvent)]
    if len(gaussian) == 1:
        others += gaussian
    elif gaussian:
        precision = math.fsum(times / leaf.noise_multiplier**2 for leaf, times in gaussian)
        # Rounded down, so that the one sum is no cheaper than the many.
        others.append((events.gaussian(math.nextafter(precision**-0.5, 0.0)), 1))
    return others


def _pld_of_part(part: tuple[events.Event, int], interval: float) -> Pld | None:
    event, times = part
    if isinstance(event, dp_accounting.NonPrivateDpEvent):
        return None
    if isinstance(event, dp_accounting.GaussianDpEvent):
        return _one(events.gaussian(event.noise_multiplier / math.sqrt(times)), interval)
    one = _one(event, interval)
    return one if times == 1 else one.self_compose(times)


@functools.lru_cache(maxsize=256)
def _one(event: events.Event, interval: float) -> Pld:
    sampled = _rate_and_noise(event)
    if sampled is not None:
        rate, noise = sampled
        return plds.from_gaussian_mechanism(noise, sampling_prob=rate, value_discretization_interval=interval)
    if isinstance(event, dp_accounting.GaussianDpEvent):
        return plds.from_gaussian_mechanism(event.noise_multiplier, value_discretization_interval=interval)
    if isinstance(event, dp_accounting.LaplaceDpEvent):
        return plds.from_laplace_mechanism(event.noise_multiplier, value_discretization_interval=interval)
    if isinstance(event, dp_accounting.TruncatedSubsampledGaussianDpEvent):
        return plds.from_truncated_subsampled_gaussian_mechanism(
            dataset_size=event.dataset_size,
            sampling_probability=event.sampling_probability,
            truncated_batch_size=event.truncated_batch_size,
            noise_multiplier=event.noise_multiplier,
            value_discretization_interval=interval,
        )
    if isinstance(event, events.RandomAllocationDpEvent):
        return pld_of_random_allocation(event, interval)
    raise AccountingError(f"Privacy loss distributions have no proven bound for this event ({events.to_json(event)}).")


def _sampled(found: Counter[events.Event]) -> dict[_Leaf, int]:
    pairs = ((_rate_and_noise(leaf), times) for leaf, times in found.items())
    return {pair: times for pair, times in pairs if pair is not None}


def _rate_and_noise(event: events.Event) -> _Leaf | None:
    """Return sampling rate and noise multiplier of a Poisson-sampled Gaussian sum."""
    if isinstance(event, dp_accounting.PoissonSampledDpEvent) and isinstance(
        event.event, dp_accounting.GaussianDpEvent
    ):
        return event.sampling_probability, event.event.noise_multiplier
    return None


def _places(values: Sequence[float], width: float) -> Callable[[float], int]:
    """Return the number of the group, by relative size, that a value falls into."""
    least, most = math.log(min(values)), math.log(max(values))
    size = max(width, (most - least) / _GROUPS)
    return lambda value: math.floor((math.log(value) - least) / size)
