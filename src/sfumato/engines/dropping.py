"""Clients that are lost by chance."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import final

from sfumato import _checks


@final
@dataclass(frozen=True)
class DropOut:
    """Loses each client that is asked with the same chance, whatever the others do: called with (step, client).

    Who is lost in which step follows from the seed alone, so it is the same for any number of workers.

    Raises:
        InputError: share is not in [0, 1).
    """

    share: float
    seed: int = 0

    def __post_init__(self) -> None:
        _checks.fraction("drop_out", self.share, allow_zero=True)

    def __call__(self, step: int, client: str) -> bool:
        """Whether this client is lost in this step."""
        return word(f"{self.seed} {step} {client}") < self.share * 2**64


def word(text: str) -> int:
    """Return 64 bits that a text decides."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")
