"""What is counted to judge a classifier, and what the counts say once they carry noise.

Every record adds to five small tables, and every metric is computed from their sums.

| table | a record adds | gives |
| --- | --- | --- |
| tally (2) | 1 to wrong or right | number of records, accuracy |
| confusion (classes, classes) | 1 to (its class, the predicted class) | confusion matrix |
| bins (bins, 2) | 1 to (the bin of its confidence, wrong or right) | calibration |
| confidences (bins, 2) | in its bin, votes for the lower and the upper end | mean confidence of a bin |
| losses (3) | votes for none, half and all of the loss bound | mean loss and its spread |

One joint table over (class, predicted class, bin) would also do, but accuracy would then carry the noise of all its cells.
A record has 2**20 votes in each of the last two, so that rounding to whole votes is far below any noise. Where clients are
protected a client adds the mean of what its records add, in votes of which it has 2**20 in every table.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any, NamedTuple, final

import torch
from torch import Tensor

from sfumato.privacy.budget import Unit

VOTES = 2**20
NORM_BOUNDS: Mapping[str, int] = {"tally": 1, "confusion": 1, "bins": 1, "confidences": VOTES, "losses": VOTES}
"""The l2 norm of what one record adds to each table: exact, because it adds whole numbers of at least 0 with this sum."""

UNIT_BOUNDS: Mapping[Unit, Mapping[str, int]] = {
    Unit.RECORD: NORM_BOUNDS,
    Unit.CLIENT: dict.fromkeys(NORM_BOUNDS, VOTES),
}
"""The l2 norm of what one unit adds to each table, at most."""

# A confidence lies within its bin whatever the noise, so its table needs least; the noise of a mean loss grows with the bound.
SHARES: Mapping[str, float] = {"tally": 0.25, "confusion": 0.15, "bins": 0.2, "confidences": 0.03, "losses": 0.37}
"""How the accuracy of a release is split over the tables."""


@final
@dataclass(frozen=True)
class Estimate:
    """A number and the ends of its confidence interval."""

    value: float
    low: float
    high: float


@final
@dataclass(frozen=True)
class ReliabilityBin:
    """The records whose confidence, the largest probability that the model gave, lies in [lower, upper)."""

    lower: float
    upper: float
    count: Estimate
    confidence: Estimate
    accuracy: Estimate


@final
@dataclass(frozen=True)
class Reliability:
    """Whether a confidence of p is right in a share p of the cases (Guo et al. 2017).

    Attributes:
        bins: Of equal width within [0, 1]; those that no confidence can reach (below one over the classes) are left out.
        error: The expected calibration error: the mean over all records of |mean confidence - accuracy| of their bin. Noise
            alone would raise it; what the noise adds on average to the squares is taken off.
    """

    bins: tuple[ReliabilityBin, ...]
    error: Estimate


@final
@dataclass(frozen=True)
class Layout:
    """The public shape of the tables, and what records add to them.

    Attributes:
        classes: Number of classes, at least 2.
        bins: Bins of confidence of equal width within [0, 1]; those below one over the classes cannot be reached, and have
            no row in the tables.
        loss_bound: Where a record's loss is cut off.
    """

    classes: int
    bins: int
    loss_bound: float

    @property
    def lowest(self) -> int:
        """The first bin that a confidence can reach: the largest of k probabilities is at least 1/k."""
        return self.bins // self.classes

    def edges(self, place: int) -> tuple[float, float]:
        """Return the ends of the bin in row `place` of the tables."""
        return (self.lowest + place) / self.bins, (self.lowest + place + 1) / self.bins

    def empty(self) -> dict[str, Tensor]:
        """Return the tables of no record."""
        return self.tables(torch.zeros(0, self.classes, dtype=torch.float64), torch.zeros(0, dtype=torch.int64))

    def tables(self, scores: Tensor, targets: Tensor) -> dict[str, Tensor]:
        """Return the tables (int64) of records with scores (n, classes), float64 and finite, and targets (n,)."""
        logs = scores.log_softmax(1)
        best, predicted = logs.max(1)
        right = (predicted == targets).long()
        rows = self.bins - self.lowest
        scaled = best.exp() * self.bins
        # Rounding may put the confidence of a guess a hair below 1/k, or one of 1 on the upper edge.
        place = scaled.floor().long().clamp(self.lowest, self.bins - 1)
        upper = ((scaled - place).clamp(0, 1) * VOTES).round().long()
        place -= self.lowest
        part = -logs.gather(1, targets[:, None])[:, 0].clamp(-self.loss_bound, 0) / self.loss_bound
        # The Bernstein polynomials of degree 2: they add up to 1 and hold the mean and the mean square.
        all_of_it = (part.square() * VOTES).round().long()
        half = torch.minimum((2 * part * (1 - part) * VOTES).round().long(), VOTES - all_of_it)
        votes = torch.stack([VOTES - upper, upper], 1)
        return {
            "tally": torch.bincount(right, minlength=2),
            "confusion": torch.bincount(targets * self.classes + predicted, minlength=self.classes**2).view(self.classes, -1),
            "bins": torch.bincount(place * 2 + right, minlength=2 * rows).view(rows, 2),
            "confidences": torch.zeros(rows, 2, dtype=torch.int64).index_add_(0, place, votes),
            "losses": torch.stack([VOTES - all_of_it - half, half, all_of_it], 1).sum(0),
        }  # fmt: skip


class Measures(NamedTuple):
    """What `measure` returns: what `Evaluation` describes, in its order."""

    number: Estimate
    accuracy: Estimate
    confusion: tuple[tuple[Estimate, ...], ...]
    calibration: Reliability
    loss: Estimate


def measure(
    layout: Layout, tables: Mapping[str, Tensor], stds: Mapping[str, float], level: float, unit: Unit = Unit.RECORD
) -> Measures:
    """Return all metrics, with intervals that are meant to hold with `level`.

    The chance in the intervals is that of drawing units. A client's part is a mean of its records' parts, so the variance of
    a client's part is at most that of a record drawn from a client drawn at random (Jensen), which is what the intervals
    reckon with: for clients they are cautious, the more so the more alike clients are.

    Args:
        layout: The shape of the tables.
        tables: Sums over records or clients, with or without noise.
        stds: Of the noise on every cell of each table; 0 for none.
        level: In (0, 1).
        unit: What the sums are over.
    """
    quantile = NormalDist().inv_cdf((1 + level) / 2)
    bounds = UNIT_BOUNDS[unit]
    # In units: a table of votes comes down to one a unit.
    cells = {name: (table.double() / bounds[name]).tolist() for name, table in tables.items()}
    std = {name: stds[name] / bounds[name] for name in tables}
    bins = []
    for place, (right_or_not, votes) in enumerate(zip(cells["bins"], cells["confidences"], strict=True)):
        lower, upper = layout.edges(place)
        confidence = _scaled(_ratio(votes, (0, 1), std["confidences"], quantile), lower, upper)
        accuracy = _ratio(right_or_not, (0, 1), std["bins"], quantile)
        bins.append(ReliabilityBin(lower, upper, _count(right_or_not, std["bins"], quantile), confidence, accuracy))
    # A spread seen in a few units may be far too small, and federations of a few clients are common: as Wilson does for shares,
    # a federation's is taken together with that of quantile**2 more clients which vary as much as can be.
    trust = 1.0 if unit is Unit.RECORD else _trust(sum(cells["losses"]), quantile)
    loss = _ratio(cells["losses"], (0, 0.5, 1), std["losses"], quantile, _spread(*cells["losses"]), trust)
    return Measures(
        number=_count(cells["tally"], std["tally"], quantile),
        accuracy=_ratio(cells["tally"], (0, 1), std["tally"], quantile),
        confusion=tuple(tuple(_count([n], std["confusion"], quantile) for n in row) for row in cells["confusion"]),
        calibration=Reliability(tuple(bins), _calibration_error(layout, cells, std, quantile)),
        loss=_scaled(loss, 0.0, layout.loss_bound),
    )


def _spread(none: float, half: float, whole: float) -> float:
    """Return the variance of a record's loss over the bound: mean square minus squared mean, no more than can be."""
    total = none + half + whole
    if total <= 0:
        return 0.25
    mean = min(max((half / 2 + whole) / total, 0.0), 1.0)
    return min(max(whole / total - mean**2, 0.0), mean * (1 - mean))


