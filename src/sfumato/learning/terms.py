"""What one step is done with: how units are clipped, and how many are expected. Public, set before each step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

from sfumato.gradients.clipping import Clipping


@final
@dataclass(frozen=True)
class Terms:
    """The privacy knobs of one step.

    Attributes:
        noise_multiplier: Noise std over sensitivity.
        clipping: How one unit's part is clipped, and at which norm; None without privacy.
        rate: The expected share of the population in the step.
    """

    noise_multiplier: float
    clipping: Clipping | None
    rate: float

    @property
    def bounded(self) -> Clipping:
        """The clipping of a private step."""
        assert self.clipping is not None, "a plain step has no clipping; this is a fault in sfumato"
        return self.clipping
