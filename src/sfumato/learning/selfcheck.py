"""The first step checks itself: one unit's part is bounded, the release is noised, every parameter is covered.

Training that only looks private is the failure nobody notices, so it is looked for once in every run, on the real first
step. Only pass or fail leaves; a sound run fails with a probability below 1e-9, whatever its data.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Mapping

import torch

from sfumato.errors import SelfCheckError
from sfumato.privacy.bounded import Bounded, Released

_PIECE = 2**16  # coordinates at a time, so that the check takes no memory to speak of


def check_bounded(names: Iterable[str], parts: Mapping[str, Bounded], probe: Bounded | None) -> None:
    """Stop a run in which one unit's part is too large or a parameter is missing; costs no budget.

    Args:
        names: The trainable parameters.
        parts: The sums that are to be released, by client.
        probe: One unit's part alone, made by the same code; None where there is no unit.

    Raises:
        SelfCheckError: says which of the two failed.
    """
    for name in names:
        if any(name not in part.value for part in [*([] if probe is None else [probe]), *parts.values()]):
            raise SelfCheckError(f'The first step does not cover the trainable parameter "{name}"; training stopped.')
    if probe is None:
        return
    norm = math.sqrt(sum(float(tensor.square().sum()) for tensor in probe.value.values()))
    if not norm <= probe.norm_bound:
        raise SelfCheckError(f"One unit's part is above the clip norm {probe.norm_bound:g}; training stopped.")


def check_scale(released: Mapping[str, Released], parts: Mapping[str, Bounded], std: float) -> None:
    """Stop a run in which a release says that it has less noise than the plan pays for, or comes from nowhere.

    Args:
        released: What was released.
        parts: The sums it was made from.
        std: What the plan asks of every release.

    Raises:
        SelfCheckError: says which release.
    """
    if set(released) != {"all"} and not set(released) <= set(parts):
        raise SelfCheckError("A release does not belong to the clients that answered; training stopped.")
    for name, release in released.items():
        if not release.noise_std >= std * (1 - 1e-9):
            raise SelfCheckError(
                f'The release "{name}" has noise of {release.noise_std:.6g}, the plan pays for {std:.6g}; training stopped.'
            )


def check_noised(
    names: Iterable[str], parts: Mapping[str, Bounded], released: Mapping[str, Released], zero: Bounded
) -> None:
    """Stop a run whose first release is not the sum plus the accounted noise.

    Args:
        names: The trainable parameters.
        parts: The sums that were released, by client.
        released: What was released: one sum of all parts under "all", or one for each part by its name.
        zero: The sum of no units.

    Raises:
        SelfCheckError: a parameter is missing or without noise, or the noise has another variance.
    """
    for name in names:
        if any(name not in release.value for release in released.values()):
            raise SelfCheckError(f'The first release does not cover the parameter "{name}"; training stopped.')
    for key, release in released.items():
        summed = list(parts.values()) if key == "all" else [parts[key]]
        # A single sum was released as it is, so it needs no copy in the float64 of `zero`.
        total = summed[0] if len(summed) == 1 else functools.reduce(Bounded.plus, summed, zero)
        _check_noise(total, release)


def _check_noise(total: Bounded, release: Released) -> None:
    energy, size = 0.0, 0
    for name, tensor in total.value.items():
        noised = False
        pieces = (release.value[name].flatten().split(_PIECE), tensor.flatten().split(_PIECE))
        for after, before in zip(*pieces, strict=True):
            noise = (after.double() - before.double()) / release.noise_std
            noised = noised or bool((noise.abs() > 2.0**-20).any())
            energy += float(torch.nan_to_num(noise, nan=math.inf).square().sum())
        if tensor.numel() >= 2 and not noised:
            raise SelfCheckError(f'The first step released "{name}" without noise; training stopped.')
        size += tensor.numel()
    # The energy is chi-square with `size` degrees of freedom; the bounds hold but for one run in 1e9 (Laurent and
    # Massart 2000, lemma 1, with x = 21).
    above = size + 2 * math.sqrt(size * 21) + 42
    below = size - 2 * math.sqrt(size * 21)
    if not below <= energy <= above or energy == 0:
        raise SelfCheckError(
            f"The noise of the first step has {energy / size:.3g} times the variance that is accounted; training stopped."
        )
