"""Memory that is used again: a round's large tensors are asked of the system once, and not for every chunk of clients anew.

Fresh memory costs a page fault for every few thousand bytes, which takes longer than a small model's step.
"""

from __future__ import annotations

import threading
from collections import defaultdict
from collections.abc import Sequence
from typing import TypeAlias

import torch
from torch import Tensor

_Kind: TypeAlias = tuple[tuple[int, ...], torch.dtype, torch.device]
_MOST = 2  # tensors of one kind that are held for a thread


class _Shelf(threading.local):
    def __init__(self) -> None:
        self.held: defaultdict[_Kind, list[Tensor]] = defaultdict(list)


_shelf = _Shelf()


def take(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return a contiguous tensor that holds anything."""
    spare = _shelf.held.get((tuple(shape), dtype, device))
    return spare.pop() if spare else torch.empty(tuple(shape), dtype=dtype, device=device)


def give(tensor: Tensor) -> None:
    """Hand in a tensor of one's own that nobody will look at again."""
    if not tensor.is_contiguous() or tensor._base is not None or tensor.requires_grad:
        return
    spare = _shelf.held[tuple(tensor.shape), tensor.dtype, tensor.device]
    if len(spare) < _MOST:
        spare.append(tensor)


def clear() -> None:
    """Give this thread's memory back."""
    _shelf.held.clear()
