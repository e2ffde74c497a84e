"""Speed knobs: what they are set to never changes what is computed, beyond rounding."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

from sfumato import _checks
from sfumato.errors import InputError


@final
@dataclass(frozen=True)
class Compute:
    """How gradients are computed, apart from the mathematics.

    Args:
        memory_mb: Megabytes that the records of one microbatch may take up at most (a single record always fits). By default a
            microbatch takes about what plain training on the whole batch would, at least 34 and at most 268 MB.
        autocast: Whether the model's forward runs in bfloat16 where torch deems it safe (`torch.autocast`). Norms and
            sums are taken in float32 all the same.

    Raises:
        InputError: memory_mb is not a positive number, or autocast is neither True nor False.
    """

    memory_mb: float | None = None
    autocast: bool = False

    def __post_init__(self) -> None:
        if self.memory_mb is not None:
            _checks.positive("memory_mb", self.memory_mb)
        autocast: object = self.autocast
        if not isinstance(autocast, bool):
            raise InputError(f"autocast must be True or False, not {autocast!r}.")


DEFAULT = Compute()
