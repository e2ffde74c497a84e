"""Gradients held in full: one row for each record. Exact, and the price is memory."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import final

import torch
from torch import Tensor
from typing_extensions import override

from sfumato.gradients.terms.term import Part, Strategy, Term, Weighting, squared_norms, wide, without


@final
class Held(Part):
    """The gradient of every record, as it is.

    Args:
        rows: Shape (records, size of the parameter).
        finish: Brings a weighted sum of rows, shape (size,), into the parameter's shape.
    """

    def __init__(self, rows: Tensor, finish: Callable[[Tensor], Tensor]) -> None:
        self._rows, self._finish = rows, finish
        self.squared = squared_norms(rows)

    @override
    def weighted_sum(self, weighting: Weighting) -> Tensor:
        if not weighting.is_gentle:
            scaled = weighting.scaled(self._rows.to(torch.float64))
            return self._finish(scaled.sum(0).to(self._rows.dtype))
        rows = without(self._rows, weighting.broken)
        return self._finish((weighting.factors.to(rows.dtype).unsqueeze(0) @ rows).squeeze(0))


@final
class Given(Term):
    """A gradient that is small, or that nothing cheaper is known for.

    Args:
        name: The parameter.
        gradients: Shape (records, *shape of the parameter).
    """

    def __init__(self, name: str, gradients: Tensor) -> None:
        self.name, self._gradients = name, wide(gradients)
        self.records, self.device = len(gradients), gradients.device
        self.size = math.prod(gradients.shape[1:])
        self.signature = ("given", *gradients.shape[1:])
        self.work = gradients.numel()

    @override
    def strategies(self) -> Mapping[str, Strategy]:
        shape = self._gradients.shape[1:]
        rows = self._gradients.reshape(self.records, self.size)
        size = rows.numel() * rows.element_size()
        return {"per record": Strategy(lambda: Held(rows, lambda row: row.view(shape)), size)}

    @override
    def per_record(self) -> Tensor:
        return self._gradients


def joined(terms: Sequence[Given]) -> Given:
    """Return one term for several small parameters side by side, in the order given."""
    rows = [term.per_record().reshape(term.records, -1) for term in terms]
    dtype = functools.reduce(torch.promote_types, {row.dtype for row in rows})
    return Given(", ".join(term.name for term in terms), torch.cat([row.to(dtype) for row in rows], 1))


def added(terms: Sequence[Term]) -> Given:
    """Return the term for a parameter that is used in several places: the gradients of each record added up."""
    total = terms[0].per_record()
    for term in terms[1:]:
        total = total + term.per_record()
    return Given(terms[0].name, total)
