"""Correlated noise (DP-FTRL by a banded matrix): what one round's noise does to the model, later rounds take back in part.

The model after t rounds depends on the sum of their updates, and independent noise adds up in that sum: its variance grows with
t. Here the noise of the rounds is made so that it cancels there. It needs no sampling, so clients may come as they like.

With x_t the clipped sum of round t, the rows y = C x + z are what privacy is counted for: C is lower triangular with
c_0, ..., c_{b-1} down each column, and z is independent Gaussian noise. What the rounds use is C^{-1} y = x + C^{-1} z. The
coefficients are those of the square root of the prefix sums, c_i = (-1)^i binom(-1/2, i) = 1, 1/2, 3/8, 5/16, ...
(Fichtenberger, Henzinger and Upadhyay 2023, "Constant matters"; Kalinin and Lampert 2024, "Banded square root matrix
factorization for differentially private model training"), cut off after b bands, so that participations which are b rounds
apart touch no row together (Choquette-Choo et al. 2023, "(Amplified) banded matrix factorization").
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NoReturn, final

import torch
from torch import Tensor

from sfumato import _checks
from sfumato.data.participation import MinSeparation
from sfumato.data.sampling import Sampler
from sfumato.errors import InputError, LedgerError, PlanError, SfumatoError
from sfumato.gradients.clipping import MAX_UNITS
from sfumato.learning.aggregation import Aggregation, Noise
from sfumato.learning.plan import Plan
from sfumato.privacy import mechanisms
from sfumato.privacy.bounded import Bounded, Released
from sfumato.privacy.schedules import Constant

_LARGEST_NOISE = 32.0  # standard deviations; see `CorrelatedNoise.bound`


@final
@dataclass(frozen=True)
class CorrelatedNoise(Aggregation):
    """The server adds noise whose parts of the last `bands` rounds cancel in the sum over the rounds.

    One band is the noise of `ServerNoise`. More bands make the summed noise smaller and each round's own noise larger, up to
    about as many bands as rounds; they need clients that take part at least so many rounds apart. The server keeps the noise
    of the last `bands` - 1 rounds, as many numbers in float64 as the model has.

    **Guarantee**: with a `MinSeparation` sampler of at least this separation, one clip norm and one noise multiplier for the
    whole run, all released sums together are what the sampler's event says. Round t releases, through
    `mechanisms.gaussian`, the sum c_0 x_t + c_1 (x_{t-1} - r_{t-1}) + ... + c_{b-1} (x_{t-b+1} - r_{t-b+1}) plus noise of std
    noise_multiplier * clip * |c|, where r_s is what round s released. The r_s are known, so this tells what the row y_t of
    C x + z does; and because c_0 = 1 it is r_t itself, the unbiased x_t + (C^{-1} z)_t.

    **Edge cases**

    | case | what happens |
    | --- | --- |
    | another sampler, or a smaller separation | refused by `check_sampler` |
    | another clip norm, noise or relation than in the round before | refused before the charge is touched |
    | nobody answered, but the round counts | x_t = 0: noise is released that takes back earlier noise |
    | a void round | nothing is released, and x_t = r_t = 0 in the later sums: they stay unbiased |
    | rounds that were lost in a crash | the charge tells that their draws are gone; as void rounds |
    | a sum that is not finite | refused before the charge is touched; it may be tried again |

    Args:
        bands: Rounds over which the noise is correlated, with the present one.

    Raises:
        InputError: bands is below 1.
    """

    bands: int
    takes_total = True
    hides_cohort = False  # nor need it be hidden: the event claims no amplification
    trust = (
        "The server is trusted: it sees each client's clipped sum before the noise is added, and it keeps, also in "
        "checkpoints, the noise of the last rounds, with which their sums could be laid bare."
    )

    def __post_init__(self) -> None:
        _checks.count("bands", self.bands)

    @property
    def coefficients(self) -> tuple[float, ...]:
        """c_0, ..., c_{bands-1}."""
        return _square_root(self.bands)

    @property
    def norm(self) -> float:
        """The l2 norm of the coefficients: how much further than one round's sum one participation moves the rows."""
        return math.hypot(*self.coefficients)

    def check_clients(self, count: int) -> None:
        """Serve any number of clients."""

    def check_sampler(self, sampler: Sampler) -> None:
        """Refuse a sampler that does not keep participations apart.

        Raises:
            PlanError: it is not a `MinSeparation`, or its separation is below `bands`.
        """
        if not isinstance(sampler, MinSeparation):
            raise PlanError(
                f'CorrelatedNoise is accounted for clients that keep apart, not for "{sampler.kind}" sampling; use the '
                "sampler MinSeparation, or ServerNoise."
            )
        if self.bands > sampler.separation:
            raise PlanError(
                f"CorrelatedNoise(bands={self.bands}) needs clients that take part at least {self.bands} rounds apart, not "
                f"{sampler.separation}; use a larger separation or fewer bands."
            )

    def check_plan(self, plan: Plan) -> None:
        """Refuse a plan that does not keep participations apart, or whose noise or clip norm changes over the rounds.

        Raises:
            PlanError: names the reason and the fix.
        """
        self.check_sampler(plan.sampler)
        if plan.noise != Constant() or plan.clips != Constant():
            raise PlanError(
                "Correlated noise needs one clip norm and one noise multiplier for the whole run; leave schedules, policies "
                "and adaptive clip norms out of the plan."
            )

    def begin(self) -> CorrelatedRun:
        """Return the aggregation of one run, which remembers its rounds."""
        return CorrelatedRun(self)

    def combine(self, parts: Mapping[str, Bounded], *, zero: Bounded, asked: int, noise: Noise) -> dict[str, Released]:
        """Refuse: only what `begin` returns combines.

        Raises:
            SfumatoError: always.
        """
        raise SfumatoError("CorrelatedNoise remembers the rounds of one run; combine with what its begin() returns.")

    def bound(self, zero: Bounded, noise_multiplier: float) -> Bounded:
        """Return a zero with the bound that each release is noised for: that of `zero` times `norm`, and what rounding adds.

        Rounding: each of the rows that a participation touches is put on the grid, which `mechanisms` counts for one of them.
        And in float64 a row is off by (bands + 2) * 2**-53 times what is summed up: sums of up to `MAX_UNITS` clipped parts,
        and earlier noise. That is surely below 32 standard deviations: a draw is below 9.5, and the absolute row sums of
        C^{-1} are below 2.2, whichever rounds are void.

        Raises:
            InputError: the noise is so large that its rounding could not be hidden.
        """
        if self.bands == 1:
            return zero
        rows, moved = math.sqrt(self.bands), zero.norm_bound * self.norm
        off = rows * (self.bands + 2) * 2.0**-52 * math.fsum(self.coefficients)
        # The grid of the result is at most twice that of `moved`, because the result is at most twice as large.
        on_grid = 2 * rows * mechanisms.grid_of(moved) * math.sqrt(zero.size)
        hidden = 1 - noise_multiplier * off * _LARGEST_NOISE * math.sqrt(zero.size)
        whole = moved + on_grid + off * MAX_UNITS * zero.norm_bound
        if not whole <= 2 * moved * hidden:
            raise InputError(
                f"noise_multiplier {noise_multiplier:g} with {self.bands} bands is too large for float64; use fewer bands."
            )
        return Bounded(zero.value, whole / hidden)


