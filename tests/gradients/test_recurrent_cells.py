"""Recurrent cells called step by step, dropout between and inside layers, and what a step leaves in memory."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch
from gradient_checks import Case, check_agreement, normals, with_values
from torch import Tensor, nn

from sfumato.gradients.clipping import Clipping
from sfumato.gradients.private import PrivateGradient
from sfumato.gradients.tape import Tape


class Steps(nn.Module):
    """Calls one cell for every step, so that its weights are used many times."""

    def __init__(self, cell: nn.Module) -> None:
        super().__init__()
        self.cell, self.out = cell, nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        state = None
        for step in range(x.shape[1]):
            state = self.cell(x[:, step], state)
        return self.out(state[0] if isinstance(state, tuple) else state)


CELLS = {
    "lstm": lambda bias: nn.LSTMCell(3, 4, bias=bias),
    "gru": lambda bias: nn.GRUCell(3, 4, bias=bias),
    "rnn, tanh": lambda bias: nn.RNNCell(3, 4, bias=bias),
    "rnn, relu": lambda bias: nn.RNNCell(3, 4, bias=bias, nonlinearity="relu"),
}


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("name", CELLS)
@pytest.mark.parametrize("frozen", [None, "cell.weight_ih", "cell.weight_hh"])
def test_a_cell_that_is_called_step_by_step_equals_a_loop(name: str, bias: bool, frozen: str | None) -> None:
    model = with_values(Steps(CELLS[name](bias)), 3)
    for key, parameter in model.named_parameters():
        parameter.requires_grad_(key != frozen)
    case = Case(model, normals(1, 5, 6, 3), normals(2, 5))
    for clipping in (Clipping(0.05), Clipping(100.0), Clipping(0.3, "per-layer")):
        check_agreement(case.fast(clipping), case.loop(clipping), 1e-10)


@pytest.mark.parametrize(
    "model",
    [
        nn.TransformerEncoderLayer(4, 2, 8, dropout=0.5, batch_first=True),
        nn.Sequential(nn.LayerNorm(4), nn.TransformerEncoderLayer(4, 2, 8, dropout=0.5, batch_first=False)),
    ],
)
def test_attention_with_dropout_trains_and_every_record_draws_its_own(model: nn.Module) -> None:
    model = with_values(model.train(), 1)
    alike = normals(5, 1, 6, 4).expand(8, 6, 4).contiguous()
    gradient = PrivateGradient(model, lambda out, _: out.square().mean(), Clipping(1e6))
    several, one = (gradient.sum(x, torch.zeros(len(x))) for x in (alike, alike[:1]))
    assert several.nonfinite == 0
    # With one mask for all, eight equal records would give eight times one record.
    ratio = [float(several.bounded.value[k].norm() / (8 * one.bounded.value[k].norm())) for k in one.bounded.value]
    assert any(abs(r - 1) > 0.01 for r in ratio)


def test_layers_of_a_recurrence_with_dropout_between_them_train() -> None:
    net = nn.LSTM(3, 4, num_layers=2, dropout=0.5, batch_first=True).train()
    model = with_values(net, 2)
    gradient = PrivateGradient(model, lambda out, _: out[0].square().mean(), Clipping(1.0))
    result = gradient.sum(normals(1, 6, 5, 3), torch.zeros(6))
    assert result.nonfinite == 0
    assert all(bool(tensor.any()) for tensor in result.bounded.value.values())


def test_a_step_leaves_nothing_for_the_garbage_collector(monkeypatch: pytest.MonkeyPatch) -> None:
    tapes: list[weakref.ref[Tape]] = []

    honest = Tape.__init__

    def watched(self: Tape, *args: Any) -> None:
        honest(self, *args)
        tapes.append(weakref.ref(self))

    monkeypatch.setattr(Tape, "__init__", watched)
    model = with_values(nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)), 1)
    gradient = PrivateGradient(model, lambda out, _: out.square().mean(), Clipping(1.0))
    gc.collect()
    gc.disable()
    try:
        for _ in range(3):
            gradient.sum(normals(1, 6, 3), torch.zeros(6))
            assert tapes.pop()() is None
    finally:
        gc.enable()
