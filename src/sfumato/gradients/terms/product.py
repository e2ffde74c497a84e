"""Gradients that are a product of two matrices for each record: what a linear layer has.

With left of shape (positions, m) and right of shape (positions, n), the gradient of a record is left^T right, (m, n). Its
squared norm is also the sum over pairs of positions of (left left^T) * (right right^T), the ghost norm (Goodfellow 2015 for
one position, Li et al. 2022 for several).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import final

import torch
from torch import Tensor
from typing_extensions import override

from sfumato.gradients.terms.held import Held
from sfumato.gradients.terms.term import (
    Part,
    Strategy,
    Term,
    Weighting,
    comfortable,
    squared_norms,
    unit,
    wide,
    with_slack,
)

_BLOCK = 2**20  # coordinates of the gradients that are measured together, so that they stay in the cache


@final
class Product(Term):
    """The term for left^T right.

    Args:
        name: The parameter, of m * n coordinates.
        left: Shape (records, positions, m).
        right: Shape (records, positions, n).
        shape: Of the parameter.
    """

    def __init__(self, name: str, left: Tensor, right: Tensor, shape: torch.Size) -> None:
        self.name, self.shape = name, shape
        self.left, self.right = wide(left), wide(right)
        if self.left.dtype != self.right.dtype:
            dtype = torch.promote_types(self.left.dtype, self.right.dtype)
            self.left, self.right = self.left.to(dtype), self.right.to(dtype)
        self.records, self.positions, self.m = left.shape
        self.n, self.device = right.shape[2], left.device
        self.signature = ("product", self.positions, self.m, self.n, self.left.dtype, self.left.device.type)
        self.work = self.records * self.positions * self.m * self.n

    @override
    def strategies(self) -> Mapping[str, Strategy]:
        if self.positions == 1:
            return {"outer product": Strategy(lambda: _Direct(self, torch.mul), 0)}
        size = self.left.element_size() * self.records
        held = Strategy(lambda: Held(self._rows(), lambda row: row.view(self.shape)), size * self.m * self.n)
        ghost = Strategy(lambda: _Direct(self, self.ghost), 0)
        blocks = Strategy(lambda: _Direct(self, self._blocks), 0)
        ghost_work, product_work = self.positions * (self.m + self.n), self.m * self.n
        if ghost_work > 4 * product_work:
            return {"per record": held, "in blocks": blocks}
        if ghost_work < product_work:
            return {"ghost norm": ghost, "per record": held, "in blocks": blocks}
        return {"per record": held, "ghost norm": ghost, "in blocks": blocks}

    @override
    def per_record(self) -> Tensor:
        return self._rows().view(self.records, *self.shape)

    @override
    def merged(self, others: Sequence[Term]) -> Term | None:
        same = [
            other
            for other in others
            if isinstance(other, Product) and (other.m, other.n, other.left.dtype) == (self.m, self.n, self.left.dtype)
        ]
        if len(same) < len(others):
            return None
        left = torch.cat([self.left, *(other.left for other in same)], 1)
        right = torch.cat([self.right, *(other.right for other in same)], 1)
        return Product(self.name, left, right, self.shape)

    def _rows(self) -> Tensor:
        if self.space is None:
            return torch.bmm(self.left.transpose(1, 2), self.right).flatten(1)
        rows = self.space.rows(self.name, self.records, self.m * self.n, self.left)
        torch.bmm(self.left.transpose(1, 2), self.right, out=rows.view(self.records, self.m, self.n))
        return rows

    def masses(self) -> tuple[Tensor, Tensor]:
        """Return the squared norms of each record's left and right, shape (records,), float64."""
        return squared_norms(self.left.flatten(1)), squared_norms(self.right.flatten(1))

    def ghost(self, left_mass: Tensor, right_mass: Tensor) -> Tensor:
        """Return the squared norms without the gradients, shape (records,), float64, given the masses."""
        left, right = self.left, self.right
        mass = left_mass * right_mass
        scale = torch.ones_like(mass)
        if not (comfortable(left_mass) and comfortable(right_mass)):
            left, right, scale = unit(left, left_mass), unit(right, right_mass), mass
        # In float64: in float32 the pairs of a record that cancels would be off by more than what is left of it.
        left, right = left.to(torch.float64), right.to(torch.float64)
        pairs = torch.bmm(left, left.transpose(1, 2)).mul_(torch.bmm(right, right.transpose(1, 2)))
        return with_slack(pairs.sum((1, 2)).clamp_(min=0) * scale, mass, self.left.dtype)

    def _blocks(self, left_mass: Tensor, right_mass: Tensor) -> Tensor:
        squared = torch.empty(self.records, dtype=torch.float64, device=self.left.device)
        block = max(1, _BLOCK // (self.m * self.n))
        for start in range(0, self.records, block):
            part = slice(start, start + block)
            squared[part] = squared_norms(torch.bmm(self.left[part].transpose(1, 2), self.right[part]).flatten(1))
        return with_slack(squared, left_mass * right_mass, self.left.dtype)


@final
class _Direct(Part):
    """Measured without holding the gradients; the weighted sum is one matrix product."""

    def __init__(self, term: Product, squared: Callable[[Tensor, Tensor], Tensor]) -> None:
        self._term, self._masses = term, term.masses()
        self.squared = squared(*self._masses)

    @override
    def weighted_sum(self, weighting: Weighting) -> Tensor:
        left, right = self._weighted(weighting)
        return (left @ right).view(self._term.shape)

    @override
    def add_weighted_sum(self, total: Tensor, weighting: Weighting) -> None:
        left, right = self._weighted(weighting)
        if total.dtype == left.dtype and total.is_contiguous():
            total.view(self._term.m, self._term.n).addmm_(left, right)
        else:
            total.add_((left @ right).view(self._term.shape))

    def _weighted(self, weighting: Weighting) -> tuple[Tensor, Tensor]:
        term = self._term
        left, right = weighting.balanced(term.left, term.right, *self._masses)
        return left.flatten(0, 1).t(), right.flatten(0, 1)
