"""Clipping: how much of each unit's vector enters a sum, so that no unit moves the sum by more than the clip norm."""

from __future__ import annotations

import torch
from torch import Tensor

from sfumato.privacy.bounded import Bounded, Tensors

MAX_UNITS = 2**20
"""Units that one sum may hold: the float64 rounding of a larger sum is not covered by the margin below."""

_MARGIN = 1 - 2.0**-11
# Adding n float64 vectors of norm C one after the other is off by at most n**2 * C * 2**-53 (Higham 2002, section 4.2).
# Between neighbours that is twice as much: for n = 2**20 a move of 2**-12 * C. Norms and factors are off by far less
# than another 2**-12. Vectors are therefore clipped to a little under C, and the bound on the computed sum is C itself.


def clip_factors(squared_norms: Tensor, clip_norm: float) -> tuple[Tensor, Tensor]:
    """Return the factor by which each unit's vector is scaled, and which units were not finite.

    **Guarantee**: factor * norm <= clip_norm for every unit, with a margin that covers the rounding of a float64
    sum of up to `MAX_UNITS` vectors.

    **Edge cases**

    | squared norm | factor |
    | --- | --- |
    | at most clip_norm**2 (with margin) | 1: nothing is scaled up |
    | 0 | 1 |
    | NaN or infinite | 0, and the unit is reported as not finite |

    Args:
        squared_norms: Squared l2 norms of the units' vectors, shape (units,), float64.
        clip_norm: C > 0.

    Returns:
        Factors, shape (units,), float64; and not-finite flags, shape (units,), bool.
    """
    finite = torch.isfinite(squared_norms)
    limit = clip_norm * _MARGIN
    factors = torch.where(finite, (limit / squared_norms.sqrt()).clamp(max=1.0), 0.0)
    return factors, ~finite


def clip_vector(vector: Tensors, clip_norm: float) -> tuple[Bounded, bool]:
    """Return one unit's named tensors clipped to norm `clip_norm`, float64, and whether they were finite.

    A vector that is not finite becomes zero (see `clip_factors`).
    """
    wide = {name: tensor.detach().to(torch.float64) for name, tensor in vector.items()}
    squared = torch.stack([tensor.square().sum() for tensor in wide.values()]).sum().reshape(1)
    factors, broken = clip_factors(squared, clip_norm)
    if bool(broken):
        return Bounded({name: torch.zeros_like(tensor) for name, tensor in wide.items()}, clip_norm), False
    return Bounded({name: tensor * factors[0] for name, tensor in wide.items()}, clip_norm), True
