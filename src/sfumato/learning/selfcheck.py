"""The first step checks itself: one unit's part is bounded, the release is noised, every parameter is covered.

Training that only looks private is the failure nobody notices, so it is looked for once in every run, on the real first
step. Only pass or fail leaves; a sound run fails with a probability below 1e-9, whatever its data.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

import torch

from sfumato.errors import SelfCheckError
from sfumato.privacy.bounded import Bounded, Released


def check_first_step(
    names: Iterable[str],
    parts: Mapping[str, Bounded],
    probe: Bounded,
    released: Mapping[str, Released],
    zero: Bounded,
) -> None:
    """Stop a run whose first step is not bounded, not noised or not complete.

    Args:
        names: The trainable parameters.
        parts: The sums that were released, by client.
        probe: One unit's part alone.
        released: What was released: one sum of all parts under "all", or one for each part by its name.
        zero: The sum of no units.

    Raises:
        SelfCheckError: says which of the three failed.
    """
    expected = list(names)
    for name in expected:
        values = [probe.value, *(part.value for part in parts.values()), *(one.value for one in released.values())]
        if any(name not in value for value in values):
            raise SelfCheckError(f'The first step does not cover the trainable parameter "{name}"; training stopped.')
    norm = math.sqrt(sum(float(tensor.square().sum()) for tensor in probe.value.values()))
    if not norm <= probe.norm_bound:
        raise SelfCheckError(
            f"One unit's part has norm {norm:.6g}, above the clip norm {probe.norm_bound:g}; training stopped."
        )
    for key, release in released.items():
        sources = list(parts.values()) if key == "all" else [parts[key]]
        total = zero
        for part in sources:
            total = total.plus(part)
        _check_noise(total, release)


def _check_noise(total: Bounded, release: Released) -> None:
    energy, size = 0.0, 0
    for name, tensor in total.value.items():
        noise = (release.value[name] - tensor) / release.noise_std
        if noise.numel() >= 2 and not bool((noise.abs() > 2.0**-20).any()):
            raise SelfCheckError(f'The first step released "{name}" without noise; training stopped.')
        energy += float(torch.nan_to_num(noise, nan=math.inf).square().sum())
        size += noise.numel()
    # The energy is chi-square with `size` degrees of freedom; the bounds hold but for one run in 1e9 (Laurent and
    # Massart 2000, lemma 1, with x = 21).
    above = size + 2 * math.sqrt(size * 21) + 42
    below = size - 2 * math.sqrt(size * 21)
    if not below <= energy <= above or energy == 0:
        raise SelfCheckError(
            f"The noise of the first step has {energy / size:.3g} times the variance that is accounted; training stopped."
        )
