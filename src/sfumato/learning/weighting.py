"""How much each client counts in a round, and what that does to the bound on one client's part."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from sfumato import _checks


class Weighting(ABC):
    """Gives each client a weight from its number of records.

    Attributes:
        is_bounded: Whether no weight is above 1, so that a clipped vector stays within the clip norm.
        expected: The declared, public mean of the weights over the population, by which a private sum is divided.
    """

    is_bounded: bool
    expected: float = 1.0

    @abstractmethod
    def of(self, sizes: Tensor) -> Tensor:
        """Return the weights (clients,) float64 of clients with these numbers of records, (clients,) int64."""


@final
@dataclass(frozen=True)
class Uniform(Weighting):
    """Every client counts the same: the choice where clients are protected."""

    is_bounded = True

    def of(self, sizes: Tensor) -> Tensor:
        """Return ones."""
        return torch.ones(len(sizes), dtype=torch.float64)


@final
@dataclass(frozen=True)
class ByRecords(Weighting):
    """Every record counts the same (McMahan et al. 2017). Nothing bounds it, so only without privacy."""

    is_bounded = False

    def of(self, sizes: Tensor) -> Tensor:
        """Return the numbers of records."""
        return sizes.to(torch.float64)


BY_RECORDS = ByRecords()


@final
@dataclass(frozen=True)
class UpTo(Weighting):
    """A client counts by its records, up to `most` of them: min(records, most) / most, so at most 1.

    **Guarantee**: the weight multiplies the clipped vector and is at most 1, so one client's part stays within the clip norm
    whatever number of records it has.

    Args:
        most: Records above which a client counts no more.
        expected: The declared, public mean weight over all clients, in (0, 1]. It only scales the update; never read it off
            the clients.

    Raises:
        InputError: a number is out of range.
    """

    most: int
    expected: float = 1.0
    is_bounded = True

    def __post_init__(self) -> None:
        _checks.count("most", self.most)
        _checks.fraction("expected", self.expected, allow_one=True)

    def of(self, sizes: Tensor) -> Tensor:
        """Return min(records, most) / most."""
        return sizes.clamp(max=self.most).to(torch.float64) / self.most