def _trust(units: float, quantile: float) -> float:
    return max(units, 0.0) / (max(units, 0.0) + quantile**2)


def _count(cells: Sequence[float], std: float, quantile: float) -> Estimate:
    """Return the number of units in `cells` together, with an interval for the noise; none is below 0."""
    total, reach = sum(cells), quantile * std * math.sqrt(len(cells))
    return Estimate(*(max(number, 0.0) for number in (total, total - reach, total + reach)))


def _ratio(
    cells: Sequence[float],
    weights: Sequence[float],
    std: float,
    quantile: float,
    spread: float = 0.0,
    trust: float = 0.0,
) -> Estimate:
    """Return the mean weight, in [0, 1], of the units in noisy `cells`.

    The interval is all m for which |sum of (weight - m) * cell| is within `quantile` standard deviations of 0, counting the
    noise and the chance of drawing such records: Fieller (1954) for the noise, Wilson (1927) for a share without noise.

    Args:
        cells: Noisy numbers of units.
        weights: One a cell, in [0, 1].
        std: Of the noise of every cell.
        quantile: Of the normal distribution.
        spread: Variance of a unit's weight, as far as it can be trusted.
        trust: The share of `spread` in the variance, in [0, 1]; the rest is m (1 - m): that of a share, the largest there is.
    """
    total = sum(cells)
    top = sum(weight * cell for weight, cell in zip(weights, cells, strict=True))
    noise, units = std**2, max(total, 0.0)
    constant, linear, square = trust * spread, 1 - trust, trust - 1
    # In m: a m**2 + b m + c <= 0.
    a = total**2 - quantile**2 * (noise * len(cells) + units * square)
    b = -2 * top * total + quantile**2 * (2 * noise * sum(weights) - units * linear)
    c = top**2 - quantile**2 * (noise * sum(weight**2 for weight in weights) + units * constant)
    low, high = 0.0, 1.0
    if a > 0:  # else the noise leaves everything possible
        middle, reach = -b / (2 * a), math.sqrt(max(b**2 - 4 * a * c, 0.0)) / (2 * a)
        low, high = (min(max(end, 0.0), 1.0) for end in (middle - reach, middle + reach))
    value = top / total if total > 0 else 0.5
    return Estimate(min(max(value, low), high), low, high)


