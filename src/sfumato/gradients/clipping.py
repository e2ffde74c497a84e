"""Clipping: how much of each unit's vector enters a sum, so that no unit moves the sum by more than the clip norm."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from sfumato import _checks
from sfumato.errors import InputError, SfumatoError
from sfumato.gradients import spare
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


UNCLIPPED = ".unclipped"
"""The name, which no parameter has, of the coordinate that tells how many units were within the clip norm."""

KINDS = ("flat", "per-layer", "normalised")
_PIECE = 2**17  # numbers that are turned into float64 at a time
_STABILITY = 0.01  # Bu et al. 2022, who find it good everywhere


@final
@dataclass(frozen=True)
class Clipping:
    """How much of each record's gradient enters a sum. Whatever the kind, one record moves the sum by at most `norm`.

    - "flat": the whole gradient is scaled to norm at most C (Abadi et al. 2016);
    - "per-layer": the gradient of each of K layers is scaled to norm at most C / sqrt(K) (McMahan et al. 2018);
    - "normalised": the whole gradient g becomes C * g / (norm(g) + 0.01), so that no clip norm has to be tuned against the
      size of gradients (automatic clipping, Bu et al. 2022).

    With `counted`, every unit also adds counted * C to one more coordinate if it was within the clip norm, and subtracts as
    much if it was not. It is part of the same vector, so what a release of it costs is in the same event, and the bound on
    one unit's part grows to C * sqrt(1 + counted**2) (the indicator is centred as by Andrew et al. 2021).

    Args:
        norm: C > 0.
        kind: One of the three.
        counted: At least 0; above it only with "flat".

    Raises:
        InputError: the kind is unknown, the norm is not positive, or units are to be counted that another kind clips.
    """

    norm: float
    kind: str = "flat"
    counted: float = 0.0

    def __post_init__(self) -> None:
        _checks.positive("clip norm", self.norm)
        check_kind(self.kind)
        if _checks.non_negative("counted", self.counted) and self.kind != "flat":
            raise InputError(
                f'Only flat clipping tells who was within the norm, not "{self.kind}"; use "flat" or a fixed clip norm.'
            )

    @property
    def bound(self) -> float:
        """The bound on one unit's part, in l2 norm."""
        return self.norm * math.hypot(1.0, self.counted)

    def count(self, factors: Tensor, broken: Tensor) -> Tensor:
        """Return what the units add to the coordinate `UNCLIPPED`, a scalar, float64.

        Args:
            factors: Of each unit, shape (units,), float64.
            broken: The units that were left out, shape (units,), bool; they add nothing.
        """
        signs = torch.where(factors >= 1, 1.0, -1.0).to(torch.float64).masked_fill(broken, 0.0)
        return signs.sum() * (self.counted * self.norm * _MARGIN)

    def share_within(self, released: float, expected: float) -> float:
        """Return the share of units within the norm that a released count tells, in [0, 1] whatever the noise.

        Args:
            released: The coordinate `UNCLIPPED` after the noise.
            expected: The public number of units that were expected.
        """
        centred = released / (2 * self.counted * self.norm * _MARGIN * expected)
        return min(1.0, max(0.0, 0.5 + centred))

    def factors(
        self, squared: Mapping[str, Tensor], parameters: Iterable[str]
    ) -> tuple[dict[str, Tensor], Tensor]:  # fmt: skip
        """Return each parameter's factor for each record, and which records are not finite (all their factors are 0).

        Args:
            squared: Squared norms by parameter, shape (records,), float64, of at least one parameter.
            parameters: The names of all trained parameters, which decide the number of layers.
        """
        total = torch.stack(list(squared.values())).sum(0)
        broken = ~torch.isfinite(total)
        if self.kind == "normalised":
            factors = self.norm * _MARGIN / (total.sqrt() + _STABILITY)
            return dict.fromkeys(squared, torch.where(broken, 0.0, factors)), broken
        if self.kind == "flat":
            return dict.fromkeys(squared, clip_factors(total, self.norm)[0]), broken
        layers = len({_layer(name) for name in parameters})
        by_layer: dict[str, Tensor] = {}
        for name, values in squared.items():
            by_layer[_layer(name)] = by_layer[_layer(name)] + values if _layer(name) in by_layer else values
        each = {
            layer: torch.where(broken, 0.0, clip_factors(values, self.norm / layers**0.5)[0])
            for layer, values in by_layer.items()
        }
        return {name: each[_layer(name)] for name in squared}, broken


