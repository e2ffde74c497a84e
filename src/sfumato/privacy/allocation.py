"""What random allocation costs: each unit takes part in exactly k of the t steps of an epoch, in steps of its own choice.

**One of m steps.** Let Q be m Gaussian sums without the unit and P the same with the unit in one of them, chosen uniformly.
Their likelihood ratio at the outcomes x is the mean S = (L_1 + ... + L_m) / m of m independent lognormal numbers
L_i = exp((x_i - 1/2) / z**2), each of mean 1 under Q, and the two hockey-stick divergences at a ratio g are

    E_Q max(0, S - g)      (the unit removed)          E_Q max(0, 1 - g S)      (the unit added).

Both are convex in S. So both only grow when each L_i is moved at random to one of its neighbours on an equally spaced grid in
such a way that its mean stays: the error is of second order in the spacing, and on the safe side. A sum of m such numbers is
an m-fold convolution. What does not fit on a grid goes to the safe side too: an infinite loss for the first, a smaller L_i
for the second.

**k of t steps.** A uniformly random set of k steps is drawn by cutting the t steps at random into k blocks of t // k or
t // k + 1 steps and choosing one step from each: its law does not change when the steps are reordered, and only the uniform
one is like that. Whoever is told the blocks sees k independent choices of one step, so by joint convexity k of t costs at
most their composition.

Adaptive steps, gradients of many numbers, clipped parts of a smaller norm and the other units change nothing: given all of
them, every released sum is made out of one of the scalar sums above by rotation, scaling and adding noise.

Sources: Feldman and Shenfeld, "Privacy amplification by random allocation" (arXiv 2502.08202), for the sampling and the
blocks, and "Efficient privacy loss accounting for subsampling and random allocation" (arXiv 2602.17284), for privacy losses
of S. The package `PLD_accounting` of the latter, which rounds on other grids, is the reference that the tests compare with.
"""

from __future__ import annotations

import functools
import math
from typing import Any, TypeAlias

import numpy as np
from dp_accounting.pld import pld_pmf
from dp_accounting.pld import privacy_loss_distribution as plds
from numpy.typing import NDArray
from scipy import fft, special

from sfumato import _checks
from sfumato.privacy import events

_Array: TypeAlias = NDArray[np.float64]
Pld: TypeAlias = plds.PrivacyLossDistribution

_CELLS = 2**20  # of the grid of one factor, at most
_LONGEST = 2**22  # grid of a sum, about
_LARGEST_BLOCK = 2**16  # steps; of more steps only so many are counted on, which costs no less: see `_one_of`
_FINE = 0.02  # spacing, in standard deviations of a factor: adds 1e-4 of its variance
_COARSE = 1.0  # with a wider spacing little is gained, and the Gaussian sum without choice is the bound
_REACH_REMOVE = 8.0  # standard deviations of log L under P that the grids reach up to; 6e-16 is beyond
_REACH_ADD = 4.5
_LEFT_OUT = 1e-15  # probability that a sum passes the end of its grid
_ZERO = 1e-13  # largest probability of an infinite loss that rounding to 0 may make


def pld_of_random_allocation(event: events.RandomAllocationDpEvent, interval: float = 1e-4) -> Pld:
    """Return a privacy loss distribution that dominates `event` under add-or-remove-one.

    Args:
        event: What was done.
        interval: Spacing of the privacy losses.

    **Guarantee**: an upper bound for every ratio, in both directions, by the proof above; numbers are float64, whose errors
    (about 1e-13 of probability an epoch) are rectified, not proven. Under replace-one nothing is claimed.

    **Edge cases**

    | event | answer |
    | --- | --- |
    | selected equals steps | the Gaussian sums without sampling |
    | t is no multiple of k | blocks of two lengths |
    | noise too small for the grid (multiplier below about 0.6, 0.75 in blocks of two steps) | as if the steps were known |
    | blocks of more than 65536 steps | as blocks of 65536 |

    Raises:
        InputError: the interval is not above 0.
    """
    _checks.positive("interval", interval)
    length, longer = divmod(event.steps, event.selected)
    total = _one_of(event.noise_multiplier, length, interval).self_compose((event.selected - longer) * event.epochs)
    if longer:
        rest = _one_of(event.noise_multiplier, length + 1, interval).self_compose(longer * event.epochs)
        total = total.compose(rest)
    return total


