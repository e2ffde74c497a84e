"""Recurrent layers (Elman, LSTM, GRU), unrolled over time for all records at once.

The kernels that torch has for them keep the gates to themselves; here each step's gates are seen. The input's product is taken
for all steps at once, the hidden state's step by step, and both are plain linear layers whose positions are the steps.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

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
        projected = len(weights) > layers * (2 if both_ways else 1) * (4 if biased else 2)
        if projected or not tape.has_records(input) or input.dim() != 3:
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
    each = 4 if biased else 2
    opened = [_opened(tape, tensor, images) for tensor in start]  # (layers * ways, records * images, hidden)
    ends: list[State] = []
    for layer in range(layers):
        if layer and dropout:
            x = F.dropout(x, dropout)
        outs = []
        for way in range(ways):
            place = layer * ways + way
            mine = [tape.weight(tensor) for tensor in weights[place * each : (place + 1) * each]]
            w_in, w_hidden, *rest = mine
            assert w_in is not None
            assert w_hidden is not None
            b_in, b_hidden = rest if biased else (None, None)
            state = tuple(tensor[place] for tensor in opened)
            out, end = _unroll(tape, cell, x, state, (w_in, b_in), (w_hidden, b_hidden), backwards=way == 1)
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


def _unroll(
    tape: Tape, cell: Cell, x: Tensor, state: State, into: tuple[Weight, Weight | None],
    again: tuple[Weight, Weight | None], *, backwards: bool,
) -> tuple[Tensor, State]:  # fmt: skip
    rows, steps = x.shape[:2]
    w_in, b_in = into
    w_hidden, b_hidden = again
    gates = F.linear(x.reshape(rows * steps, -1), w_in.value, b_in.value if b_in else None)
    by_step = gates.view(rows, steps, -1).unbind(1)
    hidden_gates: list[Tensor] = []
    seen: list[Tensor] = []
    outs: list[Tensor] = [x] * steps
    for step in reversed(range(steps)) if backwards else range(steps):
        seen.append(state[0].detach())
        hidden = F.linear(state[0], w_hidden.value, b_hidden.value if b_hidden else None)
        hidden_gates.append(hidden)
        state = cell(by_step[step], hidden, state)
        outs[step] = state[0]
    kept, records = Kept(x), tape.records

    def terms(gradients: Sequence[Tensor | None]) -> Iterator[Term]:
        first, *later = gradients
        if first is not None:
            inputs = kept.get()
            if w_in.name or (b_in is not None and b_in.name):
                yield from matrix_terms(w_in, b_in, Kept(inputs.reshape(records, -1, inputs.shape[-1])), first)
        reached = [(state, g) for state, g in zip(seen, later, strict=True) if g is not None]
        if reached:
            before = torch.stack([state for state, _ in reached], 1)
            upstream = torch.stack([gradient for _, gradient in reached], 1)
            before = before.reshape(records, -1, before.shape[-1])
            yield from matrix_terms(w_hidden, b_hidden, Kept(before), upstream)

    tape.note("recurrent", (w_in, w_hidden, b_in, b_hidden), (x, *state), (gates, *hidden_gates), terms)
    return torch.stack(outs, 1), state


rule(torch.lstm)(_recurrent(_lstm, 2))
rule(torch.gru)(_recurrent(_gru, 1))
rule(torch.rnn_tanh)(_recurrent(partial(_elman, torch.tanh), 1))
rule(torch.rnn_relu)(_recurrent(partial(_elman, torch.relu), 1))
