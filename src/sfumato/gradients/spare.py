"""Memory that is used again: a round's large tensors are asked of the system once, and not for every chunk of clients anew.

Fresh memory costs a page fault for every few thousand bytes, which takes longer than a small model's step.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import TypeAlias

import torch
from torch import Tensor

_Kind: TypeAlias = tuple[tuple[int, ...], torch.dtype, torch.device]
_MOST = 2  # tensors of one kind that are held for a thread
_KINDS = 24  # that are held; of more, the one that was not asked for longest goes, so that memory stays flat


class _Shelf(threading.local):
    def __init__(self) -> None:
        self.held: dict[_Kind, list[Tensor]] = {}


_shelf = _Shelf()


def take(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return a contiguous tensor that holds anything."""
    kind = (tuple(shape), dtype, device)
    spare = _shelf.held.pop(kind, None)
    if not spare:
        return torch.empty(kind[0], dtype=dtype, device=device)
    if len(spare) > 1:
        _shelf.held[kind] = spare[:-1]
    return spare[-1]


def give(tensor: Tensor) -> None:
    """Hand in a tensor of one's own that nobody will look at again."""
    whole = tensor if tensor._base is None or tensor._base.numel() != tensor.numel() else tensor._base
    if not whole.is_contiguous() or whole._base is not None or whole.requires_grad:
        return
    kind = (tuple(whole.shape), whole.dtype, whole.device)
    held = _shelf.held.pop(kind, [])
    new = [] if any(one.data_ptr() == whole.data_ptr() for one in held) else [whole]
    _shelf.held[kind] = [*held, *new][:_MOST]
    while len(_shelf.held) > _KINDS:
        del _shelf.held[next(iter(_shelf.held))]