def _one_of(noise: float, steps: int, interval: float) -> Pld:
    """Return the distribution of one sum among `steps`.

    The mean of more independent numbers is smaller in the convex order, so a longer block never costs more than a shorter.
    """
    return _block(noise, min(steps, _LARGEST_BLOCK), interval)


@functools.lru_cache(maxsize=256)
def _block(noise: float, steps: int, interval: float) -> Pld:
    known = plds.from_gaussian_mechanism(noise, value_discretization_interval=interval)
    if steps == 1:
        return known
    removed = _removed(noise, steps, interval) or known._pmf_remove
    added = _added(noise, steps, interval) or known._pmf_remove  # the Gaussian is symmetric
    return plds.PrivacyLossDistribution(removed, added)


def _removed(noise: float, steps: int, interval: float) -> Any:
    deviation = math.sqrt(math.expm1(min(noise**-2, 700.0)))
    log_top = noise**-2 / 2 + _REACH_REMOVE / noise
    if log_top > 600 or math.exp(log_top) / _CELLS > _COARSE * deviation:
        return None
    top = math.exp(log_top)
    grid, factor = _fitted(noise, steps, top, _FINE * deviation, upward=True)
    size = len(factor)
    # Under P one factor is size-biased. It has a grid of its own in the convolution, so that no probability is multiplied by S.
    biased = factor * (grid * np.arange(size))
    end = _end(factor, biased, steps, grid)
    length = fft.next_fast_len(max(size, math.ceil(end / grid) + 1), real=True)
    transformed = fft.rfft(biased, length) * fft.rfft(factor, length) ** (steps - 1)
    masses = fft.irfft(transformed, length)
    beyond = special.ndtr(-_REACH_REMOVE) + (steps - 1) * special.ndtr(-(_REACH_REMOVE + 1 / noise)) + _LEFT_OUT
    losses = np.log(np.arange(1, length) * (grid / steps))
    return _on_losses(losses, masses[1:], beyond, interval)


def _added(noise: float, steps: int, interval: float) -> Any:
    deviation = math.sqrt(math.expm1(min(noise**-2, 700.0)))
    log_top = noise**-2 / 2 + _REACH_ADD / noise
    if log_top > 600 or math.exp(log_top) / _CELLS > _COARSE * deviation:
        return None
    top = math.exp(log_top)
    # Fine enough that hardly ever all factors are rounded to 0, as far as the number of cells allows.
    least = math.exp(-(noise**-2) / 2 - max(0.0, 1 - float(special.ndtri(_ZERO ** (1 / steps)))) / noise)
    grid, factor = _fitted(noise, steps, top, min(_FINE * deviation, least), upward=False)
    if steps * math.log(factor[0] + 1e-300) > math.log(_ZERO):
        return None
    end = _end(factor, factor, steps, grid)
    length = fft.next_fast_len(max(len(factor), math.ceil(end / grid) + 1), real=True)
    # A sum beyond the end comes back at the beginning: a smaller S, on the safe side.
    masses = fft.irfft(fft.rfft(factor, length) ** steps, length)
    losses = -np.log(np.arange(length - 1, 0, -1) * (grid / steps))
    return _on_losses(losses, masses[:0:-1], max(0.0, float(masses[0])), interval)


def _fitted(noise: float, steps: int, top: float, spacing: float, *, upward: bool) -> tuple[float, _Array]:
    """Return spacing and probabilities of a factor on a grid up to `top`, no longer in sum than `_LONGEST`, about."""
    spacing = max(spacing, top / _CELLS, steps / _LONGEST)
    factor = _factor(noise, math.ceil(top / spacing), spacing, upward=upward)
    end = _end(factor, factor * np.arange(len(factor)), steps, spacing)
    if end > 2 * spacing * _LONGEST:
        spacing = end / _LONGEST
        factor = _factor(noise, math.ceil(top / spacing), spacing, upward=upward)
    return spacing, factor


