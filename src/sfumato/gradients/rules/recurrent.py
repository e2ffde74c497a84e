"""Recurrent layers and cells (Elman, LSTM, GRU), unrolled over time for all records at once.

The kernels that torch has for them keep the gates to themselves; here each step's gates are seen. The input's product is taken
for all steps at once, the hidden state's step by step, and both are plain linear layers whose positions are the steps.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, final

import torch
from torch import Tensor
from torch.nn import functional as F

from sfumato.errors import UnsupportedModelError
from sfumato.gradients.rules.linear import matrix_terms
from sfumato.gradients.rules.registry import rule
from sfumato.gradients.tape import Kept, Tape, Weight
from sfumato.gradients.terms.term import Term

State = tuple[Tensor, ...]
Cell = Callable[[Tensor, Tensor, State], State]
"""Maps the gates of the input, the gates of the hidden state, and the state before to the state after; hidden state first."""


def _elman(activate: Callable[[Tensor], Tensor], inputs: Tensor, hidden: Tensor, state: State) -> State:
    return (activate(inputs + hidden),)


def _lstm(inputs: Tensor, hidden: Tensor, state: State) -> State:
    enter, forget, cell, leave = (inputs + hidden).chunk(4, -1)
    kept = torch.sigmoid(forget) * state[1] + torch.sigmoid(enter) * torch.tanh(cell)
    return torch.sigmoid(leave) * torch.tanh(kept), kept


def _gru(inputs: Tensor, hidden: Tensor, state: State) -> State:
    in_reset, in_update, in_new = inputs.chunk(3, -1)
    reset, update, new = hidden.chunk(3, -1)
    proposed = torch.tanh(in_new + torch.sigmoid(in_reset + reset) * new)
    keep = torch.sigmoid(in_update + update)
    return ((1 - keep) * proposed + keep * state[0],)


def _recurrent(cell: Cell, states: int) -> Callable[..., Any]:
    def follow(tape: Tape, input: Tensor, *rest: Any) -> Any:
        if len(rest) != 8 or not isinstance(rest[2], bool):
            raise UnsupportedModelError(
                "A recurrent layer got a packed sequence, which mixes the records' steps; give it a padded tensor."
            )
        start, weights, biased, layers, dropout, training, both_ways, batch_first = rest
        if not tape.has_records(input) or input.dim() != 3:
            return NotImplemented
        return _run(
            tape, cell, states, input, start if states > 1 else (start,), weights, biased=biased, layers=layers,
            dropout=dropout if training else 0.0, both_ways=both_ways, batch_first=batch_first,
        )  # fmt: skip

    return follow


def _run(
    tape: Tape, cell: Cell, states: int, input: Tensor, start: Sequence[Tensor], weights: Sequence[Tensor], *,
    biased: bool, layers: int, dropout: float, both_ways: bool, batch_first: bool,
) -> Any:  # fmt: skip
    batch = 0 if batch_first else 1
    images = input.shape[batch]
    x = tape.open(input).movedim(batch + 1, 1).flatten(0, 1)  # (records * images, steps, in)
    ways = 2 if both_ways else 1
    each = len(weights) // (layers * ways)  # two products, perhaps their biases, perhaps a projection
    opened = [_opened(tape, tensor, images) for tensor in start]  # (layers * ways, records * images, hidden)
    ends: list[State] = []
    for layer in range(layers):
        if layer and dropout:
            with tape.outside():
                x = F.dropout(x, dropout)
        outs = []
        for way in range(ways):
            place = layer * ways + way
            mine = [tape.weight(tensor) for tensor in weights[place * each : (place + 1) * each]]
            into = _Dense(mine[0], mine[2] if biased else None)
            again = _Dense(mine[1], mine[3] if biased else None)
            project = _Dense(mine[-1], None) if each % 2 else None
            state = tuple(tensor[place] for tensor in opened)
            out, end = _unroll(tape, cell, x, state, into, again, project, backwards=way == 1)
            outs.append(out)
            ends.append(end)
        x = torch.cat(outs, -1) if both_ways else outs[0]
    result = tape.close(x.unflatten(0, (tape.records, images)).movedim(1, batch + 1))
    last = [
        tape.close(torch.stack([end[i] for end in ends]).unflatten(1, (tape.records, images)).movedim(1, 0))
        for i in range(states)
    ]
    return (result, *last)


def _opened(tape: Tape, state: Tensor, images: int) -> Tensor:
    """Return a start state (layers * ways, images, hidden) of the model for all records, or the same one for each."""
    if state.requires_grad and not tape.has_records(state):
        raise UnsupportedModelError("A trained start state of a recurrent layer is not supported; use zeros.")
    if tape.has_records(state):
        return tape.open(state).movedim(0, 1).flatten(1, 2)
    return state.repeat(1, tape.records, 1)


@final
class _Dense:
    """One linear layer of the recurrence and what it saw, step by step."""

    def __init__(self, weight: Weight | None, bias: Weight | None) -> None:
        assert weight is not None
        self.weight, self.bias = weight, bias
        self.is_trained = bool(weight.name or (bias is not None and bias.name))
        self.inputs: list[Tensor] = []
        self.outputs: list[Tensor] = []

    def __call__(self, x: Tensor) -> Tensor:
        out = F.linear(x, self.weight.value, self.bias.value if self.bias else None)
        if self.is_trained:
            self.inputs.append(x)
            self.outputs.append(out)
        return out

    def note(self, tape: Tape) -> None:
        """Note all steps as one use, whose positions are the steps."""
        if not self.is_trained:
            return
        records, inputs = tape.records, [Kept(x) for x in self.inputs]

        def terms(gradients: Sequence[Tensor | None]) -> Iterator[Term]:
            reached = [(x.get(), g) for x, g in zip(inputs, gradients, strict=True) if g is not None]
            seen = torch.stack([x for x, _ in reached], 1)
            upstream = torch.stack([gradient for _, gradient in reached], 1)
            yield from matrix_terms(self.weight, self.bias, Kept(seen.reshape(records, -1, seen.shape[-1])), upstream)

        tape.note("recurrent", (self.weight, self.bias), self.inputs, self.outputs, terms)


def _unroll(
    tape: Tape, cell: Cell, x: Tensor, state: State, into: _Dense, again: _Dense, project: _Dense | None, *,
    backwards: bool,
) -> tuple[Tensor, State]:  # fmt: skip
    rows, steps = x.shape[:2]
    by_step = into(x.reshape(rows * steps, -1)).view(rows, steps, -1).unbind(1)
    outs: list[Tensor] = [x] * steps
    for step in reversed(range(steps)) if backwards else range(steps):
        state = cell(by_step[step], again(state[0]), state)
        if project is not None:
            state = (project(state[0]), *state[1:])
        outs[step] = state[0]
    for dense in (into, again, project):
        if dense is not None:
            dense.note(tape)
    return torch.stack(outs, 1), state


def _cell(cell: Cell, states: int) -> Callable[..., Any]:
    def follow(
        tape: Tape, input: Tensor, start: Any, w_in: Tensor, w_hidden: Tensor, b_in: Tensor | None = None,
        b_hidden: Tensor | None = None,
    ) -> Any:  # fmt: skip
        state = tuple(start) if states > 1 else (start,)
        with tape:  # so that the linear layers are seen; several steps are put together by their terms
            after = cell(F.linear(input, w_in, b_in), F.linear(state[0], w_hidden, b_hidden), state)
        return after if states > 1 else after[0]

    return follow


rule(torch.lstm)(_recurrent(_lstm, 2))
rule(torch.gru)(_recurrent(_gru, 1))
rule(torch.rnn_tanh)(_recurrent(partial(_elman, torch.tanh), 1))
rule(torch.rnn_relu)(_recurrent(partial(_elman, torch.relu), 1))
rule(torch.lstm_cell)(_cell(_lstm, 2))
rule(torch.gru_cell)(_cell(_gru, 1))
rule(torch.rnn_tanh_cell)(_cell(partial(_elman, torch.tanh), 1))
rule(torch.rnn_relu_cell)(_cell(partial(_elman, torch.relu), 1))