def _calibration_error(layout: Layout, cells: Mapping[str, Any], std: Mapping[str, float], quantile: float) -> Estimate:
    """Return the expected calibration error.

    With gaps g + e, of which e is error of known spread v: |g| is at most |g + e| plus the error in the direction of g, whose
    sum over the bins has the variance of all v, which gives the upper end; and at least |g + e| - |e|, which gives the lower.
    """
    plain, errors, noises = [], [], []
    for place, ((wrong, right), (_, upper_votes)) in enumerate(zip(cells["bins"], cells["confidences"], strict=True)):
        lower, upper = layout.edges(place)
        width, middle = upper - lower, (lower + upper) / 2
        plain.append(abs(lower * (wrong + right) + width * upper_votes - right))
        noises.append(std["bins"] ** 2 * ((1 - lower) ** 2 + lower**2) + (width * std["confidences"]) ** 2)
        errors.append(noises[-1] + max(right, 0.0) * (1 - middle) ** 2 + max(wrong, 0.0) * middle**2)
    total, doubt = sum(cells["tally"]), 2 * std["tally"] ** 2
    if total <= 2 * quantile * math.sqrt(doubt):
        return Estimate(0.5, 0.0, 1.0)
    raw = sum(plain) / total
    shared = raw**2 * doubt  # of the number of records
    fair = sum(math.sqrt(max(gap**2 - noise, 0.0)) for gap, noise in zip(plain, noises, strict=True)) / total
    above = quantile * math.sqrt(sum(errors) + shared) / total
    most = sum(math.sqrt(2 * error / math.pi) for error in errors)
    below = (most + quantile * math.sqrt((1 - 2 / math.pi) * sum(errors) + shared)) / total
    low, high = min(max(raw - below, 0.0), 1.0), min(raw + above, 1.0)
    return Estimate(min(max(fair, low), high), low, high)


def _scaled(share: Estimate, low: float, high: float) -> Estimate:
    return Estimate(*(low + (high - low) * part for part in (share.value, share.low, share.high)))