@final
class CorrelatedRun(Aggregation):
    """The rounds of one run with `CorrelatedNoise`, made by its `begin`. It holds private numbers."""

    takes_total = True
    hides_cohort = CorrelatedNoise.hides_cohort
    trust = CorrelatedNoise.trust

    def __init__(self, kind: CorrelatedNoise) -> None:
        self._kind = kind
        self._terms: tuple[float, float, str] | None = None
        self._round = 0  # of the next release
        self._last = (-1, -1)  # the round of the last release, and its draw
        self._noises: list[tuple[int, Tensor]] = []  # x_s - r_s, flat, float64, with its round

    def check_clients(self, count: int) -> None:
        """Serve any number of clients."""

    def check_plan(self, plan: Plan) -> None:
        """Refuse a plan that does not fit, as `CorrelatedNoise` does."""
        self._kind.check_plan(plan)

    def bound(self, zero: Bounded, noise_multiplier: float) -> Bounded:
        """Return a zero with the bound that each release is noised for."""
        return self._kind.bound(zero, noise_multiplier)

    def summed(self, parts: Mapping[str, Bounded], *, zero: Bounded, noise: Noise) -> dict[str, Bounded]:
        """Return what the next `combine` of the same arguments adds its noise to; private, for the self-check.

        Raises:
            PlanError: the clip norm, the noise or the relation is not that of the run.
            SfumatoError: a part's bound is larger than the round's, or the model has another size.
        """
        total = _flat(self._total(parts, zero))
        self._add_earlier(total, self._round_of(noise))
        return {"all": _shaped(total, self._bound_for(zero, noise))}

    def combine(self, parts: Mapping[str, Bounded], *, zero: Bounded, asked: int, noise: Noise) -> dict[str, Released]:
        """Return one released sum under the name "all".

        Its `noise_std` is that of the noise which this round adds, as accounted. Beside the sum of the parts it also carries
        earlier noise, taken back in part.

        Raises:
            PlanError: the clip norm, the noise or the relation is not that of the run.
            SfumatoError: a part's bound is larger than the round's, or the model has another size.
            LedgerError: another process took draws of the same run meanwhile.
        """
        own = _flat(self._total(parts, zero))
        bound, current, draw = self._bound_for(zero, noise), self._round_of(noise), noise.charge.position
        total = own.clone()
        self._add_earlier(total, current)
        released = mechanisms.gaussian(
            _shaped(total, bound), noise.multiplier, relation=noise.relation, charge=noise.charge, source=noise.source
        )
        if released.draw != draw:
            raise LedgerError(
                f"Another process is going on with run {noise.charge.run}; what this one drew was discarded."
            )
        self._terms = _terms(zero, noise)
        self._round, self._last = current + 1, (current, draw)
        if self._kind.bands > 1:
            self._noises.append((current, own.sub_(_flat(released))))
        self._noises = [(done, kept) for done, kept in self._noises if self._round - done < self._kind.bands]
        return {"all": released}

    def void(self, rounds: int = 1) -> None:
        """Take note that so many rounds release nothing: void, or lost in a crash. Their clients have taken part."""
        self._round += _checks.count("rounds", rounds)

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint must keep; private, because the releases less this noise are the sums."""
        return {
            "terms": self._terms,
            "round": self._round,
            "last": self._last,
            "noises": [(done, kept.clone()) for done, kept in self._noises],
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Take back what `state` returned."""
        self._terms = None if state["terms"] is None else tuple(state["terms"])
        self._round, self._last = state["round"], tuple(state["last"])
        self._noises = [(done, kept.clone()) for done, kept in state["noises"]]

    def _total(self, parts: Mapping[str, Bounded], zero: Bounded) -> Bounded:
        total = next(iter(parts.values())) if len(parts) == 1 else functools.reduce(Bounded.plus, parts.values(), zero)
        if not total.norm_bound <= zero.norm_bound:
            raise SfumatoError(
                f"A client's sum is bounded by {total.norm_bound:g}, the round by {zero.norm_bound:g}; clip to the latter."
            )
        return total

    def _bound_for(self, zero: Bounded, noise: Noise) -> Bounded:
        terms = _terms(zero, noise)
        if self._terms not in (None, terms):
            raise PlanError(
                "Correlated noise needs one clip norm, one noise multiplier and one relation for the whole run, not "
                f"{terms} after {self._terms}; leave schedules, policies and adaptive clip norms out of the plan."
            )
        return self._kind.bound(zero, noise.multiplier)

    def _round_of(self, noise: Noise) -> int:
        # Draws that are gone were rounds, whether or not anybody said so: counting them as none would let a client's two
        # participations reach the same row.
        last_round, last_draw = self._last
        return max(self._round, last_round + noise.charge.position - last_draw)

    def _add_earlier(self, total: Tensor, current: int) -> None:
        for done, kept in self._noises:
            if len(kept) != len(total):
                raise SfumatoError(f"The sums of this round have {len(total)} numbers, those before {len(kept)}.")
            if current - done < self._kind.bands:
                total.add_(kept.to(total.device), alpha=self._kind.coefficients[current - done])

    def __repr__(self) -> str:
        return repr(self._kind)

    def __reduce__(self) -> NoReturn:
        raise TypeError(
            "A run with correlated noise is private and cannot be pickled; keep its state() in a checkpoint."
        )


@functools.lru_cache(maxsize=16)
def _square_root(bands: int) -> tuple[float, ...]:
    coefficients = [1.0]
    for i in range(1, bands):
        coefficients.append(coefficients[-1] * (2 * i - 1) / (2 * i))
    return tuple(coefficients)


def _terms(zero: Bounded, noise: Noise) -> tuple[float, float, str]:
    return zero.norm_bound, noise.multiplier, str(noise.relation)


def _flat(sums: Bounded | Released) -> Tensor:
    """Return all numbers as one vector of its own, float64."""
    return torch.cat([tensor.detach().reshape(-1).to(torch.float64) for tensor in sums.value.values()])


def _shaped(flat: Tensor, like: Bounded) -> Bounded:
    """Return a vector by the names and in the shapes of `like`, with its bound."""
    pieces = flat.split([tensor.numel() for tensor in like.value.values()])
    named = zip(like.value.items(), pieces, strict=True)
    return Bounded({name: piece.view(tensor.shape) for (name, tensor), piece in named}, like.norm_bound)
