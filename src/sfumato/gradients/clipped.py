"""What every path in this folder returns: a sum of clipped gradients that knows its bound."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, final

from torch import Tensor

from sfumato.privacy.bounded import Bounded

Loss = Callable[[Any, Tensor], Tensor]
"""Maps (outputs, targets) of a batch to the loss; where privacy is promised, always a batch of one record (or its views)."""


@final
@dataclass(frozen=True)
class ClippedSum:
    """The clipped gradients of a batch, added up.

    Attributes:
        bounded: The sum; one record moves it by at most the clip norm.
        nonfinite: How many records had a NaN or infinite gradient and added zero. Private: not covered by any budget.
    """

    bounded: Bounded
    nonfinite: int
