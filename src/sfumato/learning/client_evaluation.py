"""What one client adds to the tables of an evaluation: the mean of what its records add, in whole numbers.

Every client counts the same, whatever the number of its records: relative to the noise it moves a table by at most what one
record moves it in an evaluation that protects records.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from sfumato.data.population import Population
from sfumato.data.records import Records
from sfumato.learning.metrics import NORM_BOUNDS, VOTES, Layout

TablesOf = Callable[[Records, str], Mapping[str, Tensor]]
"""Returns the tables of one client's records; the second argument is what messages call the client."""


def client_part(tables: Mapping[str, Tensor], count: int) -> dict[str, Tensor]:
    """Return the mean over a client's records, in units of 2**-20: int64, no cell below 0, each table with the sum 2**20.

    Args:
        tables: Sums of `Layout.tables` over the client's records.
        count: The number of its records, 1 to 2**42.
    """
    return {name: _shared_out(table * (VOTES // NORM_BOUNDS[name]), count) for name, table in tables.items()}


def _shared_out(total: Tensor, count: int) -> Tensor:
    """Return total / count, rounded so that no cell is below 0 and all of them add up to `VOTES`."""
    # Each record adds cells of at least 0 that add up to its bound, so those of `total` add up to count * VOTES. The ends
    # below are the running sums over count, rounded down: they never fall, because no cell is below 0, and the last one is
    # VOTES exactly. So their differences are whole numbers of at least 0 with the sum VOTES, and the l2 norm, which is at
    # most the l1 norm, is at most VOTES after rounding too. All of it is whole-number arithmetic, without float error.
    ends = total.flatten().cumsum(0).div(count, rounding_mode="floor")
    return ends.diff(prepend=ends.new_zeros(1)).view_as(total)


def client_sums(layout: Layout, clients: Population, tables_of: TablesOf) -> dict[str, Tensor]:
    """Return the sum over all clients of their parts; one client is in memory at a time."""
    sums = layout.empty()
    for index in range(len(clients)):
        # In a function of its own, so that a client is gone before the next one is made.
        for name, part in _part_at(clients, index, tables_of).items():
            sums[name] += part
    return sums


def _part_at(clients: Population, index: int, tables_of: TablesOf) -> dict[str, Tensor]:
    records = clients.at(index)
    return client_part(tables_of(records, f'Client "{clients.name_at(index)}"'), len(records))


def public_form(records: Records) -> tuple[Tensor, tuple[str, ...] | None]:
    """Return two made-up records of zeros, (2, ...), shaped and placed as the features, and the declared classes."""
    features = records.features
    return torch.zeros(2, *features.shape[1:], dtype=features.dtype, device=features.device), records.classes
