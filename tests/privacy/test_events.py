"""Events: built, written as JSON, and read back to the same event."""

from __future__ import annotations

import json
import math

import dp_accounting
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sfumato.errors import InputError
from sfumato.privacy import events

NOISE = st.floats(min_value=1e-3, max_value=1e3)
RATE = st.floats(min_value=1e-6, max_value=1.0)


def trees() -> st.SearchStrategy[events.Event]:
    leaves = st.one_of(
        st.builds(events.gaussian, NOISE),
        st.builds(dp_accounting.LaplaceDpEvent, NOISE),
        st.builds(dp_accounting.NoOpDpEvent),
        st.builds(events.non_private),
    )
    return st.recursive(
        leaves,
        lambda inner: st.one_of(
            st.builds(events.poisson_sampled, RATE, inner),
            st.builds(events.repeated, inner, st.integers(min_value=0, max_value=10**6)),
            st.builds(events.composed, st.lists(inner, max_size=3)),
        ),
        max_leaves=6,
    )


@given(trees())
def test_json_round_trip_is_the_same_event(event: events.Event) -> None:
    text = events.to_json(event)
    assert "\n" not in text
    assert events.from_dict(json.loads(text)) == event
    assert events.to_json(events.from_dict(json.loads(text))) == text


@given(trees())
def test_json_is_enough_to_rebuild_the_event_without_sfumato(event: events.Event) -> None:
    def rebuilt(node: object) -> object:
        if isinstance(node, list):
            return [rebuilt(item) for item in node]
        if not isinstance(node, dict):
            return node
        fields = {name: rebuilt(value) for name, value in node.items() if name != "type"}
        return getattr(dp_accounting, node["type"])(**fields)

    assert rebuilt(json.loads(events.to_json(event))) == event


@pytest.mark.parametrize("noise", [0, -1, math.nan, math.inf])
def test_gaussian_refuses_a_noise_multiplier_that_is_no_noise(noise: float) -> None:
    with pytest.raises(InputError, match="noise_multiplier"):
        events.gaussian(noise)


@pytest.mark.parametrize("rate", [0, -0.1, 1.01, math.nan])
def test_poisson_refuses_a_rate_that_is_no_probability(rate: float) -> None:
    with pytest.raises(InputError, match="sampling rate"):
        events.poisson_sampled(rate, events.gaussian(1.0))


@pytest.mark.parametrize("times", [-1, 1.5, math.nan, True])
def test_repeated_refuses_what_is_no_count(times: object) -> None:
    with pytest.raises(InputError, match="times"):
        events.repeated(events.gaussian(1.0), times)  # type: ignore[arg-type]


def test_sampling_is_found_at_any_depth() -> None:
    sampled = events.poisson_sampled(0.1, events.gaussian(1.0))
    deep = events.repeated(events.composed([events.gaussian(1.0), events.repeated(sampled, 3)]), 2)
    assert events.is_sampled(sampled)
    assert events.is_sampled(deep)


def test_events_without_sampling_claim_none() -> None:
    parts = [
        events.gaussian(1.0),
        dp_accounting.LaplaceDpEvent(1.0),
        dp_accounting.NoOpDpEvent(),
        events.non_private(),
    ]
    assert not events.is_sampled(events.repeated(events.composed(parts), 5))


def test_an_event_that_is_not_known_counts_as_sampled() -> None:
    unknown = dp_accounting.SampledWithoutReplacementDpEvent(100, 10, events.gaussian(1.0))
    assert events.is_sampled(unknown)


def test_an_event_of_another_type_is_not_written() -> None:
    with pytest.raises(InputError, match="SampledWithoutReplacementDpEvent cannot be written"):
        events.to_json(dp_accounting.SampledWithoutReplacementDpEvent(100, 10, events.gaussian(1.0)))


@pytest.mark.parametrize(
    "tree",
    [
        {},
        {"type": None},
        {"type": 3},
        {"type": "UnsupportedDpEvent"},
        {"type": "__init__"},
    ],
)
def test_an_unknown_type_is_not_read(tree: dict[str, object]) -> None:
    with pytest.raises(InputError, match="is unknown"):
        events.from_dict(tree)


@pytest.mark.parametrize(
    "tree",
    [
        {"type": "GaussianDpEvent"},
        {"type": "GaussianDpEvent", "noise_multiplier": 1.0, "more": 2},
        {"type": "SelfComposedDpEvent", "event": {"type": "NoOpDpEvent"}},
    ],
)
def test_missing_or_extra_fields_are_not_read(tree: dict[str, object]) -> None:
    with pytest.raises(InputError, match="has the fields"):
        events.from_dict(tree)


def test_a_nan_is_not_written() -> None:
    with pytest.raises(ValueError, match="JSON"):
        events.to_json(dp_accounting.GaussianDpEvent(math.nan))


def test_zero_times_is_nothing_done() -> None:
    assert events.repeated(events.gaussian(1.0), 0) == dp_accounting.NoOpDpEvent()
