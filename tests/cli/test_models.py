"""The built-in models."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sfumato.errors import InputError
from sfumato.gradients.support import check_model
from sfumato.learning.models import build

shapes = st.tuples(st.integers(1, 3), st.integers(4, 12), st.integers(4, 12))


@settings(max_examples=25, deadline=None)
@given(st.sampled_from(["logistic", "mlp", "cnn"]), shapes, st.integers(1, 5))
def test_every_kind_gives_one_score_per_output_and_trains_privately(kind, shape, outputs):
    model = build(kind, shape, outputs)
    check_model(model)
    assert model(torch.zeros(2, *shape)).shape == (2, outputs)


@pytest.mark.parametrize("hidden", [None, [7], [5, 3]])
def test_hidden_widths_are_kept(hidden):
    widths = [layer.out_features for layer in build("mlp", (4,), 2, hidden) if hasattr(layer, "out_features")]
    assert widths == [*(hidden or [32]), 2]
    assert isinstance(build("mlp", (4,), 2, hidden)[-1], torch.nn.Linear)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("lgistic", (4,), 2), "logistic"),
        (("logistic", (4,), 2, [3]), "hidden"),
        (("cnn", (4,), 2), "images"),
        (("cnn", (1, 3, 9), 2), "images"),
        (("mlp", (4,), 0), "at least 1"),
    ],
)
def test_what_does_not_fit_is_refused(arguments, words):
    with pytest.raises(InputError, match=words):
        build(*arguments)
