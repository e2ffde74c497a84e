"""What torch keeps for each thread, so that workers compute in the surroundings of the caller: autocast, the default device."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import final

import torch

_DEVICES = ("cpu", "cuda")


@final
@dataclass(frozen=True)
class Surroundings:
    """What a thread computes in.

    Attributes:
        autocast: The number type of each kind of device where autocast is on, else None.
        device: Where new tensors are made.
    """

    autocast: tuple[torch.dtype | None, ...]
    device: torch.device

    @classmethod
    def here(cls) -> Surroundings:
        """Return those of this thread."""
        types = (torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None for kind in _DEVICES)
        return cls(tuple(types), torch.get_default_device())

    @contextlib.contextmanager
    def entered(self) -> Iterator[None]:
        """Compute in them meanwhile; what is the same here already costs nothing."""
        here = Surroundings.here()
        with contextlib.ExitStack() as stack:
            for kind, wanted, now in zip(_DEVICES, self.autocast, here.autocast, strict=True):
                if wanted != now:
                    stack.enter_context(torch.autocast(kind, dtype=wanted, enabled=wanted is not None))
            if self.device != here.device:
                stack.enter_context(self.device)
            yield
