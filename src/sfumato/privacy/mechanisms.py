"""The only file that draws noise: `Bounded` goes in, `Released` comes out, and the ledger has already been charged.

**Floating point.** Noise computed in floating point leaks through its low bits which number was added to it (Mironov
2012, "On significance of the least significant bits for differential privacy"; Holohan and Braghin 2021, "Secure random
sampling in differential privacy"). So both the sum and the noise are put on one fixed grid, a power of two that depends
on public numbers only. The sum is rounded to the grid first; adding the noise then rounds once more to the grid, and that
is a function of the sum on the grid plus the noise, hence post-processing of the Gaussian mechanism. Rounding the
sum can move it by at most grid * sqrt(d), which is added to the sensitivity before the noise is scaled. What remains is
the rounding inside log, sqrt, sin and cos in float64, about 2**-28 of the mass of one grid cell.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import final

import torch
from torch import Tensor

from sfumato import _checks
from sfumato.errors import InputError, LostClientsError, SelfCheckError, SfumatoError
from sfumato.privacy.bounded import RELEASE, Bounded, Released, Tensors
from sfumato.privacy.budget import Relation
from sfumato.privacy.ledger import Charge
from sfumato.privacy.randomness import RandomSource

_GRID_BITS = 24
LARGEST_MULTIPLIER = 2.0**20  # ten standard deviations then stay within 2**50 grid units, for up to 2**28 coordinates
_BLOCK = 2 * 65_536  # as many as a random source makes at a time
_EXACT = 2.0**50  # grid units: with the noise still inside what float64 adds on the grid, and 32 times any honest sum
_UPWARDS = 1 + 2.0**-40  # more than float64 loses in a few products
_LEAST_MULTIPLIER = 1e-9
_LEAST_BOUND, _LARGEST_BOUND = 1e-100, 1e100


def grid_of(norm_bound: float) -> float:
    """Return the spacing on which sums with this bound are released: 2**-24 of the bound, as a power of two."""
    return 2.0 ** (math.floor(math.log2(norm_bound)) - _GRID_BITS)


def noise_std(bounded: Bounded, noise_multiplier: float, relation: Relation, *, roundings: int = 1) -> float:
    """Return the noise std for `bounded`: noise_multiplier * (sensitivity + roundings * grid * sqrt(size)).

    `roundings` counts the sums that one unit can move and that are put on the grid one by one.

    Raises:
        InputError: the multiplier is so large that float64 could not add noise and sum on the grid, or the bound is so
            small or large that it has no grid there.
    """
    if not noise_multiplier <= LARGEST_MULTIPLIER:
        raise InputError(
            f"noise_multiplier {noise_multiplier:g} is above {LARGEST_MULTIPLIER:g}; such a release says nothing."
        )
    if not noise_multiplier >= _LEAST_MULTIPLIER:
        raise InputError(f"noise_multiplier {noise_multiplier:g} is below {_LEAST_MULTIPLIER:g}, which hides nobody.")
    if not _LEAST_BOUND <= bounded.norm_bound <= _LARGEST_BOUND:
        raise InputError(
            f"A sum with the bound {bounded.norm_bound:g} cannot be noised exactly in float64; use a clip norm between "
            f"{_LEAST_BOUND:g} and {_LARGEST_BOUND:g}."
        )
    rounding = roundings * grid_of(bounded.norm_bound) * math.sqrt(bounded.size)
    return noise_multiplier * (bounded.sensitivity(relation) + rounding)


def gaussian(
    bounded: Bounded, noise_multiplier: float, *, relation: Relation, charge: Charge, source: RandomSource
) -> Released:
    """Release a bounded sum with Gaussian noise on every coordinate.

    **Guarantee**: the release is `GaussianDpEvent(noise_multiplier)` in the given relation. The ledger has paid for
    this draw before the noise exists, so a crash in between loses budget, never privacy.

    **Edge cases**

    | case | what happens |
    | --- | --- |
    | a sum of no units (empty batch) | noise alone is released |
    | a coordinate is NaN or infinite | refused before the charge is touched |
    | the charge has no draws left | BudgetExhaustedError, no noise drawn |
    | the charge was carried into a forked process | refused |

    Args:
        bounded: The private sum.
        noise_multiplier: Noise std over sensitivity, > 0.
        relation: The neighbouring relation of the promise; it decides the sensitivity.
        charge: The ledger's receipt; one draw is taken from it.
        source: Where the noise comes from.

    Raises:
        SelfCheckError: the sum is not finite or too large for its bound.
    """
    return gaussian_each({"all": bounded}, noise_multiplier, relation=relation, charge=charge, source=source)["all"]


def gaussian_each(
    parts: Mapping[str, Bounded],
    noise_multiplier: float,
    *,
    relation: Relation,
    charge: Charge,
    source: RandomSource,
) -> dict[str, Released]:
    """Release several bounded sums over disjoint sets of units, each with its own noise, for the price of one.

    **Guarantee**: as `gaussian`: a unit is in one part only, so what the other parts release does not depend on it
    (parallel composition). That the parts are disjoint is the caller's promise: one part for each owner.
    """
    _checks.positive("noise_multiplier", noise_multiplier)
    stds = {name: noise_std(part, noise_multiplier, relation) for name, part in parts.items()}
    for part in parts.values():
        _refuse_nonsense(part, grid_of(part.norm_bound))
    draw = charge.take()
    released = {}
    for name, part in parts.items():
        grid = grid_of(part.norm_bound)
        released[name] = Released(_noised(part.value, grid, stds[name], source), stds[name], grid, draw, RELEASE)
    return released


def gaussian_counts(
    parts: Mapping[str, Bounded],
    noise_multiplier: float,
    *,
    shares: Mapping[str, float],
    relation: Relation,
    charge: Charge,
    source: RandomSource,
) -> dict[str, Released]:
    """Release several sums of whole numbers over the same units, in whole numbers, for the price of one.

    In every part each unit adds a vector of whole numbers, none below 0, of l2 norm at most the part's bound: a
    histogram, or votes. Under replace-one two such vectors lie at most sqrt(2) bounds apart, not 2, because
    |u - v|**2 <= |u|**2 + |v|**2 where no coordinate is negative. A part's noise has the std
    noise_multiplier * sensitivity / sqrt(share), so that the squares of (sensitivity over std) add up to
    1 / noise_multiplier**2: all parts together are one Gaussian mechanism.

    **Guarantee**: the release is `GaussianDpEvent(noise_multiplier)` in the given relation. The sum is a whole number, and
    adding the noise rounds to the nearest whole number once: post-processing of the Gaussian mechanism, so no bit
    below 1 leaves. (It is the rounded Gaussian, not the discrete Gaussian of Canonne, Kamath and Steinke 2020.) That each
    unit keeps to the bounds, with no coordinate below 0, is the caller's promise.

    **Edge cases**

    | case | what happens |
    | --- | --- |
    | a sum of no units | noise alone is released |
    | a part is not int64, is negative or beyond 2**50 | refused before the charge is touched |
    | the noise would pass 2**50 | refused before the charge is touched |
    | the charge has no draws left | BudgetExhaustedError, no noise drawn |

    Args:
        parts: The private sums, int64; returned in int64 with a grid of 1.
        noise_multiplier: Of the whole release, > 0.
        shares: How much of the accuracy each part gets, > 0; they are scaled to add up to 1.
        relation: The neighbouring relation of the promise.
        charge: One draw is taken from it.
        source: Where the noise comes from.

    Raises:
        InputError: the shares do not name the parts, or a number is out of range.
        SelfCheckError: a part is not a sum of whole numbers of at least 0.
    """
    _checks.positive("noise_multiplier", noise_multiplier)
    if shares.keys() != parts.keys():
        raise InputError(f"The shares name {sorted(shares)}, the parts {sorted(parts)}; give each part one share.")
    whole = math.fsum(_checks.positive(f'the share of "{name}"', share) for name, share in shares.items())
    stds = {}
    for name, part in parts.items():
        sensitivity = min(part.sensitivity(relation), math.sqrt(2) * part.norm_bound)
        stds[name] = _UPWARDS * noise_multiplier * sensitivity / math.sqrt(shares[name] / whole)
        if not stds[name] <= _EXACT / 16:
            raise InputError(
                f"noise_multiplier {noise_multiplier:g} is too large for counts; such a release says nothing."
            )
        _refuse_nonsense(part, 1.0)
        if any(t.dtype != torch.int64 or (t.numel() and int(t.min()) < 0) for t in part.value.values()):
            raise SelfCheckError(f'The counts "{name}" are not whole numbers of at least 0; nothing was released.')
    draw = charge.take()
    return {
        name: Released(_noised(part.value, 1.0, stds[name], source), stds[name], 1.0, draw, RELEASE)
        for name, part in parts.items()
    }


@final
@dataclass(frozen=True)
class NoisyShare:
    """One client's sum with its part of the noise: safe only once enough shares are added up.

    Attributes:
        round: Which `SharedGaussian` it belongs to.
    """

    round: object
    units: dict[str, Tensor] = field(repr=False)


@final
class SharedGaussian:
    """One release whose noise is drawn by the clients: each adds a part, so the server never sees an un-noised sum.

    Every client adds Gaussian noise of variance std**2 / (clients - tolerate). The sum of the shares therefore has at
    least the full variance as long as at most `tolerate` clients are lost; beyond that the round is refused.

    **Guarantee**: the combined sum is `GaussianDpEvent(noise_multiplier)` against everybody who sees only the sum. A
    single share is protected by its own part of the noise alone, and a client can subtract the part that it drew.
    The shares are rounded to the grid one by one; their std is over 2**20 grid cells, where the sum of rounded
    Gaussians differs from a rounded Gaussian by less than exp(-2**40).

    Args:
        norm_bound: The public bound on one unit's part.
        size: Number of coordinates.
        noise_multiplier: Of the combined sum.
        relation: The neighbouring relation.
        clients: How many clients were asked.
        tolerate: How many of them may be lost.
        charge: One draw is taken for the whole round, before any share exists.

    Raises:
        InputError: tolerate is not below clients.
    """

    def __init__(
        self, norm_bound: float, size: int, noise_multiplier: float, *,
        relation: Relation, clients: int, tolerate: int, charge: Charge,
    ) -> None:  # fmt: skip
        _checks.positive("noise_multiplier", noise_multiplier)
        self._needed = _checks.count("clients minus tolerated losses", clients - tolerate)
        self._clients = clients
        probe = Bounded({"all": torch.empty(size, device="meta")}, norm_bound)
        self._norm_bound = norm_bound
        self._size = size
        self._combined = False
        self._shared: set[str] = set()
        self._grid = grid_of(norm_bound)
        # Each client rounds its own sum. A unit that is added or removed moves one of them, a replaced one perhaps two.
        roundings = 1 if relation is Relation.ADD_OR_REMOVE_ONE else 2
        self._std = noise_std(probe, noise_multiplier, relation, roundings=roundings)
        self._draw = charge.take()

    def share(self, client: str, bounded: Bounded, source: RandomSource) -> NoisyShare:
        """Return the sum of `client` with that client's part of the noise, drawn from the client's own source.

        Raises:
            SfumatoError: the client has shared already in this round, or its sum has a larger bound or another size than
                the round was opened for.
        """
        if client in self._shared:
            raise SfumatoError(f'Client "{client}" has shared already in this round; each client adds one sum.')
        if bounded.size != self._size:
            raise SfumatoError(
                f"A client's sum has {bounded.size} coordinates, the round {self._size}; use one model for all."
            )
        if not bounded.norm_bound <= self._norm_bound:
            raise SfumatoError(
                f"A client's sum is bounded by {bounded.norm_bound:g}, the round by {self._norm_bound:g}; clip to the latter."
            )
        _refuse_nonsense(bounded, grid_of(bounded.norm_bound))
        part = self._std / math.sqrt(self._needed)
        units = _noised(bounded.value, self._grid, part, source, scaled=False)
        self._shared.add(client)
        return NoisyShare(self, units)

    def combine(self, shares: Sequence[NoisyShare]) -> Released:
        """Return the sum of the shares.

        Raises:
            LostClientsError: more clients were lost than tolerated; nothing is released and the charge stays spent.
            SfumatoError: a share belongs to another round or arrived twice, there are more shares than clients, or the
                round was combined before (two totals would need two charges).
        """
        if self._combined:
            raise SfumatoError("This round was combined before; one charge pays for one total. Fix: open a new round.")
        if any(share.round is not self for share in shares) or len({id(share) for share in shares}) != len(shares):
            raise SfumatoError("A noise share belongs to another round or arrived twice; nothing was released.")
        if len(shares) > self._clients:
            raise SfumatoError(f"{len(shares)} shares came from {self._clients} clients; nothing was released.")
        if len(shares) < self._needed:
            raise LostClientsError(
                f"Only {len(shares)} of {self._clients} clients answered and the noise needs {self._needed}: the round was "
                "not released and its charge stays spent. Fix: tolerate more losses (every client then adds more noise) "
                "or let the server add the noise."
            )
        self._combined = True
        total = {name: torch.stack([share.units[name] for share in shares]).sum(0) for name in shares[0].units}
        std = self._std * math.sqrt(len(shares) / self._needed)
        return Released(
            {name: units.mul_(self._grid) for name, units in total.items()},
            std,
            self._grid,
            self._draw,
            RELEASE,
        )


def _refuse_nonsense(bounded: Bounded, grid: float) -> None:
    for name, tensor in bounded.value.items():
        if not tensor.numel():
            continue
        low, high = (float(end) / grid for end in torch.aminmax(tensor.detach()))
        # Written so that NaN, which aminmax passes on, fails it.
        if not -_EXACT < low <= high < _EXACT:
            raise SelfCheckError(
                f'The bounded sum for "{name}" is not finite or far beyond its bound; nothing was released. '
                "This is a fault in the code that made the sum, not in your data."
            )


def _noised(
    value: Tensors, grid: float, std: float, source: RandomSource, *, scaled: bool = True
) -> dict[str, Tensor]:  # fmt: skip
    """Return the sum on the grid plus noise, on the grid, computed in float64.

    In the tensors' own dtype, to which the released numbers are rounded; or, not `scaled`, in whole grid units, float64.
    """
    # One vector, because a model has many small tensors.
    given = torch.cat([tensor.detach().reshape(-1) for tensor in value.values()])
    device, given = given.device, given.cpu()
    result = given if scaled else torch.empty_like(given, dtype=torch.float64)
    work = torch.empty(min(len(given), _BLOCK), dtype=torch.float64)
    # Beside this number the spacing of float64 is the grid, so that an addition is one and a rounding as well.
    far = 1.5 * 2.0**52 * grid
    # A block goes through all of it while it is in the cache.
    for start in range(0, len(given), _BLOCK):
        part = given[start : start + _BLOCK]
        near = work[: len(part)].copy_(part).add_(far)
        source.add_normal(near, std)
        near.sub_(far)
        result[start : start + _BLOCK].copy_(near if scaled else near.div_(grid))
    parts = result.to(device).split([tensor.numel() for tensor in value.values()])
    return {name: flat.view(tensor.shape) for (name, tensor), flat in zip(value.items(), parts, strict=True)}
