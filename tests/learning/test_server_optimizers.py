from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from sfumato.errors import InputError
from sfumato.learning.server_optimizers import KINDS, AdaptiveServer

NUMBERS = st.floats(-5, 5, allow_subnormal=False)


def stepped(optimizer: AdaptiveServer, parameter: nn.Parameter, gradients: list[list[float]]) -> np.ndarray:
    for gradient in gradients:
        parameter.grad = torch.tensor(gradient, dtype=torch.float64)
        optimizer.step()
    return parameter.detach().numpy().copy()


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(KINDS), st.lists(st.lists(NUMBERS, min_size=3, max_size=3), min_size=1, max_size=5),
    st.floats(1e-3, 2), st.floats(0, 0.99), st.floats(0, 0.999), st.floats(1e-3, 1),
)  # fmt: skip
def test_it_follows_algorithm_2(
    kind: str, gradients: list[list[float]], lr: float, beta1: float, beta2: float, tau: float
) -> None:
    parameter = nn.Parameter(torch.tensor([1.0, -2.0, 0.0], dtype=torch.float64))
    w, m, v = parameter.detach().numpy().copy(), np.zeros(3), np.full(3, tau**2)
    optimizer = AdaptiveServer([parameter], kind, lr=lr, beta1=beta1, beta2=beta2, tau=tau)
    found = stepped(optimizer, parameter, gradients)
    for gradient in gradients:
        delta = -np.array(gradient)
        m = beta1 * m + (1 - beta1) * delta
        if kind == "adagrad":
            v = v + delta**2
        elif kind == "adam":
            v = beta2 * v + (1 - beta2) * delta**2
        else:
            v = v - (1 - beta2) * delta**2 * np.sign(v - delta**2)
        w = w + lr * m / (np.sqrt(v) + tau)
    assert np.abs(found - w).max() < 1e-6 * max(1.0, lr / tau)


def test_there_is_no_correction_of_the_first_steps() -> None:
    parameter = nn.Parameter(torch.zeros(1, dtype=torch.float64))
    optimizer = AdaptiveServer([parameter], "adam", lr=1.0, beta1=0.9, beta2=0.99, tau=0.1)
    found = stepped(optimizer, parameter, [[1.0]])
    assert found[0] == pytest.approx(-0.1 / (math.sqrt(0.99 * 0.01 + 0.01) + 0.1))


def test_a_parameter_without_a_gradient_stays() -> None:
    moved, still = nn.Parameter(torch.zeros(2)), nn.Parameter(torch.ones(2))
    optimizer = AdaptiveServer([moved, still])
    moved.grad = torch.ones(2)
    optimizer.step()
    assert bool((moved < 0).all())
    assert torch.equal(still, torch.ones(2))
    assert still not in optimizer.state


def test_groups_have_settings_of_their_own() -> None:
    one, other = nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(1))
    optimizer = AdaptiveServer([{"params": [one]}, {"params": [other], "lr": 0.02}], lr=0.01)  # type: ignore[list-item]
    for parameter in (one, other):
        parameter.grad = torch.ones(1)
    optimizer.step()
    assert torch.allclose(other, 2 * one)


@pytest.mark.parametrize("kind", KINDS)
def test_a_saved_state_goes_on_where_it_was(kind: str) -> None:
    steps = [[1.0, -1.0], [0.5, 3.0], [-2.0, 0.25]]
    whole = nn.Parameter(torch.zeros(2, dtype=torch.float64))
    expected = stepped(AdaptiveServer([whole], kind), whole, steps)
    first = nn.Parameter(torch.zeros(2, dtype=torch.float64))
    saved = AdaptiveServer([first], kind)
    stepped(saved, first, steps[:2])
    second = nn.Parameter(first.detach().clone())
    resumed = AdaptiveServer([second], kind, lr=0.5)
    resumed.load_state_dict(copy.deepcopy(saved.state_dict()))
    assert np.array_equal(stepped(resumed, second, steps[2:]), expected)


def test_what_is_out_of_range_is_refused() -> None:
    parameters = [nn.Parameter(torch.zeros(1))]
    for arguments, message in [
        ({"kind": "adm"}, 'no server optimiser "adm".*"adam"'),
        ({"lr": 0.0}, "lr"),
        ({"lr": math.nan}, "lr"),
        ({"beta1": 1.0}, "beta1"),
        ({"beta2": -0.1}, "beta2"),
        ({"beta2": math.nan}, "beta2"),
        ({"tau": 0.0}, "tau"),
    ]:
        with pytest.raises(InputError, match=message):
            AdaptiveServer(parameters, **arguments)  # type: ignore[arg-type]
