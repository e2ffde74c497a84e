"""Schedules and policies by name, as a file of settings has them."""

from __future__ import annotations

import pytest

import sfumato as sf
from sfumato.errors import InputError, PlanError
from sfumato.learning.shapes import clips_of, noise_of, rates_of


@pytest.mark.parametrize(
    ("settings", "made"),
    [
        (None, sf.Constant()),
        ({"kind": "cosine", "start": 2, "end": 1}, sf.Cosine(2, 1)),
        ({"kind": "stepwise", "values": [2, 1], "milestones": [0.5]}, sf.Stepwise((2, 1), (0.5,))),
        ({"kind": "listed", "values": [1, 2]}, sf.Listed([1, 2])),
        ({"kind": "spend-evenly"}, sf.SpendEvenly()),
        ({"kind": "decay", "ratio": 3.0}, sf.Decay(3.0)),
        ({"kind": "signal-to-noise", "window": 5}, sf.SignalToNoise(window=5)),
        ({"kind": "stop-when-flat", "least": 0.5}, sf.StopWhenFlat(least=0.5)),
    ],
)
def test_a_table_makes_what_a_program_would(settings: dict[str, object] | None, made: object) -> None:
    assert noise_of(settings) == made


def test_clip_norms_and_rates_have_names_of_their_own() -> None:
    assert clips_of({"kind": "adaptive", "quantile": 0.7}) == sf.AdaptiveClip(0.7)
    assert rates_of({"kind": "linear", "start": 0.5, "end": 1.5}) == sf.Linear(0.5, 1.5)
    with pytest.raises(InputError, match="kind 'adaptive' is unknown"):
        rates_of({"kind": "adaptive"})


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"kind": "cosin", "start": 2, "end": 1}, InputError, "Did you mean"),
        ({"start": 2}, InputError, "needs a kind, one of constant, linear"),
        (
            {"kind": "cosine", "begin": 2},
            InputError,
            "takes the settings start, end, not begin",
        ),
        ({"kind": "cosine"}, InputError, "takes the settings start, end, not none"),
        ({"kind": "cosine", "start": 0, "end": 1}, InputError, "the start of the schedule"),
        ({"kind": "listed", "values": []}, PlanError, "one value for each step"),
    ],
)
def test_what_is_not_known_is_named(settings: dict[str, object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        noise_of(settings)
