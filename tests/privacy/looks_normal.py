"""A test of noise with power: accepts the right scale and, by its tests, rejects near misses."""

from __future__ import annotations

import math

import torch
from torch import Tensor

_FALSE_ALARM = 1e-7


def looks_like_normal(samples: Tensor, std: float) -> bool:
    """Tell whether the samples could be independent draws of N(0, std**2): Kolmogorov-Smirnov, mean and variance.

    A true Gaussian fails with a chance of about one in a million.
    """
    ordered = samples.flatten().to(torch.float64).sort().values / std
    n = ordered.numel()
    ideal = torch.special.ndtr(ordered)
    steps = torch.arange(n + 1, dtype=torch.float64) / n
    distance = max(float((steps[1:] - ideal).max()), float((ideal - steps[:-1]).max()))
    close = distance < math.sqrt(math.log(2 / _FALSE_ALARM) / (2 * n))
    centred = abs(float(ordered.mean())) < 5.4 / math.sqrt(n)
    scaled = abs(float(ordered.square().mean()) - 1) < 5.6 * math.sqrt(2 / n)
    return close and centred and scaled