def clip_vector(vector: Tensors, clipping: Clipping) -> tuple[Bounded, bool]:
    """Return one unit's named tensors clipped as a whole, float64, and whether they were finite.

    A vector that is not finite becomes zero (see `clip_factors`).
    """
    bounded, broken = clip_vectors({name: tensor.unsqueeze(0) for name, tensor in vector.items()}, clipping)
    return bounded, broken == 0


def clip_vectors(vectors: Tensors, clipping: Clipping, weights: Tensor | None = None) -> tuple[Bounded, int]:
    """Return the sum of the units' named tensors, each clipped as a whole, float64, and how many were not finite.

    What is not finite adds nothing (see `clip_factors`).

    Args:
        vectors: Named tensors of each unit, shape (units, ...).
        clipping: How each is clipped.
        weights: By which a clipped vector is multiplied, in [0, 1], shape (units,), float64; None for 1.

    Raises:
        SfumatoError: a weight is outside of [0, 1].
    """
    if weights is not None and not bool(((weights >= 0) & (weights <= 1)).all()):
        raise SfumatoError("A weight of a clipped vector is outside of [0, 1], so nothing would bound it.")
    rows = {name: tensor.detach().unsqueeze(-1).flatten(1) for name, tensor in vectors.items()}
    squared = {
        name: torch.stack([piece.to(torch.float64).square().sum(1) for piece in _pieces(tensor)]).sum(0)
        for name, tensor in rows.items()
    }
    factors, broken = clipping.factors(squared, rows)
    weighted = factors if weights is None else {name: one * weights for name, one in factors.items()}
    value = {name: weighted_sum(vectors[name], weighted[name], broken) for name in vectors}
    if clipping.counted:
        value[UNCLIPPED] = clipping.count(next(iter(factors.values())), broken)
    return Bounded(value, clipping.bound), int(broken.sum())


def weighted_sum(vectors: Tensor, weights: Tensor, broken: Tensor | None = None) -> Tensor:
    """Return the weighted sum over units, shape (...), float64, without a float64 copy of all of them.

    Args:
        vectors: Shape (units, ...).
        weights: Shape (units,), float64.
        broken: The units that are left out whatever they hold, shape (units,), bool.
    """
    rows = vectors.detach().unsqueeze(-1).flatten(1)
    if broken is not None and bool(broken.any()):
        rows, weights = rows[~broken], weights[~broken]
    total = spare.take(vectors.shape[1:], torch.float64, rows.device)
    flat = total.view(-1)
    start = 0
    for piece in _pieces(rows):
        if len(piece) == 1:
            torch.mul(piece[0], weights, out=flat[start : start + piece.shape[1]])
        else:
            torch.mv(piece.to(torch.float64).t(), weights, out=flat[start : start + piece.shape[1]])
        start += piece.shape[1]
    return total


def _pieces(rows: Tensor) -> tuple[Tensor, ...]:
    """Cut (units, size) into columns whose float64 copies fit a processor's cache."""
    return torch.split(rows, max(1, _PIECE // max(1, len(rows))), dim=1)


def check_kind(kind: str) -> str:
    """Return the kind of clipping if it is known.

    Raises:
        InputError: names the nearest known kind.
    """
    if kind not in KINDS:
        raise InputError(f'There is no clipping "{kind}".{_checks.did_you_mean(kind, KINDS)}')
    return kind


def _layer(parameter: str) -> str:
    return parameter.rpartition(".")[0]
