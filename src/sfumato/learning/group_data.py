"""The records of clients that are trained at once, cut into batches; and the ways to train them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import final

import torch
from torch import Tensor

from sfumato.data.records import Records
from sfumato.gradients import spare
from sfumato.learning.local_training import Batches

STACKED, ALONE, CHANNELS_LAST = "stacked", "alone", "alone, channels last"

Batch = tuple[Tensor, Tensor, Tensor | None]
"""Features, targets and, unless all batches are full, the counts of each client's."""


@final
class Data:
    """The records of some clients, cut into batches.

    Stacked, they are copied side by side once: in the order of their batches if no record is used twice, so that a batch is a
    slice, and in their own order otherwise.
    """

    def __init__(self, records: Sequence[Records], batches: Batches, device: torch.device, way: str) -> None:
        self._batches, self._channels_last = batches, way == CHANNELS_LAST
        self._many, self._sorted = way == STACKED, False
        first = records[0]
        if not self._many:
            self._features, self._targets = first.features.to(device), first.targets.to(device)
            return
        self._most = max(len(one) for one in records)
        self._sorted = batches.index[0].numel() <= self._most + batches.index.shape[2]
        length = batches.index[0].numel() if self._sorted else self._most
        here = [len(records), length]
        self._features = spare.take([*here, *first.features.shape[1:]], first.features.dtype, device)
        self._targets = spare.take([*here, *first.targets.shape[1:]], first.targets.dtype, device)
        if self._sorted:
            self._in_order(records, batches.index.flatten(1))
            return
        for row, one in enumerate(records):
            self._features[row, : len(one)] = one.features
            self._targets[row, : len(one)] = one.targets

    def _in_order(self, records: Sequence[Records], index: Tensor) -> None:
        """Copy the clients' records at `index`, (clients, places)."""
        for one, rows, out in zip(records, index.unbind(), self._features.unbind(), strict=True):
            if one.features.device == out.device:
                torch.index_select(one.features, 0, rows.to(out.device), out=out)
            else:
                out.copy_(one.features.index_select(0, rows.to(one.features.device)))
        ends = torch.tensor([one.targets.shape[0] for one in records]).cumsum(0)
        places = index + torch.cat([ends.new_zeros(1), ends[:-1]]).unsqueeze(1)
        every = torch.cat([one.targets for one in records])
        self._targets.copy_(every.index_select(0, places.flatten().to(every.device)).view(self._targets.shape))

    def done(self) -> None:
        """Hand the memory in for the next clients."""
        if self._many:
            spare.give(self._features)
            spare.give(self._targets)

    def batch(self, step: int, clients: int) -> Batch:
        """Return features, targets and, unless all batches are full, the counts of the first `clients` clients' step."""
        batches = self._batches
        count = batches.count[:clients, step]
        size = int(count.max())
        if self._sorted:
            place = slice(step * batches.index.shape[2], step * batches.index.shape[2] + size)
            features, targets = self._features[:clients, place], self._targets[:clients, place]
        else:
            index = batches.index[:clients, step, :size]
            if self._many:
                index = index + torch.arange(clients).unsqueeze(1) * self._most
            rows = index.flatten().to(self._features.device)
            if not self._many:
                features, targets = self._features.index_select(0, rows), self._targets.index_select(0, rows)
                return channels_last(features) if self._channels_last else features, targets, None
            features = self._features.flatten(0, 1).index_select(0, rows).unflatten(0, (clients, size))
            targets = self._targets.flatten(0, 1).index_select(0, rows).unflatten(0, (clients, size))
        return features, targets, None if bool((count == size).all()) else count.to(features.device)


def channels_last(value: Tensor) -> Tensor:
    """Return images or kernels with their channels last in memory; anything else as it is."""
    return value.to(memory_format=torch.channels_last) if value.dim() == 4 else value
