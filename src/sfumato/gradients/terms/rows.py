"""Gradients with few rows that are not zero: what an embedding has."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import final

import torch
from torch import Tensor
from typing_extensions import override

from sfumato.gradients.terms.term import Part, Strategy, Term, Weighting, squared_norms, wide


@final
class Rows(Term):
    """The term for a table of which each record reads some rows.

    Args:
        name: The table's parameter.
        index: Which row was read, shape (records, positions), int64; below 0 means none.
        gradients: Of what was read, shape (records, positions, width).
        rows: Rows of the table.
    """

    def __init__(self, name: str, index: Tensor, gradients: Tensor, rows: int) -> None:
        self.name, self.index, self.gradients, self.rows = name, index, wide(gradients), rows
        self.records, self.positions, self.width = gradients.shape
        self.device = gradients.device
        self.signature = ("rows", self.positions, self.width)
        self.work = self.gradients.numel()

    @override
    def strategies(self) -> Mapping[str, Strategy]:
        return {"rows read": Strategy(lambda: _Segments(self), self.gradients.numel() * self.gradients.element_size())}

    @override
    def per_record(self) -> Tensor:
        flat, gradients = self.placed()
        table = gradients.new_zeros(self.records * self.rows, self.width)
        return table.index_add_(0, flat, gradients).view(self.records, self.rows, self.width)

    @override
    def merged(self, others: Sequence[Term]) -> Term | None:
        same = [other for other in others if isinstance(other, Rows)]
        if len(same) < len(others):
            return None
        index = torch.cat([self.index, *(other.index for other in same)], 1)
        return Rows(self.name, index, torch.cat([self.gradients, *(other.gradients for other in same)], 1), self.rows)

    def placed(self) -> tuple[Tensor, Tensor]:
        """Return which row of which record was read, as record * rows + row, and its gradients; both flat."""
        record = torch.arange(self.records, device=self.index.device).unsqueeze(1)
        flat = (record * self.rows + self.index).flatten()
        read = (self.index >= 0).flatten()
        return flat[read], self.gradients.flatten(0, 1)[read]


@final
class _Segments(Part):
    """The gradients of one row in one record added up, so that they are measured and summed as the same numbers."""

    def __init__(self, term: Rows) -> None:
        self._term = term
        flat, gradients = term.placed()
        places, inverse = torch.unique(flat, return_inverse=True)
        self._record, self._row = places // term.rows, places % term.rows
        self._sums = gradients.new_zeros(len(places), term.width).index_add_(0, inverse, gradients)
        squared = squared_norms(self._sums)
        self.squared = squared.new_zeros(term.records).index_add_(0, self._record, squared)

    @override
    def weighted_sum(self, weighting: Weighting) -> Tensor:
        term = self._term
        total = self._sums.new_zeros(term.rows, term.width)
        self.add_weighted_sum(total, weighting)
        return total

    @override
    def add_weighted_sum(self, total: Tensor, weighting: Weighting) -> None:
        sums = weighting.of(self._record).scaled(self._sums)
        total.index_add_(0, self._row, sums.to(total.dtype))
