"""Linear layers, with any leading dimensions."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from torch import Tensor
from torch.nn import functional as F

from sfumato.gradients.rules.registry import rule
from sfumato.gradients.tape import Kept, Tape, Weight
from sfumato.gradients.terms.held import Given
from sfumato.gradients.terms.product import Product
from sfumato.gradients.terms.term import Term, wide


@rule(F.linear)
def linear(tape: Tape, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Any:
    """Follow `torch.nn.functional.linear`."""
    if not tape.has_records(input) or tape.has_records(weight) or tape.has_records(bias) or weight.dim() != 2:
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


def matrix_terms(weight: Weight, bias: Weight | None, inputs: Kept, gradient: Tensor) -> Iterator[Term]:
    """Yield the terms of out = inputs @ weight.T + bias, for inputs (records, *, in) and gradients of any such shape."""
    x = inputs.get()
    records = len(x)
    left = gradient.reshape(records, -1, gradient.shape[-1])
    if weight.name:
        yield Product(weight.name, left, x.reshape(records, -1, x.shape[-1]), weight.value.shape)
    if bias is not None and bias.name:
        yield Given(bias.name, wide(left).sum(1))
