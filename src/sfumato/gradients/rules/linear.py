"""Linear layers and products with a weight, with any leading dimensions."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from sfumato.gradients.rules.registry import rule, together
from sfumato.gradients.tape import Kept, Tape, Weight
from sfumato.gradients.terms.held import Given
from sfumato.gradients.terms.product import Product
from sfumato.gradients.terms.term import Term, wide


@rule(F.linear)
def linear(tape: Tape, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Any:
    """Follow `torch.nn.functional.linear`."""
    if not tape.has_records(input) or not _is_layer(tape, input, weight, bias):
        return NotImplemented
    x = tape.open(input)
    w, b = tape.weight(weight), tape.weight(bias)
    assert w is not None
    out = F.linear(x.reshape(-1, x.shape[-1]), w.value, b.value if b else None)
    kept = Kept(x)

    def terms(gradients: Sequence[Tensor | None]) -> Iterator[Term]:
        (gradient,) = gradients
        assert gradient is not None
        yield from matrix_terms(w, b, kept, gradient)

    tape.note("linear", (w, b), (x,), (out,), terms)
    return tape.close(out.view(*x.shape[:-1], len(weight)))


@together(F.linear)
def frozen_linear(tape: Tape, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Any:
    """Compute `torch.nn.functional.linear` of frozen weights in one product; vmap would add the bias in a pass of its own."""
    if not tape.can_open(input) or not _is_layer(tape, input, weight, bias):
        return NotImplemented
    x = tape.open(input)
    out = F.linear(x.reshape(-1, x.shape[-1]), weight, bias)
    tape.bytes += out.nbytes
    return tape.close(out.view(*x.shape[:-1], len(weight)))


def _is_layer(tape: Tape, input: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    # A number for each record, without dimensions, torch refuses; opened it would be a vector over the records.
    return input.dim() > 0 and weight.dim() == 2 and not tape.has_records(weight) and not tape.has_records(bias)


@rule(torch.addmm)
def addmm(
    tape: Tape, input: Tensor, mat1: Tensor, mat2: Tensor, *, beta: float = 1, alpha: float = 1
) -> Any:  # fmt: skip
    """Follow `torch.addmm(bias, x, weight)`, a linear layer whose weight has shape (in, out)."""
    if beta != 1 or alpha != 1 or tape.has_records(input) or input.dim() != 1:
        return NotImplemented
    return _times(tape, mat1, mat2, input)


@rule(torch.matmul, torch.mm, Tensor.matmul, Tensor.mm, Tensor.__matmul__)
def matmul(tape: Tape, input: Tensor, other: Tensor) -> Any:
    """Follow `x @ weight` for a weight of shape (in, out)."""
    return _times(tape, input, other, None)


def _times(tape: Tape, input: Tensor, weight: Tensor, bias: Tensor | None) -> Any:
    if not tape.has_records(input) or tape.has_records(weight) or weight.dim() != 2 or input.dim() < 1:
        return NotImplemented
    x = tape.open(input)
    w, b = tape.weight(weight), tape.weight(bias)
    assert w is not None
    flat = x.reshape(-1, x.shape[-1])
    out = flat @ w.value if b is None else torch.addmm(b.value, flat, w.value)
    kept = Kept(x)

    def terms(gradients: Sequence[Tensor | None]) -> Iterator[Term]:
        (gradient,) = gradients
        assert gradient is not None
        yield from matrix_terms(w, b, kept, gradient, out_last=True)

    tape.note("linear", (w, b), (x,), (out,), terms)
    return tape.close(out.view(*x.shape[:-1], weight.shape[1]))


def matrix_terms(
    weight: Weight, bias: Weight | None, inputs: Kept, gradient: Tensor, *, out_last: bool = False
) -> Iterator[Term]:  # fmt: skip
    """Yield the terms of out = inputs @ weight.T + bias, or of inputs @ weight + bias if the weight has its outputs last.

    Inputs have shape (records, *, in), and gradients any such shape.
    """
    x = inputs.get()
    records = len(x)
    of_out = gradient.reshape(records, -1, gradient.shape[-1])
    if weight.name:
        of_in = x.reshape(records, -1, x.shape[-1])
        left, right = (of_in, of_out) if out_last else (of_out, of_in)
        yield Product(weight.name, left, right, weight.value.shape)
    if bias is not None and bias.name:
        yield Given(bias.name, wide(of_out).sum(1))