def _factor(noise: float, cells: int, spacing: float, *, upward: bool) -> _Array:
    """Return the law of L under Q, each value moved to an end of its cell with its mean kept.

    Upward, rounding errors may raise the mean and values beyond the grid are left out; else they may lower it and such values
    are moved to its end.
    """
    edges = spacing * np.arange(cells + 1)
    with np.errstate(divide="ignore"):
        logs = np.log(edges)
    mass = _between(noise * logs + 0.5 / noise)
    moment = _between(noise * logs - 0.5 / noise)  # the integral of L is the law of L under P
    with np.errstate(divide="ignore", invalid="ignore"):
        share = (moment / mass - edges[:-1]) / spacing
    slack = 8 * np.finfo(np.float64).eps * np.arange(1, cells + 1, dtype=np.float64) ** 2
    share = np.nan_to_num(share + slack if upward else share - slack, nan=float(upward), posinf=1.0, neginf=0.0)
    share = np.clip(share, 0.0, 1.0)
    law = np.zeros(cells + 1)
    law[:-1] = mass * (1 - share)
    law[1:] += mass * share
    if not upward:
        law[-1] += special.ndtr(-(noise * logs[-1] + 0.5 / noise))
    return law


def _between(places: _Array) -> _Array:
    """Return the standard normal probability between neighbours, from the tail that is nearer."""
    low, high = places[:-1], places[1:]
    right = low > 0
    ends = special.ndtr(np.where(right, -low, high)), special.ndtr(np.where(right, -high, low))
    return np.asarray(ends[0] - ends[1], dtype=np.float64)


def _end(factor: _Array, first: _Array, steps: int, spacing: float) -> float:
    """Return what a sum of one number of law `first` and others of law `factor` passes with a chance of `_LEFT_OUT` at most.

    Chernoff's bound, on blocks of cells that are moved to their upper ends.
    """
    width = max(1, len(factor) // 4096)
    starts = np.arange(0, len(factor), width)
    places = spacing * (np.minimum(starts + width, len(factor)) - 1)
    one, other = np.add.reduceat(first, starts), np.add.reduceat(factor, starts)
    tilts = np.geomspace(1e-3 / (places[-1] + steps), 1e3 / places[-1] * math.sqrt(steps) + 10, 96)[:, None]
    ends = (
        special.logsumexp(tilts * places, b=one / one.sum(), axis=1)
        + (steps - 1) * special.logsumexp(tilts * places, b=other / other.sum(), axis=1)
        - math.log(_LEFT_OUT)
    ) / tilts[:, 0]
    return float(min(ends.min(), steps * places[-1]))


def _on_losses(losses: _Array, masses: _Array, infinite: float, interval: float) -> Any:
    """Return rising losses on the grid of `dp_accounting`, each moved to its neighbours with both measures kept."""
    infinite += float(-masses[masses < 0].sum())
    masses = np.maximum(masses, 0.0)
    # Tails that do not count: the lower is moved up to where it ends, the upper becomes infinite.
    low = int(np.searchsorted(np.cumsum(masses), _LEFT_OUT))
    from_top = np.cumsum(masses[::-1])
    high = len(masses) - int(np.searchsorted(from_top, _LEFT_OUT))
    infinite += float(masses[high:].sum())
    masses = np.concatenate([[masses[: low + 1].sum()], masses[low + 1 : high]])
    losses = losses[low:high]
    cells = np.floor(losses / interval)
    share = np.clip(np.expm1(-(losses - cells * interval)) / math.expm1(-interval), 0.0, 1.0)
    index = (cells - cells[0]).astype(np.int64)
    size = int(index[-1]) + 2
    spread = np.bincount(index, masses * (1 - share), size) + np.bincount(index + 1, masses * share, size)
    return pld_pmf.DensePLDPmf(interval, int(cells[0]), spread, infinite, True)
